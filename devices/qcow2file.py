"""The file a qcow2 image is in: bounds, metadata transfers, and what must never be overwritten.

Everything that changes an image goes through `ImageFile` and the `Raw` in it. Metadata is written
through at once, so that an image is as good after a SIGKILL as before it; `sync` is the barrier
that makes it good after a power cut, too.
"""

from __future__ import annotations

import errno
import os
from array import array
from bisect import bisect_left, insort
from contextlib import suppress
from struct import pack
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices import qcow2head
from devices.raw import Raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55 of L1 and L2 entries
COPIED: Final = 1 << 63  # refcount is exactly one: may be written in place


class ImageFile:
    """The descriptor, its header, and how far it reaches. Whoever opened it closes it."""

    def __init__(self, fd: int) -> None:
        """Read the header. Raises ConfigError, HostError, OSError."""
        self.raw = Raw(fd)
        self.header = qcow2head.read(fd)
        self.bits = self.header.cluster_bits
        self.cluster_size = 1 << self.bits
        self.readonly = self.raw.readonly or self.header.corrupt
        self.guard = Guard(self.bits)
        #: Whether metadata may not be on the medium yet, also some that was there at the start.
        self.unsynced = True
        #: Called after everything written so far has reached the medium.
        self.on_sync: Callable[[], None] = lambda: None
        self.look_again()

    def look_again(self) -> None:
        """Find out how many bytes there are, in whole clusters."""
        size = self.raw.find_size()
        self.end = size + (-size & self.cluster_size - 1)

    def get(self, offset: int, length: int) -> bytearray:
        """Return bytes of the file, zeroes where it has ended. Raises OSError."""
        data = bytearray(length)
        self.raw.read([memoryview(data)], offset, length)
        return data

    def words(self, offset: int, count: int) -> array[int]:
        """Return big-endian 64-bit words of the file. Raises OSError."""
        words = array("Q", bytes(self.get(offset, 8 * count)))
        words.byteswap()
        return words

    def put(self, offset: int, data: bytes | bytearray) -> None:
        """Write metadata. Raises OSError."""
        self.may_write()
        self.unsynced = True
        if self.raw.write([memoryview(data)], offset, len(data)) != len(data):
            raise OSError(errno.EIO, "the image file took only part of its metadata")

    def may_write(self) -> None:
        """Raise OSError if the image must not be written to (any more)."""
        if self.readonly:
            raise OSError(errno.EROFS, "the image is read-only, or marked corrupt")

    def clear(self, offset: int, length: int) -> None:
        """Make free clusters read as zeroes and lie within the file. Raises OSError."""
        self.may_write()
        stop = offset + length
        below = min(stop, self.end) - offset
        if below > 0:
            self.raw.write_zeroes(offset, below, unmap=True)
        if self.raw.find_size() < stop:
            os.ftruncate(self.raw.fd, stop)
        self.end = max(self.end, stop)

    def sync(self) -> None:
        """Bring all that was written to the medium. Raises OSError."""
        self.raw.flush()
        self.unsynced = False
        self.on_sync()

    def change_header(self, at: int, data: bytes, **changes: Any) -> None:
        """Rewrite adjacent fields of the header, `changes` saying the same to us."""
        self.put(at, data)
        self.header = self.header._replace(**changes)

    def corrupt(self, what: str) -> OSError:
        """Mark the image corrupt, so that nobody writes to it any more; return what to raise.

        A version 2 header has no place for the mark: then it holds while the image is open.
        """
        if not self.readonly:
            bits = self.header.incompatible | qcow2head.INCOMPATIBLE_CORRUPT
            if self.header.version >= 3:
                at = qcow2head.AT_INCOMPATIBLE
                with suppress(OSError):  # then at least we stop writing
                    self.change_header(at, pack(">Q", bits), incompatible=bits)
            self.protect()
        return OSError(errno.EIO, f"{what}: the image is corrupt (pyvmctl image check tells more)")

    def protect(self) -> None:
        """Write to it no more, as long as it is open."""
        self.readonly = True
        if self.raw.window is not None:
            self.raw.window.writable = False

    def holds(self, offset: int) -> bool:
        """Whether a cluster can be at `offset`: on a boundary, and begun before the file ends."""
        return not offset & self.cluster_size - 1 and 0 < offset < self.end


class Guard:
    """Where metadata is, so that nothing else is ever written there."""

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._ranges: dict[str, list[tuple[int, int]]] = {}  # first cluster, behind the last
        self._singles: dict[str, array[int]] = {}  # sorted

    def cover(self, name: str, *ranges: tuple[int, int]) -> None:
        """Say where `name` is: all of its ranges, as offset and length in bytes."""
        mask = (1 << self._bits) - 1
        self._ranges[name] = [
            (offset >> self._bits, (offset + length + mask) >> self._bits)
            for offset, length in ranges
            if length
        ]

    def fill(self, name: str, offsets: Iterable[int]) -> int:
        """Say where all clusters called `name` are; return an offset that is there twice, or 0."""
        found = array("Q", sorted(offset >> self._bits for offset in offsets))
        self._singles[name] = found
        twice = next((found[i] for i in range(len(found) - 1) if found[i] == found[i + 1]), 0)
        return twice << self._bits

    def add(self, name: str, offset: int) -> None:
        """Add one cluster."""
        insort(self._singles.setdefault(name, array("Q")), offset >> self._bits)

    def remove(self, name: str, offset: int) -> None:
        """Take one cluster out again."""
        found = self._singles[name]
        at = bisect_left(found, offset >> self._bits)
        if at < len(found) and found[at] == offset >> self._bits:
            del found[at]

    def hit(self, offset: int, *, but: str = "") -> str:
        """Return the name of the metadata in the cluster at `offset`, other than `but`, or ""."""
        cluster = offset >> self._bits
        for name, ranges in self._ranges.items():
            if name != but and any(start <= cluster < stop for start, stop in ranges):
                return name
        for name, found in self._singles.items():
            at = bisect_left(found, cluster)
            if name != but and at < len(found) and found[at] == cluster:
                return name
        return ""


def open_problem(what: str) -> ConfigError:
    """Return what to raise for a table that cannot be used, found when an image is opened."""
    return ConfigError(f"qcow2 image: {what}", hint="pyvmctl image check --repair all may mend it")
