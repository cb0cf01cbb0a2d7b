"""Requests that overlap: what `blkserve.Server` does, with many in flight by io_uring.

For images opened with O_DIRECT, where every request waits for the medium. What the kernel cannot
do to the end (memory that is not aligned, an image that ends early, no worker thread) is left to
Server, when nothing else is in flight.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from devices.blkreq import S_OK, T_FLUSH, T_FLUSH_OUT, T_IN, T_OUT, T_WRITE_ZEROES, Request
from devices.blkserve import Done, Server, finish, joined
from devices.uring import Ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host
    from devices.raw import Disk

# Not aligned; no thread for what has to wait in the kernel. Server can do these all the same.
_NOT_HERE: Final = (-errno.EINVAL, -errno.ECANCELED, -errno.EAGAIN)
DEPTH: Final = 256  # requests in flight, of all queues: more than any device works on at once


class OverlappingServer(Server):
    """Does requests on a disk, many at a time and in any order."""

    in_order = False

    def __init__(
        self, disk: Disk, host: Host, serial: str, give_back: Callable[[int, Done], None]
    ) -> None:
        """Call `give_back(queue, done)` for what did not get done within `serve`.

        Raises OSError where there is no io_uring.
        """
        super().__init__(disk, host, serial)
        self._ring, self._report = Ring(DEPTH), give_back
        self._flying: dict[int, tuple[int, list[Request], int]] = {}  # token → queue, run, bytes
        self._next_token = 0
        self._nr_flying = 0  # requests, of which a run has many
        self._odd: list[tuple[int, Request]] = []  # to be done when nothing flies
        self._landed: defaultdict[int, Done] = defaultdict(list)  # by queue
        host.watch(self._ring.fd, self._ready)

    @property
    def room(self) -> int:
        """How many requests `serve` may be given."""
        return DEPTH - self._nr_flying

    def serve(self, queue: int, requests: list[Request], done: Done) -> int:
        """See Server; what is not in `done` afterwards comes to `give_back`."""
        asked = super().serve(queue, requests, done)
        self._ring.submit()
        return asked

    def drain(self) -> None:
        """Wait for everything in flight, and give it back."""
        self._land_all()
        self._give_back()

    def abandon(self) -> None:
        """Wait for everything in flight, and forget it."""
        while self._flying:
            self._ring.wait()
            for token, _ in self._ring.reap():
                del self._flying[token]
        self._nr_flying = 0

    def _attempts(self) -> tuple[None, None]:
        return None, None  # which would wait

    def _transfer(self, queue: int, run: list[Request], done: Done) -> None:
        kind, offset, length, views, *_ = run[0]
        if len(run) > 1:
            views, length = joined(run)
        token = self._launch(queue, run, length)
        if kind:
            stable = not self.writeback
            self._ring.write(token, self.disk.fd, views, offset, stable=stable)
        else:
            self._ring.read(token, self.disk.fd, views, offset)

    def _special(self, queue: int, request: Request, done: Done) -> None:
        if request[0] in (T_FLUSH, T_FLUSH_OUT):
            # Writes in flight need not be covered, only those that were reported (§5.2.6.2).
            self._ring.sync(self._launch(queue, [request], 0), self.disk.fd)
            return
        if request[0] == T_WRITE_ZEROES:
            self.drain()  # zeroes that are not aligned take what is around them along
        super()._special(queue, request, done)

    def _launch(self, queue: int, run: list[Request], length: int) -> int:
        """Count a run as flying and return its token; `length` is what the kernel should say."""
        self._next_token = token = (self._next_token + 1) & 0xFFFF_FFFF_FFFF_FFFF
        self._flying[token] = queue, run, length
        self._nr_flying += len(run)
        return token

    def _ready(self, _events: int) -> None:
        """Take results from the ring."""
        self._land()
        if self._odd:
            self._land_all()
        self._give_back()

    def _land(self) -> None:
        """Settle what has come back, but for what must wait until nothing flies."""
        for token, result in self._ring.reap():
            queue, run, length = self._flying.pop(token)
            self._nr_flying -= len(run)
            done = self._landed[queue]
            if result == length:
                for request in run:
                    finish(request, S_OK, request[2] if request[0] == T_IN else 0, done)
            elif len(run) > 1:  # which of them it was shows when each flies alone
                for request in run:
                    self._transfer(queue, [request], done)
            elif result >= 0 or result in _NOT_HERE:
                self._odd.append((queue, run[0]))
            else:
                self._failed(run[0], OSError(-result, os.strerror(-result)), done)
        self._ring.submit()

    def _land_all(self) -> None:
        while self._flying:
            self._ring.wait()
            self._land()
        odd, self._odd = self._odd, []
        for queue, request in odd:
            if request[0] in (T_IN, T_OUT):
                super()._transfer(queue, [request], self._landed[queue])
            else:
                super()._special(queue, request, self._landed[queue])

    def _give_back(self) -> None:
        landed, self._landed = self._landed, defaultdict(list)
        for queue, done in landed.items():
            self._report(queue, done)
