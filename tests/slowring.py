"""In place of `devices.uring.Ring`: one that completes what it is told to, when it is told to."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from devices.uringmake import OP_READ, OP_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.uring import Transfer


class SlowRing:
    """Does nothing until `land()` or `wait()`; the latest first, so that order shows."""

    latest: SlowRing
    entries = 256

    def __init__(self, fd: int, _params: bytes) -> None:
        os.close(fd)
        self.fd = os.eventfd(0)
        self.nr_old = self._old_results = 0  # a predecessor's
        self.queued: list[tuple[int, Callable[[], int]]] = []
        self.flying: list[tuple[int, Callable[[], int]]] = []
        self.results: list[tuple[int, int]] = []
        self.files: dict[int, int] = {}
        SlowRing.latest = self

    def read(self, token: int, fd: int, views: Sequence[memoryview], offset: int) -> None:
        self.queued.append((token, lambda: os.preadv(self._plain(fd), views, offset)))

    def write(
        self, token: int, fd: int, views: Sequence[memoryview], offset: int, *, stable: bool
    ) -> None:
        flags = os.RWF_DSYNC if stable else 0
        self.queued.append((token, lambda: os.pwritev(self._plain(fd), views, offset, flags)))

    def start(self, fd: int, transfers: Sequence[Transfer]) -> None:
        for token, operation, hva, length, offset in transfers:
            view = memoryview((ctypes.c_char * length).from_address(hva)).cast("B")
            if operation == OP_WRITE:
                self.write(token, fd, [view], offset, stable=False)
            else:
                assert operation == OP_READ
                self.read(token, fd, [view], offset)
        self.submit()

    @property
    def nr_in_flight(self) -> int:
        return self.nr_old + len(self.queued) + len(self.flying) + len(self.results)

    @property
    def has_results(self) -> bool:
        return bool(self.results or self._old_results)

    def sync(self, token: int, fd: int) -> None:
        self.queued.append((token, lambda: int(os.fdatasync(fd) is not None)))  # type: ignore[func-returns-value]

    def _plain(self, fd: int) -> int:
        """The same file without O_DIRECT, since no test here cares for alignment."""
        if fd not in self.files:
            self.files[fd] = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        return self.files[fd]

    def close(self) -> None:
        for fd in (self.fd, *self.files.values()):
            os.close(fd)

    def submit(self) -> None:
        self.flying += self.queued
        self.queued.clear()
        assert len(self.flying) <= self.entries

    def wait(self) -> None:
        self.submit()
        if self.nr_old:
            self.land_old()
        else:
            self.land()

    def land_old(self) -> None:
        """Complete one of a predecessor's."""
        self._old_results += 1

    def reap(self, most: int = 1 << 16) -> list[tuple[int, int]]:
        self.nr_old -= self._old_results
        self._old_results = 0
        results, self.results = self.results[:most], self.results[most:]
        return results

    def land(self, result: int | None = None) -> None:
        """Complete the latest request, or let it come back with `result`."""
        token, work = self.flying.pop()
        if result is None:
            try:
                result = work()
            except OSError as err:
                result = -(err.errno or 0)
        self.results.append((token, result))
