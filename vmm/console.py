"""The console socket of a VM: serial bytes to every viewer, every viewer's typing to the UART.

Raw bytes both ways. What the guest prints goes to console.log, to a ring that a new viewer is
shown first, and to each viewer's own queue; a viewer that does not keep up loses bytes and is
told how many, and nobody else notices. The guest never waits for any of them. A BREAK cannot be
said in raw bytes: it is a command on the control socket (x-pyvmd-send-break).
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from vmm.log import Appender
from vmm.sockets import Listener, Stream, flush_and_close, leaver

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from devices.loop import Loop
    from vmm.sockets import Peer

VIEWERS: Final = 16
RING: Final = 64 * 1024  # bytes shown to a new viewer
PENDING_LIMIT: Final = 256 * 1024  # bytes printed that the loop has not taken yet
VIEWER_LIMIT: Final = 256 * 1024  # bytes a viewer may be behind
INPUT_LIMIT: Final = 64 * 1024  # bytes kept from a viewer that typed and left
ORPHANS: Final = 16  # viewers of whom such bytes are kept
LOG_LIMIT: Final = 1024 * 1024  # bytes in one file; console.log and console.log.1
# A guest prints a byte at a time. After one delivery the next waits this long (seconds), so that
# a flood costs the loop hundreds of wake-ups a second, not tens of thousands.
GATHER: Final = 0.004


class Viewer(Stream):
    """One attached client."""

    def __init__(self, loop: Loop, sock: socket.socket, console: Console) -> None:
        super().__init__(loop, sock)
        self._console = console
        self._lost = 0  # bytes not queued since it fell behind
        self.typed = bytearray()  # input that the UART has not taken yet

    def show(self, data: bytes) -> None:
        """Queue output; from a viewer that is too far behind, keep it."""
        if self._lost or (self.queued and self.queued + len(data) > VIEWER_LIMIT):
            self._lost += len(data)
        else:
            self.send(data)

    def drained(self) -> None:
        """Once it has caught up half way, tell a late viewer what it missed and go on."""
        if self._lost and self.queued <= VIEWER_LIMIT // 2:
            note, self._lost = _gap(self._lost), 0
            self.send(note)

    def received(self, data: bytes) -> None:
        """Pass typing on."""
        self.typed += data
        self._console.type_in(self)

    def ended(self) -> None:
        """Closed its sending half: it may still watch."""

    def hung_up(self) -> None:
        """Gone. What it typed before it left is still for the guest."""
        if self.typed:
            self.typed += self.rest(INPUT_LIMIT)
        self.close()

    def close(self) -> None:
        """Drop the viewer."""
        super().close()
        self._console.forget(self)


class Console:
    """The console of one VM. output() and room() are for any thread, the rest for the loop's."""

    def __init__(
        self,
        loop: Loop,
        listen_socket: socket.socket,
        log_path: str,
        feed: Callable[[bytes], int],
        permitted: Callable[[Peer], bool],
    ) -> None:
        """`feed` takes typed bytes and returns how many it took; room() says when it takes more.

        Raises HostError when the log cannot be opened.
        """
        self._loop, self._feed = loop, feed
        self._log = Appender(log_path, LOG_LIMIT, _log_gap)
        self._lock = threading.Lock()
        self._pending = bytearray()  # printed, for _deliver()
        self._lost = 0  # printed, but too much for _pending
        self._awake = False  # _deliver() is on its way
        self._ring = bytearray()
        self._viewers: dict[Viewer, Peer] = {}
        self._starved: deque[Viewer] = deque()  # have typed what the UART has no room for
        self._hungry = False  # room() matters
        self.bytes_out = 0  # printed by the guest
        self.bytes_in = 0  # taken by the guest's UART
        self._timer = loop.timer(self._deliver)
        self._listener = Listener(
            loop,
            listen_socket,
            permitted=permitted,
            welcome=self._welcome,
            refusal=lambda why: f"pyvmd: console: {why}\r\n".encode(),
            who="console",
        )

    @property
    def viewers(self) -> int:
        """How many are attached."""
        return len(self._viewers)

    def output(self, data: bytes) -> None:
        """Take what the guest printed. Never waits; what is too much is dropped, oldest first."""
        with self._lock:
            self.bytes_out += len(data)
            self._pending += data
            excess = len(self._pending) - PENDING_LIMIT
            if excess > 0:
                del self._pending[:excess]
                self._lost += excess
            if self._awake:
                return
            self._awake = True
        self._loop.call(self._deliver)

    def room(self) -> None:
        """The UART has room for typed bytes again. Cheap when nobody waits."""
        if self._hungry:
            self._hungry = False
            self._loop.call(self._feed_starved)

    def close(self) -> None:
        """Deliver the last output, give viewers a moment to read it, drop them."""
        self._deliver()
        self._timer.close()
        self._listener.close()
        flush_and_close(list(self._viewers))
        self._log.close()

    def type_in(self, viewer: Viewer) -> None:
        """Give the UART what a viewer typed; if it cannot take all, that viewer has to wait."""
        self._starved.append(viewer)
        if len(self._starved) == 1:
            self._feed_starved()
        viewer.read(not viewer.typed)

    def forget(self, viewer: Viewer) -> None:
        """A viewer has closed."""
        self._viewers.pop(viewer, None)
        gone = [other for other in self._starved if other.closed]
        if len(gone) > ORPHANS:
            self._starved.remove(gone[0])

    def _feed_starved(self) -> None:
        """Feed the waiting viewers in turn until the UART is full."""
        # Before feed(), or a room() from the guest's side just after it would be missed.
        self._hungry = True
        while self._starved:
            viewer = self._starved.popleft()
            taken = self._feed(bytes(viewer.typed))
            self.bytes_in += taken
            del viewer.typed[:taken]
            if not viewer.typed:
                viewer.read(True)
            elif taken:
                self._starved.append(viewer)
            else:
                self._starved.appendleft(viewer)
                return
        self._hungry = False

    def _welcome(self, sock: socket.socket, peer: Peer) -> None:
        if len(self._viewers) >= VIEWERS:
            crowd = leaver(self._viewers, peer)
            if crowd is None:
                self._listener.refuse(sock, f"{VIEWERS} viewers are attached already")
                return
            crowd.close()
        viewer = Viewer(self._loop, sock, self)
        self._viewers[viewer] = peer
        # A full ring begins somewhere in a line, perhaps in the middle of an escape sequence.
        start = self._ring.find(b"\n", 0, RING // 16) + 1 if len(self._ring) == RING else 0
        viewer.send(bytes(self._ring[start:]))

    def _deliver(self) -> None:
        with self._lock:
            if not self._pending:
                self._awake = False
                return
            data, lost = bytes(self._pending), self._lost
            self._pending.clear()
            self._lost = 0
        self._timer.arm(GATHER)
        if lost:
            data = _gap(lost) + data
        self._log.write(data)
        self._ring += data
        del self._ring[:-RING]
        for viewer in list(self._viewers):
            viewer.show(data)


def _gap(lost: int) -> bytes:
    return f"\r\n[pyvmd: {lost} bytes lost]\r\n".encode()


def _log_gap(lost: int, why: str) -> bytes:
    return f"\r\n[pyvmd: {lost} bytes lost: {why}]\r\n".encode()
