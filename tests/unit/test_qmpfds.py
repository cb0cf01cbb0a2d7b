"""Descriptors over the control socket: getfd and closefd, and that none is left behind."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from tests.descriptors import count_before
from tests.unit.test_control import Client, Served, served
from tests.unit.test_qmpclient import Running, place, running
from tests.unit.turning import turn, until
from vmm import qmpfds
from vmm.qmpclient import CommandError, QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["place", "running", "served"]  # fixtures

SET = {"device": "cd", "setting": "medium", "value": 1}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file that only this test has open."""
    path = tmp_path / "disc.iso"
    path.write_bytes(b"disc")
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def copies(fd: int) -> int:
    """Count the descriptors of this process, which is the server's, that are the same file."""
    count, wanted = 0, os.fstat(fd)
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.path.samestat(os.fstat(int(name)), wanted)
        except OSError:
            continue  # that of the listing
    return count


def request(name: str, arguments: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a command."""
    return json.dumps({"execute": name, "arguments": arguments or {}}).encode()


def call(client: Client, data: bytes, fds: Sequence[int] = ()) -> str:
    """Send bytes and descriptors; return the error's words, or ""."""
    socket.send_fds(client.sock, [data], list(fds))
    answer = client.next()
    assert answer.keys() <= {"return", "error"}
    return str(answer.get("error", {}).get("desc", ""))


def test_a_descriptor_is_named_and_used_up(served: Served, file: int) -> None:
    """Getfd names it; the command that uses it closes it, and the name is free again."""
    client = served.client()
    assert call(client, request("getfd", {"fdname": "disc"}), [file]) == ""
    assert copies(file) == 2
    use = request("x-pyvmd-set-device", {**SET, "fdname": "disc"})
    assert call(client, use) == ""
    assert served.vm.asked == ["cd: medium = 1 with disc.iso"]
    assert copies(file) == 1
    assert "no file descriptor is named 'disc'" in call(client, use)
    assert len(served.vm.asked) == 1


def test_a_command_that_fails_has_used_it_up(served: Served, file: int) -> None:
    """The descriptor is closed whatever the device says."""
    client = served.client()
    served.vm.answer = HostError("no such tray")
    assert call(client, request("getfd", {"fdname": "disc"}), [file]) == ""
    use = request("x-pyvmd-set-device", {**SET, "fdname": "disc"})
    assert call(client, use) == "no such tray"
    assert copies(file) == 1


def test_closefd_closes(served: Served, file: int) -> None:
    """Closefd forgets a name, once."""
    client = served.client()
    assert call(client, request("getfd", {"fdname": "a"}), [file]) == ""
    assert call(client, request("closefd", {"fdname": "a"})) == ""
    assert copies(file) == 1
    assert "'a'" in call(client, request("closefd", {"fdname": "a"}))


def test_a_name_can_be_given_anew(served: Served, file: int) -> None:
    """The descriptor that had the name before is closed."""
    client = served.client()
    with open(os.devnull) as other:
        assert call(client, request("getfd", {"fdname": "a"}), [file]) == ""
        assert call(client, request("getfd", {"fdname": "a"}), [other.fileno()]) == ""
    assert copies(file) == 1
    assert call(client, request("x-pyvmd-set-device", {**SET, "fdname": "a"})) == ""
    assert served.vm.asked == ["cd: medium = 1 with null"]


def test_names_are_each_clients_own(served: Served, file: int) -> None:
    """What one client has handed over is nothing to another."""
    one, other = served.client(), served.client()
    assert call(one, request("getfd", {"fdname": "a"}), [file]) == ""
    assert "'a'" in call(other, request("closefd", {"fdname": "a"}))
    assert call(one, request("closefd", {"fdname": "a"})) == ""


@pytest.mark.parametrize("name", ["", "7up", "0"])
def test_a_bad_name_is_refused(served: Served, file: int, name: str) -> None:
    """As in QEMU, a name does not begin with a digit: such words mean numbers elsewhere."""
    client = served.client()
    assert "starting with a digit" in call(client, request("getfd", {"fdname": name}), [file])
    assert copies(file) == 1


def test_none_or_several_are_refused(served: Served, file: int) -> None:
    """Exactly one comes with a getfd; whatever came is closed."""
    client = served.client()
    get = request("getfd", {"fdname": "a"})
    assert "no file descriptor supplied" in call(client, get)
    for count in (2, 3, 50):
        assert "more than one" in call(client, get, [file] * count)
        assert copies(file) == 1
    assert call(client, get, [file]) == ""


def test_what_comes_unasked_is_closed(served: Served, file: int) -> None:
    """A descriptor with another command, with nonsense, or with nothing is not kept for later."""
    client = served.client()
    for data in (request("query-name"), b"nonsense\n", b'{"execute": 1}'):
        socket.send_fds(client.sock, [data], [file])
        assert client.next()
        turn(served.loop, 2)
        assert copies(file) == 1
    socket.send_fds(client.sock, [b"\r\n"], [file])
    turn(served.loop, 3)
    assert copies(file) == 1
    assert "no file descriptor supplied" in call(client, request("getfd", {"fdname": "a"}))


def test_it_waits_for_the_rest_of_its_command(served: Served, file: int) -> None:
    """The bytes it came with may be the first of a getfd, or hold commands before that one."""
    client = served.client()
    get = request("getfd", {"fdname": "a"})
    socket.send_fds(client.sock, [get[:5]], [file])
    turn(served.loop, 3)
    assert copies(file) == 2
    assert call(client, get[5:]) == ""
    socket.send_fds(client.sock, [request("query-name") * 20 + get], [file])
    for _ in range(20):
        assert client.next() == {"return": {"name": "web"}}
    assert client.next() == {"return": {}}
    assert copies(file) == 2


def test_a_later_one_takes_its_place(served: Served, file: int) -> None:
    """A client that sends one with each byte of a command has one here, not a hundred."""
    client = served.client()
    data = request("getfd", {"fdname": "a"})
    for at in range(len(data) - 1):
        socket.send_fds(client.sock, [data[at : at + 1]], [file])
        turn(served.loop, 2)
        assert copies(file) == 2
    assert call(client, data[-1:]) == ""
    assert copies(file) == 2


def test_a_client_may_keep_a_few(served: Served, file: int) -> None:
    """The number is bounded; giving one up makes room."""
    client = served.client()
    for n in range(qmpfds.NAMES):
        assert call(client, request("getfd", {"fdname": f"n{n}"}), [file]) == ""
    assert "already" in call(client, request("getfd", {"fdname": "more"}), [file])
    assert copies(file) == 1 + qmpfds.NAMES
    assert call(client, request("getfd", {"fdname": "n0"}), [file]) == ""
    assert call(client, request("closefd", {"fdname": "n3"})) == ""
    assert call(client, request("getfd", {"fdname": "more"}), [file]) == ""


def test_a_client_that_leaves_leaves_none(served: Served, file: int) -> None:
    """Named, arrived, or unread: after many connections the process has as many as before."""
    before = count_before()
    for n in range(60):
        client = served.client()
        assert call(client, request("getfd", {"fdname": "a"}), [file]) == ""
        if n % 3 == 1:
            socket.send_fds(client.sock, [b"{"], [file])
        elif n % 3 == 2:
            socket.send_fds(client.sock, [b"{" * 100], [file, file])
        client.sock.close()
        until(served.loop, lambda: not served.control.clients)
    served.clients.clear()
    assert copies(file) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_nobody_but_permitted_clients_gets_that_far(served: Served, file: int) -> None:
    """Before negotiation getfd is no command, and closes what came with it."""
    client = served.client(negotiate=False)
    assert "QMP" in client.next()
    assert "capabilities" in call(client, request("getfd", {"fdname": "a"}), [file])
    turn(served.loop, 2)
    assert copies(file) == 1


def test_the_client_passes_one(running: Running, file: int) -> None:
    """QmpClient.pass_fd(), then the command that uses it; a refusal keeps nothing for later."""
    with QmpClient(running.path) as client:
        client.pass_fd("disc", file)
        client.call("x-pyvmd-set-device", **SET, fdname="disc")
        with pytest.raises(CommandError, match="digit"):
            client.pass_fd("1", file)
        with pytest.raises(CommandError, match="no file descriptor supplied"):
            client.call("getfd", fdname="a")
    assert running.vm.asked == ["cd: medium = 1 with disc.iso"]
