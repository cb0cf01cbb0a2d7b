"""A window on the page cache: small transfers of an image without a system call.

    preadv(2) of 4 KiB, in the page cache    1.9 µs, of which copying 0.5
    a copy out of a map                      0.8 µs

The image is mapped in pieces, and what is small and inside of one is copied from or to there. It
is the same memory that preadv and pwritev would use, so both ways see each other's data, and
fdatasync(2) covers both. What a map cannot do, the system calls do, and they are also how every
error is told: see `buserror`.

A map costs memory for tables, and its pages count as ours in some statistics. So pieces are mapped
where there is traffic, the oldest gives way to a new one, and there is an end to it.

**Spots** are what a request looks up: number of a block of the disk → its bytes in the window. Of a
raw image the blocks are the pieces, of others they are their clusters, wherever these are in the
file. A spot is a part of a piece, so all are forgotten before one is unmapped; whoever moves a
cluster forgets its spot.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections import Counter
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices import buserror

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.raw import Attempt

PIECE_BITS: Final = 26
PIECE: Final = 1 << PIECE_BITS  # bytes, 64 MiB
NR_PIECES: Final = 16  # mapped at a time
WORTHWHILE: Final = 64  # transfers in a piece before it is mapped
MOST: Final = 128 << 10  # bytes of a transfer
# Bytes of a write to a disk's file system: there each page has to be made ready for it anew, after
# it has gone to the medium, and for larger ones a system call is no worse.
MOST_WRITTEN: Final = 32 << 10
MOST_SPOTS: Final = 1 << 15

_WITHIN: Final = PIECE - 1

# File systems whose maps and system calls share one page cache at all times (linux/magic.h).
_TMPFS: Final = 0x01021994
_COHERENT: Final = frozenset((0xEF53, 0x58465342, _TMPFS, 0x9123683E, 0xF2F52010))
_NOWHERE: Final = memoryview(b"")

_libc = ctypes.CDLL(None, use_errno=True)


def suits(fd: int) -> bool:
    """Tell whether an image can have a window: a local file or block device, not O_DIRECT."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISBLK(mode) or (stat.S_ISREG(mode) and _file_system(fd) in _COHERENT)


def _file_system(fd: int) -> int:
    found = (ctypes.c_long * 32)()  # struct statfs, which begins with f_type
    return found[0] if _libc.fstatfs(fd, ctypes.byref(found)) == 0 else 0


class Spots(dict[int, memoryview]):
    """Blocks of a disk that are in the window: number → bytes, as far as the file has them.

    One that is not there is looked for; `spots[number]` is empty where there is none.
    """

    def __init__(self, bits: int, find: Callable[[int], memoryview | None]) -> None:
        """A block is 1 << `bits` bytes; `find` looks for one."""
        super().__init__()
        self.bits, self._find = bits, find

    def __missing__(self, number: int) -> memoryview:
        spot = self._find(number)
        if spot is None:
            return _NOWHERE
        if len(self) >= MOST_SPOTS:
            self.clear()
        self[number] = spot
        return spot


class Window:
    """Maps parts of one image."""

    def __init__(self, fd: int, size: Callable[[], int], *, write: bool) -> None:
        """`size` tells how large the file is by now. Raises OSError."""
        buserror.install()
        self._fd, self._size, self._write = fd, size, write
        self.pieces: dict[int, memoryview] = {}  # number → as much of it as is in the file
        self.spots = Spots(PIECE_BITS, self.pieces.get)
        #: Whether what is in the window may be written to.
        self.writable = write
        #: Bytes of a write, at most.
        self.most_written = MOST if _file_system(fd) == _TMPFS else MOST_WRITTEN
        self._misses: Counter[int] = Counter()

    def divide(self, bits: int, find: Callable[[int], int]) -> None:
        """Have blocks of 1 << `bits` bytes, no larger than a piece.

        `find` says where in the file one is, on a boundary of blocks; negative: nowhere.
        """
        piece_of, size = self.pieces.get, 1 << bits

        def spot(number: int) -> memoryview | None:
            offset = find(number)
            piece, at = piece_of(offset >> PIECE_BITS), offset & _WITHIN
            return None if piece is None or offset < 0 else piece[at : at + size]

        self.spots = Spots(bits, spot)

    def attempts(self, read: Attempt, write: Attempt) -> tuple[Attempt, Attempt]:
        """Return what transfers by map where it can, and else does as `read` and `write`."""
        piece_of, failed = self.pieces.get, buserror.failures
        most_written = self.most_written

        def read_(views: Sequence[memoryview], offset: int) -> int:
            piece = piece_of(offset >> PIECE_BITS)
            if piece is not None and len(views) == 1:
                view, start = views[0], offset & _WITHIN
                end = start + len(view)
                if end <= len(piece) and end - start <= MOST:
                    view[:] = piece[start:end]
                    if not failed:
                        return end - start
                    self.clear()
            got = read(views, offset)
            self.missed(views, offset)
            return got

        def write_(views: Sequence[memoryview], offset: int) -> int:
            piece = piece_of(offset >> PIECE_BITS)
            if piece is not None and len(views) == 1:
                view, start = views[0], offset & _WITHIN
                end = start + len(view)
                if end <= len(piece) and end - start <= most_written:
                    piece[start:end] = view
                    if not failed:
                        return end - start
                    self.clear()
            got = write(views, offset)
            self.missed(views, offset, write=True)
            return got

        return read_, write_ if self._write else write

    def missed(self, views: Sequence[memoryview], offset: int, *, write: bool = False) -> None:
        """Count transfers that a piece might have served; map it when there are enough.

        Several views are as many requests that follow each other, more often than not.
        """
        number, start = divmod(offset, PIECE)
        end = start + len(views[0]) if views else PIECE
        piece = self.pieces.get(number)
        most = self.most_written if write else MOST
        if end - start > most or end > PIECE or (piece is not None and end <= len(piece)):
            return
        self._misses[number] += len(views)
        if self._misses[number] < WORTHWHILE:
            return
        self._misses.clear()
        try:
            self._map(number)
        except (OSError, HostError):  # not here, then: nothing depends on it
            self._misses[number] = -(1 << 20)

    def _map(self, number: int) -> None:
        """Map as much of a piece as is in the file; it may have grown since the last time."""
        self._drop(number)
        start = number * PIECE
        length = min(self._size() - start, PIECE)
        if length <= 0:
            return
        while len(self.pieces) >= NR_PIECES:
            self._drop(next(iter(self.pieces)))
        self.pieces[number] = buserror.map_file(self._fd, length, start, write=self._write)

    def clear(self) -> None:
        """Unmap everything, since some page could not be had: it is not the image's any more."""
        buserror.failures.clear()
        for number in list(self.pieces):
            self._drop(number)

    def _drop(self, number: int) -> None:
        piece = self.pieces.pop(number, None)
        if piece is not None:
            self.spots.clear()  # nobody may hold a part of it
            buserror.unmap(piece)
