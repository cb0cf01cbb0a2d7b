"""The in-flight area of a split queue whose chains come back in the order they were taken.

Then no chain needs an entry of its own. What is in flight is the row between two cursors, and a
batch is published when the ring's used index says so: three stores for any number of chains.

The area as bytes, native order, at an 8-byte boundary; size is the queue's:

    0  u16  version    see inflight.py
    2  u16  size
    4  u16  layout     2
    6  u16  intent     cursor behind the batch being published; equal to used when there is none
    8  u32  cursors    behind the latest chain taken << 16 | of the next used entry
   12  u32  -
   16  u16  heads[size]   of the chain that will be, or was, used number n: at n mod size

**Order of stores.** Killed before the last one of a step, nothing happened.
  take:    heads, **cursors**
  publish: intent; the ring's used entries; **the ring's index**; cursors
The successor compares intent with the used cursor. If they differ it asks the ring whether the
driver can see the batch. If it can, the batch is settled; if not, its chains are in flight still.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.inflight import Inflight

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTENT: Final = 3  # in 16-bit words
_CURSORS: Final = 2  # in 32-bit words
_HEADS: Final = 8  # in 16-bit words


class RowInflight(Inflight):
    """Reads and writes one such area; an entry is a head."""

    __slots__ = ("_taken", "_used")

    LAYOUT = 2

    def __init__(self, area: memoryview, size: int) -> None:
        """Take a view of at least inflight_bytes(size). Changes nothing in it."""
        super().__init__(area, size, packed=False)
        cursors = self._i[_CURSORS]
        self._taken, self._used = cursors >> 16, cursors & 0xFFFF

    # What the living process writes.

    def format(self, used: int) -> None:
        """See Inflight."""
        self._h[0] = 0
        self._h[1], self._h[2], self._h[_INTENT] = self._size, self.LAYOUT, used
        self._taken = self._used = used
        self._store()
        self._h[0] = self.VERSION

    def take(self, entry: int, head: int) -> None:
        """See Inflight."""
        self._h[_HEADS + (self._taken & self._size - 1)] = head
        self._taken = (self._taken + 1) & 0xFFFF
        self._store()

    def take_all(self, heads: Sequence[int]) -> None:
        """See Inflight."""
        place, count = _HEADS + (self._taken & self._size - 1), len(heads)
        if place + count <= _HEADS + self._size:
            self._h[place : place + count] = array("H", heads)
        else:
            for number, head in enumerate(heads, self._taken):
                self._h[_HEADS + (number & self._size - 1)] = head
        self._taken = (self._taken + count) & 0xFFFF
        self._store()

    def drop(self, entry: int) -> None:
        """See Inflight; the entry is the one taken last."""
        self._taken = (self._taken - 1) & 0xFFFF
        self._store()

    def begin(self, batch: Sequence[tuple[int, int]], used: int) -> None:
        """See Inflight."""
        self._h[_INTENT] = used

    def settle(self, batch: Sequence[tuple[int, int]], used: int) -> None:
        """See Inflight; a batch that was not taken before counts as taken now."""
        if (self._taken - self._used) & 0xFFFF < (used - self._used) & 0xFFFF:
            self._taken = used
        self._used = used
        self._store()

    def _store(self) -> None:
        self._i[_CURSORS] = self._taken << 16 | self._used

    # What its successor reads.

    @property
    def used(self) -> int:
        """See Inflight."""
        return self._used

    def unsettled(self) -> tuple[list[tuple[int, int]], int]:
        """Return no batch, since there is nothing to finish, and the cursor after it."""
        intent = self._h[_INTENT]
        self._within((intent - self._used) & 0xFFFF)
        return [], intent

    def taken(self) -> list[int]:
        """See Inflight."""
        count = self._within((self._taken - self._used) & 0xFFFF)
        heads = [self._h[_HEADS + (self._used + n & self._size - 1)] for n in range(count)]
        if len(set(heads)) < count or max(heads, default=0) >= self._size:
            raise GuestError("in-flight area: broken row")
        return heads

    def _within(self, count: int) -> int:
        if count > self._size:
            raise GuestError("in-flight area: cursors further apart than the ring is long")
        return count
