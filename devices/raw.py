"""Disk images: the `Disk` protocol that vioblk stands on, and raw images and block devices.

A disk is bytes 0 to `size`. Everything here is synchronous and takes views of guest memory, so no
byte is copied in this process. The kernel's own word is the only judge of what an image can do:
what it refuses once, in a way that another try would not change, is done in another way from
then on.

**O_DIRECT** wants memory, offset and length aligned to blocks whose size depends on file system
and device. Instead of knowing it we try: EINVAL means "not aligned", and that one transfer goes
through a buffer of ours, in whole pages. A write then reads what is around it and writes that
back, so whoever overlaps requests does these when nothing else is in flight.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from struct import pack, unpack
from typing import Any, Final, NamedTuple, Protocol

from config.errors import ConfigError, HostError
from devices import window
from devices.views import ZEROES, copy, gather, skip, zeroes
from devices.window import Window

SECTOR: Final = 512
IOV_MAX: Final = 1024  # views in one call

_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | KEEP_SIZE
_ZERO_RANGE: Final = 0x10 | 0x01  # FALLOC_FL_ZERO_RANGE | KEEP_SIZE
_BLKDISCARD: Final = 0x1277  # linux/fs.h
_BLKSSZGET: Final = 0x1268
_BLKGETSIZE64: Final = 0x80081272
_PAGE: Final = mmap.PAGESIZE  # no device's blocks are larger
_BOUNCE: Final = 1 << 20  # bytes of the buffer for what is not aligned
_NOT_THERE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)

_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# Takes views and an offset, and returns how many bytes it did, if not all; may raise OSError.
Attempt = Callable[[Sequence[memoryview], int], int]


# Takes offset, length and whether to write; returns an offset in the image's file or, if it would
# take more than a look, -1.
Locate = Callable[[int, int, int], int]


class Run(NamedTuple):
    """Bytes of a disk that are kept in one way, in one piece."""

    offset: int  # on the disk
    length: int
    kind: str  # "data", "zero", "compressed" or "unallocated"
    depth: int  # 0: in the image itself, 1: in its base, …
    host_offset: int  # of data in its file, else -1


class Disk(Protocol):
    """What a block device stands on. Offsets and lengths are bytes, multiples of a sector.

    Every method may raise OSError, with the kernel's errno.
    """

    fd: int  # of the image itself
    size: int
    readonly: bool
    granularity: int  # discarding less than an aligned piece of this many bytes frees nothing
    #: On the file of the image itself, if that can have one; made by attempts().
    window: Window | None
    #: Where in that file bytes are, which may be read or written in place; None: where the disk
    #: has them.
    locate: Locate | None

    def attempts(self) -> tuple[Attempt, Attempt]:
        """Return what reads, and what writes, as fast as can be, for now.

        Whoever is not content with what they did calls `read` or `write`.
        """

    def place(self, offset: int, length: int, *, write: bool, stable: bool = False) -> int:
        """Return where in `fd` these bytes are and may be read or written, in one piece, or -1.

        With `stable`, nothing but the bytes themselves has to reach the medium.
        """

    def read(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """Fill views of `length` bytes in all. Return how many were: less if the disk shrank."""

    def write(
        self, views: Sequence[memoryview], offset: int, length: int, *, stable: bool = False
    ) -> int:
        """Write views of `length` bytes in all; `stable`: they are on the medium afterwards."""

    @property
    def pending(self) -> bool:
        """Whether there is something to commit."""

    def commit(self) -> None:
        """Make what was changed so far outlive this process. To be done before it is reported."""

    @property
    def settled(self) -> bool:
        """Whether an fdatasync(2) of `fd` is all that `flush` would do."""

    def flush(self) -> None:
        """Bring everything written so far to the medium."""

    def finish(self) -> None:
        """Leave the image in good order: it will not be used any more."""

    def remember(self) -> dict[str, Any]:
        """Return, as plain JSON, what whoever opens the image next must `load`: it is not in it."""

    def load(self, state: dict[str, Any]) -> None:
        """Take that over. Raises PyvmError."""

    def discard(self, offset: int, length: int) -> None:
        """Say that these bytes are not needed any more; what they read as is undefined."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make these bytes read as zeroes; with `unmap`, by freeing their space if possible."""

    def resize(self, size: int) -> None:
        """Grow to `size`, or with 0 find out what size it has become. Raises PyvmError."""

    def map(self, offset: int, length: int) -> Iterator[Run]:
        """Yield what a part of the disk consists of, in order and without gaps."""


class Raw:
    """A raw image or a block device, on a descriptor opened by somebody who was allowed to."""

    pending = False
    settled = True
    locate: Locate | None = None

    def __init__(self, fd: int) -> None:
        """Take over `fd`; whether it can be written, and is O_DIRECT, shows in its flags."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        status = os.fstat(fd)
        self.fd = fd
        self.readonly = flags & os.O_ACCMODE == os.O_RDONLY
        self._direct = bool(flags & os.O_DIRECT)
        self._buffer: memoryview | None = None
        self._is_file = stat.S_ISREG(status.st_mode)
        self.size = self.find_size()
        # Block devices are discarded in whole blocks of their own, files in those of their system.
        block = min(status.st_blksize, 1 << 16)
        self.granularity = block if self._is_file else _ioctl_int(fd, _BLKSSZGET)
        self._refused: set[int] = set()  # modes of fallocate that this file system lacks
        self.lost = 0  # errno of the flush that failed
        self._tries: tuple[Attempt, Attempt] | None = None
        self.window: Window | None = None

    # Transfers.

    def attempts(self) -> tuple[Attempt, Attempt]:
        """See Disk."""
        if self._tries is None:
            self._tries = self._make_attempts()
        return self._tries

    def _make_attempts(self) -> tuple[Attempt, Attempt]:
        fd = self.fd

        def read(views: Sequence[memoryview], offset: int) -> int:
            return os.preadv(fd, views, offset)

        def write(views: Sequence[memoryview], offset: int) -> int:
            return os.pwritev(fd, views, offset)

        if self._direct or not window.suits(fd):
            return read, write
        self.window = Window(self.fd, self.find_size, write=not self.readonly)
        return self.window.attempts(read, write)

    def place(self, offset: int, length: int, *, write: bool, stable: bool = False) -> int:
        """See Disk."""
        return offset

    def read(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """See Disk."""
        got = self._transfer(views, offset, length, None)
        if self.window is not None:
            self.window.missed(views, offset)
        return got

    def write(
        self, views: Sequence[memoryview], offset: int, length: int, *, stable: bool = False
    ) -> int:
        """See Disk."""
        got = self._transfer(views, offset, length, os.RWF_DSYNC if stable else 0)
        if self.window is not None and not stable:
            self.window.missed(views, offset, write=True)
        return got

    def _transfer(
        self, views: Sequence[memoryview], offset: int, length: int, flags: int | None
    ) -> int:
        """Write with `flags`, or read if that is None, until all is done or nothing moves.

        The kernel stops at 2 GiB, at a signal, and for good where the image ends.
        """
        done = 0
        while True:
            try:
                if flags is None:
                    got = os.preadv(self.fd, views, offset + done)
                else:
                    got = os.pwritev(self.fd, views, offset + done, flags)
            except OSError as err:
                if err.errno != errno.EINVAL or not self._direct:
                    raise
                return done + self._bounce(views, offset + done, length - done, flags)
            done += got
            if not got or done >= length:
                return done
            views = skip(views, got)

    def _bounce(
        self, views: Sequence[memoryview], offset: int, length: int, flags: int | None
    ) -> int:
        """Transfer in whole pages through a buffer: write with `flags`, or read if that is None.

        Returns how many bytes were transferred.
        """
        self._buffer = self._buffer or memoryview(mmap.mmap(-1, _BOUNCE, _PRIVATE))
        done = 0
        while done < length:
            at = offset + done
            start = at - at % _PAGE
            stop = min(offset + length, start + _BOUNCE)
            pages = self._buffer[: -(-(stop - start) // _PAGE) * _PAGE]
            filled = os.preadv(self.fd, [pages], start)
            piece = pages[at - start : stop - start]
            if flags is None:
                piece = piece[: max(filled - (at - start), 0)]
                if not piece:
                    break
                copy(piece, skip(views, done))
            else:
                pages[filled:] = bytes(len(pages) - filled)
                gather(piece, skip(views, done))
                size = os.fstat(self.fd).st_size
                os.pwritev(self.fd, [pages], start, flags)
                if self._is_file and start + len(pages) > size:
                    os.ftruncate(self.fd, max(size, stop))
            done += len(piece)
        return done

    def flush(self) -> None:
        """See Disk. Once one failed in the page cache, all later ones fail, too.

        The kernel reports a page it could not write once, and drops it: a flush that succeeds
        after that would be a lie.
        """
        if self.lost:
            raise OSError(self.lost, f"{os.strerror(self.lost)}, and data was lost before")
        try:
            os.fdatasync(self.fd)
        except OSError as err:
            if not self._direct:
                self.lost = err.errno or errno.EIO
            raise

    def commit(self) -> None:
        """See Disk. The page cache outlives us."""

    def finish(self) -> None:
        """See Disk."""
        if self.window is not None:
            self.window.clear()

    def remember(self) -> dict[str, Any]:
        """See Disk. The kernel has told us of pages that were lost, and tells nobody else."""
        return {"lost": self.lost}

    def load(self, state: dict[str, Any]) -> None:
        """See Disk."""
        if type(state["lost"]) is not int:
            raise HostError("the state of an image makes no sense")
        self.lost = state["lost"]

    # Ranges.

    def discard(self, offset: int, length: int) -> None:
        """See Disk. An image that cannot free space keeps it: nobody may rely on a discard."""
        if self._is_file:
            self._fallocate(_PUNCH_HOLE, offset, length)
            return
        start = -(-offset // self.granularity) * self.granularity
        end = (offset + length) // self.granularity * self.granularity
        if start < end:
            try:
                fcntl.ioctl(self.fd, _BLKDISCARD, pack("=QQ", start, end - start))
            except OSError as err:
                if err.errno not in _NOT_THERE:
                    raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See Disk. fallocate(2) does it for block devices, too."""
        if unmap and self._fallocate(_PUNCH_HOLE, offset, length):
            return
        if self._fallocate(_ZERO_RANGE, offset, length):
            return
        end = offset + length
        while offset < end:
            piece = min(end - offset, IOV_MAX * len(ZEROES))
            offset += self.write(zeroes(piece), offset, piece)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Return whether it was done; if not, it must be done in another way. Raises OSError."""
        if mode in self._refused:
            return False
        if not length or _libc.fallocate(self.fd, mode, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number in _NOT_THERE:
            self._refused.add(mode)
        elif number != errno.EINVAL:  # EINVAL: not in whole blocks of the device
            raise OSError(number, os.strerror(number))
        return False

    def map(self, offset: int, length: int) -> Iterator[Run]:
        """See Disk. Holes of a file are zeroes."""
        end = min(offset + length, self.size)
        while offset < end:
            start = _seek(self.fd, offset, os.SEEK_DATA, end)
            if start > offset:
                yield Run(offset, start - offset, "zero", 0, -1)
            offset = start
            if start < end:
                offset = _seek(self.fd, start, os.SEEK_HOLE, end)
                yield Run(start, offset - start, "data", 0, start)

    # Size.

    def resize(self, size: int) -> None:
        """See Disk. Raises ConfigError for a size it cannot have, HostError, OSError."""
        if size:
            if not self._is_file or self.readonly:
                what = "a read-only image" if self._is_file else "a block device"
                raise ConfigError(f"{what} has the size it has", hint="give no size to look again")
            found = self.find_size()
            if size < found:
                raise ConfigError(
                    f"the image has {found} bytes already",
                    hint="pyvmctl image resize --shrink cuts one that no VM has",
                )
            os.ftruncate(self.fd, size)
        self.size = self.find_size()

    def find_size(self) -> int:
        """Return how many bytes there are now. Raises HostError, OSError."""
        if self._is_file:
            return os.fstat(self.fd).st_size
        try:
            size: int = unpack("=Q", fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8)))[0]
        except OSError as err:
            raise HostError(f"cannot tell the size of the block device: {err.strerror}") from err
        return size


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Return where data, or a hole, begins, at most `end`."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as err:
        if err.errno == errno.ENXIO:  # nothing but a hole up to the end
            return end
        if whence == os.SEEK_DATA:  # it cannot tell
            return offset
        return end


def _ioctl_int(fd: int, request: int) -> int:
    number: int = unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return number
