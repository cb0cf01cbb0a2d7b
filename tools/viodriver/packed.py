"""Driver side of a packed virtqueue (virtio 1.2 §2.8)."""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Final

from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_WRITE
from devices.guestmem import fence
from devices.packed import (
    DESC_F_AVAIL,
    DESC_F_USED,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    MARKS,
    PLACE,
    WRAP,
)
from tools.viodriver.errors import NoRoomError
from tools.viodriver.queue import DriverQueue, Request, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.guestmem import GuestMemory

Element = tuple[int, int, int]  # addr, len, flags without the marks

_pack_body: Final = Struct("<QIH").pack_into  # all of a descriptor but its flags


class PackedDriver(DriverQueue):
    """Keeps two cursors, place and wrap counter in one, as the device does."""

    layout = "packed"

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
        self._ring = memory.view(self.desc_gpa, 16 * size)
        self._ring16, self._ring32 = self._ring.cast("H"), self._ring.cast("I")
        self._driver_event = memory.view(self.avail_gpa, 4).cast("H")
        self._device_event = memory.view(self.used_gpa, 4).cast("H")
        self._free_ids = deque(range(size))
        self._counts: dict[int, int] = {}  # buffer id → places it takes; oldest first
        self._free_places = size
        self._tables: dict[int, tuple[int, int]] = {}  # buffer id → its indirect table
        self._next_avail = self._next_used = WRAP
        self._unasked = 0  # places made available since kick_needed was asked

    def _layout(self, base_gpa: int, align: int) -> tuple[int, int, int]:
        avail_gpa = -(-(base_gpa + 16 * self.size) // align) * align
        return avail_gpa, avail_gpa + align, avail_gpa + align + 4

    def _table(self, segments: Sequence[Segment]) -> bytes:
        return b"".join(
            DESC.pack(segment.gpa, segment.length, 0, DESC_F_WRITE if segment.writable else 0)
            for segment in segments
        )

    # Requests.

    def submit(self, *requests: Request) -> None:
        """Make requests available, in one step. Raises NoRoomError, nothing changed."""
        all_elements = [self._elements(request) for request in requests]
        wanted = sum(map(len, all_elements))
        if wanted > self._free_places:
            raise NoRoomError(f"{wanted} places wanted, {self._free_places} free")
        chains: list[tuple[int, list[Element]]] = []
        for request, elements in zip(requests, all_elements, strict=True):
            request.head = self._free_ids.popleft()
            self._requests[request.head] = request
            if request.indirect_gpa:
                self._tables[request.head] = elements[0][:2]
            chains.append((request.head, elements))
        self.offer_chains(chains)

    def offer_chains(self, chains: Sequence[tuple[int, list[Element]]]) -> None:
        """Write chains, each a buffer id and elements, at the next places; show them in one step.

        The first flags are stored last: until then the device sees none of it (§2.8.6).
        """
        start = self._next_avail
        first_flags = -1
        for ident, elements in chains:
            for addr, length, flags in elements:
                place, marked = self._next_avail & PLACE, flags | self.available_flags
                if first_flags < 0:
                    first_flags = marked
                    marked ^= MARKS  # not available yet
                self.desc(place, addr, length, ident, marked)
                self._next_avail = self._step(self._next_avail, 1)
            self._counts[ident] = len(elements)
            self._free_places -= len(elements)
            self._unasked += len(elements)
        if first_flags >= 0:
            self.set_flags(start & PLACE, first_flags)

    def _retire(self, request: Request) -> None:
        self._free_ids.append(request.head)
        self._free_places += self._counts.pop(request.head)

    def used(self) -> Iterator[tuple[int, int]]:
        """Take the new used entries as they are: buffer id and written."""
        while True:
            place = self._next_used & PLACE
            flags = self._ring16[8 * place + 7]
            if flags & MARKS != (MARKS if self._next_used & WRAP else 0):
                return
            ident = self._ring16[8 * place + 6]
            written = self._ring32[4 * place + 2] if flags & DESC_F_WRITE else 0
            # With IN_ORDER one entry may stand for a batch, and skips the places of all.
            batch = 1 + list(self._counts).index(ident) if self.in_order else 0
            counts = list(self._counts.values())[:batch] or [self._counts[ident]]
            for count in counts:
                self._next_used = self._step(self._next_used, count)
            yield ident, written

    @property
    def free_places(self) -> int:
        """See DriverQueue."""
        return self._free_places

    def cursors(self) -> tuple[int, int]:
        """See DriverQueue."""
        return self._next_avail, self._next_used

    # The same for load generators, by heads.

    def give_heads(self, heads: Sequence[int]) -> None:
        """See DriverQueue; they must be those of indirect requests."""
        start, cursor = self._next_avail, self._next_avail
        tables, ring16, fields = self._tables, self._ring16, self._ring
        first_flags = -1
        for head in heads:
            place = cursor & PLACE
            _pack_body(fields, 16 * place, *tables[head], head)
            flags = DESC_F_INDIRECT | (DESC_F_AVAIL if cursor & WRAP else DESC_F_USED)
            if first_flags < 0:
                first_flags = flags
            else:
                ring16[8 * place + 7] = flags
            cursor = self._step(cursor, 1)
        self._next_avail = cursor
        self._unasked += len(heads)
        if heads:
            ring16[8 * (start & PLACE) + 7] = first_flags

    def take_heads(self) -> list[int]:
        """See DriverQueue."""
        heads: list[int] = []
        ring16, cursor = self._ring16, self._next_used
        while True:
            place = cursor & PLACE
            if ring16[8 * place + 7] & MARKS != (MARKS if cursor & WRAP else 0):
                break
            heads.append(ring16[8 * place + 6])
            cursor = self._step(cursor, 1)
        self._next_used = cursor
        return heads

    # Notifications.

    def kick_needed(self) -> bool:
        """Tell whether the device wants a kick for what was submitted since the last time asked."""
        fence()
        added, self._unasked = self._unasked, 0
        how, event = self._device_event[1], self._device_event[0]
        if how != EVENT_DESC:
            return bool(added) and how != EVENT_DISABLE
        end, place = self._next_avail & PLACE, event & PLACE
        if (event ^ self._next_avail) & WRAP:
            place -= self.size
        return end - added <= place < end

    def enable_calls(self) -> bool:
        """Ask for a call with the next used entry; return True if there is one already."""
        if self.event_idx:
            self.set_driver_event(self._next_used, EVENT_DESC)
        else:
            self.set_driver_event(0, EVENT_ENABLE)
        fence()
        flags = self._ring16[8 * (self._next_used & PLACE) + 7]
        return flags & MARKS == (MARKS if self._next_used & WRAP else 0)

    def disable_calls(self) -> None:
        """Tell the device that calls are not needed."""
        self.set_driver_event(0, EVENT_DISABLE)

    # Single words, for tests that break the rules.

    @property
    def available_flags(self) -> int:
        """The marks of a descriptor made available at the next place."""
        return MARKS & (0x00FF if self._next_avail & WRAP else 0xFF00)

    @property
    def next_place(self) -> int:
        """Where the next descriptor goes."""
        return self._next_avail & PLACE

    def desc(self, place: int, addr: int, length: int, ident: int, flags: int) -> None:
        """Write one descriptor, flags last and in one store."""
        DESC.pack_into(self._ring, 16 * place, addr, length, ident, self._ring16[8 * place + 7])
        self._ring16[8 * place + 7] = flags

    def set_flags(self, place: int, flags: int) -> None:
        """Write the flags of one descriptor."""
        self._ring16[8 * place + 7] = flags

    def set_driver_event(self, cursor: int, how: int) -> None:
        """Write the driver event suppression area."""
        self._driver_event[0] = cursor
        self._driver_event[1] = how

    @property
    def device_event(self) -> tuple[int, int]:
        """What the device event suppression area holds: cursor and flags."""
        return self._device_event[0], self._device_event[1]

    def ring_bytes(self) -> bytes:
        """Return a copy of the whole ring."""
        return bytes(self._ring)

    def _step(self, cursor: int, count: int) -> int:
        place = (cursor & PLACE) + count
        return cursor + count if place < self.size else place - self.size | (cursor & WRAP ^ WRAP)
