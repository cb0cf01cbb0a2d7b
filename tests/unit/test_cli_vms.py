"""pyvmctl against VM processes: status, stop, wait, reset, pause, log, console."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.unit.cli_fakes import DEADLINE, FakeVm
from vmm import cli, verb_control, verb_status, verb_wait
from vmm.verb_log import LogReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEADING: Final = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME\n"
ME: Final = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory for this test alone, and short deadlines."""
    path = tmp_path / "run"
    path.mkdir(0o700)
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(path))
    monkeypatch.setattr(verb_status, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(verb_control, "FORCE_SECONDS", 0.3)
    return path


@pytest.fixture
def vm() -> Iterator[Callable[..., FakeVm]]:
    """Makes fake VMs and ends what is left of them."""
    made: list[FakeVm] = []

    def make(*words: str, **answers: Any) -> FakeVm:
        made.append(FakeVm(*words, **answers))
        return made[-1]

    yield make
    for one in made:
        one.kill()


class Out:
    """Runs pyvmctl in this process and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        """Run one command line; its exit status."""
        status = cli.main(words)
        self.out, self.err = self._capsys.readouterr()
        return status


@pytest.fixture
def pyvmctl(capsys: pytest.CaptureFixture[str]) -> Out:
    """The command."""
    return Out(capsys)


def log_of(root: Path, name: str = "web") -> str:
    """What the VM has logged."""
    return (root / name / "log").read_text()


# status


def test_status_without_vms_is_a_heading(pyvmctl: Out) -> None:
    """No VM is no error, and no runtime directory either."""
    assert pyvmctl("status") == 0
    assert (pyvmctl.out, pyvmctl.err) == (HEADING, "")
    assert pyvmctl("status", "--json") == 0
    assert json.loads(pyvmctl.out) == []


def test_status_shows_a_running_vm_as_vmctl_does(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """One row: id, pid, vCPUs, memory given and used, console, owner, state, name."""
    pid = vm().pid

    assert pyvmctl("status") == 0
    assert pyvmctl.out == HEADING + (
        f"    1 {pid:>5}     2    512M   88.0M console {ME:>12}  running web\n"
    )


def test_status_json_has_the_facts_in_plain_units(
    pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """Sizes in bytes, paths of the sockets; one object for one name, a list otherwise."""
    pid = vm().pid

    assert pyvmctl("status", "--json", "web") == 0
    facts = json.loads(pyvmctl.out)
    live = facts.pop("live")
    assert facts == {
        "id": 1,
        "name": "web",
        "state": "running",
        "pid": pid,
        "vcpus": 2,
        "memory": 512 << 20,
        "memory_resident": 88 << 20,
        "owner": ME,
        "control": f"{root}/web/control.sock",
        "console": f"{root}/web/console.sock",
        "path": f"{root}/web",
        "exit": None,
    }
    assert live["status"] == "running"
    assert pyvmctl("status", "--json") == 0
    assert [one["name"] for one in json.loads(pyvmctl.out)] == ["web"]


def test_status_of_a_paused_vm(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """The state comes from the VM process itself."""
    vm()
    assert pyvmctl("pause", "web") == 0

    assert pyvmctl("status", "web") == 0
    assert "   paused web\n" in pyvmctl.out


def test_status_after_kill_9(pyvmctl: Out, vm: Callable[..., FakeVm], root: Path) -> None:
    """A VM process killed with -9 is shown as crashed, without pid, and is tidied up after."""
    vm().kill()

    assert pyvmctl("status") == 0
    assert pyvmctl.out == HEADING + (
        f"    1     -     2    512M       -       - {ME:>12}  crashed web\n"
    )
    assert not (root / "web" / "control.sock").exists()


def test_status_of_a_vm_that_does_not_answer(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """Nobody behind the control socket: state unknown after a deadline, the rest from files."""
    pid = vm(deaf=True).pid

    assert pyvmctl("status") == 0
    row = pyvmctl.out.splitlines()[1]
    assert row.endswith(f" {ME}  unknown web")
    assert f" {pid} " in row


def test_status_believes_no_types(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """A VM process or its owner may write anything into answers and vm.json."""
    vm(
        info={"memory_resident": "much", "status": ["running"]},
        config={"vcpus": True, "memory": -5, "owner": "\x1b[31mroot"},
    )

    assert pyvmctl("status") == 0
    row = pyvmctl.out.splitlines()[1]
    assert row.endswith(r" console \x1b[31mroot  unknown web")
    assert pyvmctl("status", "--json", "web") == 0
    facts = json.loads(pyvmctl.out)
    assert (facts["vcpus"], facts["memory"]) == (None, None)
    assert facts["memory_resident"] > 0  # of the process, from /proc


def test_status_shows_running_first_and_by_name_or_number(
    pyvmctl: Out, vm: Callable[..., FakeVm]
) -> None:
    """Running VMs come first, -r hides the others, a number is an id."""
    vm("old").kill()
    vm("web")

    assert pyvmctl("status") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "web", "old"]
    assert pyvmctl("ls", "-r") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "web"]
    assert pyvmctl("status", "1") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "old"]


def test_status_of_a_vm_that_is_not_there(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """Exit status 3, and the ones that are there are shown all the same."""
    vm()

    assert pyvmctl("status", "web", "ghost") == 3
    assert pyvmctl.err.startswith("pyvmctl: no VM 'ghost' (")
    assert pyvmctl.out.endswith("running web\n")


def test_a_runtime_directory_that_others_can_write_is_refused(pyvmctl: Out, root: Path) -> None:
    """Sockets in a directory that anybody may write to could be anybody's: said, with a remedy."""
    root.chmod(0o777)

    assert pyvmctl("status") == 1
    assert f"cannot use runtime directory {root}" in pyvmctl.err
    assert "PYVMD_RUNTIME_DIR" in pyvmctl.err


# stop


def test_stop_asks_the_guest_and_returns(
    pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """Without -f and -w: the power button is pressed, the VM lives on until the guest obeys."""
    vm()

    assert pyvmctl("stop", "web") == 0
    assert pyvmctl.err == "stopping vm web: requested to shutdown vm 1\n"
    assert "asked: power button" in log_of(root)
    assert pyvmctl("status", "web") == 0
    assert "running web" in pyvmctl.out


def test_stop_w_waits_for_the_end(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """With -w: back when the VM process has ended, status 0 whatever the VM's own was."""
    vm(power_button=1)

    assert pyvmctl("stop", "-w", "web") == 0
    assert pyvmctl.err.endswith("terminated vm 1\n")


def test_stop_timeout_is_a_failure(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """A guest that ignores the button: status 1 after the time, and the way to be harder."""
    vm()

    assert pyvmctl("stop", "--timeout", "0.1", "web") == 1
    assert "web: still runs after 0.1 s ('pyvmctl stop -f web'" in pyvmctl.err


def test_stop_f_ends_it_by_command(pyvmctl: Out, vm: Callable[..., FakeVm], root: Path) -> None:
    """With -f: the VM process ends itself in good order, and the end is waited for."""
    vm()

    assert pyvmctl("stop", "-f", "web") == 0
    assert pyvmctl.err == "forced to terminate vm 1\n"
    assert "asked: quit" in log_of(root)
    assert pyvmctl("status", "web") == 0
    assert "stopped web" in pyvmctl.out


@pytest.mark.parametrize("answers", [{"deaf": True}, {"stubborn": True}], ids=str)
def test_stop_f_gets_harder(
    answers: dict[str, bool], pyvmctl: Out, vm: Callable[..., FakeVm]
) -> None:
    """No answer, or no obedience, even to SIGTERM: SIGKILL ends it within the deadlines."""
    vm(**answers)

    assert pyvmctl("stop", "-f", "web") == 0
    assert pyvmctl.err == "forced to terminate vm 1\n"
    assert pyvmctl("status", "web") == 0
    assert "crashed web" in pyvmctl.out


def test_stop_f_kills_no_process_of_another_number(
    pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """A pid file that names another process gets that one killed only if it has the VM's lock.

    Somebody who can write the file could otherwise aim root's kill.
    """
    vm(deaf=True)
    innocent = subprocess.Popen(["sleep", "60"])
    (root / "web" / "pid").write_text(f"{innocent.pid}\n")

    status = pyvmctl("stop", "-f", "web")

    try:
        assert status == 1
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_stop_of_a_stopped_vm_fails(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """As vmctl: there is nothing to stop, status 1; with -f too."""
    vm()
    assert pyvmctl("stop", "-f", "web") == 0

    assert pyvmctl("stop", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: cannot stop vm that is not running\n"
    assert pyvmctl("stop", "-f", "web") == 1


@pytest.mark.parametrize("verb", ["stop", "wait", "reset", "pause", "unpause", "log", "console"])
def test_no_such_vm_is_status_3(verb: str, pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """A name that no VM has: status 3, and the names there are."""
    vm()

    assert pyvmctl(verb, "ghost") == 3
    assert pyvmctl.err.startswith("pyvmctl: no VM 'ghost'")
    assert "web" in pyvmctl.err


def test_stop_a_means_all_that_run(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """-a takes every running VM, and is content if there is none."""
    vm("one")
    vm("two")

    assert pyvmctl("stop", "-a", "-f") == 0
    assert pyvmctl.err == "forced to terminate vm 1\nforced to terminate vm 2\n"
    assert pyvmctl("stop", "-a", "-f") == 0


def test_stop_goes_on_after_a_failure(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """One name that is wrong does not keep the others from being stopped."""
    vm()

    assert pyvmctl("stop", "-f", "ghost", "web") == 3
    assert "forced to terminate vm 1" in pyvmctl.err


# reset, pause, unpause


@pytest.mark.parametrize(
    ("verb", "asked", "text"),
    [
        ("reset", "reset host-qmp-system-reset", "reset vm 1 successfully\n"),
        ("pause", "pause", "paused vm 1 successfully\n"),
        ("unpause", "resume", "unpaused vm 1 successfully\n"),
    ],
)
def test_one_command_verbs(  # noqa: PLR0917  a case and its fixtures
    verb: str, asked: str, text: str, pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """Each is one command to the VM process, and says so in vmctl's words."""
    vm()

    assert pyvmctl(verb, "1") == 0
    assert pyvmctl.err == text
    assert f"asked: {asked}\n" in log_of(root)


def test_a_command_to_nobody_ends(
    pyvmctl: Out, vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control socket that is there with nobody answering fails after a deadline."""
    monkeypatch.setattr(verb_control, "COMMAND_SECONDS", 0.2)
    vm(deaf=True)

    assert pyvmctl("pause", "web") == 1
    assert pyvmctl.err.startswith("pyvmctl: web: ")
    assert "0.2 s" in pyvmctl.err


# wait


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_wait_gives_the_vms_own_status(
    status: int, pyvmctl: Out, vm: Callable[..., FakeVm]
) -> None:
    """0 for a clean end, a debug-exit guest's own code, also when the VM has ended before."""
    vm(power_button=status)
    assert pyvmctl("stop", "web") == 0

    assert pyvmctl("wait", "--timeout", str(DEADLINE), "web") == status
    assert pyvmctl.err == "terminated vm 1\n"
    assert pyvmctl("wait", "--json", "web") == status
    assert json.loads(pyvmctl.out)["exit"]["status"] == status


def test_wait_returns_when_the_vm_ends(vm: Callable[..., FakeVm]) -> None:
    """Waiting begins while the VM runs and ends with it."""
    fake = vm()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "vmm.cli", "wait", "web"],
        cwd=TOP,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.3)

    assert cli.main(["stop", "-f", "web"]) == 0

    fake.reap()
    assert waiting.communicate(timeout=DEADLINE)[1] == "terminated vm 1\n"
    assert waiting.returncode == 0


def test_wait_for_a_killed_vm_is_status_1(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """A VM process that died without a word has failed."""
    vm().kill()

    assert pyvmctl("wait", "web") == 1


def test_wait_timeout_is_a_failure(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """The VM still runs: status 1, and the VM is left alone."""
    vm()

    assert pyvmctl("wait", "--timeout", "0.05", "web") == 1
    assert "still runs after 0.05 s" in pyvmctl.err


@pytest.mark.parametrize("exit_json", ["{}", '{"status": "0"}', "[]", '{"status": true}'])
def test_a_strange_record_of_the_end_is_no_success(
    exit_json: str, pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """The record can be damaged: what it does not say is not taken for a clean end."""
    vm().kill()
    assert pyvmctl("status") == 0
    (root / "web" / "exit.json").write_text(exit_json)

    assert pyvmctl("wait", "web") == 1


# log


def test_log_shows_both_parts_or_the_last_lines(
    pyvmctl: Out, vm: Callable[..., FakeVm], root: Path
) -> None:
    """The older part first; -n takes the last lines over both."""
    vm().kill()
    (root / "web" / "log.1").write_text("one\ntwo\n")
    (root / "web" / "log").write_text("three\nfour\n")

    assert pyvmctl("log", "web") == 0
    assert pyvmctl.out == "one\ntwo\nthree\nfour\n"
    assert pyvmctl("log", "-n", "3", "web") == 0
    assert pyvmctl.out == "two\nthree\nfour\n"
    assert pyvmctl("log", "-n", "0", "web") == 0
    assert pyvmctl.out == ""


def test_log_cannot_steer_the_terminal(pyvmctl: Out, vm: Callable[..., FakeVm], root: Path) -> None:
    """A log that its owner has filled with escapes, or with one endless line, is shown tamed."""
    vm().kill()
    (root / "web" / "log").write_bytes(b"a\x1b]0;x\x07b\xff\n" + b"x" * 200_000)

    assert pyvmctl("log", "web") == 0
    first, rest = pyvmctl.out.split("\n", 1)
    assert first == r"a\x1b]0;x\x07b" + "\ufffd"
    assert "x" * 16384 in rest
    assert "\x1b" not in pyvmctl.out


def test_log_f_follows_over_a_rotation(root: Path, vm: Callable[..., FakeVm], pyvmctl: Out) -> None:
    """Lines come whole and once, also when the log becomes log.1 between two looks."""
    vm().kill()
    assert pyvmctl("status") == 0
    log = root / "web" / "log"
    log.write_text("one\nhal")
    reader = LogReader(str(root / "web"))

    assert list(reader.history()) == ["one"]
    with log.open("a") as file:
        file.write("f\ntwo\n")
    log.rename(root / "web" / "log.1")
    log.write_text("three\n")
    assert list(reader.more()) == ["half", "two", "three"]
    assert list(reader.more()) == []
    log.unlink()
    assert list(reader.more()) == []
    reader.close()


def test_log_f_ends_with_the_vm(vm: Callable[..., FakeVm], root: Path) -> None:
    """Following shows the last words and ends by itself, also for a VM that has ended."""
    fake = vm()
    following = subprocess.Popen(
        [sys.executable, "-m", "vmm.cli", "log", "-f", "web"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cli.main(["pause", "web"]) == 0
    assert following.stdout is not None
    assert following.stdout.readline().endswith("asked: pause\n")

    assert cli.main(["stop", "-f", "web"]) == 0

    fake.reap()
    assert following.communicate(timeout=DEADLINE)[0].endswith("asked: quit host-qmp-quit\n")
    assert following.returncode == 0


def test_no_log_to_read(pyvmctl: Out, vm: Callable[..., FakeVm], root: Path) -> None:
    """A log that is not there is an error; one that is a link or FIFO is not followed."""
    vm().kill()
    assert pyvmctl("status") == 0
    log = root / "web" / "log"
    log.unlink()
    assert pyvmctl("log", "web") == 1
    log.symlink_to("/etc/passwd")
    assert pyvmctl("log", "web") == 1
    log.unlink()
    os.mkfifo(log)
    assert pyvmctl("log", "web") == 1


# console


def console(*words: str, stdin: str) -> subprocess.CompletedProcess[str]:
    """Run `pyvmctl console` on pipes."""
    command = [sys.executable, "-m", "vmm.cli", "console", *words]
    return subprocess.run(
        command, cwd=TOP, input=stdin, text=True, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize("status", [0, 7])
def test_console_ends_with_the_vm(status: int, vm: Callable[..., FakeVm]) -> None:
    """When the VM ends, the console says so and has the VM's own exit status."""
    vm(status=status)

    done = console("web", stdin="poweroff\r")

    assert done.stdout.strip() == "poweroff"
    assert done.stderr == "terminated vm 1\n"
    assert done.returncode == status


def test_console_no_wait_leaves_at_the_end_of_input(
    vm: Callable[..., FakeVm], pyvmctl: Out
) -> None:
    """With --no-wait the VM goes on, and what was typed has arrived."""
    vm()

    done = console("--no-wait", "web", stdin="hello\r")

    assert (done.returncode, done.stderr) == (0, "")
    assert console("--no-wait", "web", stdin="").returncode == 0
    assert pyvmctl("stop", "-f", "web") == 0


def test_console_of_a_stopped_vm(pyvmctl: Out, vm: Callable[..., FakeVm]) -> None:
    """A VM that is known but does not run has no console."""
    vm().kill()

    assert pyvmctl("console", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: is not running\n"


def test_console_break_is_a_command(vm: Callable[..., FakeVm], root: Path) -> None:
    """`~#` on a terminal asks the control socket for a BREAK; ^] leaves."""
    import pexpect

    vm()
    client = pexpect.spawn(
        sys.executable, ["-m", "vmm.cli", "console", "web"], cwd=TOP, timeout=DEADLINE
    )
    client.expect("connected to web; \\^] leaves")
    client.expect("explains\r\n")
    client.send("~#x")
    client.expect("x")  # echoed by the fake: raw mode is on and all before has been done
    client.send("\x1d")
    client.expect("left web")
    client.expect(pexpect.EOF)
    client.close()

    assert client.exitstatus == 0
    assert "asked: break" in log_of(root)


def test_waiting_helpers_do_not_hide_a_missing_status() -> None:
    """No status recorded means failed, and statuses are what a process can have."""
    from vmm.survey import VmInfo

    def ended(exit_facts: dict[str, Any]) -> VmInfo:
        return VmInfo("web", 1, "stopped", 0, exit_facts, "/x")

    assert verb_wait.exit_status(ended({})) == 1
    assert verb_wait.exit_status(ended({"status": 0})) == 0
    assert verb_wait.exit_status(ended({"status": 256 + 7})) == 7
