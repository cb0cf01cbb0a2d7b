"""A token bucket: so much per second on average, and a burst after a rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class TokenBucket:
    """Holds at most `burst` tokens, gains `rate` per second, and may run into debt once.

    Whoever wants n tokens waits until the bucket is not empty, then takes all n. So what is taken
    in a row is bounded by burst + n, and the average by rate, whatever the sizes are.
    """

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens = burst
        self._at = clock()

    def wait(self) -> float:
        """Return how many seconds to wait before `take`: 0 if it may be now."""
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._at) * self._rate, self._burst)
        self._at = now
        return max(1 - self._tokens, 0) / self._rate

    def take(self, count: float) -> None:
        """Take tokens, more than there are if need be."""
        self._tokens -= count
