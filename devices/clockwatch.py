"""Tells when somebody sets the host's clock, or the host wakes from sleep: costs nothing till then.

A timerfd on CLOCK_REALTIME that is armed for the far future and cancelled by every step of the
clock (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET). A clock that is only made to run a little
faster or slower, as NTP does, does not step.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from config.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host

TOLERATED: Final = 5.0  # seconds: what a guest need not be told, as in vmd

_CLOCK_REALTIME: Final = 0
_ABSTIME_CANCEL_ON_SET: Final = 1 | 2
_NEVER: Final = 1 << 33  # seconds since 1970: in the year 2242
_libc = ctypes.CDLL(None, use_errno=True)


def offset() -> float:
    """Return how far the wall clock is ahead of the monotonic one; steps change it. In seconds."""
    return time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class ClockWatch:
    """Calls `stepped()` when the wall clock is TOLERATED seconds from where it would have been."""

    def __init__(self, host: Host, stepped: Callable[[], None]) -> None:
        """Open the timerfd, before the jail. Raises HostError."""
        self._fd: int = _libc.timerfd_create(_CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise HostError(f"timerfd_create: {os.strerror(ctypes.get_errno())}")
        self._stepped = stepped
        self._arm()
        self._offset = offset()
        host.watch(self._fd, self._cancelled)

    def told(self) -> None:
        """Count from now on: whoever is interested has just looked at the clock."""
        self._offset = offset()

    def _arm(self) -> None:
        spec = (ctypes.c_long * 4)(0, 0, _NEVER, 0)  # struct itimerspec
        if _libc.timerfd_settime(self._fd, _ABSTIME_CANCEL_ON_SET, spec, None) < 0:
            raise HostError(f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def _cancelled(self, _events: int) -> None:
        with suppress(OSError):  # ECANCELED
            os.read(self._fd, 8)
        self._arm()  # first, so that a step while we look is told, too
        if abs(offset() - self._offset) > TOLERATED:
            self.told()
            self._stepped()
