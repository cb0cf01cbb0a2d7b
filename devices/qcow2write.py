"""Changing the disk in a qcow2 image: writes, copy on write, discard, zeroes, growth.

A cluster that is the image's own is written in place. Any other one (in the base, compressed,
zeroes, shared with a snapshot, not there) gets a new host cluster: first what the request leaves
of the old contents and what it brings, in one write, then the entry.
"""

from __future__ import annotations

import errno
from struct import pack
from typing import TYPE_CHECKING, Final

from config.errors import ConfigError
from devices import qcow2head
from devices.qcow2file import COPIED
from devices.qcow2map import NOTHING, ZERO, ZEROES
from devices.views import cut, zeroes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.qcow2 import Qcow2
    from devices.qcow2file import ImageFile
    from devices.qcow2map import Mapping

_MOST_ZEROES: Final = 1 << 20  # bytes written at a time where zeroes have to be written


class Writer:
    """What changes an image; all of it raises OSError for one that is only read."""

    def __init__(self, file: ImageFile, map_: Mapping, disk: Qcow2) -> None:
        self._file, self._map, self._disk = file, map_, disk
        self._bits, self._size = file.bits, file.cluster_size

    def write(
        self, views: Sequence[memoryview], offset: int, length: int, *, stable: bool = False
    ) -> int:
        """Write, in place or to new clusters; return `length`. Raises OSError.

        With `stable`, what is written in place is on the medium; entries never are.
        """
        self._file.may_write()
        done = 0
        while done < length:
            at = offset + done
            state, count = self._disk.run(at, length - done)
            if state >= 0:
                part = views if count == length else cut(views, done, count)
                self._put(part, state, count, stable=stable)
            else:
                count = self._write_new(cut(views, done, length - done), at, length - done)
            done += count
        return done

    def _put(
        self, views: Sequence[memoryview], host: int, length: int, *, stable: bool = False
    ) -> None:
        if self._file.raw.write(views, host, length, stable=stable) != length:
            raise OSError(errno.EIO, "the image file took only part of the data")

    def _write_new(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """Write the clusters at `offset` that cannot be written in place to new ones.

        Return how many bytes that was: at least to the end of the first cluster.
        """
        map_, bits, size = self._map, self._bits, self._size
        alloc = map_.writer()
        number, index = divmod(offset >> bits, map_.per_table)
        map_.open(number)
        within = offset & size - 1
        most = min(-(-(within + length) >> bits), map_.per_table - index)
        wanted, barrier = 0, False
        while wanted < most:
            state = map_.state(number, index + wanted)
            if state >= 0:
                break
            barrier |= self._shows(state, (offset - within) + (wanted << bits))
            wanted += 1
        host, count = alloc.take(wanted)
        length = min(length, (count << bits) - within)
        try:
            self._fill(views, offset, length, host)
        except OSError:
            alloc.untake(host, count)
            raise
        entries = [host + (i << bits) | COPIED for i in range(count)]
        map_.change(number, index, entries, barrier=barrier)
        return length

    def _fill(self, views: Sequence[memoryview], offset: int, length: int, host: int) -> None:
        """Fill new clusters, which read as zeroes: with data, and what is to stay around it."""
        size = self._size
        within = offset & size - 1
        start, stop = offset - within, offset + length
        end = min(stop + (-stop & size - 1), self._disk.size)
        parts, at = [*cut(views, 0, length)], host + within
        if head := self._old(start, within):
            parts.insert(0, head)
            at = host
        if stop < end and (tail := self._old(stop, end - stop)):
            parts.append(tail)
        for i in range(0, len(parts), 1000):  # IOV_MAX, and then some
            piece = parts[i : i + 1000]
            total = sum(map(len, piece))
            self._put(piece, at, total)
            at += total

    def _old(self, offset: int, length: int) -> memoryview | None:
        """Return what the disk has there within one cluster, None for zeroes."""
        if not length:
            return None
        state, _ = self._disk.run(offset, length)
        if not self._shows(state, offset):
            return None
        data = memoryview(bytearray(length))
        self._disk.read([data], offset, length)
        return data

    def _shows(self, state: int, offset: int) -> bool:
        """Whether a cluster in this state, with `offset` in it, may show more than zeroes."""
        if state == NOTHING:
            base = self._disk.base
            return base is not None and offset < base.size
        return state != ZEROES

    # Ranges.

    def discard(self, offset: int, length: int) -> None:
        """Free whole clusters; where a base would show through, they become zeroes instead."""
        file, base = self._file, self._disk.base
        file.may_write()
        if base is None:
            entry = 0
        elif file.header.version >= 3:
            entry = ZERO
        else:
            return  # nothing in version 2 hides a base but data
        start, stop = self._inner(offset, length)
        while start < stop:
            state, count = self._disk.run(start, stop - start)
            if state not in (NOTHING, ZEROES):
                self._replace(start, count, entry)
            start += count

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make bytes read as zeroes: whole clusters by their entries, others by writing."""
        file = self._file
        file.may_write()
        start, stop = self._inner(offset, length)
        if start >= stop:
            self._zero(offset, length, unmap=unmap)
            return
        self._zero(offset, start - offset, unmap=unmap)
        while start < stop:
            state, count = self._disk.run(start, stop - start)
            if not self._shows(state, start):
                pass  # they read as zeroes already
            elif state >= 0 and not unmap:
                file.raw.write_zeroes(state, count, unmap=False)
            elif file.header.version >= 3:
                self._replace(start, count, ZERO)
            elif self._disk.base is None:
                self._replace(start, count, 0)
            else:
                self._zero(start, count, unmap=unmap)
            start += count
        self._zero(stop, offset + length - stop, unmap=unmap)

    def _inner(self, offset: int, length: int) -> tuple[int, int]:
        """Return where the clusters that lie within a range begin and end.

        The disk's last one does when all that is of it on the disk does.
        """
        stop = offset + length
        if stop < self._disk.size:
            stop -= stop & self._size - 1
        return offset + (-offset & self._size - 1), stop

    def _zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero parts of clusters, or clusters whose entries cannot say so."""
        end = offset + length
        while offset < end:
            state, count = self._disk.run(offset, min(end - offset, _MOST_ZEROES))
            if state >= 0:
                self._file.raw.write_zeroes(state, count, unmap=unmap)
            elif self._shows(state, offset):
                count = self.write(zeroes(count), offset, count)
            offset += count

    def _replace(self, offset: int, length: int, entry: int) -> None:
        """Set the entries of whole clusters, all in one L2 table or where there is none."""
        map_, bits = self._map, self._bits
        while length > 0:
            number, index = divmod(offset >> bits, map_.per_table)
            count = min(-(-length >> bits), map_.per_table - index)
            map_.open(number)
            map_.change(number, index, [entry] * count, barrier=False)
            offset, length = offset + (count << bits), length - (count << bits)

    # Size.

    def grow(self, size: int) -> None:
        """Make the disk larger; what is new reads as zeroes. Raises ConfigError, OSError."""
        file, map_, disk = self._file, self._map, self._disk
        header = file.header
        if disk.readonly:
            raise ConfigError("a read-only image has the size it has")
        file.may_write()
        if size < header.size:
            raise ConfigError(
                f"the image has {header.size} bytes already", hint="an image is never cut"
            )
        if header.snapshots and header.version < 3:
            raise ConfigError("a version 2 image with snapshots has the size it has")
        entries = qcow2head.l1_entries_for(size, file.bits)
        if entries * 8 > qcow2head.MOST_L1_BYTES or size >= 1 << 63:
            raise ConfigError(
                f"{size} bytes are too many for clusters of {file.cluster_size}",
                hint="convert the image to larger clusters",
            )
        if entries > len(map_.l1):
            map_.move_l1(entries)
        # What lies behind the old end, in its last cluster or in a longer base, must not show.
        old, disk.size = disk.size, size
        try:
            base = disk.base
            shown = old + (-old & self._size - 1)
            if base is not None:
                shown = max(shown, base.size)
            shown = min(shown, size)
            if old < shown:
                self.write_zeroes(old, shown - old, unmap=False)
            map_.commit()
            file.sync()
            file.change_header(qcow2head.AT_SIZE, pack(">Q", size), size=size)
            file.sync()
        except BaseException:
            disk.size = old
            raise
