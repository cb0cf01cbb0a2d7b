"""Reference counts of a qcow2 image: the table, its blocks, and making both larger.

    header ─► refcount table, contiguous ─► refcount blocks of one cluster each ─► counters

Written through, blocks cached within bounds. What is new is complete on the medium before
anything points to it: a block before its table entry, a table before the header's field.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Final

from devices import qcow2head
from devices.qcow2block import Block
from devices.qcow2file import open_problem

if TYPE_CHECKING:
    from devices.qcow2file import ImageFile

CACHE_BYTES: Final = 4 << 20  # of blocks in memory, but at least two blocks
_TABLE: Final = "the refcount table"
_BLOCKS: Final = "a refcount block"


class Refcounts:
    """Counts references to host clusters; a cluster is named by its number."""

    def __init__(self, file: ImageFile) -> None:
        """Read the table. Raises ConfigError for one that cannot be true, OSError."""
        self._file, header = file, file.header
        self.bits = header.refcount_bits
        self.most = (1 << self.bits) - 1
        self.per_block = (file.cluster_size << 3) // self.bits
        length = header.refcount_clusters << file.bits
        if header.refcount_offset + length > file.end:
            raise open_problem(
                f"refcount_table_offset {header.refcount_offset:#x}: "
                f"{length} bytes from there end beyond the file, {file.end:#x}"
            )
        self.table = file.words(header.refcount_offset, length >> 3)
        file.guard.cover(_TABLE, (header.refcount_offset, length))
        self._check_table()
        self._blocks: dict[int, Block] = {}
        self._most_blocks = max(CACHE_BYTES >> file.bits, 2)

    def _check_table(self) -> None:
        file = self._file
        at = file.header.refcount_offset
        for index, offset in enumerate(self.table):
            if offset:
                where = f"refcount table entry {index} at {at + 8 * index:#x} is {offset:#x}"
                if not file.holds(offset):
                    raise open_problem(f"{where}: no cluster of the file, which ends {file.end:#x}")
                if owner := file.guard.hit(offset):
                    raise open_problem(f"{where}: {owner} is there")
        if twice := file.guard.fill(_BLOCKS, (offset for offset in self.table if offset)):
            raise open_problem(f"refcount table: {twice:#x} is in two entries")

    def get(self, cluster: int) -> int:
        """Return how often a cluster is referenced. Raises OSError."""
        number, index = divmod(cluster, self.per_block)
        block = self.block(number)
        return block.get(index) if block is not None else 0

    def block(self, number: int) -> Block | None:
        """Return a refcount block, None where there is none. Raises OSError."""
        block = self._blocks.get(number)
        if block is None:
            offset = self.table[number] if number < len(self.table) else 0
            if not offset:
                return None
            block = Block(self._file.get(offset, self._file.cluster_size), self.bits)
            while len(self._blocks) >= self._most_blocks:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = block
        return block

    def set(self, cluster: int, count: int, value: int) -> None:
        """Write the counters of adjacent clusters, all of which have blocks. Raises OSError."""
        while count:
            number, index = divmod(cluster, self.per_block)
            block = self.block(number)
            if block is None:
                raise self._file.corrupt(f"cluster {cluster:#x} has no refcount block")
            here = min(count, self.per_block - index)
            at, data = block.patch(index, here, value)
            self._file.put(self.table[number] + at, data)
            block.data[at : at + len(data)] = data  # only once the file has it
            cluster, count = cluster + here, count - here

    def drop(self, cluster: int) -> bool:
        """Count one reference less; return whether that was the last. Raises OSError."""
        value = self.get(cluster)
        if not value:
            raise self._file.corrupt(f"cluster {cluster:#x} is in use, and its refcount 0")
        self.set(cluster, 1, value - 1)
        return value == 1

    def find_free(self, start: int, most: int) -> tuple[int, int]:
        """Return the first free cluster from `start`, and how many there are, at most `most`.

        Only where there are blocks, and within one; (0, 0) if there is none.
        """
        number, index = divmod(start, self.per_block)
        for at in range(number, len(self.table)):
            block = self.block(at) if self.table[at] else None
            if block is not None:
                first, count = block.find_free(index, most)
                if count:
                    return at * self.per_block + first, count
            index = 0
        return 0, 0

    def grow(self, payload: int) -> int:
        """Make `payload` new clusters with refcount 1, all in a row; return the first's number.

        They come where nothing is counted yet, with new blocks behind them and, if the table is
        too short, a new table behind these. With 0, there is room to find afterwards. To be
        synced before anything points to them. Raises OSError.
        """
        file, per_block = self._file, self.per_block
        number, blocks, table_clusters = self._plan(payload)
        first = number * per_block
        used = payload + blocks + table_clusters
        offset = first << file.bits
        if offset + (used << file.bits) > qcow2head.OFFSET_END:
            raise OSError(errno.EFBIG, "the image has no room for more clusters")
        for cluster in range(first, first + used):
            if owner := file.guard.hit(cluster << file.bits) or (not cluster and "the header"):
                raise file.corrupt(f"cluster {cluster:#x} has no refcount, and {owner} is there")
        file.clear(offset, used << file.bits)
        blocks_at = offset + (payload << file.bits)
        for i in range(blocks):
            block = Block(bytearray(file.cluster_size), self.bits)
            counted = min(max(used - i * per_block, 0), per_block)
            block.set(0, counted, 1)
            file.put(blocks_at + (i << file.bits), block.data)
        table = array("Q", self.table)
        if table_clusters:
            table.extend([0] * ((table_clusters << file.bits - 3) - len(table)))
        for i in range(blocks):
            table[number + i] = blocks_at + (i << file.bits)
        if table_clusters:
            self._move_table(table, blocks_at + (blocks << file.bits), table_clusters)
        else:
            file.sync()
            entries = table[number : number + blocks]
            entries.byteswap()
            file.put(file.header.refcount_offset + 8 * number, entries.tobytes())
            self.table = table
        for at in range(number, number + blocks):
            file.guard.add(_BLOCKS, table[at])
        return first

    def _plan(self, payload: int) -> tuple[int, int, int]:
        """Return the first new block's number, and how many clusters of blocks and of table."""
        number = len(self.table)
        while number and not self.table[number - 1]:
            number -= 1
        blocks, table_clusters = 1, 0
        while True:
            entries = number + blocks
            if entries > len(self.table):
                table_clusters = -(-(entries + entries // 4) * 8 >> self._file.bits)
            needed = -(-(payload + blocks + table_clusters) // self.per_block)
            if needed <= blocks:
                break
            blocks = needed
        limit = max(qcow2head.MOST_REFCOUNT_TABLE_BYTES, self._file.cluster_size)
        if table_clusters << self._file.bits > limit:
            raise OSError(errno.EFBIG, "the image's refcount table can grow no more")
        return number, blocks, table_clusters

    def _move_table(self, table: array[int], offset: int, clusters: int) -> None:
        """Write a new table, and make it the image's; the old one becomes free."""
        file, header = self._file, self._file.header
        data = array("Q", table)
        data.byteswap()
        file.put(offset, data.tobytes())
        file.sync()
        file.change_header(
            qcow2head.AT_REFCOUNT_TABLE,
            qcow2head.REFCOUNT_TABLE.pack(offset, clusters),
            refcount_offset=offset,
            refcount_clusters=clusters,
        )
        self.table = table
        file.guard.cover(_TABLE, (offset, clusters << file.bits))
        file.sync()
        self.set(header.refcount_offset >> file.bits, header.refcount_clusters, 0)
