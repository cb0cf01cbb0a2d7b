"""Whose VM is it? Root's VM with an owner, and what owner, group member and stranger may do.

Every command runs in a child that has become that user, by numbers that stand for nobody here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.unit.cli_fakes import DEADLINE, FakeVm
from vmm import cli, runroot, survey
from vmm.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

for _name in cli.VERBS:
    cli.load(_name)  # a stranger may not be able to read Python's own modules

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")


class User(NamedTuple):
    """Numbers that a process can have."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)
OWNER = User(54321, 54321)
PRIMARY = User(54322, 54399)
MEMBER = User(54323, 54323, (54398, 54399))
STRANGER = User(54324, 54324)
STAFF = 54399

USERS = {"root": ROOT, "owner": OWNER, "primary": PRIMARY, "member": MEMBER}


class Said(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str


def become(user: User) -> None:
    """Be that user, for good."""
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def as_user(user: User, act: Callable[[], int]) -> Said:
    """Run something in a child that is a user; its result, and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            status = 99
            try:
                become(user)
                null = os.open(os.devnull, os.O_RDONLY)
                for number, fd in enumerate((null, out.fileno(), err.fileno())):
                    os.dup2(fd, number)
                with open(0) as sys.stdin, open(1, "w") as sys.stdout, open(2, "w") as sys.stderr:
                    status = act()
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return Said(os.waitstatus_to_exitcode(ended), out.read().decode(), err.read().decode())


def pyvmctl(user: User, *words: str) -> Said:
    """Run one command line as a user."""
    return as_user(user, lambda: cli.main(words))


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What stands for /run/pyvmd; nobody says where else to look."""
    place = tempfile.mkdtemp(prefix="pyvmd-owners-")
    os.chmod(place, 0o755)  # noqa: S103
    monkeypatch.setattr(runroot, "SYSTEM", place)
    for name in ("PYVMD_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def vms(system: str) -> Iterator[Callable[..., FakeVm]]:
    """Makes VMs of root."""
    made: list[FakeVm] = []

    def make(name: str = "web", **answers: object) -> FakeVm:
        made.append(FakeVm(name, **answers))
        return made[-1]

    yield make
    for vm in made:
        vm.kill()


@pytest.fixture
def web(vms: Callable[..., FakeVm]) -> FakeVm:
    """A VM with `owner: 54321:54399`, and one beside it that is root's alone."""
    vms("roots")
    return vms("web", owner=Owner(OWNER.uid, STAFF), echo=True, obeys=0)


# who may


@pytest.mark.parametrize("who", USERS)
def test_who_may_use_a_vm(who: str, web: FakeVm, system: str) -> None:
    """Root, the owner, members of the group: status, pause, log, console, stop, by name alone."""
    user = USERS[who]
    status = pyvmctl(user, "status", "--json", "web")
    assert status.status == 0, status.err
    facts = json.loads(status.out)
    assert (facts["state"], facts["id"], facts["vcpus"]) == ("running", 2, 2)
    assert facts["control"] == f"{system}/web/control.sock"
    assert pyvmctl(user, "pause", "web") == (0, "", "paused vm 2 successfully\n")
    assert pyvmctl(user, "unpause", "2").status == 0
    assert "asked: pause" in pyvmctl(user, "log", "web").out
    assert pyvmctl(user, "console", "--no-wait", "web").status == 0
    assert pyvmctl(user, "stop", "--timeout", "10", "web").status == 0
    ended = json.loads(pyvmctl(user, "status", "--json", "web").out)
    assert (ended["state"], ended["exit"]["status"]) == ("stopped", 0)


@pytest.mark.parametrize("verb", [["stop", "-f"], ["kill"]], ids=" ".join)
def test_the_owner_may_end_it(web: FakeVm, verb: list[str]) -> None:
    """Without the guest."""
    assert pyvmctl(OWNER, *verb, "web") == (0, "", "forced to terminate vm 2\n")


def test_a_stranger_does_not_even_see_it(web: FakeVm) -> None:
    """Neither in a list nor by name."""
    assert pyvmctl(STRANGER, "status", "-q") == (0, "", "")
    for verb in ("status", "stop", "kill", "console", "pause", "log", "wait"):
        said = pyvmctl(STRANGER, verb, "web")
        assert (said.status, said.err.startswith("pyvmctl: no VM 'web'")) == (3, True), verb
    assert survey.lookup("web").alive


def test_what_is_roots_alone_nobody_else_sees(web: FakeVm) -> None:
    """A VM without an owner."""
    assert pyvmctl(ROOT, "status", "-q").out == "roots\nweb\n"
    for user in (OWNER, MEMBER):
        assert pyvmctl(user, "status", "-q").out == "web\n"
        assert pyvmctl(user, "stop", "roots").status == 3


def test_an_owner_without_a_group_shares_with_nobody(vms: Callable[..., FakeVm]) -> None:
    """Who has the owner's group as his own is a stranger then."""
    vms("web", owner=Owner(OWNER.uid, None))
    assert pyvmctl(OWNER, "pause", "web").status == 0
    assert pyvmctl(STRANGER._replace(gid=OWNER.gid), "pause", "web").status == 3


@pytest.mark.parametrize("name", ["control.sock", "console.sock"])
def test_a_door_left_open_lets_nobody_in(web: FakeVm, system: str, name: str) -> None:
    """The kernel's word on who connects counts beside the modes."""
    os.chmod(f"{system}/web", 0o777)  # noqa: S103
    os.chmod(f"{system}/web/{name}", 0o666)  # noqa: S103

    def connect() -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(f"{system}/web/{name}")
            first = sock.recv(4096)
            print(first.decode(), end="")
            return 0 if not sock.recv(4096) else 1  # closed behind the refusal

    said = as_user(STRANGER, connect)
    assert (said.status, "permission denied" in said.out) == (0, True), said
    assert as_user(MEMBER, lambda: 0).status == 0


# a user's own VMs beside root's


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> Iterator[str]:
    """The owner's own runtime directory."""
    place = tempfile.mkdtemp(prefix="pyvmd-owners-")
    os.chown(place, OWNER.uid, OWNER.gid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", place)
    yield place
    shutil.rmtree(place)


def test_his_own_come_first(web: FakeVm, own: str) -> None:
    """Both in one list; by a name that both have, his own is meant, and -a means only those."""
    ready, tell = os.pipe()

    def serve() -> int:
        vm = FakeVm("web")
        other = FakeVm("mine")
        os.write(tell, b"!")
        vm.reap()
        other.reap()
        return 0

    pid = os.fork()
    if not pid:
        become(OWNER)
        os._exit(serve())
    assert os.read(ready, 1) == b"!"
    try:
        assert pyvmctl(OWNER, "status", "-q").out == "web\nmine\n"
        assert pyvmctl(OWNER, "kill", "web").status == 0
        assert survey.lookup("web").alive  # root's
        assert pyvmctl(OWNER, "kill", "-a").err == "forced to terminate vm 2\n"
    finally:
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)
    assert survey.lookup("web").alive


def test_a_user_forgets_only_his_own(web: FakeVm, own: str) -> None:
    """Root's VM is forgotten by root."""
    assert pyvmctl(OWNER, "stop", "-w", "web").status == 0
    said = pyvmctl(OWNER, "forget", "web")
    assert (said.status, said.err) == (1, "pyvmctl: web: is root's to forget\n")
    assert pyvmctl(OWNER, "reset", "vms").status == 0
    assert pyvmctl(ROOT, "forget", "web").status == 0


def test_a_directory_that_root_does_not_own_is_no_system(web: FakeVm, system: str) -> None:
    """Nor one that others may write to."""
    os.chmod(system, 0o777)  # noqa: S103
    assert pyvmctl(OWNER, "status", "-q").out == ""
    os.chmod(system, 0o755)  # noqa: S103
    os.chown(system, OWNER.uid, 0)
    assert pyvmctl(OWNER, "status", "-q").out == ""
    os.chown(system, 0, 0)
    assert pyvmctl(OWNER, "status", "-q").out == "web\n"


def test_a_place_that_was_said_is_the_only_one(web: FakeVm, own: str) -> None:
    """PYVMD_RUNTIME_DIR."""
    os.environ["PYVMD_RUNTIME_DIR"] = own
    try:
        assert pyvmctl(OWNER, "status", "-q").out == ""
    finally:
        del os.environ["PYVMD_RUNTIME_DIR"]


def test_members_read_what_the_vm_writes(web: FakeVm, system: str) -> None:
    """The files are made anew when the guest runs, by a process with a umask of its own."""
    for name in ("vm.json", "log", "lock", "pid"):
        assert os.stat(f"{system}/web/{name}").st_mode & 0o777 == 0o640, name
