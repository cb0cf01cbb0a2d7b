"""What the processes of one network device say to each other: the first pair's, and another's.

Between the process that has the registers and the one that serves a further queue pair there is a
SOCK_SEQPACKET pair. A message is one packet: a byte that says what it is, and the rest.

    to the pair     S  JSON: everything that it has to follow; a later one replaces it
    from the pair   F  followed: number of a state, and where its two queues are
                    C  a frame for the capture: direction, how many were left out, length, bytes
                    K  a frame for the host's end of a local interface: header, bytes
                    L  the port has failed: errno, text
                    G  the guest has broken a rule: text

So a process that takes the place of a killed one needs one message, and there is no history.
Either end may have been taken over by the guest: lengths are bounded, everything is looked at, and
nonsense ends the connection, which ends that process.
"""

from __future__ import annotations

import os
import select
import time
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import PyvmError
from devices.pcap import INBOUND, OUTBOUND

if TYPE_CHECKING:
    from collections.abc import Sequence

STATE, FOLLOWED, CAPTURED, KEPT, LOST, BROKEN = b"SFCKLG"

DEADLINE: Final = 1.5  # seconds; the VM process waits 2 for a pause, 5 for a register
STATE_MAX: Final = 192 << 10  # bytes; address tables are the longest part of it
MESSAGE_MAX: Final = 72 << 10  # bytes of what a pair says: the longest frame there is, and more
KEPT_MAX: Final = 16 << 10  # bytes of a frame for the host's end of a link
TEXT_MAX: Final = 512  # bytes
NOWHERE: Final = 0xFFFF_FFFF  # in place of a queue's cursors, if it has none

_FOLLOWED: Final = Struct("<III")  # number, cursors of the receive and of the transmit queue
_CAPTURED: Final = Struct("<BII")  # direction, frames left out before this one, its length
_LOST: Final = Struct("<i")


class LinkError(PyvmError):
    """The other end is gone, silent, or does not keep to the protocol."""


class GoneError(LinkError):
    """The other end has hung up."""


class Followed(NamedTuple):
    """A pair's answer to a state."""

    number: int
    cursors: tuple[tuple[int, int] | None, ...]  # next available and next used, of each queue


class Captured(NamedTuple):
    """A frame that a pair has carried."""

    direction: int
    left_out: int  # frames that had no room in the connection since the last one
    length: int
    data: bytes  # as much of it as is captured


def followed(number: int, cursors: Sequence[tuple[int, int] | None]) -> bytes:
    """Return a message that says what state a pair follows, and where its queues are."""
    words = (NOWHERE if at is None else at[0] << 16 | at[1] for at in cursors)
    return bytes((FOLLOWED,)) + _FOLLOWED.pack(number, *words)


def read_followed(message: bytes) -> Followed:
    """Return what it says. Raises LinkError."""
    if len(message) != 1 + _FOLLOWED.size:
        raise LinkError(f"sent an answer of {len(message)} bytes")
    number, *words = _FOLLOWED.unpack_from(message, 1)
    cursors = (None if word == NOWHERE else (word >> 16, word & 0xFFFF) for word in words)
    return Followed(number, tuple(cursors))


def captured(frame: Captured) -> list[bytes]:
    """Return a message with a frame, in parts."""
    head = _CAPTURED.pack(frame.direction, frame.left_out, frame.length)
    return [bytes((CAPTURED,)) + head, frame.data]


def read_captured(message: bytes) -> Captured:
    """Return the frame in a message. Raises LinkError."""
    if len(message) < 1 + _CAPTURED.size:
        raise LinkError(f"sent a captured frame of {len(message)} bytes")
    direction, left_out, length = _CAPTURED.unpack_from(message, 1)
    if direction not in (INBOUND, OUTBOUND):
        raise LinkError(f"sent a frame that went in direction {direction}")
    return Captured(direction, left_out, length, message[1 + _CAPTURED.size :])


def lost(err: OSError) -> bytes:
    """Return a message that says what a port was lost to."""
    text = (err.strerror or str(err)).encode()[:TEXT_MAX]
    return bytes((LOST,)) + _LOST.pack(err.errno or 0) + text


def read_lost(message: bytes) -> OSError:
    """Return the error in a message. Raises LinkError."""
    if len(message) < 1 + _LOST.size:
        raise LinkError(f"sent an error of {len(message)} bytes")
    [number] = _LOST.unpack_from(message, 1)
    return OSError(number, text_of(message[1 + _LOST.size :]))


def text_of(data: bytes) -> str:
    """Return text of the other end's, fit for a log."""
    return data[:TEXT_MAX].decode("utf-8", "replace")


class Link:
    """One end. For one thread."""

    def __init__(self, fd: int) -> None:
        """Take over a socket that does not block."""
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._ready = select.poll()
        self._ready.register(fd, select.POLLIN)

    def send(self, message: bytes, deadline: float) -> None:
        """Send a message, at the latest at `deadline` (time.monotonic). Raises LinkError."""
        while not self.attempt([message]):
            if not self._poll.poll(max(deadline - time.monotonic(), 0) * 1e3):
                raise LinkError("takes no messages")

    def attempt(self, parts: Sequence[bytes]) -> bool:
        """Send a message in parts, if there is room; return whether. Raises LinkError."""
        try:
            os.writev(self.fd, parts)
        except BlockingIOError:
            return False
        except OSError as err:
            raise GoneError(f"is gone: {err.strerror}") from err
        return True

    def receive(self, most: int) -> bytes | None:
        """Return the next message, of up to `most` bytes; None if there is none yet.

        Raises LinkError.
        """
        try:
            message = os.read(self.fd, most + 1)
        except BlockingIOError:
            return None
        except OSError as err:
            raise GoneError(f"is gone: {err.strerror}") from err
        if not message:
            raise GoneError("is gone")
        if len(message) > most:
            raise LinkError(f"sent more than {most} bytes")
        return message

    def wait(self, deadline: float) -> None:
        """Wait for a message. Raises LinkError if none comes by `deadline` (time.monotonic)."""
        if not self._ready.poll(max(deadline - time.monotonic(), 0) * 1e3):
            raise LinkError("does not answer")

    def close(self) -> None:
        """Hang up."""
        os.close(self.fd)
