"""Driver side of a split virtqueue (virtio 1.2 §2.7), and `open_driver` for either layout."""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING

from devices.chain import DESC, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_RING_PACKED
from devices.guestmem import fence
from tools.viodriver.errors import NoRoomError
from tools.viodriver.packed import PackedDriver
from tools.viodriver.queue import DriverQueue, Request, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.guestmem import GuestMemory


def open_driver(
    memory: GuestMemory,
    size: int,
    base_gpa: int,
    features: int = 0,
    *,
    align: int = 64,
    arena_bytes: int = 1 << 19,
) -> SplitDriver | PackedDriver:
    """Return the driver side of a new queue, of the layout that `features` asks for."""
    layout = PackedDriver if features & F_RING_PACKED else SplitDriver
    return layout(memory, size, base_gpa, features, align=align, arena_bytes=arena_bytes)


class SplitDriver(DriverQueue):
    """Driver side of a split virtqueue (virtio 1.2 §2.7)."""

    layout = "split"

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        base_gpa: int,
        features: int,
        *,
        align: int = 64,
        arena_bytes: int = 1 << 19,
    ) -> None:
        super().__init__(memory, size, base_gpa, features, align=align, arena_bytes=arena_bytes)
        self._table_view = memory.view(self.desc_gpa, 16 * size)
        self._avail = memory.view(self.avail_gpa, 6 + 2 * size).cast("H")
        used = memory.view(self.used_gpa, 6 + 8 * size)
        self._used16, self._used32 = used.cast("H"), used[:-2].cast("I")
        self._used_heads = self._used32[1::2]  # of all entries
        # Oldest first: with IN_ORDER that is ring order, else completions shuffle it.
        self._free_descs = deque(range(size))
        self._next_avail = self._asked_at = self._next_used = 0

    def _layout(self, base_gpa: int, align: int) -> tuple[int, int, int]:
        avail_gpa = base_gpa + 16 * self.size
        used_gpa = -(-(avail_gpa + 6 + 2 * self.size) // align) * align
        return avail_gpa, used_gpa, used_gpa + 6 + 8 * self.size

    def _table(self, segments: Sequence[Segment]) -> bytes:
        packed = [
            DESC.pack(
                segment.gpa,
                segment.length,
                (DESC_F_WRITE if segment.writable else 0) | (DESC_F_NEXT if more else 0),
                i + 1 if more else 0,
            )
            for i, segment in enumerate(segments)
            for more in [i + 1 < len(segments)]
        ]
        return b"".join(packed)

    # Requests.

    def submit(self, *requests: Request) -> None:
        """Make requests available, in one step. Raises NoRoomError, nothing changed.

        A request keeps its descriptors until `forget`, so submitting it again is two stores.
        """
        for request in requests:
            if not request.descs:
                self._write_chain(request)
        for i, request in enumerate(requests):
            self._avail[2 + (self._next_avail + i) % self.size] = request.head
            self._requests[request.head] = request
        self._publish(len(requests))

    def _write_chain(self, request: Request) -> None:
        elements = self._elements(request)
        if len(elements) > len(self._free_descs):
            raise NoRoomError(f"{len(elements)} descriptors wanted, {len(self._free_descs)} free")
        request.descs = descs = [self._free_descs.popleft() for _ in elements]
        request.head = descs[0]
        for i, (addr, length, flags) in enumerate(elements):
            self.desc(descs[i], addr, length, flags, descs[i + 1] if flags & DESC_F_NEXT else 0)

    def _retire(self, request: Request) -> None:
        if request.owned:
            self.forget(request)

    def forget(self, request: Request) -> None:
        """Free the descriptors of a request that is not with the device."""
        self._free_descs += request.descs
        request.descs = []

    def used(self) -> Iterator[tuple[int, int]]:
        """Take the new used entries as they are: head and written."""
        while self._next_used != self._used16[1]:
            slot = 1 + 2 * (self._next_used % self.size)
            head, written = self._used32[slot], self._used32[slot + 1]
            # With IN_ORDER one entry may stand for a batch, and the index skips the others.
            batch = 1 + list(self._requests).index(head) if self.in_order else 1
            self._next_used = (self._next_used + batch) & 0xFFFF
            yield head, written

    @property
    def free_places(self) -> int:
        """See DriverQueue."""
        return len(self._free_descs)

    def cursors(self) -> tuple[int, int]:
        """See DriverQueue."""
        return self._next_avail, self._next_used

    # The same for load generators, by heads.

    def give_heads(self, heads: Sequence[int]) -> None:
        """See DriverQueue."""
        slot = self._next_avail % self.size
        left = self.size - slot
        ring, count = self._avail, len(heads)
        if count <= left:
            ring[2 + slot : 2 + slot + count] = array("H", heads)
        else:
            ring[2 + slot : 2 + self.size] = array("H", heads[:left])
            ring[2 : 2 + count - left] = array("H", heads[left:])
        self._next_avail = index = (self._next_avail + count) & 0xFFFF
        ring[1] = index

    def take_heads(self) -> list[int]:
        """See DriverQueue."""
        start, end = self._next_used, self._used16[1]
        if start == end:
            return []
        self._next_used = end
        first, last = start % self.size, end % self.size
        if first < last:
            return self._used_heads[first:last].tolist()
        return self._used_heads[first:].tolist() + self._used_heads[:last].tolist()

    # Notifications.

    def kick_needed(self) -> bool:
        """Tell whether the device wants a kick for what was submitted since the last time asked."""
        fence()
        old, self._asked_at = self._asked_at, self._next_avail
        if not self.event_idx:
            return old != self._next_avail and not self._used16[0] & 1
        event = self._used16[2 + 4 * self.size]
        return (self._next_avail - event - 1) & 0xFFFF < (self._next_avail - old) & 0xFFFF

    def enable_calls(self) -> bool:
        """Ask for a call with the next used entry; return True if there is one already."""
        if self.event_idx:
            self.set_used_event(self._next_used)
        else:
            self.set_avail_flags(0)
        fence()
        return self._used16[1] != self._next_used

    def disable_calls(self) -> None:
        """Tell the device that calls are not needed."""
        if self.event_idx:
            # Far from the entries just taken, too: the device may not have asked about those yet.
            self.set_used_event((self._next_used + 0x8000) & 0xFFFF)
        else:
            self.set_avail_flags(1)

    # Single words, for tests that break the rules.

    def desc(self, index: int, addr: int, length: int, flags: int = 0, next_: int = 0) -> None:
        """Write one descriptor."""
        DESC.pack_into(self._table_view, 16 * index, addr, length, flags, next_)

    def offer(self, head: int) -> None:
        """Make the chain at `head` available."""
        self._avail[2 + self._next_avail % self.size] = head
        self._publish(1)

    def set_avail_index(self, index: int) -> None:
        """Write avail.idx; the driver goes on from there."""
        self._next_avail = index & 0xFFFF
        self._avail[1] = self._next_avail

    def set_avail_flags(self, flags: int) -> None:
        """Write avail.flags."""
        self._avail[0] = flags

    def set_used_event(self, index: int) -> None:
        """Write avail.used_event."""
        self._avail[2 + self.size] = index

    def start_at(self, index: int) -> None:
        """Begin with both rings at `index`, as after a restore; the device must `load` it too."""
        self.set_avail_index(index)
        self._used16[1] = self._next_used = self._asked_at = index

    @property
    def used_index(self) -> int:
        """What used.idx holds."""
        return self._used16[1]

    @property
    def used_flags(self) -> int:
        """What used.flags holds."""
        return self._used16[0]

    @property
    def avail_event(self) -> int:
        """What used.avail_event holds."""
        return self._used16[2 + 4 * self.size]

    def _publish(self, count: int) -> None:
        self._next_avail = (self._next_avail + count) & 0xFFFF
        self._avail[1] = self._next_avail
