"""passt's socket as the device's way out: a stream of frames, each behind its length.

    u32 length, big-endian     Ethernet frame     u32 length     …        both ways

A stream has no offloads, and knows no virtio header: what comes in gets an empty one, what goes
out loses its own. Reads are made large and cut up here; of a frame that is written in part, the
rest is kept, one frame at most, and nothing else is taken until it is gone.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from devices.nethdr import ETHERNET, HEADER_BYTES, MAX_FRAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.netport import Port

_LENGTH: Final = 4
_ROOM: Final = 2 * (_LENGTH + MAX_FRAME)  # bytes read at once: a whole frame always fits


class Stream:
    """One end of the stream; the only port of its backend."""

    features = 0

    def __init__(self, fd: int) -> None:
        """Take over a connected SOCK_STREAM descriptor."""
        os.set_blocking(fd, False)
        self.fd = fd
        self.ports: Sequence[Port] = [self]
        self._header = memoryview(bytes(HEADER_BYTES))
        self._buffer = memoryview(bytearray(_ROOM))
        self._start = self._end = 0  # what of the buffer has not been taken
        self._unsent = b""

    # Port.

    @property
    def buffered(self) -> bool:
        """Whether a whole frame has been read, and none of it taken."""
        have = self._end - self._start
        return have >= _LENGTH and have >= _LENGTH + self._length()

    def receive(self, views: Sequence[memoryview]) -> int:
        """Copy the next frame into views. Raises BlockingIOError; OSError at the stream's end."""
        self._check()
        if not self.buffered:
            self._read()
            self._check()
            if not self.buffered:
                raise BlockingIOError
        at = self._start + _LENGTH
        stop = at + self._length()
        done = _fill(views, (self._header, self._buffer[at:stop]))
        self._start = stop
        return done

    def send(self, parts: Sequence[bytes | memoryview]) -> int:
        """Write one frame. Raises BlockingIOError, nothing written of it; OSError."""
        if not self.flush():
            raise BlockingIOError
        length = sum(map(len, parts)) - len(parts[0])
        frame = [length.to_bytes(_LENGTH, "big"), *parts[1:]]
        done = os.writev(self.fd, frame)
        if done < _LENGTH + length:
            self._unsent = b"".join(frame)[done:]
        return length

    def flush(self) -> bool:
        """Write what is left of the latest frame; False if some of it still is. Raises OSError."""
        if self._unsent:
            try:
                self._unsent = self._unsent[os.write(self.fd, self._unsent) :]
            except BlockingIOError:
                return False
        return not self._unsent

    def _length(self) -> int:
        return int.from_bytes(self._buffer[self._start : self._start + _LENGTH], "big")

    def _read(self) -> None:
        """Read what is there. Raises BlockingIOError, OSError."""
        buffer, have = self._buffer, self._end - self._start
        buffer[:have] = buffer[self._start : self._end]
        self._start, self._end = 0, have
        got = os.readv(self.fd, [buffer[have:]])
        if not got:
            raise OSError(errno.EPIPE, "the other end has hung up")
        self._end += got

    def _check(self) -> None:
        """Raise OSError if the next frame cannot be one: nothing behind it makes sense then."""
        if self._end - self._start >= _LENGTH and not ETHERNET <= self._length() <= MAX_FRAME:
            raise OSError(errno.EPROTO, f"a frame of {self._length()} bytes is announced")

    # Backend.

    def offload(self, features: int) -> None:
        """Nothing is offered, so nothing is ever accepted."""

    def set_header(self, length: int) -> None:
        """Put so long a header in front of each frame."""
        self._header = memoryview(bytes(length))

    def attach(self, pairs: int) -> None:
        """There is one."""

    def carrier(self, up: bool) -> None:
        """The other end cannot be told."""

    def drain(self) -> None:
        """Frames that were read already are thrown away; the others come late."""
        while self.buffered:
            self._start += _LENGTH + self._length()


def _fill(views: Sequence[memoryview], data: Sequence[memoryview]) -> int:
    """Copy `data` into `views` as far as they go; return how many bytes that was."""
    done = index = at = 0
    for piece in data:
        rest = piece
        while rest and index < len(views):
            part = rest[: len(views[index]) - at]
            views[index][at : at + len(part)] = part
            rest, at, done = rest[len(part) :], at + len(part), done + len(part)
            if at == len(views[index]):
                index, at = index + 1, 0
    return done
