"""What refers to which host clusters of a qcow2 image: all there is, counted.

The one truth about refcounts: `qcow2check` compares them with it, `qcow2rebuild` makes them anew
from it. Everything is read from the file, nothing is taken from caches.
"""

from __future__ import annotations

import errno
from array import array
from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol

from config.errors import ConfigError
from devices.qcow2file import COPIED, OFFSET_MASK
from devices.qcow2head import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS
from devices.qcow2map import COMPRESSED, RESERVED, ZERO, packed_span
from devices.qcow2snap import snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.qcow2file import ImageFile

CHUNK: Final = 1 << 15  # clusters counted together
MOST_CHUNKS: Final = 1 << 13  # with a cluster in use: 1 GiB of counters, for 16 TiB by default
MOST_TEXTS: Final = 50  # findings that are put into words
_BITMAPS: Final = Struct(">IIQQ")
_BITMAP: Final = Struct(">QIIBBHI")


class Progress(Protocol):
    """Hears how far long work is, and may end it by what it raises."""

    def start(self, total: int) -> None:
        """`total` bytes of the disk are to be looked at."""

    def add(self, count: int) -> None:
        """So many more have been."""


class Usage:
    """Counts references to each host cluster."""

    def __init__(self, file: ImageFile, progress: Progress | None = None) -> None:
        """Walk all tables but the refcounts'. Raises OSError."""
        self.file, self._progress = file, progress
        if progress is not None:
            progress.start(file.header.size)
        self.chunks: dict[int, array[int]] = {}
        self.problems = 0
        self.texts: list[str] = []
        self.allocated = self.compressed = 0  # guest clusters of the disk itself
        header = file.header
        self.add(0, 1)
        self.add_range("the L1 table", header.l1_offset, 8 * header.l1_entries)
        self._walk("L1", header.l1_offset, header.l1_entries, active=True)
        try:
            found, length = snapshots(file)
        except ConfigError as err:
            self.complain(err.what)
            found, length = [], 0
        self.add_range("the snapshot table", header.snapshots_offset, length)
        for snapshot in found:
            name, offset, entries = snapshot.name, snapshot.l1_offset, snapshot.l1_entries
            self.add_range(f"the L1 table of snapshot {name!r}", offset, 8 * entries)
            self._walk(f"snapshot {name!r} L1", offset, entries, active=False)
        self._count_bitmaps()

    def add(self, cluster: int, count: int) -> None:
        """Count a reference to each of `count` clusters."""
        for at in range(cluster, cluster + count):
            chunk = self.chunks.get(at // CHUNK)
            if chunk is None:
                chunk = self._new_chunk(at // CHUNK)
            chunk[at % CHUNK] += 1

    def _new_chunk(self, number: int) -> array[int]:
        """Begin to count a chunk. Raises OSError: tables may point anywhere in a sparse file."""
        if len(self.chunks) >= MOST_CHUNKS:
            what = f"clusters are in use in more than {MOST_CHUNKS} pieces of {CHUNK} clusters"
            raise OSError(errno.EFBIG, f"{what}: qemu-img check may look at so large an image")
        self.chunks[number] = chunk = array("I", bytes(4 * CHUNK))
        return chunk

    def forget(self, cluster: int) -> None:
        """Count a reference less."""
        self.chunks[cluster // CHUNK][cluster % CHUNK] -= 1

    def slice(self, first: int, count: int) -> array[int]:
        """Return the counts of adjacent clusters."""
        found = array("I")
        while count:
            at = first % CHUNK
            here = min(count, CHUNK - at)
            chunk = self.chunks.get(first // CHUNK)
            found.extend(chunk[at : at + here] if chunk else array("I", bytes(4 * here)))
            first, count = first + here, count - here
        return found

    def used(self) -> Iterator[int]:
        """Yield the clusters that are referred to, in order."""
        for number, chunk in sorted(self.chunks.items()):
            for index, count in enumerate(chunk):
                if count:
                    yield number * CHUNK + index

    def complain(self, text: str) -> None:
        """Note something that is wrong."""
        self.problems += 1
        if len(self.texts) < MOST_TEXTS:
            self.texts.append(text)

    def add_range(self, name: str, offset: int, length: int) -> None:
        """Count a table."""
        if not length:
            return
        file = self.file
        if not file.holds(offset) or offset + length > file.end:
            self.complain(f"{name}: {length} bytes at {offset:#x}, the file ends at {file.end:#x}")
            return
        self.add(offset >> file.bits, -(-length >> file.bits))

    def _walk(self, name: str, offset: int, entries: int, *, active: bool) -> None:
        """Count what an L1 table reaches."""
        file = self.file
        if offset + 8 * entries > file.end:
            return  # said already
        per_table = file.cluster_size >> 3 << file.bits
        for index, entry in enumerate(file.words(offset, entries)):
            if active and self._progress is not None:
                self._progress.add(min(per_table, max(file.header.size - index * per_table, 0)))
            if not entry:
                continue
            table = entry & OFFSET_MASK
            where = f"{name} entry {index} at {offset + 8 * index:#x} is {entry:#x}"
            if entry & ~OFFSET_MASK & ~COPIED or not file.holds(table):
                self.complain(f"{where}: no cluster of the file, which ends at {file.end:#x}")
                continue
            self.add(table >> file.bits, 1)
            self._walk_l2(table, active=active)

    def _walk_l2(self, table: int, *, active: bool) -> None:
        file, chunks = self.file, self.chunks
        bits, end, odd = file.bits, file.end, ~OFFSET_MASK & ~COPIED | file.cluster_size - 1
        words = file.words(table, file.cluster_size >> 3)
        if not any(words):
            return
        for index, entry in enumerate(words):
            host = entry & OFFSET_MASK
            if entry & odd or not host or host >= end:
                if entry:
                    self._count_odd(table, index, entry, active=active)
                continue
            cluster = host >> bits  # inlined, since there are millions
            chunk = chunks.get(cluster // CHUNK)
            if chunk is None:
                chunk = self._new_chunk(cluster // CHUNK)
            chunk[cluster % CHUNK] += 1
            self.allocated += active

    def _count_odd(self, table: int, index: int, entry: int, *, active: bool) -> None:
        """Count what an L2 entry refers to that is not simply data."""
        file, bits = self.file, self.file.bits
        host = entry & OFFSET_MASK
        bad_bits = RESERVED if file.header.version >= 3 else RESERVED | ZERO
        if entry & COMPRESSED:
            host, length = packed_span(entry, bits)
            last = (host + length - 1) >> bits
            # Sectors behind the end of the file are padding that was never written.
            if entry & COPIED or not 0 < host < file.end or last << bits > file.end:
                self._bad(table, index, entry)
                return
            self.add(host >> bits, last - (host >> bits) + 1)
            self.compressed += active
        elif entry & bad_bits or (host and not file.holds(host)) or entry == COPIED:
            self._bad(table, index, entry)
            return
        elif host:
            self.add(host >> bits, 1)
        self.allocated += active and (host != 0 or bool(entry & COMPRESSED))

    def _bad(self, table: int, index: int, entry: int) -> None:
        where = f"L2 entry {index} at {table + 8 * index:#x}"
        self.complain(f"{where} is {entry:#x}: the file ends at {self.file.end:#x}")

    def _count_bitmaps(self) -> None:
        """Count what persistent bitmaps occupy, while they are valid."""
        file, header = self.file, self.file.header
        data = header.extension(EXTENSION_BITMAPS)
        if data is None or not header.autoclear & AUTOCLEAR_BITMAPS:
            return
        if len(data) < _BITMAPS.size:
            self.complain(f"the bitmaps extension has {len(data)} bytes")
            return
        number, _, length, offset = _BITMAPS.unpack_from(data)
        if length > 64 << 20 or offset + length > file.end:
            self.complain(f"the bitmap directory: {length} bytes at {offset:#x}")
            return
        self.add_range("the bitmap directory", offset, length)
        directory, at = file.get(offset, length), 0
        for _ in range(number):
            if at + _BITMAP.size > length:
                self.complain(f"the bitmap directory ends within an entry, at {offset + at:#x}")
                return
            table, entries, _, _, _, name, extra = _BITMAP.unpack_from(directory, at)
            self.add_range("a bitmap table", table, 8 * entries)
            if entries <= 1 << 22 and table + 8 * entries <= file.end:
                for entry in file.words(table, entries):
                    if entry & OFFSET_MASK:
                        self.add_range("a bitmap", entry & OFFSET_MASK, file.cluster_size)
            size = _BITMAP.size + name + extra
            at += size + -size % 8
