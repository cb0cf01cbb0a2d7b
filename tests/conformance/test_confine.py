"""The VM process after it has given up what it does not need: what it can do, and what not."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from devices import jail, policy, seccomp, syscalls
from tests.jailhost import USER, as_is, as_user, in_child, needs_root
from tests.unit import bpf
from vmm import jailview, safefile
from vmm.confine import confine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

NUMBERS = [number for number in range(480) if number not in (335, 336, 15)]  # see test_escape.py
SECONDS = 1.0  # after which a call that waits for something is taken to be allowed

WHO = [pytest.param(as_is, id="as-is"), pytest.param(as_user, id="user", marks=needs_root)]


@pytest.fixture
def rundir(tmp_path: Path) -> str:
    """A runtime directory, of any owner."""
    path = tmp_path / "run" / "web"
    path.mkdir(parents=True)
    for directory in path.parents:
        if not directory.stat().st_mode & 1:
            directory.chmod(0o711)
    path.parent.chmod(0o777)
    path.chmod(0o777)
    return str(path)


def confined(who: Callable[[], None], rundir: str, scene: Callable[[], Any]) -> Any:
    """Run a scene in a confined process, and return its result."""

    def run() -> Any:
        who()
        confine(rundir, os.geteuid(), None, "required")
        return scene()

    return in_child(run)


@pytest.mark.parametrize("who", WHO)
def test_it_can_use_its_runtime_directory(who: Callable[[], None], rundir: str) -> None:
    """Log rotation, vm.json, exit.json, and the names that go at the end."""

    def scene() -> list[str]:
        directory = safefile.open_dir(rundir)
        fd = safefile.open_file(f"{rundir}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"one\n")
        os.replace(f"{rundir}/log", f"{rundir}/log.1")
        os.ftruncate(fd, 0)
        safefile.write_json("exit.json", {"reason": "test"}, directory)
        assert safefile.read_json("exit.json", directory) == {"reason": "test"}
        safefile.write_file("pid", b"1\n", directory)
        safefile.remove("pid", directory)
        return ["done"]

    assert confined(who, rundir, scene) == ["done"]
    assert sorted(os.listdir(rundir)) == ["exit.json", "log.1"]


@pytest.mark.parametrize("who", WHO)
def test_a_failed_start_can_take_its_directory_away(who: Callable[[], None], rundir: str) -> None:
    """The directory itself, once empty; and no other file beside it."""
    beside = os.path.join(os.path.dirname(rundir), "other")
    with open(beside, "w"):
        pass

    def scene() -> bool:
        with pytest.raises(PermissionError):
            os.unlink(beside)
        os.rmdir(rundir)
        return True

    assert confined(who, rundir, scene)
    assert os.path.exists(beside)
    assert not os.path.exists(rundir)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    ("path", "flags"),
    [
        ("/etc/passwd", os.O_RDONLY),
        ("/dev/kvm", os.O_RDWR),
        ("/proc/self/mem", os.O_RDWR),
        ("/", os.O_RDONLY | os.O_DIRECTORY),
        ("{rundir}/..", os.O_RDONLY | os.O_DIRECTORY),
        ("{rundir}/../x", os.O_WRONLY | os.O_CREAT),
        (__file__, os.O_RDONLY),
    ],
)
def test_it_can_open_nothing_else(
    who: Callable[[], None], path: str, flags: int, rundir: str
) -> None:
    """No image, no library, no other VM's directory: all that is needed is open by then."""

    def scene() -> str:
        with pytest.raises(PermissionError):
            os.open(path.format(rundir=rundir), flags)
        return "refused"

    assert confined(who, rundir, scene) == "refused"


@pytest.mark.parametrize("who", WHO)
def test_it_can_make_threads(who: Callable[[], None], rundir: str) -> None:
    """A reset makes new vCPU threads; they are as confined as all others."""

    def scene() -> list[int]:
        filters: list[int] = []

        def look() -> None:
            filters.append(syscalls.call("prctl", 15, b"vcpu0", 0, 0, 0))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return filters

    assert confined(who, rundir, scene) == [0]


FORBIDDEN: dict[str, Callable[[], object]] = {
    "fork": os.fork,
    "exec": lambda: syscalls.call("execve", b"/bin/true", None, None),
    "socket": lambda: socket.socket(socket.AF_UNIX),
    "inet": lambda: socket.socket(socket.AF_INET),
    "kill": lambda: os.kill(os.getppid(), 0),
    "setuid": lambda: os.setuid(0),
    "ptrace": lambda: syscalls.call("ptrace", 16, 1, 0, 0),
    "unshare": lambda: syscalls.call("unshare", 0x10000000),
    "bpf": lambda: syscalls.call("bpf", 0, bytes(48), 48),
    "io_uring": lambda: syscalls.call("io_uring_setup", 8, bytes(120)),
    "exec_memory": lambda: syscalls.call("mmap", None, 4096, 5, 0x22, -1, 0),
    "other_ioctl": lambda: syscalls.call("ioctl", 0, 0x5412, b"x"),  # TIOCSTI
    "pidfd": lambda: os.pidfd_open(1),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_it_cannot(name: str, rundir: str) -> None:
    """What no VM process ever does ends it."""
    with pytest.raises(RuntimeError, match="the child has died"):
        confined(as_is, rundir, FORBIDDEN[name])


@needs_root
def test_root_becomes_the_owner(rundir: str) -> None:
    """Every id, no group but the owner's, no capability in any set, for all of them."""
    os.chown(rundir, USER, USER)

    reader, writer = os.pipe()
    gate, opener = os.pipe()
    pid = os.fork()
    if not pid:
        confine(rundir, USER, USER, "required")
        os.write(writer, b"x")
        os.read(gate, 1)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        found = jailview.facts(pid)
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
    finally:
        os.write(opener, b"x")
        os.waitpid(pid, 0)
        for fd in (reader, writer, gate, opener):
            os.close(fd)
    assert found is not None
    assert status["Uid"].split() == status["Gid"].split() == [str(USER)] * 4
    assert status["Groups"].split() == []
    assert set(found["capabilities"].values()) == {0}
    assert (found["seccomp_filters"], found["no_new_privs"]) == (1, True)
    assert found["limits"]["core file size"] == 0


def test_it_signals_its_own_threads_and_who_it_has_a_pidfd_of(rundir: str) -> None:
    """A vCPU thread leaves the guest by a signal; a device process that hangs must end."""
    victim = os.fork()
    if not victim:
        signal.pause()
    pidfd = os.pidfd_open(victim)

    def scene() -> int:
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return 1

    try:
        assert confined(as_is, rundir, scene) == 1
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        os.close(pidfd)
        assert os.waitpid(victim, 0)[1] == signal.SIGKILL


def test_the_real_profile_equals_the_table(rundir: str) -> None:
    """Every system call in a process of its own, with zeroes, allowed and forbidden."""
    row = policy.VM_PROCESS
    code = seccomp.program(row.calls, row.otherwise)

    def scene() -> dict[str, str]:
        differs = {}
        for number in NUMBERS:
            pid = os.fork()
            if not pid:
                _call_confined(rundir, number)
            status = os.waitpid(pid, 0)[1]
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS
            if killed == (bpf.run(code, number) != row.otherwise):
                differs[str(number)] = f"status {status:#x}"
        return differs

    assert in_child(scene) == {}


def _call_confined(rundir: str, number: int) -> None:
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        jail.confine("required", rundir, os.geteuid(), os.getegid())
        syscalls._syscall(number, 0, 0, 0, 0, 0, 0)
    finally:
        os._exit(0)


def test_off_changes_nothing(rundir: str) -> None:
    """With `jail: off` the VM process stays who and what it is."""

    def scene() -> str:
        confine(rundir, os.geteuid(), None, "off")
        os.close(os.open("/etc/passwd", os.O_RDONLY))
        with open("/proc/self/status") as file:
            return file.read()

    status = in_child(scene)
    assert "Seccomp:\t0" in status
    assert "NoNewPrivs:\t0" in status
