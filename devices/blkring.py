"""Requests that overlap: what `blkserve.Server` does, with many in flight by io_uring.

For images opened with O_DIRECT, where every request waits for the medium. Those of the usual shape
are started by `blkfly`, without the trouble that is taken here for the others. What the kernel
cannot do to the end (memory that is not aligned, an image that ends early, no worker thread) is
left to Server, when nothing else is in flight.

What a killed predecessor has left in flight goes on, and comes first: a disk may write it, or write
it into guest memory, at any time. So there is no room for requests until all of it has come back.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from devices.blkfly import TOKENS, Flights, prepare, request_of
from devices.blkquick import TABLE_BYTES
from devices.blkreq import (
    S_OK,
    T_DISCARD,
    T_FLUSH,
    T_FLUSH_OUT,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    Request,
)
from devices.blkserve import NO_BOUND, Done, Server, finish, joined
from devices.uring import address

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host
    from devices.guestmem import Span
    from devices.raw import Disk
    from devices.uring import Ring
    from devices.virtqueue import VirtQueue

# Not aligned; no thread for what has to wait in the kernel. Server can do these all the same.
_NOT_HERE: Final = (-errno.EINVAL, -errno.ECANCELED, -errno.EAGAIN)
# Zeroes that are not aligned take what is around them along; what is discarded may be written to
# in flight, and freed; and a flush that comes here has things to free, too.
_ALONE: Final = (T_WRITE_ZEROES, T_DISCARD, T_FLUSH, T_FLUSH_OUT)
FEW: Final = 8  # results given back together


class OverlappingServer(Server):
    """Does requests on a disk, many at a time and in any order."""

    in_order = False
    batch = 8  # the disk begins with these while the next are made ready

    def __init__(
        self,
        disk: Disk,
        host: Host,
        serial: str,
        *,
        ring: Ring,
        give_back: Callable[[int, Done], None],
        go_on: Callable[[int], None],
    ) -> None:
        """Call `give_back(queue, done)` for what did not get done within `serve`.

        After that `go_on(queue)` looks for more, unless the device is to come to rest.
        """
        super().__init__(disk, host, serial)
        self._ring, self._report, self._go_on = ring, give_back, go_on
        self._flying: dict[int, tuple[int, list[Request], int]] = {}  # token → queue, run, bytes
        self._quick: Flights = {}  # those of blkfly
        self._hot: Span | None = None  # memory that was used last, unless it may be gone
        self._ram_hva = 0
        self._next_token = TOKENS
        self._nr_flying = 0  # requests, of which a run has many
        self._odd: list[tuple[int, Request]] = []  # to be done when nothing flies
        self._landed: defaultdict[int, Done] = defaultdict(list)  # by queue
        host.watch(self._ring.fd, self._ready)

    @property
    def room(self) -> int:
        """How many requests `serve` may be given."""
        return 0 if self._ring.nr_old else self._ring.entries - self._nr_flying

    def serve(self, queue: int, requests: list[Request], done: Done) -> int:
        """See Server; what is not in `done` afterwards comes to `give_back`."""
        asked = super().serve(queue, requests, done)
        self._ring.submit()
        if self._odd:
            self.drain()
        return asked

    def start_quick(self, index: int, queue: VirtQueue, limit: int) -> tuple[int, int]:
        """Start up to `limit` requests of the usual shape.

        Return how many, and how many bytes they ask for. `queue` must be of a class in
        blkquick.SHAPES.
        """
        disk, hot = self.disk, queue._memory.hot
        if hot is not self._hot:
            self._hot, self._ram_hva = hot, address(hot.ram)
        tables, transfers, bytes_read, nr_writes, bytes_written = prepare(
            index,
            queue,
            min(limit, self.room),
            ram_hva=self._ram_hva,
            flights=self._quick,
            locate=disk.locate,
            disk_bytes=self.limit,
            writable=self.writeback and not disk.readonly,
        )
        if not transfers:
            return 0, 0
        queue.take(tables, TABLE_BYTES)
        self._nr_flying += len(transfers)
        self._ring.start(disk.fd, transfers)
        self.nr_reads += len(transfers) - nr_writes
        self.bytes_read += bytes_read
        self.nr_writes += nr_writes
        self.bytes_written += bytes_written
        return len(transfers), bytes_read + bytes_written

    def land_soon(self) -> None:
        """Land what has come back already."""
        if self._ring.has_results:
            self._ready(0)

    def drain(self) -> None:
        """Wait for everything in flight, and give it back."""
        self._land_all()
        self._give_back()
        self._hot = None

    def abandon(self) -> None:
        """Wait for everything in flight, and forget it."""
        while self._ring.nr_in_flight:
            self._ring.wait()
            for token, _ in self._ring.reap():
                del (self._quick if token < TOKENS else self._flying)[token]
        self._nr_flying = 0
        self._odd.clear()
        self._hot = None

    def _attempts(self) -> tuple[None, None]:
        return None, None  # which would wait

    def _transfer(self, queue: int, run: list[Request], done: Done) -> None:
        kind, offset, length, views, *_ = run[0]
        if len(run) > 1:
            views, length = joined(run)
        stable = bool(kind) and not self.writeback
        at = self.disk.place(offset, length, write=bool(kind), stable=stable)
        if at < 0:
            self._transfer_apart(queue, run, done)
            return
        token = self._launch(queue, run, length)
        if kind:
            self._ring.write(token, self.disk.fd, views, at, stable=stable)
        else:
            self._ring.read(token, self.disk.fd, views, at)

    def _transfer_apart(self, queue: int, run: list[Request], done: Done) -> None:
        """Do a run that is not in one piece in the file, as far as need be when nothing flies."""
        if len(run) == 1:
            self._odd.append((queue, run[0]))
        else:
            for request in run:
                self._transfer(queue, [request], done)

    def _special(self, queue: int, request: Request, done: Done) -> None:
        if request[0] in (T_FLUSH, T_FLUSH_OUT) and self.disk.settled and not self._odd:
            # Writes in flight need not be covered, only those that were reported (§5.2.6.2).
            self._ring.sync(self._launch(queue, [request], 0), self.disk.fd)
            return
        if request[0] in _ALONE:
            self.drain()
        super()._special(queue, request, done)

    def _launch(self, queue: int, run: list[Request], length: int) -> int:
        """Count a run as flying and return its token; `length` is what the kernel should say."""
        self._next_token = token = self._next_token + 1
        self._flying[token] = queue, run, length
        self._nr_flying += len(run)
        return token

    def _ready(self, _events: int) -> None:
        """Take results from the ring, a few at a time: the driver goes on with them meanwhile."""
        for _ in range(self._ring.entries // FEW):  # and then others have their turn
            if not self._ring.has_results:
                break
            self._land(FEW)
            if self._odd:
                self._land_all()
            landed, self._landed = self._landed, defaultdict(list)
            for queue, done in landed.items():
                self._report(queue, done)
                self._go_on(queue)

    def _land(self, most: int = NO_BOUND) -> None:
        """Settle what has come back, but for what must wait until nothing flies."""
        take_quick, landed = self._quick.pop, self._landed
        nr_landed, nr_old = 0, self._ring.nr_old
        for token, result in self._ring.reap(most):
            if token < TOKENS:
                flight = take_quick(token)
                queue, _, _, length, capacity, head, ram, _, status_at = flight
                nr_landed += 1
                if result == length:
                    ram[status_at] = S_OK
                    landed[queue].append((head, capacity))
                else:
                    self._crashed(queue, [request_of(flight)], result)
                continue
            queue, run, length = self._flying.pop(token)
            nr_landed += len(run)
            if result == length:
                for request in run:
                    written = request[2] if request[0] == T_IN else 0
                    finish(request, S_OK, written, landed[queue])
            else:
                self._crashed(queue, run, result)
        self._nr_flying -= nr_landed
        if nr_old and not self._ring.nr_old:
            self._report(0, [])  # there is room
        self._ring.submit()

    def _crashed(self, queue: int, run: list[Request], result: int) -> None:
        """See what can be done about a run that has not been done to the end."""
        if len(run) > 1:  # which of them it was shows when each flies alone
            for request in run:
                self._transfer(queue, [request], self._landed[queue])
        elif result >= 0 or result in _NOT_HERE:
            self._odd.append((queue, run[0]))
        else:
            error = OSError(-result, os.strerror(-result))
            self._failed(run[0], error, self._landed[queue])

    def _land_all(self) -> None:
        while self._ring.nr_in_flight:
            self._ring.wait()
            self._land()
        odd, self._odd = self._odd, []
        for queue, request in odd:
            if request[0] in (T_IN, T_OUT):
                super()._transfer(queue, [request], self._landed[queue])
            else:
                super()._special(queue, request, self._landed[queue])
        if self.disk.pending:
            self._commit([request for _, request in odd])

    def _give_back(self) -> None:
        landed, self._landed = self._landed, defaultdict(list)
        for queue, done in landed.items():
            self._report(queue, done)
