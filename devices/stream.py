"""passt's socket as the device's way out: a stream of frames, each behind its length.

    u32 length, big-endian     Ethernet frame     u32 length     …        both ways

A stream has no offloads, and knows no virtio header: what comes in gets an empty one, what goes
out loses its own.

**Nobody is ever in the middle of a frame**, so that another process can go on when this one is
killed: frames are looked at where they wait, and taken when they are whole, many at once; and one
is written when there is certain to be room for all of it. What has been taken and not delivered is
lost then, as frames are.
"""

from __future__ import annotations

import errno
import os
import socket
from array import array
from fcntl import ioctl
from select import EPOLLET
from termios import TIOCOUTQ
from typing import TYPE_CHECKING, Final

from devices.nethdr import ETHERNET, HEADER_BYTES, MAX_FRAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.netport import Port

_LENGTH: Final = 4
_ROOM: Final = 2 * (_LENGTH + MAX_FRAME)  # bytes read at once: a whole frame always fits
_SEND_BUFFER: Final = 4 * MAX_FRAME  # bytes asked for; the kernel gives twice what it allows
_OVERHEAD: Final = 8192  # bytes of that which a message takes beside twice its length, at most


class Stream:
    """One end of the stream; the only port of its backend."""

    features = 0

    #: Wakes once for what arrives: a frame in part stays in the socket, and is no work.
    edge = EPOLLET

    def __init__(self, fd: int) -> None:
        """Take over a connected SOCK_STREAM descriptor, of AF_UNIX."""
        os.set_blocking(fd, False)
        self.fd = fd
        self.ports: Sequence[Port] = [self]
        self._header = memoryview(bytes(HEADER_BYTES))
        self._buffer = memoryview(bytearray(_ROOM))
        self._start = self._end = 0  # whole frames that have not been delivered
        self._socket = socket.socket(fileno=os.dup(fd))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._size = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._room = 0  # of that, as far as is known

    # Port.

    @property
    def buffered(self) -> bool:
        """Whether there is a frame that has been taken."""
        return self._start < self._end

    def receive(self, views: Sequence[memoryview]) -> int:
        """Copy the next frame into views. Raises BlockingIOError; OSError at the stream's end."""
        if self._start == self._end:
            self._take()
        at = self._start + _LENGTH
        stop = at + self._length(self._start)
        done = _fill(views, (self._header, self._buffer[at:stop]))
        self._start = stop
        return done

    def send(self, parts: Sequence[bytes | memoryview]) -> int:
        """Write one frame. Raises BlockingIOError, nothing written of it; OSError."""
        length = sum(map(len, parts)) - len(parts[0])
        self._need(2 * length + _OVERHEAD)
        if os.writev(self.fd, [length.to_bytes(_LENGTH, "big"), *parts[1:]]) != _LENGTH + length:
            raise OSError(errno.EPROTO, "the socket took a frame in part")
        return length

    def _need(self, room: int) -> None:
        """Raise BlockingIOError if there is not certainly that much room in the socket.

        The kernel cuts a message into buffers, and takes one as long as there is any room at all.
        """
        if room > self._room:
            waiting = array("i", [0])
            ioctl(self.fd, TIOCOUTQ, waiting)
            self._room = self._size - waiting[0]
            if room > self._room and waiting[0]:
                raise BlockingIOError
        self._room -= room

    def _length(self, at: int) -> int:
        return int.from_bytes(self._buffer[at : at + _LENGTH], "big")

    def _take(self) -> None:
        """Take all frames that are there and whole. Raises BlockingIOError, OSError."""
        found = self._socket.recv_into(self._buffer, _ROOM, socket.MSG_PEEK)
        if not found:
            raise OSError(errno.EPIPE, "the other end has hung up")
        end = 0
        while end + _LENGTH <= found:
            length = self._length(end)
            if not ETHERNET <= length <= MAX_FRAME:  # nothing behind it makes sense
                if end:
                    break
                raise OSError(errno.EPROTO, f"a frame of {length} bytes is announced")
            if end + _LENGTH + length > found:
                break
            end += _LENGTH + length
        if not end:
            raise BlockingIOError
        self._start, self._end = 0, self._socket.recv_into(self._buffer, end)

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
        """Frames that were taken already are thrown away; the others come late."""
        self._start = self._end


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
