"""Runtime directories: one owner at a time, nothing stale, nothing followed that others put."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError, NoSuchVmError
from vmm import runroot, safefile, sockets, survey
from vmm.rundir import LOCK_TRIES, NETWORK, RunDir, _ended

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG: dict[str, Any] = {"name": "web", "vcpus": 2}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of all VMs."""
    path = tmp_path / "run"
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(path))
    return path


@pytest.fixture
def web(root: Path) -> Iterator[RunDir]:
    """A VM that runs in this process."""
    rundir = start("web")
    yield rundir
    rundir.leave()


def start(name: str) -> RunDir:
    """Take a VM's directory and let it run."""
    rundir = RunDir(name)
    rundir.take()
    for sock in (rundir.listen_control(), rundir.listen_console()):
        sock.close()
    with open(rundir.vm_log, "a") as file:
        file.write("started\n")
    rundir.running({**CONFIG, "name": name})
    return rundir


def die(rundir: RunDir) -> None:
    """End as a killed process does: descriptors close, nothing else happens."""
    rundir.leave()


def states() -> dict[str, str]:
    """What a survey tells, in short."""
    return {info.name: info.state for info in survey.survey()}


def test_the_place_depends_on_user_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has /run/pyvmd, users their session's directory or one of their own under /tmp."""
    monkeypatch.delenv("PYVMD_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runroot.root() == "/run/pyvmd"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert runroot.root() == "/run/user/1000/pyvmd"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runroot.root() == "/tmp/pyvmd-1000"
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", "/elsewhere/x")
    assert runroot.root() == "/elsewhere/x"


def test_a_trap_in_tmp_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory under /tmp that is a link, open to others or another user's is not used."""
    place = tmp_path / "pyvmd-1"
    monkeypatch.setattr(runroot, "_root", lambda: (str(place), 0o077))

    place.symlink_to(tmp_path)
    with pytest.raises(HostError, match=r"pyvmd-1: it is a symbolic link \(set PYVMD"):
        runroot.open_root(create=True)
    place.unlink()

    place.mkdir()
    place.chmod(0o711)
    with pytest.raises(HostError, match=r"look into it \(mode 0711\) \(set PYVMD_RUNTIME_DIR"):
        runroot.open_root(create=True)

    place.chmod(0o700)
    os.close(runroot.open_root(create=True))

    place.rmdir()
    place.write_text("")
    with pytest.raises(HostError, match="cannot use runtime directory"):
        runroot.open_root(create=True)


def test_another_users_directory_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns the directory could move our files: it is we or root, or it is not used."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory that belongs to somebody else")
    root.mkdir()
    os.chown(root, 4321, 4321)
    with pytest.raises(HostError, match="belongs to uid 4321"):
        RunDir("web").take()


def test_a_directory_all_may_write_to_is_refused(root: Path) -> None:
    """Also when the user chose it."""
    root.mkdir()
    root.chmod(0o1777)
    with pytest.raises(HostError, match="mode 1777"):
        RunDir("web").take()
    with pytest.raises(HostError, match="mode 1777"):
        survey.survey()


@pytest.mark.parametrize("name", ["", "..", ".ids", "a/b", "-f", "x" * 65, "wéb", "a\n", "a\0"])
def test_a_name_that_is_no_file_name_is_refused(root: Path, name: str) -> None:
    """A VM's name never leads out of the directory."""
    with pytest.raises(HostError, match="cannot name a VM"):
        RunDir(name)


def test_files_and_sockets_are_private(web: RunDir, root: Path) -> None:
    """Nobody else can enter the directory or use what is in it."""
    assert stat.S_IMODE(os.stat(web.path).st_mode) == 0o700
    for name in ("control.sock", "console.sock", "pid", "vm.json", "lock"):
        assert stat.S_IMODE(os.stat(f"{web.path}/{name}").st_mode) == 0o600, name


def test_a_second_start_names_the_first(web: RunDir) -> None:
    """Starting a running VM fails, says which process has it, and leaves that one alone."""
    before = sorted(os.listdir(web.path))
    with pytest.raises(HostError, match=rf"VM web is already running \(pid {os.getpid()}\)"):
        RunDir("web").take()
    assert sorted(os.listdir(web.path)) == before
    assert states() == {"web": "running"}


def test_of_many_starts_at_once_one_wins(root: Path) -> None:
    """Starts that race: one takes the VM, all others are told the winner's pid."""
    won, lost = list[RunDir](), list[str]()
    barrier = threading.Barrier(8)

    def racer() -> None:
        rundir = RunDir("web")
        barrier.wait()
        try:
            rundir.take()
            won.append(rundir)
        except HostError as err:
            lost.append(str(err))

    run_threads(racer, 8)
    assert len(won) == 1
    what = f"VM web is already running (pid {os.getpid()})"
    assert set(lost) == {f"{what} ('pyvmctl stop web' stops it)"}
    won[0].discard()
    assert not (root / "web").exists()


def test_starts_that_fail_never_let_two_in(root: Path) -> None:
    """Directories that come and go under racing starts never have two owners."""
    holders, most = list[int](), list[int]()
    lock = threading.Lock()

    def racer() -> None:
        for _ in range(30):
            rundir = RunDir("web")
            try:
                rundir.take()
            except HostError:
                continue
            with lock:
                holders.append(1)
                most.append(len(holders))
            survey.survey()
            with lock:
                holders.pop()
            rundir.discard()

    run_threads(racer, 4)
    assert most.count(1) == len(most) > 0
    assert sorted(os.listdir(root)) == [".ids", ".ids.lock"]


def test_a_lock_of_a_directory_that_is_gone_counts_for_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a start's open() and its flock() a failed start may remove, a third make anew."""
    first, second, third = RunDir("web"), RunDir("web"), RunDir("web")
    first.take()
    real = fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.discard()
        third.take()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(HostError, match="already running"):
        second.take()
    assert os.path.samestat(os.stat(f"{third.path}/lock"), os.fstat(third._lock))
    third.discard()


def run_threads(work: Any, count: int) -> None:
    """Run `work` on many threads at once."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_failed_first_start_leaves_nothing(root: Path) -> None:
    """What never ran leaves no directory behind."""
    rundir = RunDir("web")
    rundir.take()
    rundir.listen_control().close()
    (root / "web" / "log").write_text("why it failed\n")
    rundir.discard()
    assert not (root / "web").exists()
    assert survey.survey() == []


def test_a_failed_later_start_leaves_the_last_run(web: RunDir, root: Path) -> None:
    """Log, console log and the end of the run before survive a start that fails."""
    (root / "web" / "log").write_text("old log\n")
    web.write_exit({"reason": "guest power-off", "status": 0})
    web.close()
    before = sorted(os.listdir(web.path))

    again = RunDir("web")
    again.take()
    again.listen_control().close()
    again.discard()

    assert sorted(os.listdir(web.path)) == before
    assert (root / "web" / "log").read_text() == "old log\n"
    (info,) = survey.survey()
    assert (info.state, info.exit["reason"]) == ("stopped", "guest power-off")


def test_a_vm_that_ended_tells_how(web: RunDir) -> None:
    """After a normal end sockets and pid are gone; logs, configuration and the reason stay."""
    web.write_exit({"reason": "guest power-off", "status": 3})
    assert survey.lookup("web").state == "running"
    web.close()

    assert sorted(os.listdir(web.path)) == ["exit.json", "lock", "log", "vm.json"]
    info = survey.lookup("web")
    assert (info.state, info.pid) == ("stopped", 0)
    assert info.exit["status"] == 3
    assert info.exit["time"].endswith("Z")
    assert json.load(open(f"{web.path}/vm.json"))["vcpus"] == 2  # noqa: SIM115


def test_a_vm_that_died_is_cleaned_up_by_the_next_look(web: RunDir) -> None:
    """A killed VM process leaves pid and sockets; the next look removes them and says so."""
    die(web)
    assert os.path.exists(f"{web.path}/control.sock")

    info = survey.lookup("web")
    assert (info.state, info.pid) == ("crashed", 0)
    assert info.exit["reason"] == "crashed"
    assert f"VM process {os.getpid()} ended without a word" in info.exit["detail"]
    assert sorted(os.listdir(web.path)) == ["exit.json", "lock", "log", "vm.json"]
    assert survey.lookup("web") == info  # and that stays its end


def test_a_vm_that_died_can_be_started_again(web: RunDir) -> None:
    """A start copes with what a killed one left, without a look in between."""
    die(web)
    again = start("web")
    info = survey.lookup("web")
    assert (info.state, info.exit) == ("running", {})
    assert info.id == again.id == web.id
    again.leave()


def test_a_death_is_not_mistaken_for_the_end_before(web: RunDir, root: Path) -> None:
    """The exit.json of an earlier run says nothing about a run that was killed."""
    web.write_exit({"reason": "guest power-off", "status": 0})
    web.close()
    again = RunDir("web")
    again.take()  # killed before the guest ran: the old exit.json is still there
    (root / "web" / "pid").write_text("999999999\n")
    die(again)
    assert survey.lookup("web").state == "crashed"

    once_more = start("web")
    once_more.write_exit({"reason": "guest power-off", "status": 0})
    once_more.close()
    die(start("web"))  # in a process with the same number as the run before
    assert survey.lookup("web").state == "crashed"


def test_a_process_that_only_let_go_leaves_the_vm_running(web: RunDir) -> None:
    """The lock is the VM process's as long as it has a descriptor, whoever else has closed his."""
    inherited = os.dup(web._lock)  # what a fork gives the VM process
    web.leave()
    assert states() == {"web": "running"}
    os.close(inherited)
    assert states() == {"web": "crashed"}


def test_paths_of_any_length_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's 107 bytes do not limit where VMs can live."""
    deep = root / ("d" * 100) / ("e" * 100)
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(deep))
    rundir = RunDir("w" * 64)
    rundir.take()
    server = rundir.listen_control()
    client = sockets.connect(f"{rundir.path}/control.sock", 5.0)
    server.setblocking(True)
    accepted, _ = server.accept()
    accepted.sendall(b"hello")
    assert client.recv(5) == b"hello"
    for sock in (server, client, accepted):
        sock.close()
    rundir.discard()


def test_numbers_are_small_stable_and_found(root: Path) -> None:
    """A VM keeps its number; name and number both find it; a name goes before a number."""
    dirs = [start(name) for name in ("web", "db", "1")]
    assert [rundir.id for rundir in dirs] == [1, 2, 3]
    for rundir in dirs:
        rundir.close()
    db = start("db")
    assert db.id == 2
    assert survey.lookup("2").name == "db"
    assert survey.lookup("1").name == "1"
    assert survey.lookup("web").id == 1
    db.close()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"web": "x"}', b"[" * 100_000, b"\xff"])
def test_damaged_numbers_are_given_anew(root: Path, damage: bytes) -> None:
    """A damaged file of numbers costs the numbers, not the VMs."""
    start("db").close()
    (root / ".ids").write_bytes(damage)
    assert start("web").id == 1


def test_an_unknown_vm_is_named_with_those_that_are_known(root: Path) -> None:
    """The error says what was looked for, where, and what there is."""
    with pytest.raises(NoSuchVmError, match=f"no VM 'web' \\(there are none in {root}\\)"):
        survey.lookup("web")
    start("db").close()
    with pytest.raises(NoSuchVmError, match=r"no VM '7' \(in .* there are: db\)"):
        survey.lookup("7")
    with pytest.raises(NoSuchVmError, match=r"no VM '\.\./db'"):
        survey.lookup("../db")


def test_a_survey_follows_nothing_that_others_have_put(root: Path, web: RunDir) -> None:
    """Links, FIFOs, floods and nonsense in a VM's directory neither block nor mislead a look."""
    web.write_exit({"reason": "quit", "status": 0})
    web.close()
    exit_json = root / "web" / "exit.json"
    secret = root / "secret"
    secret.write_text('{"reason": "secret"}')
    exit_json.unlink()
    exit_json.symlink_to(secret)
    assert survey.lookup("web").exit == {}
    exit_json.unlink()
    os.mkfifo(exit_json)
    assert survey.lookup("web").exit == {}
    exit_json.unlink()
    for content in ("[" * 200_000, '{"a": "' + "x" * (1 << 20) + '"}', "7", "nonsense"):
        exit_json.write_text(content)
        assert survey.lookup("web").exit == {}
    (root / "web" / "pid").write_text("1" * 5000)
    assert survey.lookup("web").state == "stopped"


def test_strange_entries_are_no_vms(root: Path, web: RunDir) -> None:
    """Files, links and directories that are no VM's are left out, and left alone."""
    (root / "file").write_text("")
    (root / "empty").mkdir()
    (root / "link").symlink_to(web.path)
    (root / ".hidden").mkdir()
    (root / "fifolock").mkdir()
    os.mkfifo(root / "fifolock" / "lock")
    before = sorted(os.listdir(root))
    assert states() == {"web": "running"}
    assert sorted(os.listdir(root)) == before


def test_waiting_ends_with_the_vm(web: RunDir) -> None:
    """wait_end() gives up in time while the VM runs, and returns once nobody has it."""
    assert survey.wait_end("web", 0.0) is None
    assert survey.wait_end("web", 0.05) is None
    web.write_exit({"reason": "quit", "status": 0})
    os.unlink(f"{web.path}/pid")  # it is about to go: no process can be waited for
    assert survey.lookup("web").state == "stopping"
    ender = threading.Timer(0.05, web.leave)
    ender.start()
    info = survey.wait_end("web", 10.0)
    ender.join()
    assert info is not None
    assert info.exit["reason"] == "quit"
    with pytest.raises(NoSuchVmError):
        survey.wait_end("db", 1.0)


@pytest.mark.timeout(20)
def test_a_vm_that_was_started_again_has_ended(
    web: RunDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a service that is restarted: who waits for the run before does not wait for this one."""
    info = survey.wait_end("web", pid=os.getppid())
    assert info is not None
    assert (info.state, info.pid, info.exit) == ("stopped", 0, {"detail": survey.RESTARTED})

    def again(_seconds: float) -> None:  # this process had it, and now another one has
        (root / "web" / "pid").write_text(f"{os.getppid()}\n")

    assert survey.lookup("web").pid == os.getpid()
    (root / "web" / "pid").write_text("999999999\n")  # one that cannot be waited for
    monkeypatch.setattr("vmm.survey.time.sleep", again)  # between two looks
    info = survey.wait_end("web")
    assert info is not None
    assert info.exit == {"detail": survey.RESTARTED}


@pytest.mark.timeout(20)
def test_waiting_is_not_misled_by_a_pid_used_anew(
    web: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the VM ends just before its process is watched, the pid may be somebody else's."""
    real = os.pidfd_open

    def late(pid: int) -> int:
        web.write_exit({"reason": "quit", "status": 0})
        web.close()
        return real(pid)  # this process: it will not end

    monkeypatch.setattr(os, "pidfd_open", late)
    info = survey.wait_end("web")  # would wait for ever
    assert info is not None
    assert info.state == "stopped"


def test_an_owner_can_be_given_the_vm(web: RunDir) -> None:
    """`owner: user:group` opens directory and sockets to that user and group only."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    web.give(4321, 8765)
    directory, control = os.stat(web.path), os.stat(f"{web.path}/control.sock")
    assert (directory.st_uid, directory.st_gid) == (4321, 8765)
    assert stat.S_IMODE(directory.st_mode) == 0o750
    assert stat.S_IMODE(control.st_mode) == 0o660
    assert stat.S_IMODE(os.stat(f"{web.path}/vm.json").st_mode) == 0o640
    peer = sockets.Peer(4321, 1, 1, ())
    assert web.permitted(peer)
    assert web.permitted(peer._replace(uid=5, groups=(8765,)))
    assert web.permitted(peer._replace(uid=0))
    assert not web.permitted(peer._replace(uid=5))
    web.close()

    again = start("web")  # root takes it back before it trusts a name in it
    assert os.stat(again.path).st_uid == 0
    again.close()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO or a device under a file's name is refused, whatever it would do."""
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/null"):
        with pytest.raises(PermissionError, match="not a regular file"):
            safefile.open_file(path, os.O_RDWR)


def test_json_files_appear_whole(root: Path) -> None:
    """A reader sees the file before or the file after, and no draft stays behind."""
    root.mkdir()
    fd = safefile.open_dir(str(root))
    safefile.write_json("x", {"n": 1}, fd)
    (root / f".x.{os.getpid()}").write_text("draft of a killed process")
    safefile.write_json("x", {"n": 2}, fd)
    with pytest.raises(OSError, match="x/y"):
        safefile.write_json("x/y", {}, fd)
    os.close(fd)
    assert json.loads((root / "x").read_text()) == {"n": 2}
    assert os.listdir(root) == ["x"]


def test_a_socket_name_taken_by_a_stranger_is_an_error(root: Path) -> None:
    """Binding never replaces a file; the error names it."""
    rundir = RunDir("web")
    rundir.take()
    rundir.listen_control().close()
    with pytest.raises(HostError, match=r"cannot listen on .*control\.sock: Address already"):
        rundir.listen_control()
    rundir.discard()


def test_peer_credentials_come_from_the_kernel() -> None:
    """The peer is who connected, with its groups."""
    ours, theirs = socket.socketpair()
    peer = sockets.peer_of(ours)
    assert (peer.uid, peer.gid, peer.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert set(peer.groups) == set(os.getgroups())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("noted", [True, False])
def test_a_start_waits_for_who_clears_away_after_a_kill(
    web: RunDir, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """Until the lock is free: what was to be cleared away is gone from the notes before that."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    safefile.write_file("pid", b"%d\n" % pid, web.dir_fd)
    if noted:
        safefile.write_file(NETWORK, b"", web.dir_fd)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3 * LOCK_TRIES:
            safefile.remove(NETWORK, web.dir_fd)
            die(web)

    monkeypatch.setattr("vmm.rundir.time.sleep", sleep)
    again = RunDir("web")
    again.take()
    assert len(waits) == 3 * LOCK_TRIES
    again.discard()


def test_a_process_that_nobody_has_buried_has_ended() -> None:
    """A VM killed a moment ago is no VM that runs, whether or not init has looked at it yet."""
    assert not _ended(os.getpid())
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert _ended(pid)
    os.waitpid(pid, 0)
    assert _ended(pid)
    assert _ended(0)
