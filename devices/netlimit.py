"""How much may go one way through a network device: bytes and frames per second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices.bucket import TokenBucket
from devices.spec import COUNTERS_STRIDE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    # A page, the place in it that is one's own, and all places; None: nobody else has a part.
    Book = tuple[memoryview, int, list[int]] | None

RATES: Final = ("rx_rate", "tx_rate", "rx_pps", "tx_pps")
RATE_MAX: Final = 1 << 53
WAIT_MAX: Final = 0.1  # seconds, after which a shared limit is looked at again
_U64: Final = (1 << 64) - 1
_SHARES_AT: Final = 24  # in the words of one process, behind its counters: rx bytes, frames, tx
BURST_SECONDS: Final = 0.1  # what may come at once after a rest, as a part of a second's worth
LEAST_BURST: Final = 1  # a token: one frame goes whatever its size


class Limit:
    """Two token buckets, either of which may be missing."""

    def __init__(self, rate: int, pps: int, books: Sequence[Book] = (None, None)) -> None:
        """Allow `rate` bytes and `pps` frames per second; 0 is no limit.

        `books` say what other processes have used of each, where they share it.
        """
        self._bytes = _bucket(rate, books[0])
        self._frames = _bucket(pps, books[1])

    def wait(self) -> float:
        """Return how many seconds to wait before the next frame: 0 if it may go now."""
        wait = self._bytes.wait() if self._bytes is not None else 0.0
        return max(wait, self._frames.wait()) if self._frames is not None else wait

    def take(self, size: int) -> None:
        """Count a frame of `size` bytes."""
        if self._bytes is not None:
            self._bytes.take(size)
        if self._frames is not None:
            self._frames.take(1)


class Rates:
    """What is allowed, by its name in RATES: bytes or frames per second, 0: no limit."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.values: dict[str, int] = {name: settings[name] for name in RATES}

    def set(self, name: str, value: Any) -> None:
        """Change one. Raises ConfigError, nothing changed."""
        if type(value) is not int or not 0 <= value < RATE_MAX:
            raise ConfigError(f"{name}: {value!r} is not a number per second, 0 or more")
        self.values[name] = value

    def limits(self, shares: Shares | None = None) -> dict[str, Limit | None]:
        """Return new limits for "rx" and "tx", None where there is none."""
        found: dict[str, Limit | None] = {}
        for way in ("rx", "tx"):
            rate, pps = self.values[f"{way}_rate"], self.values[f"{way}_pps"]
            books = shares.books(way) if shares else (None, None)
            found[way] = Limit(rate, pps, books) if rate or pps else None
        return found


class Shares:
    """What the processes of one device have used of its limits, in their page of counters.

    Each writes its own words and reads all, so nobody waits and nobody can leave a lock behind.
    Every process has a bucket of its own and takes from it what any of them has used: whichever
    looks, sees the same average, and all bursts together are hardly more than one.
    """

    def __init__(self, page: memoryview, number: int, processes: int) -> None:
        """Use the page as process `number` of so many, from 0."""
        self._page, self._number, self._processes = page, number, processes

    def books(self, way: str) -> tuple[Book, Book]:
        """Return where bytes and frames that go "rx" or "tx" are written down."""
        at = _SHARES_AT + (0 if way == "rx" else 2)
        return self._book(at), self._book(at + 1)

    def _book(self, at: int) -> Book:
        places = [at + COUNTERS_STRIDE * n for n in range(self._processes)]
        return self._page, places[self._number], places


class _SharedBucket(TokenBucket):
    """Loses what others take, too; at the latest when it is asked."""

    def __init__(self, rate: float, burst: float, book: tuple[memoryview, int, list[int]]) -> None:
        super().__init__(rate, burst)
        self._page, self._mine, self._places = book
        self._seen = self._used()

    def _used(self) -> int:
        page = self._page
        return sum([page[place] for place in self._places])

    def wait(self) -> float:
        """Return how many seconds to wait before `take`; after a while it is to be asked again."""
        used, seen = self._used(), self._seen
        self._seen = used
        super().take(used - seen)
        return min(super().wait(), WAIT_MAX)

    def take(self, count: float) -> None:
        """Write down what is taken."""
        self._page[self._mine] = (self._page[self._mine] + int(count)) & _U64


def _bucket(rate: int, book: Book) -> TokenBucket | None:
    if not rate:
        return None
    burst = max(rate * BURST_SECONDS, LEAST_BURST)
    return TokenBucket(rate, burst) if book is None else _SharedBucket(rate, burst, book)
