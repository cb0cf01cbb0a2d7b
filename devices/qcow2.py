"""qcow2 images as a `raw.Disk`: opened, read, and put together from the parts below.

    request ─► attempt: one look into a cached L2 table ─► preadv/pwritev on the file     (hot)
            └► read, write, …: run by run ─► data, zeroes, base, compressed, new clusters

    qcow2head   the header                 qcow2write   writes, copy on write, discard, growth
    qcow2file   the file, what is where    qcow2alloc   taking and freeing clusters
    qcow2map    L1 and L2 tables           qcow2refs    refcount table and blocks
    qcow2zip    compressed clusters        qcow2block   counters of 1 to 64 bits

**What a kill or a power cut leaves.** Refcounts are on the medium before a cluster is used, old
clusters lose theirs only when nothing on the medium points to them, and an entry is written after
what it points to. So the worst is a leak. `commit`, called before a write is reported, brings the
map into the file: what was reported survives the death of this process, what was flushed that of
the host.

The header of a base describes its own contents and nothing else: a file it names is never opened.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices import qcow2head, qcow2rebuild
from devices.qcow2alloc import Allocator
from devices.qcow2file import OFFSET_MASK, ImageFile
from devices.qcow2map import NOTHING, PACKED, SHARED, ZEROES, Mapping
from devices.qcow2refs import Refcounts
from devices.qcow2snap import guard_snapshots
from devices.qcow2write import Writer
from devices.qcow2zip import Unpacker
from devices.raw import Raw, Run
from devices.views import copy, cut, zero

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.raw import Attempt, Disk, Locate
    from devices.window import Window

FORMATS: Final = ("raw", "qcow2")
_KINDS: Final = {NOTHING: "unallocated", ZEROES: "zero", PACKED: "compressed"}


def open_chain(fds: Sequence[int], formats: Sequence[str], *, again: bool = False) -> Disk:
    """Return the disk that a chain of images shows; the first of them is what gets written.

    `again`: somebody had it, and was killed. So an image that has turned out to be corrupt
    meanwhile can be had, too, to be read, which is all that the other could do.
    Raises ConfigError for an image that cannot be used, HostError, OSError.
    """
    disk: Disk | None = None
    for fd, name in reversed(list(zip(fds, formats, strict=True))):
        if name not in FORMATS:
            raise ConfigError(f"disk format {name!r}: {' or '.join(FORMATS)} is expected")
        if name == "raw" and disk is not None:
            raise ConfigError("a raw image stands on nothing, and a base is given")
        disk = Raw(fd) if name == "raw" else Qcow2(fd, disk, again=again)
    if disk is None:
        raise ConfigError("a chain of no images")
    return disk


class Qcow2:
    """A qcow2 image, on a descriptor opened by somebody who was allowed to."""

    def __init__(self, fd: int, base: Disk | None = None, *, again: bool = False) -> None:
        """Take over `fd`; `base` is what shows where the image has nothing; see `open_chain`.

        Refcounts of an image that was not closed properly are made anew if it can be written.
        Raises ConfigError for an image that cannot be used, HostError, OSError.
        """
        self.file = file = ImageFile(fd)
        header = file.header
        if base is None and header.backing_file:
            raise ConfigError(
                f"qcow2 image: it stands on the backing file {header.backing_file!r}, none is given"
            )
        if base is not None and not header.backing_file:
            raise ConfigError("qcow2 image: a base is given, and its header names no backing file")
        if header.corrupt and not file.raw.readonly and not again:
            raise ConfigError(
                "qcow2 image: it is marked corrupt, and must not be written to",
                hint="pyvmctl image check --repair all, or open it with readonly: true",
            )
        self.fd, self.size, self.base = fd, header.size, base
        self.readonly = file.raw.readonly
        self.granularity = file.cluster_size
        refs = alloc = None
        if not file.readonly:
            self._claim()
            refs = Refcounts(file)
            alloc = Allocator(file, refs)
        self.map_ = map_ = Mapping(file, refs, alloc)
        if alloc is not None:
            guard_snapshots(file)
        self._alloc = alloc
        self._writer = Writer(file, map_, self)
        self._bits, self._mask = file.bits, file.cluster_size - 1
        self._table_bits = 2 * self._bits - 3  # of the bytes that one L2 table maps
        self._index_mask = map_.per_table - 1
        self._unpacker = Unpacker(file)
        self._tries = self._make_attempts()
        self.locate: Locate | None = self._make_locate()
        self.window: Window | None = file.raw.window
        if self.window is not None:
            self.window.divide(self._bits, self._find)
            map_.spots = self.window.spots
        if file.readonly:
            file.protect()

    def _claim(self) -> None:
        """Make an image ours to write to. Raises ConfigError, OSError."""
        file = self.file
        if file.header.dirty:
            qcow2rebuild.rebuild(file)
        if file.header.autoclear:  # something we do not keep up to date
            file.change_header(qcow2head.AT_AUTOCLEAR, bytes(8), autoclear=0)
            file.sync()

    # Transfers.

    def attempts(self) -> tuple[Attempt, Attempt]:
        """See Disk."""
        return self._tries

    def _make_attempts(self) -> tuple[Attempt, Attempt]:
        """Return transfers within one cluster that is known, and in place: nearly all there are."""
        table_of, bits, table_bits = self.map_.fast.get, self._bits, self._table_bits
        cluster_size, mask, index_mask = self.file.cluster_size, self._mask, self._index_mask
        base, base_read, base_size = self.base, None, 0
        if base is not None:
            base_read, base_size = base.attempts()[0], base.size
        file = self.file
        file_read, file_write = file.raw.attempts()

        def read(views: Sequence[memoryview], offset: int) -> int:
            table = table_of(offset >> table_bits)
            if table is None:
                return -1
            host, within = table[offset >> bits & index_mask], offset & mask
            length = len(views[0]) if len(views) == 1 else sum(map(len, views))
            if within + length > cluster_size:
                return -1
            if host >= 0:
                return file_read(views, host + within)
            if host == NOTHING and base_read is not None and offset + length <= base_size:
                return base_read(views, offset)
            return -1

        def write(views: Sequence[memoryview], offset: int) -> int:
            table = table_of(offset >> table_bits)
            if table is None:
                return -1
            host, within = table[offset >> bits & index_mask], offset & mask
            length = len(views[0]) if len(views) == 1 else sum(map(len, views))
            if host < 0 or within + length > cluster_size or file.readonly:
                return -1
            return file_write(views, host + within)

        return read, write

    def _make_locate(self) -> Locate:
        """Return what finds bytes of one cluster that is known, and in place."""
        table_of, bits, table_bits = self.map_.fast.get, self._bits, self._table_bits
        cluster_size, mask, index_mask = self.file.cluster_size, self._mask, self._index_mask
        file = self.file

        def locate(offset: int, length: int, write: int) -> int:
            table = table_of(offset >> table_bits)
            if table is None:
                return -1
            host, within = table[offset >> bits & index_mask], offset & mask
            if host < 0 or within + length > cluster_size or (write and file.readonly):
                return -1
            return host + within

        return locate

    def _find(self, cluster: int) -> int:
        """Return where in the file a cluster is, if it is known and in place, else a negative."""
        table = self.map_.fast.get(cluster // self.map_.per_table)
        return NOTHING if table is None else table[cluster & self._index_mask]

    def place(self, offset: int, length: int, *, write: bool, stable: bool = False) -> int:
        """See Disk."""
        file = self.file
        if (stable and file.unsynced) or (write and file.readonly):
            return -1
        within, table = offset & self._mask, self.map_.fast.get(offset >> self._table_bits)
        if table is not None and within + length <= file.cluster_size:  # nearly always
            host = table[offset >> self._bits & self._index_mask]
            if host >= 0:
                return host + within
        try:
            state, count = self.run(offset, length)
        except OSError:
            return -1  # whoever tries it in another way is told why
        return state if state >= 0 and count == length else -1

    def run(self, offset: int, length: int) -> tuple[int, int]:
        """Return the state of the byte at `offset`, and how many from there are like it.

        The state is where the first one is in the file, if they are in a row there and may be
        written in place, or one of qcow2map. Raises OSError.
        """
        map_, cluster = self.map_, offset >> self._bits
        number, index = divmod(cluster, map_.per_table)
        table = map_.load(number)
        if table is None:
            return NOTHING, min(length, ((number + 1) << self._table_bits) - offset)
        state = map_.state(number, index)
        within, size = offset & self._mask, self.file.cluster_size
        count = size - within
        if state in (PACKED, SHARED):
            return state, min(count, length)
        step, expected = (size, state + size) if state >= 0 else (0, state)
        while count < length:
            index += 1
            if index == map_.per_table or map_.state(number, index) != expected:
                break
            count += size
            expected += step
        return state + within if state >= 0 else state, min(count, length)

    def read(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """See Disk."""
        done = 0
        while done < length:
            at = offset + done
            state, count = self.run(at, length - done)
            part = views if count == length else cut(views, done, count)
            if state >= 0:
                self._read_data(part, state, count)
            elif state == SHARED:
                self._read_data(part, self._shared(at), count)
            elif state == PACKED:
                within = at & self._mask
                copy(self._unpacker.unpack(self._entry(at))[within : within + count], part)
            elif state == NOTHING:
                self._read_base(part, at, count)
            else:
                zero(part)
            done += count
        return done

    def _read_data(self, views: Sequence[memoryview], host: int, length: int) -> None:
        """Read clusters in a row; only the last one of the file need not be all there."""
        got = self.file.raw.read(views, host, length)
        if got < length:
            last = (host + length - 1) & ~self._mask
            if last >= self.file.raw.find_size():
                raise OSError(errno.EIO, f"the image file has shrunk: {last:#x} is behind its end")
            zero(cut(views, got, length - got))

    def _read_base(self, views: Sequence[memoryview], offset: int, length: int) -> None:
        base = self.base
        there = min(max(base.size - offset, 0), length) if base is not None else 0
        if base is not None and there:
            got = base.read(cut(views, 0, there), offset, there)
            if got != there:
                raise OSError(errno.EIO, f"the base has shrunk to {offset + got} bytes")
        if there < length:
            zero(cut(views, there, length - there))

    # Changes: see qcow2write.

    def write(
        self, views: Sequence[memoryview], offset: int, length: int, *, stable: bool = False
    ) -> int:
        """See Disk. What leads to data written in place may not be on the medium, either."""
        done = self._writer.write(views, offset, length, stable=stable)
        if stable and (self.map_.changed or self.file.unsynced):
            self.flush()
        return done

    def discard(self, offset: int, length: int) -> None:
        """See Disk. Whole clusters are freed."""
        self._writer.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See Disk."""
        self._writer.write_zeroes(offset, length, unmap=unmap)

    def resize(self, size: int) -> None:
        """See Disk. Raises ConfigError, OSError."""
        if size:
            self._writer.grow(size)
        self.size = self.file.header.size

    # Barriers.

    @property
    def pending(self) -> bool:
        """See Disk."""
        return self.map_.changed

    @property
    def settled(self) -> bool:
        """See Disk."""
        return not self.map_.changed and (self._alloc is None or self._alloc.settled)

    def commit(self) -> None:
        """See Disk."""
        self.map_.commit()

    def flush(self) -> None:
        """See Disk."""
        self.map_.commit()
        self.file.sync()

    def finish(self) -> None:
        """See Disk. Nothing reserved stays behind."""
        if self._alloc is not None and not self.file.readonly:
            self.flush()
            self._alloc.close()

    def remember(self) -> dict[str, Any]:
        """See Disk. In a version 2 image there is no place to say that it is corrupt."""
        file = self.file
        return {**file.raw.remember(), "corrupt": file.readonly and not file.raw.readonly}

    def load(self, state: dict[str, Any]) -> None:
        """See Disk."""
        self.file.raw.load(state)
        if state["corrupt"]:
            self.file.protect()

    def map(self, offset: int, length: int) -> Iterator[Run]:
        """See Disk. What nobody has is "unallocated" at the depth of the last image it is in."""
        end = min(offset + length, self.size)
        while offset < end:
            state, count = self.run(offset, end - offset)
            base = self.base
            if state == NOTHING and base is not None and offset < base.size:
                count = min(count, base.size - offset)
                for run in base.map(offset, count):
                    yield run._replace(depth=run.depth + 1)
            elif state >= 0 or state == SHARED:
                host = state if state >= 0 else self._shared(offset)
                yield Run(offset, count, "data", 0, host)
            else:
                yield Run(offset, count, _KINDS[state], 0, -1)
            offset += count

    def _shared(self, offset: int) -> int:
        """Return where in the file a byte of a shared cluster is."""
        return self._entry(offset) & OFFSET_MASK | offset & self._mask

    def _entry(self, offset: int) -> int:
        """Return the L2 entry of a cluster whose table was just looked into."""
        number, index = divmod(offset >> self._bits, self.map_.per_table)
        return self.map_.entries[number][index]
