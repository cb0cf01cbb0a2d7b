"""pyvmctl start when it goes wrong or the user gives up: said here, and nothing left behind."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from config.errors import ConfigError, KvmError, PyvmError
from tests.unit.cli_fakes import DEADLINE
from tests.unit.cli_start_lab import fails, runs
from vmm import cli, daemon, survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from config.model import VmConfig
    from tests.unit.cli_start_lab import Report, Run, StartLab
    from vmm.rundir import RunDir


# it does not start


def test_errors_in_the_vm_yaml_are_printed_as_they_are(lab: StartLab) -> None:
    """All at once, in the form that editors read, with status 2; nothing is started."""
    lab.yaml.write_text("name: web\nmemmory: 1G\nboot: {kernel: k}\nvcpus: none\n")

    assert lab.start() == 2
    lines = lab.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{lab.yaml}:2:1: memmory: unknown key")
    assert lines[1].startswith(f"{lab.yaml}:4:8: vcpus: ")
    assert lab.nothing_left()


def test_a_vm_of_that_name_already_running(lab: StartLab) -> None:
    """The second start names the process that has the VM, which is not disturbed."""
    lab.vm_is(runs)
    assert lab.start() == 0
    pid = lab.pid()

    assert lab.start() == 1
    remedy = "'pyvmctl stop web' stops it"
    assert lab.err == f"pyvmctl: VM web is already running (pid {pid}) ({remedy})\n"
    assert lab.pid() == pid
    assert survey.lookup("web").state == "running"


def test_a_vm_can_be_started_again_after_kill_9(lab: StartLab) -> None:
    """What a killed VM process leaves behind does not keep the next one from starting."""
    lab.vm_is(runs)
    assert lab.start() == 0
    os.kill(lab.pid(), signal.SIGKILL)
    os.waitpid(lab.pid() or -1, 0)

    assert lab.start() == 0
    assert lab.err.startswith("started vm 1 successfully")


@pytest.fixture
def crowded() -> Iterator[Callable[[int], None]]:
    """Returns what takes all descriptors up to a number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    taken: list[int] = []

    def take(last: int) -> None:
        while not taken or taken[-1] < last:
            taken.append(os.dup(2))

    yield take
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)


def test_reports_come_on_descriptors_of_any_number(
    lab: StartLab, crowded: Callable[[int], None]
) -> None:
    """A thousand VMs that start together need more than select(2) knows."""
    lab.vm_is(runs)
    crowded(1024)
    assert lab.start() == 0


def test_a_process_without_a_descriptor_to_spare(
    lab: StartLab, crowded: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as what keeps the VM from starting."""
    lab.vm_is(runs)
    crowded(100)
    pipe = os.pipe

    def full() -> tuple[int, int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, hard))
        try:
            return pipe()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(os, "pipe", full)
    assert lab.start() == 1
    assert lab.err == "pyvmctl: web: cannot start a process: Too many open files\n"
    assert lab.nothing_left()


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KvmError("no KVM", hint="load it"), 1, "pyvmctl: no KVM (load it)\n"),
        (ConfigError("v.yaml:1:1: boot: no kernel"), 2, "v.yaml:1:1: boot: no kernel\n"),
        (PyvmError("x" * 10_000), 1, "pyvmctl: " + "x" * 3999 + "\n"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_the_vm_process_is_told_here(
    error: PyvmError, status: int, text: str, lab: StartLab
) -> None:
    """Text and exit status as if there were one process; long text is cut; nothing is left."""
    lab.vm_is(fails(error))

    assert lab.start() == status
    assert lab.err == text
    assert lab.nothing_left()


def test_a_fault_of_ours_is_told_with_its_traceback(lab: StartLab) -> None:
    """An exception nobody foresaw reaches the user and the log, and leaves nothing running."""
    lab.vm_is(fails(ZeroDivisionError("oops")))

    assert lab.start() == 1
    assert lab.err.startswith("pyvmctl: internal error in the VM process\nTraceback")
    assert lab.err.endswith("ZeroDivisionError: oops\n")
    assert lab.nothing_left()


def test_a_fault_of_ours_while_it_runs_is_placed_in_the_log(lab: StartLab) -> None:
    """By function and line, without `traceback`, which a process in its jail cannot import."""

    def breaks(config: VmConfig, rundir: RunDir, report: Report) -> int:
        rundir.running({"name": config.name})
        report(None)
        sys.modules["traceback"] = None  # type: ignore[assignment]  # importing it fails now
        raise ZeroDivisionError("oops")

    lab.vm_is(breaks)
    assert lab.start() == 0
    ended = survey.wait_end("web", DEADLINE)
    assert ended is not None
    assert ended.exit["detail"] == "ZeroDivisionError: oops"
    log = Path(ended.path, "log").read_text()
    assert "error web: ends: oops\n" in log
    assert re.search(
        r"a fault of pyvmd's own, at test_cli_start_faults.py:\d+ breaks, daemon.py:\d+ run\n", log
    )


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), 42), "killed by signal 42"),
        (lambda: os._exit(5), "exit status 5"),
        (lambda: os._exit(0), "exit status 0"),
    ],
)
def test_a_vm_process_that_dies_without_a_word(
    die: Callable[[], None], how: str, lab: StartLab
) -> None:
    """No report but an end: its status is the report, and what it left is tidied up."""

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        die()
        return 0

    lab.vm_is(run)

    assert lab.start() == 1
    assert lab.err == f"pyvmctl: web: VM process died during start: {how}\n"
    assert not (lab.root / "web" / "pid").exists()
    assert lab.children() == set()


def test_a_dead_vm_process_is_noticed_though_its_child_holds_the_pipe(lab: StartLab) -> None:
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


def test_no_process_to_be_had(lab: StartLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses to fork: an ordinary error, and ^C works as before."""

    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)

    assert lab.start() == 1
    assert lab.err == "pyvmctl: web: cannot start a process: Resource temporarily unavailable\n"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_runtime_directory_that_cannot_be_made(
    lab: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_interrupt_during_start_leaves_nothing(
    stubborn: bool, lab: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """^C while waiting ends the VM process, by SIGKILL if need be, and tidies up: status 130."""
    monkeypatch.setattr(daemon, "CANCEL_SECONDS", 0.1 if stubborn else DEADLINE)
    lab.vm_is(signals_starter(signal.SIGINT, stubborn=stubborn))

    assert lab.start() == 130
    assert not (lab.root / "web" / "pid").exists()
    assert stubborn or lab.nothing_left()
    assert lab.children() == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ends_of_the_starter_leave_nothing(number: signal.Signals, lab: StartLab) -> None:
    """A starter told to end takes the half-started VM along, and its handlers are put back."""
    lab.vm_is(signals_starter(number))
    before = signal.getsignal(number)

    with pytest.raises(SystemExit) as end:
        lab.start()

    assert end.value.code == 128 + number
    assert lab.nothing_left()
    assert signal.getsignal(number) == before


def test_a_vm_outlives_a_starter_that_is_killed(lab: StartLab) -> None:
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
    while not ((lab.root / "web" / "vm.json").exists() and lab.pid()):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)
    cli.main(["stop", "-f", "web"])  # not our child any more
