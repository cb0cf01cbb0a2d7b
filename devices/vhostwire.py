"""vhost-user on the wire: messages, their layouts, and the socket that carries them.

A message is a header of 12 bytes, request, flags and payload size, all u32 little-endian, then
the payload; descriptors travel with its first byte. The *front end* is the monitor, the *back
end* the device. The front end asks on the main socket; the back end may ask on a second one, the
back-end channel. Numbers and layouts are those of QEMU's vhost-user specification (docs/interop).

Either side may lie. So payload and descriptors are bounded here, before anything is looked at;
what a message may look like at all is a row of `FRONT` or `BACK`. Whatever is wrong ends in
PeerError, and every descriptor that came with it is closed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import PyvmError
from devices import passing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEADER: Final = Struct("<III")
VERSION: Final = 1  # low two bits of the flags
REPLY: Final = 4
NEED_REPLY: Final = 8  # with REPLY_ACK: answer with 0, or with an error, when it is done

PAYLOAD_MAX: Final = 4096  # bytes; the longest message that there is needs 268
REGIONS_MAX: Final = 8  # memory regions, and descriptors, in one message
CONFIG_MAX: Final = 256  # bytes of configuration space in one message

F_LOG_ALL: Final = 1 << 26  # VHOST_F_LOG_ALL, a virtio feature bit that no driver sees
F_PROTOCOL_FEATURES: Final = 1 << 30  # likewise

# Protocol features.
P_MQ: Final = 1 << 0
P_LOG_SHMFD: Final = 1 << 1
P_RARP: Final = 1 << 2
P_REPLY_ACK: Final = 1 << 3
P_MTU: Final = 1 << 4
P_BACKEND_REQ: Final = 1 << 5
P_CONFIG: Final = 1 << 9
P_BACKEND_SEND_FD: Final = 1 << 10
P_INFLIGHT_SHMFD: Final = 1 << 12
P_RESET_DEVICE: Final = 1 << 13
P_INBAND_NOTIFICATIONS: Final = 1 << 14
P_CONFIGURE_MEM_SLOTS: Final = 1 << 15
P_STATUS: Final = 1 << 16
P_DEVICE_STATE: Final = 1 << 19

# Payloads.
U64: Final = Struct("<Q")
VRING_STATE: Final = Struct("<II")  # queue, number
VRING_ADDR: Final = Struct("<IIQQQQ")  # queue, flags, descriptor, used, avail: HVAs; log: GPA
MEM_TABLE: Final = Struct("<II")  # count of regions, padding; regions follow
MEM_SLOT: Final = Struct("<Q")  # padding; one region follows
MEM_REGION: Final = Struct("<QQQQ")  # GPA, size, HVA in the front end, offset in the file
LOG: Final = Struct("<QQ")  # size, offset in the file
CONFIG: Final = Struct("<III")  # offset, size, flags; bytes follow
# Size, offset in the file, count of queues, entries of each; padded as everybody's compiler does,
# which the specification does not mention.
INFLIGHT: Final = Struct("<QQHH4x")
INFLIGHT_LEAST: Final = 20  # bytes; without the padding

VRING_NO_FD: Final = 1 << 8  # in the u64 of KICK, CALL and ERR, beside the queue: none comes
VRING_INDEX: Final = 0xFF
VRING_LOG_USED: Final = 1  # a flag of VRING_ADDR: writes to the used ring are logged, too


class PeerError(PyvmError):
    """The other end is gone, silent, or does not keep to the protocol."""


class Front(IntEnum):
    """What a front end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class Back(IntEnum):
    """What a back end asks, on its own channel."""

    CONFIG_CHANGE = 2
    VRING_CALL = 4
    VRING_ERR = 5


class Shape(NamedTuple):
    """What a message looks like."""

    least: int = 0  # bytes of payload
    most: int = -1  # the same as `least` if -1
    fds: tuple[int, int] = (0, 0)  # fewest and most descriptors
    replies: bool = False  # has an answer of its own, whatever NEED_REPLY says
    needs: int = 0  # protocol features without which nobody may send it


_STATE: Final = VRING_STATE.size
_ONE_REGION: Final = MEM_SLOT.size + MEM_REGION.size
_CONFIG: Final = (CONFIG.size, CONFIG.size + CONFIG_MAX)
_INFLIGHT: Final = (INFLIGHT_LEAST, INFLIGHT.size)
_RINGED: Final = Shape(8, fds=(0, 1))
_SLOTS: Final = P_CONFIGURE_MEM_SLOTS
_TABLE: Final = MEM_TABLE.size

FRONT: Final[Mapping[int, Shape]] = {
    Front.GET_FEATURES: Shape(replies=True),
    Front.SET_FEATURES: Shape(8),
    Front.SET_OWNER: Shape(),
    Front.RESET_OWNER: Shape(),
    Front.SET_MEM_TABLE: Shape(
        _TABLE, _TABLE + REGIONS_MAX * MEM_REGION.size, fds=(0, REGIONS_MAX)
    ),
    Front.SET_LOG_BASE: Shape(LOG.size, fds=(1, 1), replies=True, needs=P_LOG_SHMFD),
    Front.SET_LOG_FD: Shape(0, 8, fds=(1, 1)),
    Front.SET_VRING_NUM: Shape(_STATE),
    Front.SET_VRING_ADDR: Shape(VRING_ADDR.size),
    Front.SET_VRING_BASE: Shape(_STATE),
    Front.GET_VRING_BASE: Shape(_STATE, replies=True),
    Front.SET_VRING_KICK: _RINGED,
    Front.SET_VRING_CALL: _RINGED,
    Front.SET_VRING_ERR: _RINGED,
    Front.GET_PROTOCOL_FEATURES: Shape(replies=True),
    Front.SET_PROTOCOL_FEATURES: Shape(8),
    Front.GET_QUEUE_NUM: Shape(replies=True, needs=P_MQ),
    Front.SET_VRING_ENABLE: Shape(_STATE),
    Front.SEND_RARP: Shape(8, needs=P_RARP),
    Front.NET_SET_MTU: Shape(8, needs=P_MTU),
    Front.SET_BACKEND_REQ_FD: Shape(fds=(1, 1), needs=P_BACKEND_REQ),
    Front.GET_CONFIG: Shape(*_CONFIG, replies=True, needs=P_CONFIG),
    Front.SET_CONFIG: Shape(*_CONFIG, needs=P_CONFIG),
    Front.GET_INFLIGHT_FD: Shape(*_INFLIGHT, replies=True, needs=P_INFLIGHT_SHMFD),
    Front.SET_INFLIGHT_FD: Shape(*_INFLIGHT, fds=(1, 1), needs=P_INFLIGHT_SHMFD),
    Front.RESET_DEVICE: Shape(needs=P_RESET_DEVICE),
    Front.VRING_KICK: Shape(_STATE, needs=P_INBAND_NOTIFICATIONS),
    Front.GET_MAX_MEM_SLOTS: Shape(replies=True, needs=_SLOTS),
    Front.ADD_MEM_REG: Shape(_ONE_REGION, fds=(1, 1), needs=_SLOTS),
    # A descriptor that some front ends send is of no use here.
    Front.REM_MEM_REG: Shape(_ONE_REGION, fds=(0, 1), needs=_SLOTS),
    Front.SET_STATUS: Shape(8, needs=P_STATUS),
    Front.GET_STATUS: Shape(replies=True, needs=P_STATUS),
    Front.SET_DEVICE_STATE_FD: Shape(8, fds=(1, 1), replies=True, needs=P_DEVICE_STATE),
    Front.CHECK_DEVICE_STATE: Shape(replies=True, needs=P_DEVICE_STATE),
}

BACK: Final[Mapping[int, Shape]] = {
    Back.CONFIG_CHANGE: Shape(),
    Back.VRING_CALL: Shape(_STATE, needs=P_INBAND_NOTIFICATIONS),
    Back.VRING_ERR: Shape(_STATE, needs=P_INBAND_NOTIFICATIONS),
}


class Message(NamedTuple):
    """One message; whoever takes descriptors out of `fds` closes them."""

    request: int
    flags: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()


class Wire:
    """One end of a vhost-user socket. For one thread; never waits unless told to."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Take over a connected stream socket; `name` is the peer's, for messages."""
        sock.setblocking(False)
        self.name = name
        self._sock = sock
        self._bytes = b""  # of a message that is not complete
        self._fds: list[int] = []
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def fileno(self) -> int:
        """Return the descriptor, to poll it."""
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Send a message, and copies of its descriptors.

        Raises PeerError, also if the peer does not take it at once: it has stopped reading.
        """
        data = HEADER.pack(message.request, message.flags | VERSION, len(message.payload))
        data += message.payload
        try:
            sent = socket.send_fds(self._sock, [data], message.fds)
        except OSError as err:
            raise PeerError(f"{self.name}: cannot send: {err.strerror or err}") from err
        if sent < len(data):
            raise PeerError(f"{self.name}: does not take messages")

    def receive(self) -> Message | None:
        """Return a message if one is there and complete. Raises PeerError, also at its end."""
        while (missing := self._missing()) > 0:
            try:
                data, fds, more = passing.receive(self._sock, missing, REGIONS_MAX)
            except BlockingIOError:
                return None
            except OSError as err:
                raise PeerError(f"{self.name}: {err.strerror or err}") from err
            self._fds += fds
            if not data:
                raise self._wrong("has hung up") from EOFError()
            if more or len(self._fds) > REGIONS_MAX:
                raise self._wrong("sends too many descriptors")
            if fds and self._bytes:
                raise self._wrong("sends a descriptor in the middle of a message")
            self._bytes += data
        request, flags, _ = HEADER.unpack_from(self._bytes)
        message = Message(request, flags, self._bytes[HEADER.size :], tuple(self._fds))
        self._bytes, self._fds = b"", []
        return message

    def wait(self, seconds: float) -> Message:
        """Wait for a message. Raises PeerError, also if none has come by then."""
        end = time.monotonic() + seconds
        while (message := self.receive()) is None:
            if not self._poll.poll(max(end - time.monotonic(), 0) * 1e3):
                raise self._wrong("does not answer") from TimeoutError(errno.ETIMEDOUT)
        return message

    def close(self) -> None:
        """Hang up; also drop what was received of a message."""
        passing.close(self._fds)
        self._bytes, self._fds = b"", []
        self._sock.close()

    def _missing(self) -> int:
        """Return how many bytes of the message are to come, as far as it is known."""
        if len(self._bytes) < HEADER.size:
            return HEADER.size - len(self._bytes)
        _, flags, size = HEADER.unpack_from(self._bytes)
        if flags & 3 != VERSION:
            raise self._wrong(f"speaks version {flags & 3} of vhost-user")
        if size > PAYLOAD_MAX:
            raise self._wrong(f"sends a message of {size} bytes")
        return HEADER.size + int(size) - len(self._bytes)

    def _wrong(self, what: str) -> PeerError:
        passing.close(self._fds)
        self._bytes, self._fds = b"", []
        return PeerError(f"{self.name}: {what}")


def misshapen(message: Message, shapes: Mapping[int, Shape], features: int) -> str:
    """Return what is wrong with the form of a message, "" if nothing is.

    `features` are the protocol features that both sides have agreed on.
    """
    shape = shapes.get(message.request)
    if shape is None:
        return f"request {message.request} is unknown"
    if shape.needs & ~features:
        return f"request {message.request} needs protocol feature {shape.needs:#x}"
    size, (fewest, most) = len(message.payload), shape.fds
    if not shape.least <= size <= max(shape.least, shape.most):
        return f"request {message.request} has a payload of {size} bytes"
    if not fewest <= len(message.fds) <= most:
        return f"request {message.request} has {len(message.fds)} descriptors"
    return ""


def drop(message: Message, kept: Sequence[int] = ()) -> None:
    """Close the descriptors of a message but those that were taken."""
    for fd in message.fds:
        if fd not in kept:
            os.close(fd)
