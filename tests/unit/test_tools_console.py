"""tools/guest/console: a shell session over a socket, against a scripted guest."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.guest.console import Console, ConsoleError


class FakeGuest:
    """The other end of a console socket: a shell that answers as `script` says."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread: threading.Thread | None = None

    def serve(self, script: Callable[[socket.socket], None]) -> None:
        """Accept one viewer and run `script` on its connection, which is then closed."""

        def run() -> None:
            viewer, _ = self._listener.accept()
            with viewer:
                script(viewer)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def close(self) -> None:
        """Wait for the script to end."""
        if self._thread:
            self._thread.join()
        self._listener.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    """Return a guest whose script is still to be set."""
    guest = FakeGuest(tmp_path / "console.sock")
    yield guest
    guest.close()


def shell(viewer: socket.socket, output: bytes, status: int) -> None:
    """Play a shell: prompt, echo, run one command, prompt."""
    viewer.sendall(b"boot messages\r\n/ # \x1b[6n")
    line = viewer.recv(4096)
    mark = re.findall(rb"beg''in (\d+:)", line)[0]
    viewer.sendall(line.replace(b"\n", b"\r\n") + b"begin " + mark + b"\r\n")
    for at in range(0, len(output), 3):  # in pieces, as a serial port gives it
        viewer.sendall(output[at : at + 3])
    viewer.sendall(b"end " + mark + b" %d\r\n/ # \x1b[6n" % status)


def test_run_returns_what_the_command_printed(guest: FakeGuest) -> None:
    """Not the prompt, not the echo of what was typed, no carriage returns or escapes."""
    guest.serve(lambda viewer: shell(viewer, b"one\r\n\x1b[1mtwo\x1b[0m\r\n", 0))
    with Console(guest.path) as console:
        console.shell(60)
        assert console.run("cat file", 60) == "one\ntwo"


def test_run_of_a_command_that_prints_nothing(guest: FakeGuest) -> None:
    """Empty output is "", whether or not a prompt follows at once."""
    guest.serve(lambda viewer: shell(viewer, b"", 0))
    with Console(guest.path) as console:
        console.shell(60)
        assert console.run("true", 60) == ""


def test_run_fails_with_the_command(guest: FakeGuest) -> None:
    """A status other than the expected one is an error that shows the output."""
    guest.serve(lambda viewer: shell(viewer, b"no such thing\r\n", 2))
    with Console(guest.path) as console:
        console.shell(60)
        with pytest.raises(ConsoleError, match="status 2: no such thing"):
            console.run("ls x", 60)


def test_expect_gives_up_in_time_and_shows_what_there_was(guest: FakeGuest) -> None:
    """A guest that hangs costs the timeout, and its last words are in the error."""
    said, hold = threading.Event(), threading.Event()

    def script(viewer: socket.socket) -> None:
        viewer.sendall(b"Kernel panic - not syncing")
        said.set()
        hold.wait(60)

    guest.serve(script)
    with Console(guest.path) as console:
        assert said.wait(60)
        with pytest.raises(ConsoleError, match=r"(?s)within 0\.2 s.*Kernel panic"):
            console.shell(0.2)
        hold.set()


def test_a_closed_console_is_not_waited_for(guest: FakeGuest) -> None:
    """When the VM ends, so does the wait."""
    guest.serve(lambda viewer: viewer.sendall(b"bye"))
    with Console(guest.path) as console, pytest.raises(ConsoleError, match=r"(?s)closed.*bye"):
        console.shell(60)
