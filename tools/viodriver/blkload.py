"""Many block requests at a time, as cheaply as Python can: a load generator that is no bottleneck.

    load = BlkLoad(transport, ring, Pattern(write=False, length=4096, sequential=False), depth=32)
    ran = load.run(seconds=1.0, poll=True)       # ran.iops, ran.busy, …

Requests are placed once. After that one costs a store of its sector, and its share of a turn: all
that came back is taken with one look at the ring, given again with one store, and at most one
kick. Both ways to wait are here: by polling the ring, or for a call.
"""

from __future__ import annotations

import os
import select
from array import array
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from devices.blkreq import HEADER, S_OK, T_IN, T_OUT
from tools.viodriver.errors import DeviceGoneError, DriverError, NoAnswerError
from tools.viodriver.queue import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver
    from tools.viodriver.transport import Transport

SECTOR: Final = 512
PAGE: Final = 4096
DEADLINE: Final = 10.0  # seconds that a device may be silent
NR_PLACES: Final = 1 << 16  # random ones, over and over
SEED: Final = 1  # the same places in every run
SPINS: Final = 1 << 14  # looks at the ring between looks at the clock
UNWRITTEN: Final = 0xEE  # a status that no device writes


class Pattern(NamedTuple):
    """What to ask."""

    write: bool
    length: int  # bytes of each request, whole sectors
    sequential: bool


class Ran(NamedTuple):
    """What became of a run."""

    nr_done: int
    seconds: float
    nr_kicks: int
    nr_calls: int  # interrupts taken
    nr_turns: int  # in each of which something had come back
    idle: float  # seconds without anything to do

    @property
    def iops(self) -> float:
        """Requests per second."""
        return self.nr_done / self.seconds

    @property
    def busy(self) -> float:
        """The share of the time in which this process had something to do, 0 to 1."""
        return 1 - self.idle / self.seconds


class BlkLoad:
    """Keeps `depth` requests with queue 0 of a started device. For one thread."""

    def __init__(
        self,
        transport: Transport,
        ring: SplitDriver | PackedDriver,
        pattern: Pattern,
        *,
        depth: int,
        disk_bytes: int,
    ) -> None:
        """Place the requests; a packed ring needs INDIRECT_DESC. Raises NoRoomError."""
        self._transport, self._ring = transport, ring
        self._depth = depth
        memory, length = ring.memory, pattern.length
        start = ring.arena.take(17 * depth + depth * length + 2 * PAGE)
        statuses = start + HEADER.size * depth
        data = -(-(statuses + depth) // PAGE) * PAGE
        kind = T_OUT if pattern.write else T_IN
        memory.write(start, HEADER.pack(kind, 0, 0) * depth)
        if pattern.write:
            for index in range(depth):
                memory.write(data + index * length, Random(index).randbytes(length))  # noqa: S311
        #: The sector in each request's header, and each request's status.
        self._sectors = memory.view(start, HEADER.size * depth).cast("Q")[1::2]
        self._statuses = memory.view(statuses, depth)
        self._requests = [
            ring.place_at(
                [
                    Segment(start + HEADER.size * index, HEADER.size, writable=False),
                    Segment(data + index * length, length, writable=not pattern.write),
                    Segment(statuses + index, 1, writable=True),
                ]
            )
            for index in range(depth)
        ]
        self._data_gpa, self._length = data, length
        self._places = _places(pattern, disk_bytes, depth)
        self._nr_places, self._at = len(self._places) - depth, 0
        self._heads: list[int] = []  # of all requests, once they have been submitted
        self._number: list[int] = []  # head → request

    def run(self, seconds: float, *, poll: bool) -> Ran:
        """Go on for so long; nothing is outstanding afterwards, and every status was good.

        Raises DriverError if one was not, NoAnswerError, DeviceGoneError.
        """
        ring, kick = self._ring, self._transport.kick
        take, give, kick_needed, aim = ring.take_heads, ring.give_heads, ring.kick_needed, self._aim
        self._statuses[:] = bytes((UNWRITTEN,)) * self._depth
        ring.disable_calls()
        nr_done = nr_kicks = nr_calls = nr_turns = 0
        idle = 0.0
        begun = monotonic()
        end = begun + seconds
        self._begin()
        if kick_needed():
            kick(0)
            nr_kicks += 1
        out = self._depth
        while out:
            heads = take()
            if not heads:
                since = monotonic()
                if poll:
                    heads = self._spin()
                    idle += monotonic() - since
                else:
                    nr_calls += self._sleep()
                    idle += monotonic() - since
                    continue
            nr_turns += 1
            nr_done += len(heads)
            if monotonic() < end:
                aim(heads)
                give(heads)
                if kick_needed():
                    kick(0)
                    nr_kicks += 1
            else:
                out -= len(heads)
        took = monotonic() - begun
        wrong = set(self._statuses) - {S_OK}
        if wrong:
            raise DriverError(f"requests ended with statuses {sorted(wrong)}")
        return Ran(nr_done, took, nr_kicks, nr_calls, nr_turns, idle)

    def last(self) -> list[tuple[int, bytes]]:
        """Return the last sector and data of each request, to check what was read or written."""
        return [
            (
                self._sectors[index],
                self._ring.memory.read(self._data_gpa + index * self._length, self._length),
            )
            for index in range(self._depth)
        ]

    def _begin(self) -> None:
        """Make all requests available."""
        if not self._heads:
            for index in range(self._depth):
                self._sectors[index] = self._places[index]
            self._at = self._depth
            self._ring.submit(*self._requests)
            self._heads = [request.head for request in self._requests]
            self._number = [0] * (max(self._heads) + 1)
            for index, head in enumerate(self._heads):
                self._number[head] = index
        else:
            self._aim(self._heads)
            self._ring.give_heads(self._heads)

    def _aim(self, heads: Sequence[int]) -> None:
        """Give requests their next sectors."""
        at, sectors, number = self._at, self._sectors, self._number
        upto = at + len(heads)
        for head, sector in zip(heads, self._places[at:upto], strict=True):
            sectors[number[head]] = sector
        self._at = upto if upto < self._nr_places else 0

    def _spin(self) -> list[int]:
        """Look at the ring until something is there."""
        take, end = self._ring.take_heads, monotonic() + DEADLINE
        while True:
            for _ in range(SPINS):
                heads = take()
                if heads:
                    return heads
            self._check(end)

    def _sleep(self) -> int:
        """Wait for a call, unless something came meanwhile; return how many came."""
        ring, fd = self._ring, self._transport.call_fd(0)
        nr_calls = 0
        if not ring.enable_calls():
            waiter = select.poll()
            waiter.register(fd, select.POLLIN)
            end = monotonic() + DEADLINE
            while not waiter.poll(1000):
                self._check(end)
            os.eventfd_read(fd)
            nr_calls = 1
        ring.disable_calls()
        return nr_calls

    def _check(self, end: float) -> None:
        if not self._transport.alive:
            raise DeviceGoneError("the device has gone amid requests")
        if monotonic() > end:
            raise NoAnswerError(f"no request came back for {DEADLINE:g} s")


def _places(pattern: Pattern, disk_bytes: int, depth: int) -> array[int]:
    """Return sectors to go to, the first `depth` of them once more at the end."""
    count = disk_bytes // pattern.length
    if count < 1:
        raise DriverError(f"a disk of {disk_bytes} bytes is shorter than a request")
    if pattern.sequential:
        order = [index % count for index in range(max(count, depth))]
    else:
        dice = Random(SEED)  # noqa: S311
        order = [dice.randrange(count) for _ in range(NR_PLACES)]
    step = pattern.length // SECTOR
    places = array("Q", [index * step for index in order])
    return places + places[:depth]
