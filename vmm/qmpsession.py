"""One client of the control socket: its input, its place in line, its unread output.

Input and output are bounded, and a client gets at most a few commands per round of the loop, so
that one that floods, stalls or talks nonsense disturbs no other and never the VM. Commands run in
the order they came; what they do is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import PyvmError
from devices import passing
from vmm import log, qmp, qmpfds
from vmm.sockets import READ_SIZE, Stream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from devices.loop import Loop

BATCH: Final = 8  # commands per round of the loop
OUTPUT_PAUSE: Final = 64 * 1024  # unread bytes at which the next command waits
OUTPUT_LIMIT: Final = 1024 * 1024  # unread bytes at which the client is dropped


class Later:
    """The result of a command that takes time. One of done() and failed() is called once.

    Both are for the loop's thread. The client's next commands wait meanwhile; others do not.
    """

    def __init__(self) -> None:
        self._answer: Callable[[Any, PyvmError | None], None] | None = None
        self._early: tuple[Any, PyvmError | None] | None = None

    def done(self, value: Any = None) -> None:
        """The command has worked; `value` is what it returns."""
        self._settle(value, None)

    def failed(self, err: PyvmError) -> None:
        """The command has failed."""
        self._settle(None, err)

    def then(self, answer: Callable[[Any, PyvmError | None], None]) -> None:
        """Call `answer` when the result is there, at once if it is."""
        self._answer = answer
        if self._early is not None:
            answer(*self._early)

    def _settle(self, value: Any, err: PyvmError | None) -> None:
        if self._answer is None:
            self._early = (value, err)
        else:
            self._answer(value, err)


class Session(Stream):
    """One client. `execute` runs a request, `gone` is told of the end."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        execute: Callable[[Session, qmp.Request], Any],
        gone: Callable[[Session], None],
    ) -> None:
        super().__init__(loop, sock)
        self._execute, self._gone, self._framer = execute, gone, qmp.Framer()
        self._due = False  # a round of _serve() is on its way
        self._later: Later | None = None  # the command whose result is awaited
        self.negotiated = False
        self.descriptors = qmpfds.Descriptors()
        self.send(qmp.greeting())

    def received(self, data: bytes) -> None:
        """Execute what is complete."""
        self._framer.feed(data)
        self._serve()

    def ended(self) -> None:
        """Close once the answers are read; all that was asked has been answered."""
        if not self.queued:
            self.close()

    def hung_up(self) -> None:
        """Close, but not while there are commands that can be executed."""
        if not self._due:
            self.close()

    def drained(self) -> None:
        """Go on if it was output that commands waited for."""
        if not self._due:
            self._serve()

    def send(self, data: bytes) -> None:
        """Send, or drop a client that has stopped reading."""
        super().send(data)
        if self.queued > OUTPUT_LIMIT:
            what = f"client dropped, it left {self.queued} bytes unread"
            log.limited("control unread", what, "control")
            self.close()

    def close(self) -> None:
        """Drop the client."""
        super().close()
        self.descriptors.close()
        self._gone(self)

    def _take(self) -> bytes:
        """Read once, also descriptors, which are for a getfd among these bytes."""
        data, fds, more = passing.receive(self._sock, READ_SIZE, qmpfds.BATCH)
        self.descriptors.arrive(fds, more=more)
        return data

    def _waits(self) -> bool:
        return self._later is not None or self.queued > OUTPUT_PAUSE

    def _serve(self) -> None:
        """Execute a few commands; leave the rest to later rounds, and meanwhile read no more."""
        self._due = False
        for _ in range(BATCH):
            if self.closed or self._waits():
                break
            if not self._serve_one():
                if self._framer.empty:
                    self.descriptors.drop()  # nobody asked for what came
                self.read(True)
                if self.eof:
                    self.ended()
                return
        self.read(False)
        self._serve_soon()

    def _serve_soon(self) -> None:
        if not self.closed and not self._waits() and not self._due:
            self._due = True
            self._loop.call(self._serve)

    def _serve_one(self) -> bool:
        """Answer the client's next text; false if none is complete."""
        tag: dict[str, Any] = {}
        try:
            text = self._framer.next()
            if text is None:
                return False
            request = qmp.parse(text)
            tag = request.tag
            value = self._execute(self, request)
        except PyvmError as err:
            self.send(qmp.error(err, tag))
            if isinstance(err, qmp.QmpFatalError):
                self.close()
            return True
        if isinstance(value, Later):
            self._later = value
            value.then(lambda result, err: self._settled(tag, result, err))
        else:
            self.send(_encoded(value, tag))
        return True

    def _settled(self, tag: dict[str, Any], value: Any, err: PyvmError | None) -> None:
        self._later = None
        self.send(_encoded(value, tag) if err is None else qmp.error(err, tag))
        self._serve_soon()


def _encoded(value: Any, tag: dict[str, Any]) -> bytes:
    try:
        return qmp.reply(value, tag)
    except (TypeError, ValueError) as err:  # a value JSON cannot hold: our fault
        log.error(f"unspeakable reply: {err}", "control")
        return qmp.error(qmp.QmpError(f"internal error: {err}"), tag)
