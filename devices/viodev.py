"""viodev_msg and imsg: how a VM process and a device process speak to each other.

An imsg is a 16-byte header and a payload, carried as one frame of a multiprocessing connection
over a Unix stream socket. Frames are bytes: nothing is ever unpickled, for a compromised device
process must not run code in its VM process. A descriptor travels behind its frame.

Either side may lie, so every length is bounded, every wait has a deadline, and whatever is
wrong ends in ChannelError, which the owner of the channel answers by ending the peer.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from enum import IntEnum
from multiprocessing.connection import Connection
from struct import Struct, pack
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import PyvmError
from devices import passing

if TYPE_CHECKING:
    from collections.abc import Iterator

IMSG_MAX: Final = 16384  # bytes, header included (vmd, reference §b.1)
FD_MARK: Final = 1 << 31  # in the length: one descriptor follows
_HEADER: Final = Struct("<IIII")  # type, length, peerid, pid
DATA_MAX: Final = IMSG_MAX - _HEADER.size

_SOL: Final = socket.SOL_SOCKET


class ChannelError(PyvmError):
    """The other end is gone, silent, or does not keep to the protocol."""


class ImsgType(IntEnum):
    """Message types between VM process, spawner and device process."""

    DEVOP_MSG = 1  # payload: one viodev_msg
    LAUNCH = 2  # to the spawner: JSON, then one FD message per descriptor
    FD = 3  # payload: the descriptor's name; carries it
    LAUNCHED = 4  # from the spawner: JSON; carries the child's pidfd
    EXITED = 5  # from the spawner: JSON, a child's wait status
    PAUSE = 6  # to a device: no DMA after the answer, which has the same type
    UNPAUSE = 7
    SETTING = 8  # to a device: JSON, perhaps a descriptor: a change at run time; same type back
    LOG = 9  # from a device: level byte and text
    EVENT = 10  # from a device: a word of its kind, something that the VM process acts on


class MsgType(IntEnum):
    """viodev_msg types (vmd, reference §c.2)."""

    INVALID = 0
    READY = 1  # device → VM, once on each channel
    ERROR = 2  # device → VM: the device cannot go on; data is a code
    KICK = 3  # device → VM: interrupt; data is the queue, CONFIG_CHANGE, or all of them
    IO_READ = 4  # VM → device, answered by the same type with data_valid 1
    IO_WRITE = 5  # VM → device, not answered
    DUMP = 6
    SHUTDOWN = 7  # VM → device: leave


CONFIG_CHANGE: Final = 0xFFFF  # in a KICK's data where a queue index would be

_LAYOUT: Final = Struct("<BHBBBbIB")  # 12 bytes, packed; same order as the fields below


class ViodevMsg(NamedTuple):
    """One message between a VM process and a device process; little-endian, no padding."""

    type: int  # MsgType value; an int, since building the member costs more than packing
    reg: int = 0  # byte offset in the BAR
    io_sz: int = 0  # access width: 1, 2 or 4 bytes
    vcpu: int = 0
    irq: int = 0
    state: int = 0  # interrupt line: +1 assert, -1 deassert, 0 leave
    data: int = 0
    data_valid: int = 0  # 1 when `data` carries a value

    def pack(self) -> bytes:
        """Return the wire bytes. The inverse, unpack(), raises struct.error on a bad length."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, wire: bytes) -> ViodevMsg:
        """Return the message in exactly 12 wire bytes."""
        return cls._make(_LAYOUT.unpack(wire))


class Imsg(NamedTuple):
    """One received message; whoever takes `fd` closes it."""

    type: int
    data: bytes
    peerid: int
    pid: int
    fd: int | None


class Channel:
    """One end of a message channel. Not thread-safe: one thread, or a lock of the owner's."""

    def __init__(self, sock: socket.socket, name: str, deadline: float) -> None:
        """Take over `sock`; every wait for the peer ends after `deadline` seconds."""
        self.name = name
        sock.setblocking(True)
        self._connection = Connection(sock.detach())
        self._passing: socket.socket | None = None
        self.set_deadline(deadline)

    def fileno(self) -> int:
        """Return the descriptor, to poll it."""
        return self._connection.fileno()

    def set_deadline(self, seconds: float) -> None:
        """Bound every later wait for the peer, also for the rest of a frame; the kernel does."""
        wait = pack("ll", int(seconds), int(seconds % 1 * 1e6))
        with socket.socket(fileno=os.dup(self.fileno())) as sock:
            sock.setsockopt(_SOL, socket.SO_RCVTIMEO, wait)
            sock.setsockopt(_SOL, socket.SO_SNDTIMEO, wait)

    def send(self, kind: int, data: bytes = b"", *, peerid: int = 0, fd: int | None = None) -> None:
        """Send one message, and a copy of `fd` with it. Raises ChannelError."""
        length = _HEADER.size + len(data)
        if length > IMSG_MAX:
            raise ChannelError(f"{self.name}: a message of {length} bytes is too long to send")
        mark = 0 if fd is None else FD_MARK
        try:
            self._connection.send_bytes(
                _HEADER.pack(kind, length | mark, peerid, os.getpid()) + data
            )
            if fd is not None:
                with self._socket() as sock:
                    socket.send_fds(sock, [b"F"], [fd])
        except BlockingIOError as err:
            raise ChannelError(f"{self.name}: does not take messages") from err
        except OSError as err:
            raise ChannelError(f"{self.name}: {err.strerror or err}") from err

    def receive(self) -> Imsg:
        """Wait for one message. Raises ChannelError on silence, EOF and nonsense."""
        try:
            frame = self._connection.recv_bytes(IMSG_MAX)
        except EOFError as err:
            raise ChannelError(f"{self.name}: closed the channel") from err
        except BlockingIOError as err:
            raise ChannelError(f"{self.name}: does not answer") from err
        except OSError as err:
            raise ChannelError(f"{self.name}: {err.strerror or err}") from err
        if len(frame) < _HEADER.size:
            raise ChannelError(f"{self.name}: sent {len(frame)} bytes, shorter than a header")
        kind, marked, peerid, pid = _HEADER.unpack_from(frame)
        if marked & ~FD_MARK != len(frame):
            raise ChannelError(f"{self.name}: sent {len(frame)} bytes and said {marked & ~FD_MARK}")
        fd = self._receive_fd() if marked & FD_MARK else None
        return Imsg(kind, frame[_HEADER.size :], peerid, pid, fd)

    def expect_fds(self) -> None:
        """Get ready to receive descriptors where no other can be made meanwhile: in a jail."""
        self._passing = socket.socket(fileno=os.dup(self.fileno()))

    @contextmanager
    def _socket(self) -> Iterator[socket.socket]:
        """The channel as a socket, which knows how to pass descriptors; a connection does not."""
        if self._passing is not None:
            yield self._passing
        else:
            with socket.socket(fileno=os.dup(self.fileno())) as sock:
                yield sock

    def _receive_fd(self) -> int:
        try:
            with self._socket() as sock:
                byte, fds, cut = passing.receive(sock, 1, 1)
        except OSError as err:
            raise ChannelError(f"{self.name}: {err.strerror or err}") from err
        if len(fds) != 1 or byte != b"F" or cut:
            passing.close(fds)
            raise ChannelError(f"{self.name}: sent no descriptor where it said one follows")
        return fds[0]

    def send_msg(self, message: ViodevMsg) -> None:
        """Send one viodev_msg. Raises ChannelError."""
        self.send(ImsgType.DEVOP_MSG, message.pack())

    def receive_msg(self) -> ViodevMsg:
        """Wait for one viodev_msg; anything else is a protocol error. Raises ChannelError."""
        imsg = self.receive()
        if imsg.fd is not None:
            os.close(imsg.fd)
            raise ChannelError(f"{self.name}: sent a descriptor nobody asked for")
        return self.decode(imsg)

    def decode(self, imsg: Imsg) -> ViodevMsg:
        """Return the viodev_msg inside `imsg`. Raises ChannelError if there is none."""
        if imsg.type != ImsgType.DEVOP_MSG or len(imsg.data) != _LAYOUT.size:
            raise ChannelError(
                f"{self.name}: sent {len(imsg.data)} bytes of type {imsg.type}, not a viodev_msg"
            )
        return ViodevMsg.unpack(imsg.data)

    def close(self) -> None:
        """Close this end; the peer sees EOF."""
        if self._passing is not None:
            self._passing.close()
        self._connection.close()


def pair(name: str, deadline: float) -> tuple[Channel, socket.socket]:
    """Return our end of a new channel to `name`, and the socket to hand to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours, name, deadline), theirs
