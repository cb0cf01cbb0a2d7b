"""The program that serves a device: met, asked, lost, and met again as another process.

    take(socket) ─► meet ─► serve ─► attempt, attempt, … ─► lost ─► `peer-lost`, `peer-bad`
                      └► sent away: it will not do            (the VM process connects anew)

Every question is part of a step, and steps have little time: the VM process that waits for a
register of this device must not take it for dead because of somebody else.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final

from config.errors import ConfigError, HostError
from devices.device import INFO
from devices.vhostfront import PROTOCOL, FrontEnd
from devices.vhostwire import (
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_LOG_SHMFD,
    PeerError,
    Wire,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host
    from devices.vhostlook import Face
    from devices.vhostwire import Message

STEP: Final = 3.0  # seconds for all questions of one step
_REFILL: Final = 0.25  # seconds of patience per second
_FREE: Final = 0.25  # seconds of each step that cost none: a busy machine is slow, too
_LEAST: Final = 0.5  # seconds that anybody gets

# Agreed on where there is a use for it.
_AGREED: Final = PROTOCOL & ~(P_LOG_SHMFD | P_CONFIGURE_MEM_SLOTS)


class Patience:
    """How long back ends may keep everybody waiting: STEP at once, and a quarter of all time.

    The VM process gives a register access a little longer than that before it ends this process.
    """

    def __init__(self) -> None:
        self._left, self._then = STEP, time.monotonic()

    def begin(self, seconds: float) -> float:
        """Return when to give up, having waited for at most `seconds` from now on."""
        now = time.monotonic()
        self._left = min(STEP, self._left + (now - self._then) * _REFILL)
        self._then = now
        return now + min(seconds, max(self._left, _LEAST))

    def end(self) -> None:
        """The wait is over."""
        now = time.monotonic()
        self._left -= max(now - self._then - _FREE, 0.0)
        self._then = now


class BackEnd:
    """Who serves a device, or nobody. For one thread."""

    def __init__(self, host: Host, face: Face, name: str, socket_fd: int) -> None:
        """Take over the socket of the first one, which `begin` meets; -1: one comes later."""
        self.name = name
        #: Has the queues served, by a back end that serves none yet.
        self.run: Callable[[], None] = lambda: None
        #: Notes that the back end is gone, and serves no queue any more.
        self.lost: Callable[[], None] = lambda: None
        #: How many there have been.
        self.count = 0
        self._host, self._face = host, face
        self._link: FrontEnd | None = None
        self._next = socket.socket(fileno=socket_fd) if socket_fd >= 0 else None
        self._soon = host.timer(self._catch_up)
        self._patience = Patience()
        self._news = False  # the configuration has changed, it says
        self._met = False  # there is another one, and the VM process does not know yet

    def begin(self) -> None:
        """Meet the first one, which settles what the driver will see. Raises HostError."""
        sock, self._next = self._next, None
        if sock is None:
            raise HostError("vhost-user: there is no socket")
        try:
            link = self._meet(sock)
        except PeerError as err:
            raise HostError(f"vhost-user: {err.what}") from err
        self._welcome(link)

    def take(self, fd: int) -> None:
        """Take the socket of one that is to come in the place of one that is gone.

        Raises ConfigError, and the socket is the caller's.
        """
        if self._link is not None or self._next is not None:
            raise ConfigError("has a back end")
        try:
            self._next = socket.socket(fileno=fd)
        except OSError as err:
            raise ConfigError("peer: is no socket") from err
        self._soon.arm(0)  # meeting it takes longer than an answer may

    def attempt(self, step: Callable[[FrontEnd], None], seconds: float = STEP) -> None:
        """Do something with the back end, if there is one; lose it if it fails."""
        link = self._link
        if link is None:
            return
        link.until = self._patience.begin(seconds)
        try:
            step(link)
        except PeerError as err:
            self._lose(link, err)
        finally:
            self._patience.end()

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()

    def _catch_up(self) -> None:
        """Do what had to wait: meet another one, or look at news of the one there is."""
        sock, self._next = self._next, None
        if sock is not None:
            try:
                link = self._meet(sock)
            except PeerError as err:
                self._sent_away(err)
                return
            self._welcome(link)
            self._met = True
            self._soon.arm(0)  # registers have their turn between two steps
            return
        if self._met:
            self._met = False
            self.run()
            if self._link is not None:
                self._host.log(INFO, f"served by {self.name} again")
                self._host.tell("peer-up")
        if self._news:
            self._news = False
            self.attempt(self._look_again)

    def _look_again(self, link: FrontEnd) -> None:
        if self._face.fetch(link):
            self._host.config_changed()

    def _meet(self, sock: socket.socket) -> FrontEnd:
        """Negotiate, and see whether it will do. Raises PeerError, with the socket closed."""
        link = FrontEnd(Wire(sock, self.name))
        link.until = self._patience.begin(STEP)
        link.on_request = self._requested
        try:
            link.negotiate(_AGREED)
            self._face.meet(link)
            if link.protocol & P_BACKEND_REQ and link.protocol & P_CONFIG:
                link.open_back_channel()
        except BaseException:
            link.close()
            raise
        finally:
            self._patience.end()
        return link

    def _welcome(self, link: FrontEnd) -> None:
        self._link = link
        self.count += 1
        self._host.watch(link.fileno(), lambda _: self.attempt(FrontEnd.unasked))
        if link.back is not None:
            self._host.watch(link.back.fileno(), lambda _: self.attempt(self._hear))

    def _hear(self, link: FrontEnd) -> None:
        while link.back is not None and (message := link.back.receive()) is not None:
            self._requested(message)

    def _requested(self, message: Message) -> None:
        """It says that its configuration has changed: there is nothing else to say."""
        self._news = True
        self._soon.arm(0)  # it may wait for an answer to something else right now

    def _lose(self, link: FrontEnd, err: PeerError) -> None:
        self._link, self._met = None, False
        self.lost()
        self._host.unwatch(link.fileno())
        if link.back is not None:
            self._host.unwatch(link.back.fileno())
        link.close()
        self._sent_away(err)

    def _sent_away(self, err: PeerError) -> None:
        """Have the VM process try again, and know whether it is gone or will not do."""
        gone = isinstance(err.__cause__, OSError | EOFError)
        gone = gone and not isinstance(err.__cause__, TimeoutError)
        self._host.log(INFO, f"{err.what}; requests wait for its return")
        self._host.tell("peer-lost" if gone else "peer-bad")
