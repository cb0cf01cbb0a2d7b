"""Runs a Loop one round at a time, so that a test is server and client in one thread."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from devices.loop import Loop

DEADLINE: Final = 10.0  # seconds until a test gives up


def turn(loop: Loop, rounds: int = 1) -> None:
    """Serve everything that is ready, `rounds` times."""
    for _ in range(rounds):
        loop.call(loop.stop)
        loop.run()


def until(loop: Loop, condition: Callable[[], object]) -> None:
    """Serve until `condition` holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the loop did not get there in time"
        turn(loop)


def take(sock: socket.socket, size: int = 1 << 20) -> bytes:
    """Return what a non-blocking socket has now; b"" if nothing or at its end."""
    data = b""
    try:
        while len(data) < size and (piece := sock.recv(size - len(data))):
            data += piece
    except (BlockingIOError, ConnectionResetError):
        pass
    return data


def at_end(sock: socket.socket) -> bool:
    """Tell whether the other side of a non-blocking socket has closed; drops what is unread."""
    try:
        while sock.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


class LoopThread:
    """Runs a loop on a thread of its own, for tests of clients that block. A context manager."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._thread = loop, threading.Thread(target=loop.run)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call(self._loop.stop)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the loop did not stop"
