"""An event loop: descriptors, timers and calls from other threads.

One epoll, owned by the main thread. vCPU threads reach it through `call` only; a timer may be
armed from any thread, since that is one system call on its timerfd.
"""

from __future__ import annotations

import ctypes
import os
import select
from collections import deque
from typing import TYPE_CHECKING, Final

from config.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT

_CLOCK_MONOTONIC: Final = 1
_TFD_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class _Itimerspec(ctypes.Structure):
    """struct itimerspec (timerfd_settime(2)); seconds and nanoseconds."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")
    )


class Timer:
    """Calls back on the loop's thread. Arming replaces what was armed before."""

    def __init__(self, loop: Loop, callback: Callable[[], None]) -> None:
        self._fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd < 0:
            raise HostError(f"timerfd_create: {os.strerror(ctypes.get_errno())}")
        self._loop, self._callback = loop, callback
        loop.add(self._fd, READ, self._fired)

    def arm(self, seconds: float, every: float = 0.0) -> None:
        """Fire once after `seconds` (0 fires at once), then `every` seconds if not 0."""
        self._set(max(int(seconds * 1e9), 1), int(every * 1e9))

    def disarm(self) -> None:
        """Forget what was armed; harmless if nothing was."""
        self._set(0, 0)

    def close(self) -> None:
        """Leave the loop and free the descriptor."""
        self._loop.remove(self._fd)
        os.close(self._fd)

    def _set(self, first_ns: int, every_ns: int) -> None:
        spec = _Itimerspec(*divmod(every_ns, 10**9), *divmod(first_ns, 10**9))
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None) < 0:
            raise HostError(f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def _fired(self, _events: int) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # disarmed between epoll_wait and here
        self._callback()


class Loop:
    """Runs callbacks until stop(). add, modify, remove and timer are for the loop's thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = False
        self.add(self._wake, READ, self._woken)

    def fileno(self) -> int:
        """Return a descriptor that is readable when run() would have something to do."""
        return self._epoll.fileno()

    def add(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Watch `fd`; the callback gets the epoll event mask."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Watch `fd` for other events than before."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; call it before closing the descriptor."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return an unarmed timer of this loop."""
        return Timer(self, callback)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` soon on the loop's thread. Safe from any thread."""
        self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve until stop()."""
        self._running = True
        while self._running:
            for fd, events in self._epoll.poll():
                # An earlier callback of this round may have removed this descriptor.
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback(events)

    def stop(self) -> None:
        """Make run() return after the current round. From another thread: call(loop.stop)."""
        self._running = False

    def close(self) -> None:
        """Free the loop's own descriptors."""
        self._epoll.close()
        os.close(self._wake)

    def _woken(self, _events: int) -> None:
        os.eventfd_read(self._wake)
        # Only what is queued now: a call that calls again waits for the next round.
        for _ in range(len(self._calls)):
            self._calls.popleft()()
