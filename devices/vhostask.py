"""One question to a vhost-user back end and its answer, and the questions that it has itself.

The back end may lie. What comes back is checked for request, size and descriptors, and a wait has
an end: PeerError, and the connection is good for nothing any more but close(). `RefusedError` is
different: the back end understood and said no, and goes on.
"""

from __future__ import annotations

import errno
import math
import select
import socket
import time
from typing import TYPE_CHECKING

from devices import vhostwire
from devices.vhostwire import (
    BACK,
    FRONT,
    NEED_REPLY,
    P_REPLY_ACK,
    REPLY,
    VERSION,
    Front,
    Message,
    PeerError,
    Wire,
    misshapen,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class RefusedError(PeerError):
    """The back end answers that it does not, or cannot, do what it was asked."""


def connect(path: str) -> Wire:
    """Connect to the back end that listens at `path`; does not wait. Raises PeerError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except OSError as err:  # too long a path among them; EAGAIN: too many wait before us
        sock.close()
        raise PeerError(f"{path}: cannot connect: {err.strerror or err}") from err
    return Wire(sock, path)


class BackChannel:
    """Our end of the socket on which the back end asks; answers what wants an answer."""

    def __init__(self, wire: Wire, features: int) -> None:
        """`features` are the protocol features agreed on."""
        self._wire, self._features = wire, features

    def fileno(self) -> int:
        """Return the descriptor, to poll it."""
        return self._wire.fileno()

    def receive(self) -> Message | None:
        """Return a request if one is there, a row of vhostwire.BACK. Raises PeerError."""
        message = self._wire.receive()
        if message is None:
            return None
        why = misshapen(message, BACK, self._features)
        if message.flags & REPLY:
            why = f"request {message.request} is a reply"
        if why:
            vhostwire.drop(message)
            raise PeerError(f"{self._wire.name}: {why}")
        if message.flags & NEED_REPLY and self._features & P_REPLY_ACK:
            self._wire.send(Message(message.request, REPLY, vhostwire.U64.pack(0)))
        return message

    def close(self) -> None:
        """Hang up."""
        self._wire.close()


class Asker:
    """Asks one back end. For one thread."""

    def __init__(self, wire: Wire, deadline: float) -> None:
        """Take over `wire`; `deadline` is in seconds, for each answer."""
        self.name, self.deadline = wire.name, deadline
        self.until = math.inf  #: when to give up, whatever is asked; on the monotonic clock
        self.protocol = 0  #: protocol features agreed on
        #: Where the back end asks, once it has a socket for it.
        self.back: BackChannel | None = None
        #: Called with each request that comes there while an answer is waited for.
        self.on_request: Callable[[Message], None] = lambda message: None
        self._wire = wire

    def fileno(self) -> int:
        """Return the descriptor: while no question is open, it can only be read at the end."""
        return self._wire.fileno()

    def unasked(self) -> None:
        """Look at what has come without a question: the end, or nonsense. Raises PeerError."""
        message = self._wire.receive()
        if message is not None:
            vhostwire.drop(message)
            raise self.wrong(f"answers what nobody has asked, request {message.request}")

    def close(self) -> None:
        """Hang up, both channels."""
        if self.back is not None:
            self.back.close()
            self.back = None
        self._wire.close()

    def tell(self, request: Front, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Ask for something that has no answer but yes and no."""
        acknowledged = bool(self.protocol & P_REPLY_ACK)
        self.send(request, payload, fds, NEED_REPLY * acknowledged)
        if acknowledged:
            (result,) = vhostwire.U64.unpack(self._reply(request, vhostwire.U64.size, 0).payload)
            if result:
                raise RefusedError(f"{self.name}: refuses {request.name}")

    def ask_u64(self, request: Front) -> int:
        """Ask for a number."""
        payload = self.ask(request, size=vhostwire.U64.size).payload
        return int(vhostwire.U64.unpack(payload)[0])

    def ask(
        self,
        request: Front,
        payload: bytes = b"",
        given: tuple[int, ...] = (),
        *,
        size: int = -1,
        fds: int = 0,
    ) -> Message:
        """Ask, and return the answer of `size` bytes (-1: any) and `fds` descriptors."""
        self.send(request, payload, given)
        return self._reply(request, size, fds)

    def send(
        self, request: Front, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        """Send something that is not answered. Raises PeerError if the other end cannot take it."""
        message = Message(request, flags, payload, fds)
        if why := misshapen(message, FRONT, self.protocol):
            raise PeerError(f"{self.name}: cannot send {request.name}: {why}")
        self._wire.send(message)

    def _reply(self, request: Front, size: int, fds: int) -> Message:
        message = self._wait()
        fine = message.request == request and message.flags & (REPLY | 3) == REPLY | VERSION
        if fine and size in (-1, len(message.payload)) and len(message.fds) == fds:
            return message
        vhostwire.drop(message)
        told = f"request {message.request}, flags {message.flags:#x}"
        told += f", {len(message.payload)} bytes, {len(message.fds)} descriptors"
        raise self.wrong(f"answers {request.name} with {told}")

    def _wait(self) -> Message:
        """Wait for a message, and meanwhile hear what the back end asks. Raises PeerError.

        It may need our answer before it can give its own.
        """
        end = min(time.monotonic() + self.deadline, self.until)
        poll = select.poll()
        poll.register(self._wire.fileno(), select.POLLIN)
        if self.back is not None:
            poll.register(self.back.fileno(), select.POLLIN)
        while (message := self._wire.receive()) is None:
            if not poll.poll(max(end - time.monotonic(), 0) * 1e3):
                raise self.wrong("does not answer") from TimeoutError(errno.ETIMEDOUT)
            if self.back is not None and (request := self.back.receive()) is not None:
                self.on_request(request)
                if time.monotonic() > end:  # it asks and asks
                    raise self.wrong("does not answer") from TimeoutError(errno.ETIMEDOUT)
        return message

    def wrong(self, what: str) -> PeerError:
        """Return an error that says `what` the back end does."""
        return PeerError(f"{self.name}: {what}")
