"""A disc in the drive: an ISO image, or a block device, read in blocks of 2048 bytes.

An image's last block may be cut off; what is missing of it reads as zeroes. The size is that of
the moment when the disc went in. If the image shrinks later, or the host cannot read it, that is
an unreadable place on the disc and nothing more.
"""

from __future__ import annotations

import fcntl
import os
import stat
from struct import unpack
from typing import TYPE_CHECKING, Final

from config.errors import ConfigError, HostError
from devices import spread
from devices.bucket import TokenBucket
from devices.device import ERROR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.device import Host

BLOCK: Final = 2048  # bytes
ERRORS_RATE: Final = 1.0  # lines per second about errors of the host
ERRORS_BURST: Final = 10

_BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
_IOV_MAX: Final = 1024


class Disc:
    """One disc, on a descriptor opened by somebody who was allowed to."""

    def __init__(self, fd: int, host: Host, size: int = 0) -> None:
        """Look at `fd`, which is ours unless this raises: ConfigError, HostError.

        One that went in earlier, when it had `size` bytes, is not looked at again.
        """
        self.size = size or _look(fd)
        self._fd, self._host = fd, host
        self._limiter, self._untold = TokenBucket(ERRORS_RATE, ERRORS_BURST), 0
        self.blocks = -(-self.size // BLOCK)

    def read(self, views: Sequence[memoryview], lba: int, count: int) -> int:
        """Fill views of `count` blocks in all; return how many bytes were filled.

        The blocks are on the disc. Fewer bytes than asked for mean that the next are unreadable.
        """
        offset, wanted, done = lba * BLOCK, count * BLOCK, 0
        try:
            while done < wanted:
                got = os.preadv(self._fd, views[:_IOV_MAX], offset + done)
                if not got:
                    return self._ended(views, offset + done, wanted - done) + done
                done += got
                views = spread.after(views, got)
        except OSError as err:
            what = f"read of {wanted} bytes at {offset:#x}: {err.strerror or err}"
            self._complain(what)
        return done

    def close(self) -> None:
        """Take it out."""
        os.close(self._fd)

    def _ended(self, views: Sequence[memoryview], offset: int, wanted: int) -> int:
        """Nothing is left at `offset`: return how many bytes of zeroes are right from there."""
        if offset < self.size:
            self._complain(f"the image has shrunk to {offset} bytes")
            return 0
        return spread.fill(views, bytes(wanted))

    def _complain(self, text: str) -> None:
        """Log an error of the host's, so many and no more."""
        if self._limiter.wait() > 0:
            self._untold += 1
            return
        self._limiter.take(1)
        untold, self._untold = self._untold, 0
        self._host.log(ERROR, f"{text} (and {untold} errors before it)" if untold else text)


def _look(fd: int) -> int:
    """Return how many bytes a disc has that can be read. Raises ConfigError, HostError."""
    try:
        size = _size(fd)
        os.preadv(fd, [bytearray(1)], 0)
    except OSError as err:
        raise HostError(f"cannot read the image: {err.strerror}") from err
    if not size:
        raise ConfigError("the image is empty")
    return size


def _size(fd: int) -> int:
    """Return how many bytes there are. Raises ConfigError, OSError."""
    mode = os.fstat(fd)
    if stat.S_ISREG(mode.st_mode):
        return mode.st_size
    if stat.S_ISBLK(mode.st_mode):
        size: int = unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        return size
    raise ConfigError("neither a file nor a block device: no image of a disc")
