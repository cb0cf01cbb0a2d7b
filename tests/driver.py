"""A virtio driver for tests, fuzzing and benchmarks: it plays the guest's part.

    memory = make_memory()
    driver = open_driver(memory, 256, base_gpa=0x10000, features=F_EVENT_IDX)
    token = driver.add([b"header", b"data"], [512, 1])     # readable contents, writable lengths
    if driver.kick_needed(): transport.kick(0)
    [used] = driver.collect()                               # used.token, used.written
    driver.data(used.request)                               # what the device wrote

Fast and without allocation: `request = driver.place(...)` once, then `submit(request)` and
`collect()` as often as you like. For hostile tests the split and the packed driver also write
single words: `desc`, `offer`, `set_avail_index` and so on; nothing checks those.

A driver knows memory and ring only. How a kick reaches the device, and a call the driver, is a
`Transport`, which each way of running a device brings along.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from devices.chain import DESC, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_RING_PACKED
from devices.guestmem import GuestMemory, Region, fence
from tests.driver_packed import PackedDriver
from tests.driver_queue import DriverQueue, NoRoomError, Request, Segment, Used

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "DriverQueue",
    "NoRoomError",
    "PackedDriver",
    "Request",
    "Segment",
    "SplitDriver",
    "Transport",
    "Used",
    "make_memfd",
    "make_memory",
    "open_driver",
]

_F_ADD_SEALS: Final = 1033  # fcntl.F_ADD_SEALS is missing where Python was built on old headers
_SEALS: Final = 1 | 2 | 4  # F_SEAL_SEAL, SHRINK, GROW


class Transport(Protocol):
    """How a driver and a device that may be in another process reach each other."""

    def kick(self, queue: int) -> None:
        """Tell the device that queue number `queue` has something new."""

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for a call of that queue, at most `timeout` seconds; False if none came."""

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of the device's configuration space."""

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write to it."""


def make_memfd(size: int) -> int:
    """Return a sealed memfd of `size` bytes, as a VM process makes for its guest."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    return fd


def make_memory(size: int = 1 << 20, regions: Sequence[Region] = ()) -> GuestMemory:
    """Return guest memory of a new memfd of `size` bytes, in one region at 0 or in `regions`."""
    fd = make_memfd(size)
    try:
        return GuestMemory(fd, regions or [Region(0, size, 0)])
    finally:
        os.close(fd)


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
