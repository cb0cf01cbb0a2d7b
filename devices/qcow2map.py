"""Where the bytes of a qcow2 disk are: L1 and L2 tables, looked up, changed, and written.

    guest cluster ─► L1 entry ─► L2 table, one cluster of entries ─► host cluster

A change is made in memory first; `commit` writes it. Between the two, the file still shows the
old state, whole. Where the old state was more than zeroes, new data must be on the medium before
an entry points to it, so `commit` begins with a sync: one for all that changed since the last.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Final

from devices.qcow2file import COPIED, OFFSET_MASK, open_problem
from devices.qcow2head import AT_L1, L1

if TYPE_CHECKING:
    from devices.qcow2alloc import Allocator
    from devices.qcow2file import ImageFile
    from devices.qcow2refs import Refcounts

CACHE_BYTES: Final = 8 << 20  # of L2 tables in memory, but at least four
_MOST_ABSENT: Final = 1 << 14  # tables in memory when those that are not there are counted, too
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
RESERVED: Final = 0x3F000000_000001FE

# What `fast` says of a cluster, if not the offset of its data, which may be read and written.
UNKNOWN, NOTHING, ZEROES, SHARED, PACKED = -1, -2, -3, -4, -5

_L1: Final = "the L1 table"
_L2: Final = "an L2 table"


class Mapping:
    """L1 table, and as much of the L2 tables as is in use.

    `fast[n][i]` is the state of entry i of L2 table n, kept in step with `entries[n][i]`, which
    is what the file holds or, until `commit`, will.
    """

    def __init__(self, file: ImageFile, refs: Refcounts | None, alloc: Allocator | None) -> None:
        """Read the L1 table; without `alloc` it is to be read only. Raises ConfigError, OSError."""
        self._file, self._refs, self._alloc = file, refs, alloc
        header = file.header
        self.per_table = file.cluster_size >> 3
        length = 8 * header.l1_entries
        if length and header.l1_offset + length > file.end:
            raise open_problem(
                f"l1_table_offset {header.l1_offset:#x}: {length} bytes from there end beyond "
                f"the file, {file.end:#x}"
            )
        self.l1 = file.words(header.l1_offset, header.l1_entries)
        file.guard.cover("the header", (0, file.cluster_size))
        file.guard.cover(_L1, (header.l1_offset, length))
        if alloc is not None:
            self._check_l1()
        self.fast: dict[int, array[int]] = {}
        self.entries: dict[int, array[int]] = {}
        #: What of the disk is in a window, by cluster: forgotten as soon as the cluster moves.
        self.spots: dict[int, memoryview] = {}
        self._nothing = array("q", [NOTHING]) * self.per_table  # of every table that is not there
        self._most_tables = max(CACHE_BYTES >> file.bits, 4)
        self._changed: dict[int, set[int]] = {}
        self._barrier = False
        self._stale: list[tuple[int, int]] = []

    def _check_l1(self) -> None:
        """Refuse tables of which two are in one place: a write would be seen twice."""
        at, file = self._file.header.l1_offset, self._file
        offsets = [entry & OFFSET_MASK for entry in self.l1 if entry & OFFSET_MASK]
        for index, entry in enumerate(self.l1):
            offset = entry & OFFSET_MASK
            where = f"L1 entry {index} at {at + 8 * index:#x} is {entry:#x}"
            if entry and (entry & ~OFFSET_MASK & ~COPIED or not file.holds(offset)):
                raise open_problem(f"{where}: no cluster of the file, which ends {file.end:#x}")
            if offset and (owner := file.guard.hit(offset)):
                raise open_problem(f"{where}: {owner} is there")
        if twice := file.guard.fill(_L2, offsets):
            raise open_problem(f"L1 table: {twice:#x} is in two entries")

    @property
    def changed(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._changed)

    # Looking up.

    def load(self, number: int) -> array[int] | None:
        """Return the states of an L2 table, None if there is no such table. Raises OSError."""
        fast = self.fast.get(number)
        if fast is not None:
            return fast if fast is not self._nothing else None
        entry = self.l1[number]
        offset = entry & OFFSET_MASK
        if not offset:
            if len(self.fast) < _MOST_ABSENT:
                self.fast[number] = self._nothing
            return None
        if entry & ~OFFSET_MASK & ~COPIED or not self._file.holds(offset):
            raise self._file.corrupt(f"L1 entry {number} is {entry:#x}, no cluster of the file")
        entries = self._file.words(offset, self.per_table)
        return self._keep(number, entries)

    def _keep(self, number: int, entries: array[int]) -> array[int]:
        """Put a table into the cache, and the oldest ones out."""
        while len(self.entries) >= self._most_tables:
            oldest = next(iter(self.entries))
            if oldest in self._changed:
                self.commit()
            del self.entries[oldest], self.fast[oldest]
        self.entries[number] = entries
        self.fast[number] = fast = array("q", [UNKNOWN]) * self.per_table
        return fast

    def state(self, number: int, index: int) -> int:
        """Return an offset, or what else an entry of a loaded table stands for. Raises OSError."""
        state = self.fast[number][index]
        if state == UNKNOWN:
            state = self.fast[number][index] = self._decode(number, index)
        return state

    def _decode(self, number: int, index: int) -> int:
        file, entry = self._file, self.entries[number][index]
        offset = entry & OFFSET_MASK
        if entry & COMPRESSED:
            if entry & COPIED:
                raise self._wrong(number, index, "compressed clusters are not written in place")
            self._check_hosts(number, index, *self._packed_clusters(entry))
            return PACKED
        if entry & RESERVED or (entry & ZERO and file.header.version < 3):
            raise self._wrong(number, index, "reserved bits are set")
        if not offset:
            if entry & COPIED:
                raise self._wrong(number, index, "it lacks an offset")
            return ZEROES if entry & ZERO else NOTHING
        if not file.holds(offset):
            raise self._wrong(number, index, f"no cluster of the file, which ends {file.end:#x}")
        self._check_hosts(number, index, offset, 1)
        if entry & ZERO:
            return ZEROES
        if self._refs is None:
            return offset  # never written to
        return offset if entry & COPIED and self.table_is_ours(number) else SHARED

    def _check_hosts(self, number: int, index: int, offset: int, count: int) -> None:
        """Refuse clusters that are metadata, or free: they must be neither written nor freed."""
        if self._refs is None:
            return
        file = self._file
        for at in range(offset, offset + (count << file.bits), file.cluster_size):
            if owner := file.guard.hit(at):
                raise self._wrong(number, index, f"{owner} is there")
            if at < file.end and not self._refs.get(at >> file.bits):
                raise self._wrong(number, index, f"the refcount at {at:#x} is 0")

    def table_is_ours(self, number: int) -> bool:
        """Whether an L2 table may be changed in place."""
        return bool(self.l1[number] & COPIED)

    def _wrong(self, number: int, index: int, why: str) -> OSError:
        table, entry = self.l1[number] & OFFSET_MASK, self.entries[number][index]
        where = f"L2 entry {index} at {table + 8 * index:#x}"
        return self._file.corrupt(f"{where} is {entry:#x}: {why}")

    # Changing.

    def open(self, number: int) -> array[int]:
        """Return the states of an L2 table that may be changed, made if need be. Raises OSError."""
        file, alloc = self._file, self.writer()
        fast, old = self.load(number), self.l1[number] & OFFSET_MASK
        if fast is not None and self.table_is_ours(number):
            return fast
        offset = alloc.take(1)[0]
        self._forget(alloc)
        if fast is not None:
            try:
                self._copy_table(number, offset)
            except OSError:
                alloc.untake(offset, 1)
                raise
        self._put_l1(number, offset)
        fast = self.fast[number] if fast is not None else None
        if fast is None:  # what was taken reads as zeroes, and so does an empty table
            return self._keep(number, array("Q", bytes(file.cluster_size)))
        alloc.drop(old)
        file.guard.remove(_L2, old)
        return fast

    def _forget(self, alloc: Allocator) -> None:
        """Before a cluster that once was data becomes a table: look again at what points there.

        In a sound image nothing does.
        """
        if alloc.reused:
            self.spots.clear()
            for number in self.entries:
                self.fast[number] = array("q", [UNKNOWN]) * self.per_table

    def _copy_table(self, number: int, offset: int) -> None:
        """Write a table that is shared to a new place, with flags that are no more than true."""
        file, entries, refs = self._file, self.entries[number], self._refs
        for index, entry in enumerate(entries):
            host = entry & OFFSET_MASK
            if entry & COPIED and (refs is None or refs.get(host >> file.bits) != 1):
                entries[index] = entry & ~COPIED
        words = array("Q", entries)
        words.byteswap()
        file.put(offset, words.tobytes())
        file.sync()

    def _put_l1(self, number: int, offset: int) -> None:
        entry = offset | COPIED
        self._file.put(self._file.header.l1_offset + 8 * number, entry.to_bytes(8, "big"))
        self.l1[number] = entry
        self._file.guard.add(_L2, offset)

    def move_l1(self, count: int) -> None:
        """Make the L1 table one of `count` entries, elsewhere. Raises OSError."""
        file, alloc, header = self._file, self.writer(), self._file.header
        self.commit()
        table = array("Q", self.l1)
        table.extend([0] * (count - len(table)))
        clusters = -(-8 * count >> file.bits)
        offset = alloc.take_row(clusters)
        self._forget(alloc)
        words = array("Q", table)
        words.byteswap()
        try:
            file.put(offset, words.tobytes())
            file.sync()
        except OSError:
            alloc.untake(offset, clusters)
            raise
        file.change_header(AT_L1, L1.pack(count, offset), l1_entries=count, l1_offset=offset)
        self.l1 = table
        file.guard.cover(_L1, (offset, 8 * count))
        alloc.drop(header.l1_offset, -(-8 * header.l1_entries >> file.bits))
        file.sync()

    def change(self, number: int, index: int, entries: list[int], *, barrier: bool) -> None:
        """Set entries of a table that was opened; what they pointed to is given up.

        `barrier`: what the disk read there before was more than zeroes, and will be replaced.
        """
        table, fast = self.entries[number], self.fast[number]
        first = number * self.per_table
        for i, entry in enumerate(entries, index):
            self.spots.pop(first + i, None)
            self._give_up(table[i])
            table[i] = entry
            fast[i] = UNKNOWN
            if entry & COPIED and not entry & ZERO:
                fast[i] = entry & OFFSET_MASK
        self._changed.setdefault(number, set()).update(range(index, index + len(entries)))
        self._barrier |= barrier

    def _give_up(self, entry: int) -> None:
        if entry & COMPRESSED:
            self._stale.append(self._packed_clusters(entry))
        elif entry & OFFSET_MASK:
            self._stale.append((entry & OFFSET_MASK, 1))

    def _packed_clusters(self, entry: int) -> tuple[int, int]:
        """Return the offset, and the number, of the host clusters that compressed data is in."""
        file = self._file
        offset, length = packed_span(entry, file.bits)
        stop = min(offset + length, file.end)  # behind it there is only padding, not written
        first = offset - (offset & file.cluster_size - 1)
        return first, max(-(-(stop - first) >> file.bits), 0)

    def commit(self) -> None:
        """Write what was changed. Raises OSError; then what is not written stays to be."""
        if not self._changed:
            return
        file, alloc = self._file, self.writer()
        if self._barrier:
            file.sync()
            self._barrier = False
        while self._changed:
            number, indices = next(iter(self._changed.items()))
            table, at = self.entries[number], self.l1[number] & OFFSET_MASK
            ordered = sorted(indices)
            start = 0
            for i, index in enumerate(ordered):
                if i + 1 == len(ordered) or ordered[i + 1] != index + 1:
                    words = table[ordered[start] : index + 1]
                    words.byteswap()
                    file.put(at + 8 * ordered[start], words.tobytes())
                    start = i + 1
            del self._changed[number]
        stale, self._stale = self._stale, []
        for offset, count in stale:
            alloc.drop(offset, count)

    def writer(self) -> Allocator:
        """Return what clusters come from. Raises OSError if the image must not be written to."""
        self._file.may_write()
        if self._alloc is None:
            raise OSError(errno.EROFS, "the image was opened to be read")
        return self._alloc


def packed_span(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return where in the file compressed data begins, and the most bytes it can have."""
    split = 62 - (cluster_bits - 8)
    offset = entry & (1 << split) - 1
    sectors = (entry >> split & (1 << cluster_bits - 8) - 1) + 1
    return offset, 512 * sectors - (offset & 511)
