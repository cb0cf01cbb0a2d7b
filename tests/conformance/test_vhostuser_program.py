"""The back end as a program: its conventions, one front end after another, nothing left over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from devices.backend import Plan, Supervisor
from devices.blkreq import HEADER, S_OK, T_IN
from devices.features import F_RING_PACKED, F_VERSION_1
from devices.vhostask import connect
from devices.vhostfront import MemoryRegion
from devices.vhostwire import F_LOG_ALL, U64, Back, Front
from devices.vhostwire import HEADER as MESSAGE
from tests.jailhost import as_is, as_user, needs_root
from tests.taplab import TapLab
from tests.vhostlab import DEADLINE, TOP, Program, Session
from tools.viodriver import make_memfd
from tools.viodriver.private import facts as status_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHO = [pytest.param(as_is, id="as-is"), pytest.param(as_user, id="user", marks=needs_root)]
KINDS = {"vioblk": "block", "vionet": "net", "vioscsi": "scsi", "viornd": "rng"}
CONNECTIONS = 10_000


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "devices", *arguments],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_capabilities_are_printed_whatever_else_is_said(kind: str) -> None:
    """In JSON, and that is all it does."""
    for more in ([], ["--socket-path", "/nowhere"], ["--no-such-option"]):
        done = run(kind, *more, "--print-capabilities")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["type"] == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_an_example(kind: str) -> None:
    """That can be copied."""
    done = run(kind, "--help")
    assert done.returncode == 0
    assert f"example: python -m devices {kind} --socket-path" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "KIND"),
        (["viotea"], 2, "viotea"),
        (["viornd"], 2, "--socket-path"),
        (["viornd", "--socket-path", "x", "--fd", "3"], 2, "not allowed"),
        (["viornd", "--fd", "99"], 2, "--fd 99: Bad file descriptor"),
        (["viornd", "--fd", "0"], 2, "--fd 0"),
        (["viornd", "--socket-path", "/nowhere/s"], 1, "cannot listen at /nowhere/s: No such"),
        (["viornd", "--socket-path", "x" * 200], 2, "longer than 107 bytes"),
        (["viornd", "--socket-path", "/dev/null"], 1, "is there and no socket"),
        (["viornd", "--rate", "fast", "--fd", "3"], 2, "not a size"),
        (["vioblk", "--fd", "3"], 2, "an image is needed"),
        (["vioblk", "--fd", "3", "a", "--blk-file", "b"], 2, "an image is needed, once"),
        (["vioblk", "--fd", "3", "/etc/passwd"], 2, "never guessed"),
        (["vioblk", "--fd", "3", "/nowhere", "--format", "raw"], 2, "No such file"),
        (["vioblk", "--fd", "3", "/dev", "--format", "raw"], 2, "is a directory"),
        (["vioblk", "--fd", "3", "/etc/passwd", "--format", "qcow2"], 2, "qcow2"),
        (["vionet", "--fd", "3"], 2, "--tap"),
        (["vionet", "--fd", "3", "--tap-fd", "0"], 1, "is no tap"),
        (["vionet", "--fd", "3", "--tap", "x", "--mac", "01:00:00:00:00:00"], 2, "no address"),
        (["vionet", "--fd", "3", "--tap", "a name that is too long"], 1, "tap"),
        (["vioscsi", "--fd", "3", "--cdrom", "/nowhere"], 2, "No such file"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], status: int, words: str) -> None:
    """In one line, before anything is listened at."""
    done = run(*arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_listening_socket_is_inherited() -> None:
    """Served as one of its own would be; SIGTERM is exit 0."""
    with socket.socket(socket.AF_UNIX) as sock:
        path = f"/tmp/vhostuser-{os.getpid()}.sock"
        sock.bind(path)
        sock.listen()
        with Program("viornd", sock=sock, path=path) as program:
            for _ in range(2):
                with Session(program.connect()) as session:
                    session.begin()
                    assert session.ask(0, room=(16,))[0] == 16
        assert program.process.returncode == 0
        os.unlink(path)


def test_a_connection_is_inherited() -> None:
    """The program ends with it."""
    from devices.vhostwire import Wire

    ours, theirs = socket.socketpair()
    with Program("viornd", sock=theirs) as program:
        theirs.close()
        with Session(Wire(ours, "back end")) as session:
            session.begin()
            assert session.ask(0, room=(16,))[0] == 16
        assert program.process.wait(DEADLINE) == 0


def test_sockets_that_are_there(tmp_path: Path) -> None:
    """One that a killed program has left is taken over; one that is served is not."""
    path = str(tmp_path / "s")
    with Program("viornd", path=path) as program:
        assert "somebody listens" in run("viornd", "--socket-path", path).stderr
        with Session(program.connect()) as session:  # its children have closed what is not theirs
            session.begin()
        program.process.kill()
        program.process.wait()
        assert os.path.exists(path)
    with Program("viornd", path=path) as program, Session(program.connect()) as session:
        session.begin()
        assert session.ask(0, room=(16,))[0] == 16
        assert os.stat(path).st_mode & 0o077 == 0
    assert not os.path.exists(path)


def test_a_disk_has_one_back_end(tmp_path: Path) -> None:
    """The image is locked as long as the program runs, connected or not; readers share it."""
    image = str(tmp_path / "disk")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    common = ("vioblk", image, "--format", "raw")
    with Program(*common) as program:
        done = run(*common, "--socket-path", str(tmp_path / "s"))
        assert done.returncode == 1
        assert "in use: process" in done.stderr
        with Session(program.connect()) as session:
            session.begin()
            done = run(*common, "--socket-path", str(tmp_path / "s"))
            assert "in use: a vhost-user back end has it open (vioblk, process" in done.stderr
    with (
        Program(*common, "--read-only"),
        Program(*common, "--read-only") as second,
        Session(second.connect()) as session,
    ):
        session.begin()
        assert session.ask(0, HEADER.pack(T_IN, 0, 0), room=(512, 1))[1][-1] == S_OK
        assert session.front.features & 1 << 5  # RO


def test_sigterm_under_load(tmp_path: Path) -> None:
    """It leaves at once, in good order, and with exit 0."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with (
        Program("vioblk", str(tmp_path / "disk"), "--format", "raw", "--cache", "none") as program,
        Session(program.connect()) as session,
    ):
        session.begin()
        for _ in range(20):
            session.queues[0].add([HEADER.pack(T_IN, 0, 0)], [4096, 1])
        session.kick(0)
        pid = program.device_pid()
        program.process.terminate()
        assert program.process.wait(DEADLINE) == 0
        assert not os.path.exists(f"/proc/{pid}")


def test_a_disk_that_grows(tmp_path: Path) -> None:
    """SIGHUP has it looked at; the driver is told by way of the back channel."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with (
        Program("vioblk", str(image), "--format", "raw") as program,
        Session(program.connect()) as session,
    ):
        program.process.send_signal(signal.SIGHUP)  # nothing has changed
        session.begin()
        back = session.front.open_back_channel()
        os.truncate(image, 2 << 20)
        program.process.send_signal(signal.SIGHUP)
        assert session.wait_readable(back.fileno())
        message = back.receive()
        assert message is not None
        assert message.request == Back.CONFIG_CHANGE
        assert int.from_bytes(session.front.get_config(8), "little") == (2 << 20) // 512
        read = HEADER.pack(T_IN, 0, (2 << 20) // 512 - 1)
        assert session.ask(0, read, room=(512, 1))[1][-1] == S_OK


def test_a_link_that_goes_down() -> None:
    """A network interface's configuration changes when its tap is taken down."""
    with (
        TapLab() as tap,
        Program("vionet", "--tap-fd", str(tap.fds[0]), fds=tap.fds) as program,
        Session(program.connect()) as session,
    ):
        session.begin(1 << 16, 2)  # STATUS
        back = session.front.open_back_channel()
        assert session.front.get_config(2, 6) == b"\1\0"
        rx = session.queues[0]
        rx.add([], [2048])
        session.kick(0)
        tap.set_up(False)
        session.queues[1].add([bytes(12 + 60)], [])
        session.kick(1)
        assert session.wait_readable(back.fileno())
        message = back.receive()
        assert message is not None
        assert message.request == Back.CONFIG_CHANGE
        assert session.front.get_config(2, 6) == b"\0\0"


def test_front_ends_wait_their_turn() -> None:
    """The second one is served when the first one has gone, and not before."""
    with Program("viornd") as program:
        first = Session(program.connect())
        first.begin()
        second = program.connect()
        program.device_pid()
        first.close()
        with Session(second) as session:
            session.begin()
            assert session.ask(0, room=(16,))[0] == 16


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("layout", [0, F_RING_PACKED])
def test_the_jail(who: Callable[[], None], layout: int, tmp_path: Path) -> None:
    """As strict for root as for a user, and all that a connection needs can be done in it."""
    path = str(tmp_path / "s")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            who()
            with open("/dev/null", "w") as null:
                os.dup2(null.fileno(), 2)
            status = Supervisor(Plan("viornd", {"packed": True}, {}, "required"), sock).run()
        finally:
            os._exit(status)
    sock.close()
    with Session(connect(path)) as session:
        session.begin(layout | F_LOG_ALL, inflight=True)
        log = make_memfd(4096)
        session.front.set_log(log, 4096)
        session.front.open_back_channel()
        [spawner] = children(pid)
        [device] = children(spawner)
        seen = status_of(device)
        assert seen["Seccomp"] == ["2"]
        assert seen["NoNewPrivs"] == ["1"]
        assert {seen[name][0] for name in ("CapEff", "CapPrm", "CapInh", "CapBnd")} == {"0" * 16}
        assert session.ask(0, room=(4096,))[0] == 4096
        session.front.add_region(MemoryRegion(1 << 32, 4096, 1 << 32, 0, session.fd))
        assert session.ask(0, room=(4096,))[0] == 4096
        session.front.reset_device()
        os.close(log)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0


def facts(pid: int) -> tuple[int, int]:
    """A process's descriptors, and the memory it has for itself in KiB."""
    with open(f"/proc/{pid}/status") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    return len(os.listdir(f"/proc/{pid}/fd")), resident


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.timeout(3600)
def test_ten_thousand_connections_leave_nothing() -> None:
    """No process, no descriptor, no memory: some only connect, some say half a word, some work."""
    with Program("viornd", "--jail", "off") as program:
        pid = program.process.pid
        [spawner] = children(pid)
        seen: list[tuple[int, int]] = []  # memory of both

        def quiet() -> bool:
            """Nobody is served, and nothing is open that was not so with nobody served."""
            return not children(spawner) and (facts(pid)[0], facts(spawner)[0]) == idle

        own = facts(pid)[0]
        with Session(program.connect(), 1 << 20) as session:  # the spawner has begun by then
            session.front.negotiate()
        program.wait_for(lambda: not children(spawner) and facts(pid)[0] == own)
        idle = own, facts(spawner)[0]
        for number in range(CONNECTIONS):
            kind = number % 10
            if kind == 9:
                with Session(program.connect(), 1 << 20) as session:
                    session.front.negotiate()
                    session.make_queues(F_VERSION_1, 1, 16)
                    session.inflight = session.front.get_inflight(1, 16)
                    session.resume()
                    assert session.ask(0, room=(16,))[0] == 16
            else:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(program.path)
                    if kind == 1:
                        sock.send(b"\0" * 7)
                    elif kind == 2:
                        sock.send(MESSAGE.pack(Front.GET_FEATURES, 1, 0))
                    elif kind == 3:
                        sock.send(MESSAGE.pack(Front.GET_FEATURES, 1, 1 << 30))
                    elif kind == 4:
                        message = MESSAGE.pack(Front.SET_VRING_KICK, 1, 8) + U64.pack(0)
                        socket.send_fds(sock, [message], [sock.fileno()] * 8)
            if number % 1000 == 999:
                with Session(program.connect(), 1 << 20) as session:  # all before it have gone
                    session.front.negotiate()
                program.wait_for(quiet)
                seen.append((facts(pid)[1], facts(spawner)[1]))
        assert program.process.poll() is None
        for before, after in zip(seen[1], seen[-1], strict=True):
            assert after - before < 256, seen
