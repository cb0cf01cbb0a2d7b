"""pyvmctl stop, reset, pause and unpause: what the VM process is asked, and when it is killed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.unit.cli_fakes import log_of
from vmm import verb_control

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


# stop


def test_stop_asks_the_guest_and_returns(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """Without -f and -w: the power button is pressed, the VM lives on until the guest obeys."""
    fake_vm()

    assert pyvmctl("stop", "web") == 0
    assert pyvmctl.err == "stopping vm web: requested to shutdown vm 1\n"
    assert "asked: power button" in log_of(run_root)
    assert pyvmctl("status", "web") == 0
    assert "running web" in pyvmctl.out


def test_stop_w_waits_for_the_end(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """With -w: back when the VM process has ended, status 0 whatever the VM's own was."""
    fake_vm(power_button=1)

    assert pyvmctl("stop", "-w", "web") == 0
    assert pyvmctl.err.endswith("terminated vm 1\n")


def test_stop_timeout_is_a_failure(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A guest that ignores the button: status 1 after the time, and the way to be harder."""
    fake_vm()

    assert pyvmctl("stop", "--timeout", "0.1", "web") == 1
    assert "web: still runs after 0.1 s ('pyvmctl stop -f web'" in pyvmctl.err


def test_stop_f_ends_it_by_command(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """With -f: the VM process ends itself in good order, and the end is waited for."""
    fake_vm()

    assert pyvmctl("stop", "-f", "web") == 0
    assert pyvmctl.err == "forced to terminate vm 1\n"
    assert "asked: quit" in log_of(run_root)
    assert pyvmctl("status", "web") == 0
    assert "stopped web" in pyvmctl.out


@pytest.mark.parametrize("answers", [{"deaf": True}, {"stubborn": True}], ids=str)
def test_stop_f_gets_harder(
    answers: dict[str, bool], pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """No answer, or no obedience, even to SIGTERM: SIGKILL ends it within the deadlines."""
    fake_vm(**answers)

    assert pyvmctl("stop", "-f", "web") == 0
    assert pyvmctl.err == "forced to terminate vm 1\n"
    assert pyvmctl("status", "web") == 0
    assert "crashed web" in pyvmctl.out


def test_stop_f_kills_no_process_of_another_number(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """A pid file that names another process gets that one killed only if it has the VM's lock.

    Somebody who can write the file could otherwise aim root's kill.
    """
    fake_vm(deaf=True)
    innocent = subprocess.Popen(["sleep", "60"])
    (run_root / "web" / "pid").write_text(f"{innocent.pid}\n")

    status = pyvmctl("stop", "-f", "web")

    try:
        assert status == 1
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_stop_of_a_stopped_vm_fails(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """As vmctl: there is nothing to stop, status 1; with -f too."""
    fake_vm()
    assert pyvmctl("stop", "-f", "web") == 0

    assert pyvmctl("stop", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: cannot stop vm that is not running\n"
    assert pyvmctl("stop", "-f", "web") == 1


@pytest.mark.parametrize("verb", ["stop", "wait", "reset", "pause", "unpause", "log", "console"])
def test_no_such_vm_is_status_3(
    verb: str, pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """A name that no VM has: status 3, and the names there are."""
    fake_vm()

    assert pyvmctl(verb, "ghost") == 3
    assert pyvmctl.err.startswith("pyvmctl: no VM 'ghost'")
    assert "web" in pyvmctl.err


def test_stop_a_means_all_that_run(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """-a takes every running VM, and is content if there is none."""
    fake_vm("one")
    fake_vm("two")

    assert pyvmctl("stop", "-a", "-f") == 0
    assert pyvmctl.err == "forced to terminate vm 1\nforced to terminate vm 2\n"
    assert pyvmctl("stop", "-a", "-f") == 0


def test_stop_goes_on_after_a_failure(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """One name that is wrong does not keep the others from being stopped."""
    fake_vm()

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
    verb: str,
    asked: str,
    text: str,
    pyvmctl: Pyvmctl,
    fake_vm: Callable[..., FakeVm],
    run_root: Path,
) -> None:
    """Each is one command to the VM process, and says so in vmctl's words."""
    fake_vm()

    assert pyvmctl(verb, "1") == 0
    assert pyvmctl.err == text
    assert f"asked: {asked}\n" in log_of(run_root)


def test_a_command_to_nobody_ends(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control socket that is there with nobody answering fails after a deadline."""
    monkeypatch.setattr(verb_control, "COMMAND_SECONDS", 0.2)
    fake_vm(deaf=True)

    assert pyvmctl("pause", "web") == 1
    assert pyvmctl.err.startswith("pyvmctl: web: ")
    assert "0.2 s" in pyvmctl.err
