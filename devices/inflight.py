"""The in-flight area: what a device process leaves behind when it is killed.

A queue's indices and the chains it has popped but not pushed live in the process, and die with
it. This area is a piece of shared memory, one per queue, that the process keeps up to date, so
that its successor neither loses a request nor completes one twice. The rules are those of
vhost-user's inflight tracking, with one difference: a batch that was about to be published is
finished by the successor, not done again.

Queues whose chains come back in order have a simpler one, `inflightrow.py`.

The area as bytes, native order, at an 8-byte boundary; size is the queue's:

    0  u16  version    0 = holds nothing (the last store when it is made, the first when not)
    2  u16  size
    4  u16  layout     0 split, 1 packed
    6  u16  used       cursor of the next used entry; all before it is settled
    8  u32  intent     cursor after the batch being published << 16 | entry of its last chain
   12  u32  -
   16  size entries of 16 bytes, one per chain in flight (split: by head; packed: by any free one)
       0  u8   taken      1 while the chain is in flight
       2  u16  next       entry of the chain before this one in its batch, or NONE
       4  u32  written    used length
       8  u64  order      count of chains taken so far << 16 | head
    then, packed only, size descriptors of 16 bytes; an entry's chain starts at the same number
       0  u64  addr
       8  u32  len
      12  u16  link       next descriptor of the chain, if flags say NEXT
      14  u16  flags

Why packed keeps descriptors: there the device's used entries overwrite the driver's descriptors,
in the order of completion, so a chain still in flight may no longer be in the ring.

**Order of stores.** Each step below ends in one store that makes it count; killed before that
store, nothing happened, killed after it, all of it did. x86-64 keeps stores in order, and a
killed process's stores are not lost.
  take:    [packed: descriptors] order, **taken = 1**
  publish: [packed, never taken: order, descriptor;] per chain written and next; **intent**; the
           ring's used entries; **the ring's index or first flags**, from where on the driver may
           see them; per chain taken = 0; **used**, which makes intent and used agree
The successor compares intent with used. If they differ it asks the ring whether the driver can
see the batch. If it cannot, it writes the used entries again, the same ones. Then it settles.

The guest cannot reach the area, but a compromised predecessor could write anything into it. So
every value read back is checked, and what is wrong is a GuestError of this device alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.errors import GuestError, HostError
from devices.chain import DESC_F_NEXT, Desc

if TYPE_CHECKING:
    from collections.abc import Sequence

NONE: Final = 0xFFFF  # no entry; a queue has at most 2**15
_HEADER: Final = 16  # bytes; also the size of an entry and of a descriptor


def inflight_bytes(size: int, *, packed: bool) -> int:
    """Return the bytes an in-flight area needs for a queue of `size`."""
    return _HEADER + 16 * size * (2 if packed else 1)


class Inflight:
    """Reads and writes one in-flight area. Knows no ring; `packed` says if it has descriptors."""

    __slots__ = ("_b", "_h", "_i", "_layout", "_nr_taken", "_q", "_size")

    VERSION: Final = 1
    LAYOUT = 0  # of a split queue; a packed one has 1

    def __init__(self, area: memoryview, size: int, *, packed: bool) -> None:
        """Take a view of at least inflight_bytes(size). Changes nothing in it."""
        needed = inflight_bytes(size, packed=packed)
        if len(area) < needed:
            raise HostError(f"in-flight area of {len(area)} bytes; the queue needs {needed}")
        whole = area[:needed]
        self._size, self._layout = size, 1 if packed else self.LAYOUT
        self._b, self._h = whole.cast("B"), whole.cast("H")
        self._i, self._q = whole.cast("I"), whole.cast("Q")
        self._nr_taken = 0

    # What the living process writes.

    def format(self, used: int) -> None:
        """Make the area hold nothing in flight, with `used` as the cursor of the used ring."""
        self._h[0] = 0
        for entry in range(self._size):
            self._b[16 + 16 * entry] = 0
        self._h[1], self._h[2], self._h[3] = self._size, self._layout, used
        self._i[2] = used << 16 | NONE
        self._h[0] = self.VERSION

    def void(self) -> None:
        """Mark the area as holding nothing: the queue was reset."""
        self._h[0] = 0

    def keep(self, slots: Sequence[int], copies: Sequence[Desc]) -> None:
        """Store the descriptors of a packed chain in `slots`, before its `take(slots[0], …)`."""
        base = 2 + 2 * self._size
        for i, (addr, length, flags) in enumerate(copies):
            link = slots[i + 1] if i + 1 < len(slots) else 0
            self._q[base + 2 * slots[i]] = addr
            self._q[base + 2 * slots[i] + 1] = flags << 48 | link << 32 | length

    def take(self, entry: int, head: int) -> None:
        """Record that a chain is in flight from now on."""
        self._nr_taken += 1
        self._q[3 + 2 * entry] = self._nr_taken << 16 | head
        self._b[16 + 16 * entry] = 1

    def take_all(self, heads: Sequence[int]) -> None:
        """Record that these chains of a split queue are in flight from now on."""
        for head in heads:
            self.take(head, head)

    def name(self, entry: int, head: int) -> None:
        """Say whose an entry is that is not in flight: a packed chain in one place of the ring.

        It is for a batch that is published without having been taken.
        """
        self._q[3 + 2 * entry] = head
        self._q[3 + 2 * self._size + 2 * entry] = 0

    def drop(self, entry: int) -> None:
        """Record that a chain went back to the driver's side, unused; the latest go first."""
        self._b[16 + 16 * entry] = 0

    def begin(self, batch: Sequence[tuple[int, int]], used: int) -> None:
        """Announce that `batch`, pairs of entry and used length, is about to be published.

        `used` is the cursor of the used ring after the batch. `settle` must follow.
        """
        previous = NONE
        for entry, written in batch:
            self._i[5 + 4 * entry] = written
            self._h[9 + 8 * entry] = previous
            previous = entry
        self._i[2] = used << 16 | previous

    def settle(self, batch: Sequence[tuple[int, int]], used: int) -> None:
        """Record that the driver can see all of `batch`."""
        for entry, _ in batch:
            self._b[16 + 16 * entry] = 0
        self._h[3] = used

    # What its successor reads.

    def holds_queue(self) -> bool:
        """Tell whether a predecessor left its queue here. Raises GuestError if it is another's."""
        version, size, layout = self._h[0], self._h[1], self._h[2]
        if version == 0:
            return False
        if (version, size, layout) != (self.VERSION, self._size, self._layout):
            raise GuestError(
                f"in-flight area is version {version}, size {size}, layout {layout}; "
                f"the queue needs {self.VERSION}, {self._size}, {self._layout}"
            )
        return True

    @property
    def used(self) -> int:
        """Cursor of the used ring, as far as settled."""
        return self._h[3]

    def unsettled(self) -> tuple[list[tuple[int, int]], int]:
        """Return the batch that was being published, oldest first, and the cursor after it.

        The batch is empty when none was.
        """
        used, entry = divmod(self._i[2], 1 << 16)
        batch: list[tuple[int, int]] = []
        if used != self.used:
            while entry != NONE:
                if entry >= self._size or len(batch) >= self._size:
                    raise GuestError("in-flight area: broken batch")
                batch.append((entry, self._i[5 + 4 * entry]))
                entry = self._h[9 + 8 * entry]
        return batch[::-1], used

    def taken(self) -> list[int]:
        """Return the entries in flight, oldest first; `take` counts on from the youngest."""
        entries = [entry for entry in range(self._size) if self._b[16 + 16 * entry]]
        entries.sort(key=lambda entry: self._q[3 + 2 * entry])
        if entries:
            self._nr_taken = self._q[3 + 2 * entries[-1]] >> 16
        return entries

    def head(self, entry: int) -> int:
        """Return the head of an entry's chain."""
        return self._q[3 + 2 * entry] & 0xFFFF

    def chain(self, entry: int) -> tuple[list[int], list[Desc]]:
        """Return the slots and the descriptors of a packed chain."""
        base = 2 + 2 * self._size
        slots: list[int] = []
        copies: list[Desc] = []
        slot = entry
        while True:
            if slot >= self._size or len(slots) >= self._size:
                raise GuestError("in-flight area: broken chain")
            rest = self._q[base + 2 * slot + 1]
            flags = rest >> 48
            slots.append(slot)
            copies.append((self._q[base + 2 * slot], rest & 0xFFFF_FFFF, flags))
            if not flags & DESC_F_NEXT:
                return slots, copies
            slot = rest >> 32 & 0xFFFF
