"""Whether to look for work a little longer before going to sleep.

Going to sleep, a kick and waking up cost both sides more time than a driver needs that reacts to
a call. So a device whose work comes in quick succession looks on for a moment instead. One whose
work does not never spins, and an idle one sleeps; where looking was in vain (the driver may wait
for the very CPU), it is not tried again for a while, and each time for longer.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from devices.virtqueue import VirtQueue

LOOK: Final = 50e-6  # seconds
QUICK: Final = 150e-6  # seconds asleep: less, and it would have been better to look on
REST_MOST: Final = 1024  # sleeps without a look beforehand, after one was in vain


class Patience:
    """Decides for the queues of one device. For one thread."""

    def __init__(self) -> None:
        self._asleep_since = 0.0
        self._quick = False  # whether the latest sleep was short
        self._rest = 0  # sleeps to come without a look
        self._next_rest = 1

    def woken(self) -> None:
        """There is work: take note of how long there was none."""
        self._quick = monotonic() - self._asleep_since < QUICK

    def look(self, queue: VirtQueue) -> bool:
        """Look for work, if that is promising; False: there is none, sleep after this."""
        if self._quick:
            if self._rest:
                self._rest -= 1
            else:
                end = monotonic() + LOOK
                while not queue.has_work():
                    if monotonic() > end:
                        self._rest = self._next_rest
                        self._next_rest = min(2 * self._next_rest, REST_MOST)
                        break
                else:
                    self._next_rest = 1
                    return True
        self._asleep_since = monotonic()
        return False
