"""pyvmctl start: from the command to a VM process that stands on its own, and every way it fails.

`vm.run` is replaced by a guest-less stand-in; the runtime directory, the processes, the pipe
between them and the signals are real.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.errors import ConfigError, HostError, KvmError, PyvmError
from tests.unit.cli_fakes import DEADLINE
from vmm import cli, daemon, log, survey, vm
from vmm.owner import Owner, resolve, user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from config.model import VmConfig
    from vmm.rundir import RunDir

    Report = Callable[[None], None]
    Run = Callable[[VmConfig, RunDir, Report], int]

YAML: Final = "name: web\nboot: {kernel: vmlinuz}\n"
TWO: Final = """\
vms:
  one: {boot: {kernel: k}}
  two: {boot: {kernel: k}}
  off: {boot: {kernel: k}, enable: no}
"""


class Lab:
    """One test's vm.yaml, runtime directory and stand-in for the VM."""

    def __init__(
        self,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.root = path / "run"
        self.root.mkdir(0o700)
        self.yaml = path / "vm.yaml"
        self.yaml.write_text(YAML)
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(self.root))
        self.out = self.err = ""

    def vm_is(self, run: Run) -> None:
        """Let VM processes do this instead of running a guest."""
        self._monkeypatch.setattr(vm, "run", run)

    def __call__(self, *words: str) -> int:
        """Run `pyvmctl start`; its exit status."""
        try:
            return cli.main(["start", *words])
        finally:
            self.out, self.err = self._capsys.readouterr()

    def start(self, *words: str) -> int:
        """Run `pyvmctl start` with the vm.yaml."""
        return self(str(self.yaml), *words)

    def pid(self, name: str = "web") -> int:
        """The VM process's id."""
        return survey.lookup(name).pid

    def nothing_left(self) -> bool:
        """Whether no directory of a VM and no child of ours is there."""
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return [name for name in os.listdir(self.root) if not name.startswith(".")] == []


@pytest.fixture
def lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Lab]:
    """A place to start VMs in; what still runs at the end is killed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(daemon, "CANCEL_SECONDS", 0.5)
    made = Lab(tmp_path, monkeypatch, capsys)
    yield made
    for info in survey.survey():
        if info.pid:
            os.kill(info.pid, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    log.setup(stderr=True)


def runs(config: VmConfig, rundir: RunDir, report: Report) -> int:
    """Start well and run until SIGTERM."""
    ended, end = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(end, b"!") and None)
    rundir.running({"name": config.name, "vcpus": 1, "memory": 1 << 20})
    report(None)
    os.read(ended, 1)
    rundir.write_exit({"reason": "host-signal", "status": 0})
    return 0


def fails(error: BaseException) -> Run:
    """Make a VM that raises before its guest runs."""

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        raise error

    return run


def ends(status: int) -> Run:
    """Make a VM whose guest runs and ends at once."""

    def run(_config: VmConfig, rundir: RunDir, report: Report) -> int:
        rundir.running({})
        report(None)
        rundir.write_exit({"reason": "guest-shutdown", "status": status})
        return status

    return run


# it starts


def test_start_returns_once_the_guest_runs(lab: Lab) -> None:
    """Detached: the command is back with the VM running, and says id, name and pid."""
    lab.vm_is(runs)

    assert lab.start() == 0
    assert (lab.out, lab.err) == (
        "",
        f"started vm 1 successfully: web, pid {lab.pid()}\n",
    )
    assert survey.lookup("web").state == "running"


def test_the_vm_process_has_let_go_of_its_starter(lab: Lab) -> None:
    """A session of its own, /dev/null for 0 to 2, the root directory, no pipe to the starter."""
    lab.vm_is(runs)
    assert lab.start() == 0
    pid = lab.pid()

    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    fds = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert [fds[number] for number in range(3)] == ["/dev/null"] * 3
    with open(f"/proc/{pid}/status") as status:
        assert "Umask:\t0077\n" in status.read()


def test_the_vm_process_keeps_nothing_that_its_caller_had_open(lab: Lab) -> None:
    """A script's lock file must not stay locked for as long as the VM lives."""
    lab.vm_is(runs)
    with open(lab.root / ".mine", "w") as mine:
        assert lab.start() == 0
        pid = lab.pid()
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert mine.name not in links
    assert f"{lab.root}/web/lock" in links


def test_start_json(lab: Lab) -> None:
    """For programs: one object for one VM, a list for several."""
    lab.vm_is(runs)

    assert lab.start("--json") == 0
    assert json.loads(lab.out) == {
        "id": 1,
        "name": "web",
        "pid": lab.pid(),
        "control": f"{lab.root}/web/control.sock",
        "console": f"{lab.root}/web/console.sock",
    }
    lab.yaml.write_text(TWO)
    assert lab.start("--json") == 0
    assert [one["name"] for one in json.loads(lab.out)] == ["one", "two"]


def test_a_vm_that_ends_leaves_no_running_files(lab: Lab) -> None:
    """After the end the sockets and pid are gone, the log and the last status are there."""
    lab.vm_is(runs)
    assert lab.start() == 0
    os.kill(lab.pid(), signal.SIGTERM)

    info = survey.wait_end("web", DEADLINE)
    assert info is not None
    assert (info.state, info.exit["status"]) == ("stopped", 0)
    left = os.listdir(lab.root / "web")
    assert "log" in left
    assert "pid" not in left


def test_standard_input_can_be_the_vm_yaml(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads it; complaints then name <stdin>."""
    lab.vm_is(runs)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(YAML.encode())))
    assert lab("-") == 0
    assert survey.lookup("web").state == "running"

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"name: web\n")))
    assert lab("-") == 2
    assert lab.err.startswith("<stdin>:1:1: ")


# several VMs in one file


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ["one", "two"]), (["two"], ["two"]), (["off", "one"], ["off", "one"])],
)
def test_all_enabled_or_the_named(names: list[str], expected: list[str], lab: Lab) -> None:
    """Without names: all but those with `enable: no`; with names: exactly those."""
    lab.vm_is(runs)
    lab.yaml.write_text(TWO)

    assert lab.start(*names) == 0
    assert [info.name for info in survey.survey()] == sorted(expected)


def test_one_that_fails_keeps_none_of_the_others(lab: Lab) -> None:
    """The rest start, the failure is said, the exit status is 1."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        if config.name == "one":
            raise HostError("no memory left", vm="one")
        return runs(config, rundir, report)

    lab.vm_is(run)
    lab.yaml.write_text(TWO)

    assert lab.start() == 1
    assert lab.err.startswith("pyvmctl: one: no memory left\nstarted vm ")
    assert [info.name for info in survey.survey()] == ["two"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ghost"], "no VM 'ghost' in "),
        (["-c"], "-c needs exactly one VM (name one of: one, two)"),
        (["-F"], "-F needs exactly one VM"),
    ],
)
def test_a_choice_that_means_nothing_is_status_2(
    words: list[str], complaint: str, lab: Lab
) -> None:
    """Unknown names, and -c or -F for several VMs."""
    lab.yaml.write_text(TWO)

    assert lab.start(*words) == 2
    assert lab.err.startswith("pyvmctl: ")
    assert complaint in lab.err
    assert lab.nothing_left()


def test_no_enabled_vm_is_status_2(lab: Lab) -> None:
    """A file whose only VM has `enable: no` starts it when named, and says so otherwise."""
    lab.vm_is(runs)
    lab.yaml.write_text(YAML + "enable: no\n")

    assert lab.start() == 2
    assert "is enabled (name the one to start: web)" in lab.err
    assert lab.start("web") == 0


# it does not start


def test_errors_in_the_vm_yaml_are_printed_as_they_are(lab: Lab) -> None:
    """All at once, in the form that editors read, with status 2; nothing is started."""
    lab.yaml.write_text("name: web\nmemmory: 1G\nboot: {kernel: k}\nvcpus: none\n")

    assert lab.start() == 2
    lines = lab.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{lab.yaml}:2:1: memmory: unknown key")
    assert lines[1].startswith(f"{lab.yaml}:4:8: vcpus: ")
    assert lab.nothing_left()


def test_a_vm_of_that_name_already_running(lab: Lab) -> None:
    """The second start names the process that has the VM, which is not disturbed."""
    lab.vm_is(runs)
    assert lab.start() == 0
    pid = lab.pid()

    assert lab.start() == 1
    assert lab.err == f"pyvmctl: VM web is already running (pid {pid})\n"
    assert lab.pid() == pid
    assert survey.lookup("web").state == "running"


def test_a_vm_can_be_started_again_after_kill_9(lab: Lab) -> None:
    """What a killed VM process leaves behind does not keep the next one from starting."""
    lab.vm_is(runs)
    assert lab.start() == 0
    os.kill(lab.pid(), signal.SIGKILL)
    os.waitpid(lab.pid() or -1, 0)

    assert lab.start() == 0
    assert lab.err.startswith("started vm 1 successfully")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KvmError("no KVM", hint="load it"), 1, "pyvmctl: no KVM (load it)\n"),
        (ConfigError("v.yaml:1:1: boot: no kernel"), 2, "v.yaml:1:1: boot: no kernel\n"),
        (PyvmError("x" * 10_000), 1, "pyvmctl: " + "x" * 3999 + "\n"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_the_vm_process_is_told_here(
    error: PyvmError, status: int, text: str, lab: Lab
) -> None:
    """Text and exit status as if there were one process; long text is cut; nothing is left."""
    lab.vm_is(fails(error))

    assert lab.start() == status
    assert lab.err == text
    assert lab.nothing_left()


def test_a_fault_of_ours_is_told_with_its_traceback(lab: Lab) -> None:
    """An exception nobody foresaw reaches the user and the log, and leaves nothing running."""
    lab.vm_is(fails(ZeroDivisionError("oops")))

    assert lab.start() == 1
    assert lab.err.startswith("pyvmctl: internal error in the VM process\nTraceback")
    assert lab.err.endswith("ZeroDivisionError: oops\n")
    assert lab.nothing_left()


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), 42), "killed by signal 42"),
        (lambda: os._exit(5), "exit status 5"),
        (lambda: os._exit(0), "exit status 0"),
    ],
)
def test_a_vm_process_that_dies_without_a_word(die: Callable[[], None], how: str, lab: Lab) -> None:
    """No report but an end: its status is the report, and what it left is tidied up."""

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        die()
        return 0

    lab.vm_is(run)

    assert lab.start() == 1
    assert lab.err == f"pyvmctl: web: VM process died during start: {how}\n"
    assert not (lab.root / "web" / "pid").exists()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_dead_vm_process_is_noticed_though_its_child_holds_the_pipe(lab: Lab) -> None:
    """What a VM process has forked must not keep the starter waiting for a report."""
    fifo = str(lab.root / ".fifo")
    os.mkfifo(fifo)

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        if not os.fork():
            os.close(os.open(fifo, os.O_RDONLY))  # until the test opens it too
            os._exit(0)
        os._exit(5)

    lab.vm_is(run)

    assert lab.start() == 1
    assert "exit status 5" in lab.err
    assert survey.lookup("web").alive  # by the lock that the child has inherited
    os.close(os.open(fifo, os.O_WRONLY))
    assert survey.wait_end("web", DEADLINE)


def test_a_runtime_directory_that_cannot_be_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything of the VM is built, status 1."""
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", "/proc/pyvmd")
    try:
        assert lab.start() == 1
        assert lab.err.startswith("pyvmctl: cannot ")
        assert "/proc/pyvmd" in lab.err
    finally:
        monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(lab.root))


# the user gives up


def signals_starter(number: int, *, stubborn: bool = False) -> Run:
    """Make a VM that takes for ever to start, during which the starter gets a signal."""

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        if stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), number)
        while True:
            signal.pause()

    return run


@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupt_during_start_leaves_nothing(stubborn: bool, lab: Lab) -> None:
    """^C while waiting ends the VM process, by SIGKILL if need be, and tidies up: status 130."""
    lab.vm_is(signals_starter(signal.SIGINT, stubborn=stubborn))

    assert lab.start() == 130
    assert not (lab.root / "web" / "pid").exists()
    assert stubborn or lab.nothing_left()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ends_of_the_starter_leave_nothing(number: signal.Signals, lab: Lab) -> None:
    """A starter told to end takes the half-started VM along, and its handlers are put back."""
    lab.vm_is(signals_starter(number))
    before = signal.getsignal(number)

    with pytest.raises(SystemExit) as end:
        lab.start()

    assert end.value.code == 128 + number
    assert lab.nothing_left()
    assert signal.getsignal(number) == before


def test_a_vm_outlives_a_starter_that_is_killed(lab: Lab) -> None:
    """A starter killed with -9 just before the report: the VM runs all the same."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        starter = os.pidfd_open(os.getppid())
        os.kill(os.getppid(), signal.SIGKILL)
        select.select([starter], [], [], DEADLINE)
        return runs(config, rundir, report)

    lab.vm_is(run)
    starter = os.fork()
    if not starter:
        try:
            lab.start()
        finally:
            os._exit(99)
    _, status = os.waitpid(starter, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL

    deadline = time.monotonic() + DEADLINE
    while not (lab.root / "web" / "vm.json").exists():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)
    pid = lab.pid()
    assert pid
    cli.main(["stop", "-f", "web"])  # not our child any more


# in the foreground


@pytest.mark.parametrize("status", [0, 1, 7])
def test_foreground_has_the_vms_own_status(status: int, lab: Lab) -> None:
    """-F: this process is the VM; it says when the guest runs and ends with the VM's status."""
    lab.vm_is(ends(status))

    assert lab.start("-F") == status
    assert lab.err == f"started vm 1 successfully: web, pid {os.getpid()}\n"
    assert survey.lookup("web").exit["status"] == status


def test_foreground_failures_are_ordinary_errors(lab: Lab) -> None:
    """No report, no pipe: the error itself, and nothing left behind."""
    lab.vm_is(fails(HostError("no KVM")))

    assert lab.start("-F") == 1
    assert lab.err.endswith("pyvmctl: no KVM\n")
    assert lab.nothing_left()


def test_a_fault_after_the_start_is_recorded(lab: Lab) -> None:
    """An unforeseen exception of a running VM is in exit.json, not a silent crash."""

    def run(_config: VmConfig, rundir: RunDir, report: Report) -> int:
        rundir.running({})
        report(None)
        raise ZeroDivisionError("oops")

    lab.vm_is(run)

    with pytest.raises(ZeroDivisionError):
        lab.start("-F")
    info = survey.lookup("web")
    assert (info.state, info.exit["status"]) == ("stopped", 1)
    assert "ZeroDivisionError: oops" in info.exit["detail"]


# with the console


def test_start_c_of_a_vm_that_ends_at_once(lab: Lab) -> None:
    """The console comes too late, which is an end like any other: the VM's own status."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        status = ends(7)(config, rundir, report)
        rundir.close()
        return status

    lab.vm_is(run)

    assert lab.start("-c") == 7
    assert lab.err.endswith("terminated vm 1\n")


# owner


def test_owners() -> None:
    """Names and numbers, a user or a group or both; unknown ones are errors."""
    me = os.geteuid()
    assert resolve("") == Owner(me, None)
    assert resolve("root") == Owner(0, None)
    assert resolve("12:34") == Owner(12, 34)
    assert resolve(":root") == Owner(me, 0)
    assert user_name(0) == "root"
    assert user_name(4_000_000_000) == "4000000000"
    for words in ("nobody-of-that-name", ":no-such-group"):
        with pytest.raises(HostError, match="no such user or group"):
            resolve(words)


def test_an_owner_that_is_not_there_stops_the_start(lab: Lab) -> None:
    """Found out before anything is built."""
    lab.vm_is(runs)
    lab.yaml.write_text(YAML + "owner: nobody-of-that-name\n")

    assert lab.start() == 1
    assert "no such user or group" in lab.err
    assert lab.nothing_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a VM away")
def test_an_owner_gets_the_vm(lab: Lab) -> None:
    """Root's VM with an owner: directory and sockets are the owner's."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        sock = rundir.listen_control()
        with sock:
            return runs(config, rundir, report)

    lab.vm_is(run)
    lab.yaml.write_text(YAML + "owner: 65534:65534\n")

    assert lab.start() == 0
    status = os.stat(lab.root / "web" / "control.sock")
    assert (status.st_uid, status.st_gid) == (65534, 65534)


def test_a_vm_cannot_be_given_away_by_its_user(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses: the start fails with what to know, and the VM does not run on."""
    from vmm.rundir import RunDir as Real

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Real, "give", refuse)
    lab.vm_is(runs)
    lab.yaml.write_text(YAML + "owner: 65534\n")

    assert lab.start() == 1
    assert "cannot make uid 65534 the owner: Operation not permitted" in lab.err
    assert lab.nothing_left()
