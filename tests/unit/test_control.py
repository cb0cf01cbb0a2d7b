"""The control socket: QMP as clients expect it, and no client that disturbs another or the VM."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from devices.loop import Loop
from tests.unit.turning import at_end, take, turn, until
from vmm import control, qmp, qmpsession, safefile, sockets
from vmm.control import COMMANDS, Command, Control
from vmm.qmpsession import Later
from vmm.sockets import Peer

if TYPE_CHECKING:
    from pathlib import Path


class FakeVm:
    """A VM that notes what it is asked, and answers what a test has put in `answer`."""

    name = "web"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Any = None
        self.state = "running"

    def status(self) -> str:
        return self.state

    def info(self) -> dict[str, Any]:
        self.asked.append("info")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if isinstance(self.answer, dict) else {"name": self.name, "vcpus": 2}

    def pause(self) -> Later | None:
        self.state = "paused"
        return self._note("pause")

    def resume(self) -> Later | None:
        self.state = "running"
        return self._note("resume")

    def reset(self, cause: str) -> Later | None:
        return self._note(f"reset {cause}")

    def power_button(self) -> Later | None:
        return self._note("power button")

    def ctrl_alt_del(self) -> Later | None:
        return self._note("ctrl-alt-del")

    def send_break(self) -> Later | None:
        return self._note("break")

    def set_device(self, device: str, setting: str, value: Any, fd: int = -1) -> Any:
        passed = "" if fd < 0 else f" with {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}"
        return self._note(f"{device}: {setting} = {value!r}{passed}")

    def ask(self, goal: str) -> dict[str, Any]:
        self._note(f"ask {goal}")
        return {"goal": goal, "state": "asked"}

    def move_tray(
        self, device: str, action: str, *, force: bool = False, fd: int = -1, path: str = ""
    ) -> Any:
        disc = os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) if fd >= 0 else ""
        return self._note(f"{device}: {action} {disc} {path} {force}")

    def quit(self, cause: str) -> Later | None:
        return self._note(f"quit {cause}")

    def _note(self, what: str) -> Later | None:
        self.asked.append(what)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if isinstance(self.answer, Later) else None


class Client:
    """A test's end of one connection."""

    def __init__(self, served: Served, *, negotiate: bool = True) -> None:
        self._served = served
        self.sock = sockets.connect(served.path, 5.0)
        self.sock.setblocking(False)
        self._unread = b""
        if negotiate:
            assert "QMP" in self.next()
            assert self.call("qmp_capabilities") == {"return": {}}

    def send(self, data: bytes) -> None:
        """Send all of `data`, serving meanwhile."""
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                turn(self._served.loop)

    def next(self) -> Any:
        """Return the next message."""
        until(self._served.loop, self._has_line)
        line, self._unread = self._unread.split(b"\r\n", 1)
        return json.loads(line)

    def rest(self, rounds: int = 5) -> list[Any]:
        """Return what comes within a few rounds."""
        turn(self._served.loop, rounds)
        *lines, self._unread = (self._unread + take(self.sock)).split(b"\r\n")
        return [json.loads(line) for line in lines]

    def call(self, name: str, **members: Any) -> Any:
        """Run a command and return its answer, whole."""
        self.send(json.dumps({"execute": name, **members}).encode())
        return self.next()

    def thrown_out(self) -> bool:
        """Serve a little and tell whether the server has closed."""
        turn(self._served.loop, 3)
        return at_end(self.sock)

    def _has_line(self) -> bool:
        self._unread += take(self.sock)
        return b"\r\n" in self._unread


class Served:
    """A control socket in a directory of its own, and its loop."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "control.sock")
        self.loop, self.vm = Loop(), FakeVm()
        self.peers: list[sockets.Peer] = []
        self.allowed = True
        dir_fd = safefile.open_dir(str(directory))
        listener = sockets.listen("control.sock", dir_fd)
        os.close(dir_fd)
        self.control = Control(self.loop, listener, self.vm, self._permitted)
        self._closed = False
        self.clients: list[Client] = []

    def client(self, *, negotiate: bool = True) -> Client:
        """Connect one more client."""
        self.clients.append(Client(self, negotiate=negotiate))
        return self.clients[-1]

    def close(self) -> None:
        """End the server, then the clients."""
        if not self._closed:
            self._closed = True
            self.control.close()

    def _permitted(self, peer: sockets.Peer) -> bool:
        self.peers.append(peer)
        return self.allowed


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A control socket for a test to connect to."""
    served = Served(tmp_path)
    yield served
    served.close()
    for client in served.clients:
        client.sock.close()
    served.loop.close()


def test_a_connection_begins_with_greeting_and_negotiation(served: Served) -> None:
    """First the greeting; then only qmp_capabilities is a command, once (qmp-spec)."""
    client = served.client(negotiate=False)
    greeting = client.next()
    assert greeting["QMP"]["capabilities"] == []
    assert client.call("stop", id=1)["error"]["class"] == "CommandNotFound"
    assert client.call("qmp_capabilities", arguments={"enable": ["oob"]})["error"]
    assert client.call("qmp_capabilities", arguments={"enable": "oob"})["error"]
    assert client.call("qmp_capabilities", arguments={"enable": []}, id=2) == {
        "return": {},
        "id": 2,
    }
    assert client.call("qmp_capabilities")["error"]["class"] == "CommandNotFound"
    assert served.vm.asked == []


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("stop", "pause"),
        ("cont", "resume"),
        ("system_reset", "reset host-qmp-system-reset"),
        ("system_powerdown", "power button"),
        ("quit", "quit host-qmp-quit"),
        ("x-pyvmd-send-break", "break"),
        ("x-pyvmd-ctrl-alt-del", "ctrl-alt-del"),
    ],
)
def test_a_command_reaches_the_vm_and_returns_an_empty_object(
    served: Served, command: str, asked: str
) -> None:
    """Commands without a result return {}, and the id is repeated."""
    assert served.client().call(command, id={"n": 1}) == {"return": {}, "id": {"n": 1}}
    assert served.vm.asked == [asked]


def test_queries_tell_what_qemu_would(served: Served) -> None:
    """query-status, -name, -version and -commands have the members of QEMU's schema."""
    client = served.client()
    assert client.call("query-status") == {"return": {"status": "running", "running": True}}
    client.call("stop")
    assert client.call("query-status") == {"return": {"status": "paused", "running": False}}
    assert client.call("query-name") == {"return": {"name": "web"}}
    assert client.call("query-version")["return"] == qmp.version()
    assert client.call("x-pyvmd-info")["return"] == {"name": "web", "vcpus": 2}
    names = [entry["name"] for entry in client.call("query-commands")["return"]]
    assert names == list(COMMANDS)
    assert {"quit", "stop", "cont", "query-commands", "qmp_capabilities"} <= set(names)


def test_unknown_commands_and_arguments_have_no_effect(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong name or argument is an error before anything is done."""
    client = served.client()
    error = client.call("sotp", id=9)
    assert error == {
        "error": {"class": "CommandNotFound", "desc": "the command 'sotp' has not been found"},
        "id": 9,
    }
    assert "'x' is unexpected" in client.call("quit", arguments={"x": 1})["error"]["desc"]

    row = Command(lambda vm, arguments: arguments, {"n": (int, True), "s": (str, False)})
    monkeypatch.setitem(COMMANDS, "x-test", row)
    assert "'n' is missing" in client.call("x-test")["error"]["desc"]
    for wrong in (True, "1", None, 1.5, [1]):
        desc = client.call("x-test", arguments={"n": wrong})["error"]["desc"]
        assert "'n' must be an integer" in desc
    assert client.call("x-test", arguments={"n": 1, "s": "a"})["return"] == {"n": 1, "s": "a"}
    assert served.vm.asked == []


def test_an_operation_that_fails_says_why(served: Served) -> None:
    """The VM's own words reach the client, and the connection goes on."""
    client = served.client()
    served.vm.answer = HostError("is paused, not running", vm="web")
    assert client.call("stop", id=1) == {
        "error": {"class": "GenericError", "desc": "web: is paused, not running"},
        "id": 1,
    }
    assert client.call("query-name")["return"] == {"name": "web"}


@pytest.mark.parametrize("fault", [ZeroDivisionError("oops"), {"n": float("nan")}, {"b": b""}])
def test_a_fault_of_ours_does_not_end_the_vm(served: Served, fault: Any) -> None:
    """A bug behind a command costs that command its answer, no more."""
    client = served.client()
    served.vm.answer = fault
    assert "internal error" in client.call("x-pyvmd-info")["error"]["desc"]
    assert client.call("query-name")["return"] == {"name": "web"}


def test_events_go_to_everyone_past_negotiation(served: Served) -> None:
    """Events reach all clients that have negotiated, with data only where there is some."""
    first, second = served.client(), served.client()
    silent = served.client(negotiate=False)
    assert silent.next().keys() == {"QMP"}
    served.control.emit("STOP")
    served.control.emit("RESET", {"guest": True, "reason": control.CAUSE_GUEST_RESET})
    for client in (first, second):
        stop, reset = client.rest()
        assert stop.keys() == {"event", "timestamp"}
        assert stop["event"] == "STOP"
        assert reset["data"] == {"guest": True, "reason": "guest-reset"}
    assert silent.rest() == []


def test_a_command_that_takes_time_holds_up_its_client_only(served: Served) -> None:
    """Answers keep the order of commands; other clients are served meanwhile."""
    client, other = served.client(), served.client()
    later = served.vm.answer = Later()
    client.send(b'{"execute":"stop","id":1}{"execute":"query-name","id":2}')
    assert client.rest() == []
    served.vm.answer = None
    assert other.call("query-status")["return"]["status"] == "paused"
    later.done()
    assert client.rest() == [{"return": {}, "id": 1}, {"return": {"name": "web"}, "id": 2}]

    later = served.vm.answer = Later()
    client.send(b'{"execute":"cont","id":3}')
    assert client.rest() == []
    later.failed(HostError("the disk does not answer"))
    assert client.next()["error"]["desc"] == "the disk does not answer"


def test_a_result_that_is_there_at_once_is_no_special_case(served: Served) -> None:
    """A Later may be settled before it is returned, and its client may leave before it is."""
    client = served.client()
    served.vm.answer = later = Later()
    later.done({"took": 0})
    assert client.call("stop", id=1) == {"return": {"took": 0}, "id": 1}
    assert client.call("query-name", id=2) == {"return": {"name": "web"}, "id": 2}

    served.vm.answer = later = Later()
    client.send(b'{"execute":"stop"}')
    turn(served.loop, 2)
    client.sock.close()
    until(served.loop, lambda: not served.control.clients)
    later.done()
    turn(served.loop, 2)


def test_who_may_not_is_refused_with_one_line(served: Served) -> None:
    """A peer without permission gets an error object and no greeting."""
    served.allowed = False
    client = served.client(negotiate=False)
    assert client.next() == {"error": {"class": "GenericError", "desc": "permission denied"}}
    assert client.thrown_out()
    assert [(peer.uid, peer.pid) for peer in served.peers] == [(os.geteuid(), os.getpid())]


def test_clients_that_say_nothing_do_not_keep_others_out(served: Served) -> None:
    """When the house is full, whoever has not negotiated leaves first; then it is full."""
    silent = [served.client(negotiate=False) for _ in range(control.CLIENTS)]
    for client in silent:
        client.next()
    working = [served.client() for _ in range(control.CLIENTS)]
    assert all(client.thrown_out() for client in silent)
    late = served.client(negotiate=False)
    assert "32 clients are connected" in late.next()["error"]["desc"]
    assert working[0].call("query-name")["return"] == {"name": "web"}
    assert served.control.clients == control.CLIENTS


@pytest.mark.parametrize("other", [Peer(1, 0, os.getpid(), ()), Peer(os.geteuid(), 0, 1, ())])
def test_one_who_takes_every_place_keeps_nobody_else_out(
    other: Peer, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user, or another process of the same one, gets the place of his oldest client."""
    many = [served.client() for _ in range(control.CLIENTS)]
    monkeypatch.setattr(sockets, "peer_of", lambda _sock: other)
    assert served.client().call("query-name")["return"] == {"name": "web"}
    assert many[0].thrown_out()
    assert many[1].call("query-name")["return"] == {"name": "web"}
    assert served.control.clients == control.CLIENTS


def test_the_log_says_who_wanted_it(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    """For what changes the VM's life, also where it changes nothing; not for questions."""
    client = served.client()
    for name in ("stop", "query-status", "x-pyvmd-stop", "x-pyvmd-info", "quit"):
        client.call(name)
    lines = capfd.readouterr().err.splitlines()
    who = f"from uid {os.geteuid()}, process {os.getpid()}"
    told = ("stop", "x-pyvmd-stop", "quit")
    assert [line.split(": ", 1)[1] for line in lines] == [f"{name}, {who}" for name in told]


def test_a_flood_of_commands_lets_others_in_between(served: Served) -> None:
    """A client gets a few commands per round, however many it has sent."""
    flooder, other = served.client(), served.client()
    flooder.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    flooder.send(b'{"execute":"stop"}' * 1000)
    rounds = 0
    other.sock.send(b'{"execute":"query-name"}')
    while not take(other.sock):
        turn(served.loop)
        rounds += 1
    assert rounds <= 3
    assert len(served.vm.asked) <= (rounds + 1) * qmpsession.BATCH
    until(served.loop, lambda: len(served.vm.asked) == 1000)


def test_a_client_that_does_not_read_waits_and_is_dropped_in_the_end(served: Served) -> None:
    """Unread replies stop a client's commands; unread events end it. Memory stays bounded."""
    client, other = served.client(), served.client()
    served.vm.answer = {"filler": "x" * 10_000}
    client.sock.setblocking(False)
    for _ in range(2000):
        try:
            client.sock.send(b'{"execute":"x-pyvmd-info"}' * 10)
        except BlockingIOError:
            break
        turn(served.loop)
    else:
        pytest.fail("the server took 20,000 commands from a client that reads no answer")
    session = next(iter(served.control._clients))
    assert session.queued < qmpsession.OUTPUT_PAUSE + 2 * 10_000
    asked = len(served.vm.asked)

    for _ in range(3000):
        served.control.emit("x-pyvmd-test", {"filler": "y" * 1000})
        assert session.queued <= qmpsession.OUTPUT_LIMIT
        other.rest(1)
    assert session.closed
    assert len(served.vm.asked) == asked
    assert other.call("query-name")["return"] == {"name": "web"}


def test_a_client_that_reads_late_gets_everything(served: Served) -> None:
    """Back-pressure loses nothing: each command is answered, in order."""
    client = served.client()
    served.vm.answer = {"filler": "x" * 10_000}
    client.send(b"".join(b'{"execute":"x-pyvmd-info","id":%d}' % n for n in range(100)))
    turn(served.loop, 30)
    assert len(served.vm.asked) < 100
    assert [client.next()["id"] for _ in range(100)] == list(range(100))


@pytest.mark.parametrize(
    ("data", "desc"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b'{"execute": "' + b"x" * 200_000, "longer than"),
        (b"x" * 200_000, "longer than"),
    ],
)
def test_what_cannot_be_a_request_ends_the_connection(
    served: Served, data: bytes, desc: str
) -> None:
    """A line without end or a pit of brackets: one error, then the connection is closed."""
    client, other = served.client(), served.client()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # thrown out half way
        client.send(data)
    assert desc in client.next()["error"]["desc"]
    assert client.thrown_out()
    assert other.call("query-name")["return"] == {"name": "web"}


@pytest.mark.parametrize(
    "data", [b'{"execute": }', b'{"execute": "\xc3("}', b"7\n", b"null\n", b'{"half": \x01', b"[]"]
)
def test_a_mistake_is_answered_and_forgiven(served: Served, data: bytes) -> None:
    """Bad JSON, bad UTF-8 and wrong types get an error; the next command works."""
    client = served.client()
    client.send(data)
    assert client.next()["error"]["class"] == "GenericError"
    assert client.call("query-name", id=1) == {"return": {"name": "web"}, "id": 1}


def test_half_a_request_costs_nothing(served: Served) -> None:
    """A client that stops in the middle is not waited for; it may finish any time later."""
    client, other = served.client(), served.client()
    client.send(b'{"execute": "query-')
    assert other.call("query-name")["return"] == {"name": "web"}
    client.send(b'name"}')
    assert client.next()["return"] == {"name": "web"}


def test_what_was_said_before_leaving_still_counts(served: Served) -> None:
    """`echo ... | socat` works: commands are executed though the client has closed."""
    client = served.client(negotiate=False)
    client.send(b'{"execute":"qmp_capabilities"}' + b'{"execute":"stop"}' * 20)
    client.sock.close()
    until(served.loop, lambda: len(served.vm.asked) == 20)
    until(served.loop, lambda: not served.control.clients)


def test_a_client_that_has_said_all_still_gets_its_answers(served: Served) -> None:
    """Closing the sending half is no hang-up: answers come, then the server closes."""
    client = served.client(negotiate=False)
    client.send(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-name"}' * 20)
    client.sock.shutdown(socket.SHUT_WR)
    messages = client.rest(20)
    assert messages[2:] == [{"return": {"name": "web"}}] * 20
    assert client.thrown_out()


def test_answers_unread_at_half_close_are_kept(served: Served) -> None:
    """A client that has said all and reads slowly loses nothing; then the server closes."""
    client = served.client()
    served.vm.answer = {"filler": "x" * 10_000}
    session, count = next(iter(served.control._clients)), 0
    while not session.queued:  # more than the kernel keeps, less than makes commands wait
        client.sock.send(b'{"execute":"x-pyvmd-info"}')
        turn(served.loop)
        count += 1
    client.sock.shutdown(socket.SHUT_WR)
    turn(served.loop, 3)
    assert [client.next()["return"] for _ in range(count)] == [served.vm.answer] * count
    assert client.thrown_out()


def test_the_last_words_reach_clients(served: Served) -> None:
    """An answer and an event given just before the end are delivered, then the socket closes."""
    client = served.client()
    client.send(b'{"execute":"quit"}')
    until(served.loop, lambda: served.vm.asked)
    served.control.emit("SHUTDOWN", {"guest": False, "reason": control.CAUSE_QUIT})
    served.close()
    data = take(client.sock)
    assert json.loads(data.split(b"\r\n")[-2])["event"] == "SHUTDOWN"
    assert at_end(client.sock)


def test_idle_clients_cost_nothing(served: Served) -> None:
    """No timer and no round of the loop is spent on clients that are silent."""
    for _ in range(3):
        served.client()
    turn(served.loop, 5)
    assert served.loop._epoll.poll(0) == []
    assert not served.loop._calls


def test_running_out_of_descriptors_pauses_accepting(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When accept() fails the loop does not spin; clients get in once it works again."""
    monkeypatch.setattr(sockets, "ACCEPT_PAUSE", 0.01)
    listener = served.control._listener
    real = listener._sock

    class Full:
        """accept() of a process that has no descriptor left."""

        def fileno(self) -> int:
            return real.fileno()

        def accept(self) -> Any:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(listener, "_sock", Full())
    client = served.client(negotiate=False)
    turn(served.loop, 2)
    assert served.loop._epoll.poll(0) == []
    monkeypatch.setattr(listener, "_sock", real)
    assert "QMP" in client.next()


def test_device_settings_reach_the_vm(served: Served) -> None:
    """A setting goes to the device it names, its value untouched whatever JSON type it has."""
    call = served.client().call
    settings = {"device": "vioblk0", "setting": "rate"}
    value = [1, {"a": None}]
    answer = call("x-pyvmd-set-device", arguments={**settings, "value": value})
    assert answer == {"return": {}}
    answer = call("block_resize", arguments={"device": "vioblk0", "size": 1 << 40})
    assert answer == {"return": {}}
    assert served.vm.asked == [f"vioblk0: rate = {value}", f"vioblk0: resize = {1 << 40}"]
    assert "error" in call("block_resize", arguments={"device": "vioblk0", "size": True})
    assert "error" in call("x-pyvmd-set-device", arguments=settings)
