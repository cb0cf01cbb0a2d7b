"""pyvmctl's QMP client: clear words for every way a VM can fail to answer, and never a hang."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError, NoSuchVmError
from devices.loop import Loop
from tests.unit.test_control import FakeVm
from tests.unit.turning import DEADLINE, LoopThread
from vmm import qmp, qmpclient, safefile, sockets
from vmm.control import Control
from vmm.qmpclient import CommandError, GoneError, QmpClient

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The path of VM web's control socket, and the socket that listens there."""
    directory = tmp_path / "web"
    directory.mkdir()
    dir_fd = safefile.open_dir(str(directory))
    listener = sockets.listen("control.sock", dir_fd)
    os.close(dir_fd)
    yield str(directory / "control.sock"), listener
    listener.close()


class Running:
    """A served FakeVm."""

    def __init__(self, path: str, control: Control, loop: Loop, vm: FakeVm) -> None:
        self.path, self.control, self.loop, self.vm = path, control, loop, vm

    def emit(self, name: str) -> None:
        """Send an event from the loop's thread, and wait until it is sent."""
        sent = threading.Event()
        self.loop.call(lambda: self.control.emit(name))
        self.loop.call(sent.set)
        assert sent.wait(DEADLINE)


@pytest.fixture
def running(place: tuple[str, socket.socket]) -> Iterator[Running]:
    """A VM whose control socket is served on another thread."""
    path, listener = place
    loop, vm = Loop(), FakeVm()
    control = Control(loop, listener, vm, lambda peer: True)
    with LoopThread(loop):
        yield Running(path, control, loop, vm)
    control.close()
    loop.close()


class Puppet(threading.Thread):
    """A server that plays one connection as a test says."""

    def __init__(self, listener: socket.socket, play: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self._listener, self._play = listener, play
        listener.setblocking(True)
        self.start()

    def run(self) -> None:
        """Accept one client and play."""
        sock, _ = self._listener.accept()
        with sock:
            self._play(sock)


def negotiate(sock: socket.socket) -> None:
    """Do the server's part of the negotiation."""
    sock.sendall(qmp.greeting())
    request = json.loads(sock.recv(1 << 16))
    sock.sendall(qmp.reply(None, {"id": request["id"]}))


def test_commands_return_results(running: Running) -> None:
    """call() gives the value of "return"; arguments are passed by name."""
    with QmpClient(running.path) as client:
        assert "QMP" in client.greeting
        assert client.call("query-status") == {"status": "running", "running": True}
        assert client.call("stop") == {}
        assert running.vm.asked == ["pause"]
        with pytest.raises(CommandError, match="'name' is unexpected"):
            client.call("stop", name="x")


def test_a_refusal_keeps_its_words_and_class(running: Running) -> None:
    """An error reply becomes an exception that names the VM; the connection can go on."""
    with QmpClient(running.path) as client:
        with pytest.raises(CommandError, match=r"web: the command 'nope' has not") as caught:
            client.call("nope")
        assert caught.value.error_class == "CommandNotFound"
        assert client.call("query-name") == {"name": "web"}


def test_events_are_kept_and_yielded(running: Running) -> None:
    """Events that come during a call are not lost; events() ends when its time is over."""
    with QmpClient(running.path) as client:
        running.emit("STOP")
        client.call("query-name")
        running.emit("RESUME")
        found = [event["event"] for _, event in zip("12", client.events(DEADLINE), strict=False)]
        assert found == ["STOP", "RESUME"]
        assert list(client.events(0.0)) == []


def test_nobody_there_is_no_such_vm(tmp_path: Path) -> None:
    """No directory, no socket, nobody behind the socket: the VM is not running (exit status 3)."""
    (tmp_path / "web").mkdir()
    paths = [str(tmp_path / "db" / "control.sock"), str(tmp_path / "web" / "control.sock")]
    for path in paths:
        with pytest.raises(NoSuchVmError, match=r"VM (db|web) is not running"):
            QmpClient(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(paths[1])
    sock.close()
    with pytest.raises(NoSuchVmError, match="VM web is not running") as caught:
        QmpClient(paths[1])
    assert caught.value.exit_status == 3


def test_a_vm_of_somebody_else_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission problems are told as such, whether by the file system or by the VM."""
    monkeypatch.setattr(running.control._listener, "_permitted", lambda peer: False)
    with pytest.raises(HostError, match="web: permission denied"):
        QmpClient(running.path)

    def refused(path: str, seconds: float) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sockets, "connect", refused)
    with pytest.raises(HostError, match=r"web: you may not control this VM \(its owner and root"):
        QmpClient(running.path)


def plays() -> list[Any]:
    """What a VM process that has gone mad, or bad, may do; and the words for it."""

    def silent(sock: socket.socket) -> None:
        sock.recv(1)

    def silent_later(sock: socket.socket) -> None:
        negotiate(sock)
        sock.recv(1 << 16)
        sock.recv(1)

    def flooding(sock: socket.socket) -> None:
        negotiate(sock)
        try:
            while True:
                sock.sendall(qmp.event("x", {}))
        except OSError:
            pass

    def leaves(sock: socket.socket) -> None:
        negotiate(sock)
        sock.recv(1 << 16)

    def says(data: bytes) -> Callable[[socket.socket], None]:
        def play(sock: socket.socket) -> None:
            negotiate(sock)
            try:
                sock.sendall(data)
                sock.recv(1 << 16)
                sock.recv(1)
            except OSError:
                pass

        return play

    endless = b"x" * (qmpclient.MESSAGE_LIMIT + (1 << 17))
    return [
        pytest.param(silent, HostError, "socket is silent for 0.2 s", id="silent"),
        pytest.param(silent_later, HostError, "no answer to stop within 0.2 s", id="hangs"),
        pytest.param(flooding, HostError, "no answer to stop within 0.2 s", id="only-events"),
        pytest.param(leaves, GoneError, "the VM closed the control connection", id="leaves"),
        pytest.param(says(endless), HostError, "does not speak QMP", id="endless"),
        pytest.param(says(b"[" * 200_000 + b"\n"), HostError, "does not speak QMP", id="deep"),
        pytest.param(says(b"\xff\n"), HostError, "does not speak QMP", id="bytes"),
        pytest.param(says(b"7\n"), HostError, "does not speak QMP", id="number"),
        pytest.param(
            says(b'{"id": 2, "error": {"desc": "\\u001b[2J"}}\n'),
            CommandError,
            r"web: \\x1b\[2J",
            id="escapes",
        ),
        pytest.param(says(b'{"id": 2, "error": 5}\n'), CommandError, "refused", id="odd-error"),
    ]


@pytest.mark.parametrize(("play", "error", "words"), plays())
def test_no_behaviour_of_the_vm_hangs_or_breaks_the_client(
    place: tuple[str, socket.socket],
    play: Callable[[socket.socket], None],
    error: type[HostError],
    words: str,
) -> None:
    """Silence, floods, nonsense and hang-ups end in an error that says so, in time."""
    path, listener = place
    puppet = Puppet(listener, play)

    def ask() -> None:
        """Be patient but for what never comes."""
        with QmpClient(path, 0.2 if "socket is silent" in words else DEADLINE) as client:
            if "0.2 s" in words:
                client.timeout = 0.2
            client.call("stop")

    started = time.monotonic()
    with pytest.raises(error, match=words):
        ask()
    assert time.monotonic() - started < DEADLINE
    puppet.join(DEADLINE)
    assert not puppet.is_alive()


def test_an_answer_that_came_too_late_is_not_the_next_ones(
    place: tuple[str, socket.socket],
) -> None:
    """After a timeout the connection can be used: answers are matched by id."""
    path, listener = place
    go_on = threading.Event()

    def late(sock: socket.socket) -> None:
        negotiate(sock)
        sock.recv(1 << 16)
        assert go_on.wait(DEADLINE)
        sock.sendall(qmp.reply("late", {"id": 2}))
        request = json.loads(sock.recv(1 << 16))
        sock.sendall(qmp.reply("right", {"id": request["id"]}))

    puppet = Puppet(listener, late)
    with QmpClient(path) as client:
        client.timeout = 0.05
        with pytest.raises(HostError, match="no answer"):
            client.call("stop")
        go_on.set()
        client.timeout = DEADLINE
        assert client.call("cont") == "right"
    puppet.join(DEADLINE)


def test_events_end_with_the_vm(place: tuple[str, socket.socket]) -> None:
    """Waiting for events ends quietly when the VM does."""
    path, listener = place

    def short(sock: socket.socket) -> None:
        negotiate(sock)
        sock.sendall(qmp.event("SHUTDOWN", {"guest": True}))

    puppet = Puppet(listener, short)
    with QmpClient(path) as client:
        assert [event["event"] for event in client.events()] == ["SHUTDOWN"]
        with pytest.raises(GoneError):
            client.call("stop")
    puppet.join(DEADLINE)
