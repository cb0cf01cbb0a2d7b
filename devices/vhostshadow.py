"""The rings that a back end sees where its own books would die with it.

A back end with an in-flight area knows after a restart what it had begun. One without would be
started again where the used ring ends, which repeats requests that are done and loses others
unless it completes all in order. So its avail and used rings are ours: heads are copied from the
driver's avail ring, used entries back into the driver's used ring, and what is between the two is
known here. The descriptors stay the driver's, and so do all buffers: no data is copied.

    driver ── VirtQueue ── offer ──► avail ring ──► back end
                   └────── take ◄─── used ring  ◄──┘

The back end may write anything into either ring, and so may a guest that names their address in
a descriptor: what is read back is checked, and what is wrong is PeerError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.guestmem import fence
from devices.vhostwire import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STRIDE: Final = 0x4000  # bytes per queue: rings of spec.QUEUE_SIZE_MAX entries fit
USED_AT: Final = 0x1000  # where the used ring is; the avail ring is at 0

_NO_NOTIFY: Final = 1


class Shadow:
    """Avail and used ring of one queue, split layout. The driver's side of them."""

    def __init__(self, area: memoryview, name: str) -> None:
        """Take STRIDE bytes; `name` is the back end's, for messages."""
        self._area, self._name = area, name
        self._size, self._event_idx = 0, False
        #: Heads that the back end has, oldest first, and how many bytes it may write for each.
        self.outstanding: dict[int, int] = {}

    def begin(self, size: int, *, event_idx: bool) -> None:
        """Make both rings anew, for a back end that starts at base 0, and offer what it had not."""
        self._size, self._mask, self._event_idx = size, size - 1, event_idx
        self._avail = self._area[: 6 + 2 * size].cast("H")
        used = self._area[USED_AT : USED_AT + 6 + 8 * size]
        self._used16, self._used32 = used.cast("H"), used[:-2].cast("I")
        self._avail[0] = self._avail[1] = self._used16[0] = self._used16[1] = 0
        self._avail[2 + size] = 0  # used_event: a call for the first one
        self._used16[2 + 4 * size] = 0
        self._next_avail = self._next_used = 0
        heads, self.outstanding = self.outstanding, {}
        self.offer(heads)

    def reset(self) -> None:
        """Forget the queue."""
        self.outstanding = {}

    def offer(self, heads: Mapping[int, int]) -> bool:
        """Make chains available; return whether the back end wants to be told.

        `heads` have the bytes that may be written for each.
        """
        avail, old = self._avail, self._next_avail
        at = old
        for head in heads:
            avail[2 + (at & self._mask)] = head
            at += 1
        self.outstanding.update(heads)
        # Entries first, index second, in one store each.
        avail[1] = self._next_avail = at & 0xFFFF
        fence()  # our index, then what the back end wants
        if not self._event_idx:
            return not self._used16[0] & _NO_NOTIFY
        event = self._used16[2 + 4 * self._size]
        return (at - 1 - event) & 0xFFFF < at - old

    def take(self) -> list[tuple[int, int]]:
        """Return what the back end has used since: heads, and bytes written. Raises PeerError.

        It will call for the next one.
        """
        done: list[tuple[int, int]] = []
        while True:
            index = self._used16[1]
            if (index - self._next_used) & 0xFFFF > len(self.outstanding):
                raise PeerError(f"{self._name}: uses more than it was given")
            for at in _between(self._next_used, index):
                slot = 1 + 2 * (at & self._mask)
                head, written = self._used32[slot], self._used32[slot + 1]
                most = self.outstanding.pop(head, -1)
                if most < 0:
                    raise PeerError(f"{self._name}: uses chain {head}, which it does not have")
                # Some back ends count what they have read, too; no driver must believe that.
                done.append((head, min(written, most)))
            self._next_used = index
            self._avail[2 + self._size] = index
            fence()  # our wish for a call, then the back end's news
            if self._used16[1] == index:
                return done


def _between(start: int, end: int) -> Iterable[int]:
    return range(start, start + ((end - start) & 0xFFFF))
