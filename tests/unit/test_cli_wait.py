"""pyvmctl wait and log: what a VM leaves behind, and following it until then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli_fakes import DEADLINE, TOP
from vmm import cli, verb_wait
from vmm.survey import VmInfo
from vmm.verb_log import LogReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


# wait


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_wait_gives_the_vms_own_status(
    status: int, pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """0 for a clean end, a debug-exit guest's own code, also when the VM has ended before."""
    fake_vm(obeys=status)
    assert pyvmctl("stop", "web") == 0

    assert pyvmctl("wait", "--timeout", str(DEADLINE), "web") == status
    assert pyvmctl.err == "terminated vm 1\n"
    assert pyvmctl("wait", "--json", "web") == status
    assert json.loads(pyvmctl.out)["exit"]["status"] == status


def test_wait_returns_when_the_vm_ends(fake_vm: Callable[..., FakeVm]) -> None:
    """Waiting begins while the VM runs and ends with it."""
    fake = fake_vm()
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


def test_wait_for_a_killed_vm_is_status_1(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A VM process that died without a word has failed."""
    fake_vm().kill()

    assert pyvmctl("wait", "web") == 1


def test_wait_timeout_is_a_failure(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """The VM still runs: status 1, and the VM is left alone."""
    fake_vm()

    assert pyvmctl("wait", "--timeout", "0.05", "web") == 1
    assert "still runs after 0.05 s" in pyvmctl.err


@pytest.mark.parametrize("exit_json", ["{}", '{"status": "0"}', "[]", '{"status": true}'])
def test_a_strange_record_of_the_end_is_no_success(
    exit_json: str, pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """The record can be damaged: what it does not say is not taken for a clean end."""
    fake_vm().kill()
    assert pyvmctl("status") == 0
    (run_root / "web" / "exit.json").write_text(exit_json)

    assert pyvmctl("wait", "web") == 1


def test_waiting_helpers_do_not_hide_a_missing_status() -> None:
    """No status recorded means failed, and statuses are what a process can have."""

    def ended(exit_facts: dict[str, Any]) -> VmInfo:
        return VmInfo("web", 1, "stopped", 0, exit_facts, "/x")

    assert verb_wait.exit_status(ended({})) == 1
    assert verb_wait.exit_status(ended({"status": 0})) == 0
    assert verb_wait.exit_status(ended({"status": 256 + 7})) == 7


# log


def test_log_shows_both_parts_or_the_last_lines(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """The older part first; -n takes the last lines over both."""
    fake_vm().kill()
    (run_root / "web" / "log.1").write_text("one\ntwo\n")
    (run_root / "web" / "log").write_text("three\nfour\n")

    assert pyvmctl("log", "web") == 0
    assert pyvmctl.out == "one\ntwo\nthree\nfour\n"
    assert pyvmctl("log", "-n", "3", "web") == 0
    assert pyvmctl.out == "two\nthree\nfour\n"
    assert pyvmctl("log", "-n", "0", "web") == 0
    assert pyvmctl.out == ""


def test_log_json(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """The parts of each line; what is no line of ours is text."""
    vm = fake_vm()
    assert pyvmctl("pause", "web") == 0
    vm.kill()
    with open(run_root / "web" / "log", "a") as file:
        file.write("now warning web/vioblk0: sector: 7\nno line of ours\n")
    assert pyvmctl("log", "--json", "web") == 0
    entries = [json.loads(line) for line in pyvmctl.out.splitlines()]
    assert [set(entry) for entry in entries] == [{"time", "level", "who", "text"}] * 4
    assert [tuple(entry.values())[1:] for entry in entries[1:]] == [
        ("info", "web", "asked: pause"),
        ("warning", "web/vioblk0", "sector: 7"),
        ("", "", "no line of ours"),
    ]
    assert entries[0]["who"] == "web/control"


def test_log_cannot_steer_the_terminal(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """A log that its owner has filled with escapes, or with one endless line, is shown tamed."""
    fake_vm().kill()
    (run_root / "web" / "log").write_bytes(b"a\x1b]0;x\x07b\xff\n" + b"x" * 200_000)

    assert pyvmctl("log", "web") == 0
    first, rest = pyvmctl.out.split("\n", 1)
    assert first == r"a\x1b]0;x\x07b" + "\ufffd"
    assert "x" * 16384 in rest
    assert "\x1b" not in pyvmctl.out


def test_log_f_follows_over_a_rotation(
    run_root: Path, fake_vm: Callable[..., FakeVm], pyvmctl: Pyvmctl
) -> None:
    """Lines come whole and once, also when the log becomes log.1 between two looks."""
    fake_vm().kill()
    assert pyvmctl("status") == 0
    log = run_root / "web" / "log"
    log.write_text("one\nhal")
    reader = LogReader(str(run_root / "web"))

    assert list(reader.history()) == ["one"]
    with log.open("a") as file:
        file.write("f\ntwo\n")
    log.rename(run_root / "web" / "log.1")
    log.write_text("three\n")
    assert list(reader.more()) == ["half", "two", "three"]
    assert list(reader.more()) == []
    log.unlink()
    assert list(reader.more()) == []
    reader.close()


def test_log_f_ends_with_the_vm(fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """Following shows the last words and ends by itself, also for a VM that has ended."""
    fake = fake_vm()
    following = subprocess.Popen(
        [sys.executable, "-m", "vmm.cli", "log", "-f", "web"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert cli.main(["pause", "web"]) == 0
    assert following.stdout is not None
    assert " info web/control: stop, from uid " in following.stdout.readline()
    assert following.stdout.readline().endswith("asked: pause\n")

    assert cli.main(["stop", "-f", "web"]) == 0

    fake.reap()
    assert following.communicate(timeout=DEADLINE)[0].endswith("asked: quit host-qmp-quit\n")
    assert following.returncode == 0


def test_no_log_to_read(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """A log that is not there is an error; one that is a link or FIFO is not followed."""
    fake_vm().kill()
    assert pyvmctl("status") == 0
    log = run_root / "web" / "log"
    log.unlink()
    assert pyvmctl("log", "web") == 1
    log.symlink_to("/etc/passwd")
    assert pyvmctl("log", "web") == 1
    log.unlink()
    os.mkfifo(log)
    assert pyvmctl("log", "web") == 1
