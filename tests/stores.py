"""Shared memory that watches its writer: every store is logged, and may be the writer's last.

Wraps the views a queue keeps of its ring and in-flight area. A test then sees the order of
stores, or kills the device between any two of them.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, cast, overload

from devices.guestmem import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import Region


class Killed(BaseException):
    """The process died here. Not an Exception, so that nothing handles it by mistake."""


class Store:
    """One store: which memory, byte offset there, width in bytes, value."""

    def __init__(self, where: str, offset: int, width: int, value: int) -> None:
        self.where, self.offset, self.width, self.value = where, offset, width, value

    def __repr__(self) -> str:
        return f"{self.where}[{self.offset}:{self.offset + self.width}] = {self.value:#x}"


class Watch:
    """Counts stores, keeps a log of them, and raises Killed in place of number `kill_at`."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.log: list[Store] = []
        self.kill_at = kill_at

    def store(self, store: Store) -> None:
        """Allow one store, or die."""
        if len(self.log) == self.kill_at:
            raise Killed
        self.log.append(store)

    def view(self, name: str, view: memoryview) -> memoryview:
        """Return something that behaves as `view` does for a queue, and reports stores here."""
        return cast("memoryview", WatchedView(self, name, 0, view))


class WatchedView:
    """The part of memoryview that the queues use on shared memory."""

    def __init__(self, watch: Watch, name: str, offset: int, view: memoryview) -> None:
        self._watch, self._name, self._offset, self._view = watch, name, offset, view

    def __len__(self) -> int:
        return len(self._view)

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> WatchedView: ...
    def __getitem__(self, key: int | slice) -> int | WatchedView:
        if isinstance(key, int):
            return self._view[key]
        offset = self._offset + key.indices(len(self))[0] * self._view.itemsize
        return WatchedView(self._watch, self._name, offset, self._view[key])

    def __setitem__(self, key: int | slice, value: int | bytes | array[int]) -> None:
        if isinstance(key, slice):  # no order among its parts is promised, but this is one
            assert isinstance(value, bytes | array)
            for at, byte in zip(range(*key.indices(len(self))), value, strict=True):
                self[at] = byte
            return
        assert isinstance(value, int)
        width = self._view.itemsize
        self._watch.store(Store(self._name, self._offset + key * width, width, value))
        self._view[key] = value

    def cast(self, code: str) -> WatchedView:
        """Return the same memory in other units."""
        return WatchedView(self._watch, self._name, self._offset, self._view.cast(code))  # type: ignore[call-overload]

    def toreadonly(self) -> memoryview:
        """Return the plain view: what cannot be stored to need not be watched."""
        return self._view.toreadonly()


class WatchedMemory(GuestMemory):
    """Guest memory whose `view`s, which are the rings, are watched. Buffers are not."""

    def __init__(self, fd: int, regions: Sequence[Region], watch: Watch) -> None:
        super().__init__(fd, regions)
        self._watch = watch

    def view(self, gpa: int, length: int) -> memoryview:
        """Return a watched view; the log calls it by its guest address."""
        return self._watch.view(f"{gpa:#x}", super().view(gpa, length))
