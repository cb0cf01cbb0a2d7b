"""pyvmctl stop, kill, reboot, reset, pause, unpause: what VMs are asked, and when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from tests.netns import namespace
from tests.unit.cli_fakes import log_of
from vmm import known, runroot, survey, verb_control, verb_reset
from vmm.net import keeper
from vmm.net.links import BRIDGE_ALIAS
from vmm.qmpclient import QmpClient
from vmm.verb_wait import await_end

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl
    from vmm.survey import VmInfo


# stop


def test_stop_asks_the_guest_and_returns(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """Without -f and -w: the guest is asked, and the VM lives on until it obeys."""
    fake_vm()

    assert pyvmctl("stop", "web") == 0
    assert pyvmctl.err == "stopping vm web: requested to shutdown vm 1\n"
    assert "asked: ask stop" in log_of(run_root)
    assert pyvmctl("status", "web") == 0
    assert "running web" in pyvmctl.out


def test_stop_w_waits_for_the_end(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """With -w: back when the VM process has ended, status 0 whatever the VM's own was."""
    fake_vm(obeys=1)

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
    remedy = "'pyvmctl wait web' tells how it ended"
    assert pyvmctl.err == f"pyvmctl: web: cannot stop vm that is not running ({remedy})\n"
    assert pyvmctl("stop", "-f", "web") == 1
    assert pyvmctl("reboot", "web") == 1
    assert "reboot vm that is not running ('pyvmctl start web' starts it)" in pyvmctl.err


@pytest.mark.parametrize(
    "verb", ["stop", "wait", "reboot", "reset", "pause", "unpause", "log", "console"]
)
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


def test_stop_w_says_that_the_guest_did_not_go_down(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """The VM has ended, so status 0 as always; but that it was ended is told, and `wait` fails."""
    detail = "asked to stop, but the guest took note of nothing"
    fake_vm(obeys=124, exit={"how": "timeout", "detail": detail + "\x1b[2J"})

    assert pyvmctl("stop", "-w", "web") == 0
    assert pyvmctl.err.endswith(f"terminated vm 1\nweb: {detail}\\x1b[2J\n")
    assert pyvmctl("wait", "web") == 124


def test_two_clients_may_stop_one_vm(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """The second one asks again, and both could wait: neither is told that something is wrong."""
    fake_vm()

    assert pyvmctl("stop", "web") == 0
    assert pyvmctl("stop", "web") == 0
    assert pyvmctl.err == "stopping vm web: requested to shutdown vm 1\n"


def test_kill_is_stop_f(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """For one or all."""
    for name in ("web", "db"):
        fake_vm(name)
    assert pyvmctl("kill", "web") == 0
    assert pyvmctl.err == "forced to terminate vm 1\n"
    assert "asked: quit" in log_of(run_root)
    assert pyvmctl("kill", "-a") == 0
    assert pyvmctl.err == "forced to terminate vm 2\n"
    assert pyvmctl("kill") == 2
    assert "name the VMs to kill, or all by -a" in pyvmctl.err


# reboot


def test_reboot_asks_the_guest(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """Without -w it returns at once; `restart` is another word for it."""
    fake_vm()

    for verb in ("reboot", "restart"):
        assert pyvmctl(verb, "web") == 0
        assert pyvmctl.err == "rebooting vm web: requested to reboot vm 1\n"
    assert log_of(run_root).count("asked: ask reboot") == 2


def test_reboot_w_waits_for_the_reset(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """RESET is what it waits for, also if that comes before the answer."""
    fake_vm(reboots=("RESET", {"guest": True}))

    assert pyvmctl("reboot", "-w", "web") == 0
    assert pyvmctl.err.endswith("\nrebooted vm 1\n")


def test_reboot_f_resets(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """With -f the guest is not asked."""
    fake_vm()

    assert pyvmctl("reboot", "-f", "-w", "web") == 0
    assert "asked: reset host-qmp-system-reset" in log_of(run_root)
    assert "ask reboot" not in log_of(run_root)


def test_reboot_that_does_not_come(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Other events do not count; after the time it is a failure that names the harder way."""
    fake_vm(reboots=("POWERDOWN", {}))

    assert pyvmctl("reboot", "--timeout", "0.1", "web") == 1
    assert "web: has not rebooted after 0.1 s ('pyvmctl reset web'" in pyvmctl.err


@pytest.mark.parametrize("verb", ["stop", "reboot"])
def test_many_have_one_deadline(
    verb: str,
    pyvmctl: Pyvmctl,
    fake_vm: Callable[..., FakeVm],
    run_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are asked before the first is waited for, and the time counts from there for all."""
    names = ["a", "b", "c"]
    for name in names:
        fake_vm(name)
    calls: list[tuple[str, float, float]] = []

    def wait(info: VmInfo, *rest: Any) -> None:
        assert all(f"x-pyvmd-{verb}, from" in log_of(run_root, name) for name in names)
        calls.append((info.name, *rest[-2:]))

    monkeypatch.setattr(verb_control, "await_end" if verb == "stop" else "_await_reset", wait)
    assert pyvmctl(verb, "-a", "--timeout", "60") == 0
    begun = calls[0][2]
    assert calls == [(name, 60, begun) for name in names]


def test_time_that_is_over_is_waited_no_more(
    fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a deadline is what remains since it began to count."""
    fake_vm()
    left: list[float | None] = []
    monkeypatch.setattr(survey, "wait_end", lambda _name, seconds, _pid: left.append(seconds))
    with pytest.raises(HostError, match="still runs after 60 s"):
        await_end(survey.lookup("web"), 60, since=time.monotonic() - 50)
    assert left[0] is not None
    assert left[0] <= 10


def test_a_vm_process_killed_while_it_reboots(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is no matter of time, and whoever waits is told what happened, at once."""
    vm = fake_vm()
    wait = verb_control._await_reset

    def killed(*arguments: Any) -> None:
        killer = threading.Timer(0.1, os.kill, (vm.pid, signal.SIGKILL))
        killer.start()
        try:
            wait(*arguments)
        finally:
            killer.join()

    monkeypatch.setattr(verb_control, "_await_reset", killed)
    assert pyvmctl("reboot", "--timeout", "600", "web") == 1
    assert "web: has ended instead of rebooting (see 'pyvmctl log web')" in pyvmctl.err


def test_reboot_that_becomes_an_end(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Somebody stops it meanwhile: a failure, told at once."""
    fake_vm(reboots=("SHUTDOWN", {"guest": False, "reason": "host-signal"}))

    assert pyvmctl("reboot", "--timeout", "0.1", "web") == 1
    assert "web: has ended instead of rebooting" in pyvmctl.err


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


def test_a_vm_that_ends_just_before_it_is_asked(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known, so that is status 1, as for one that has ended before."""
    vm = fake_vm()

    def late(path: str, seconds: float) -> QmpClient:
        vm.kill()
        return QmpClient(path, seconds)

    monkeypatch.setattr(verb_control, "QmpClient", late)
    assert pyvmctl("pause", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: has just ended ('pyvmctl wait web' tells how)\n"


# reset of everything


@pytest.mark.parametrize("word", ["vms", "all"])
def test_reset_vms_ends_and_forgets_all(
    word: str,
    pyvmctl: Pyvmctl,
    fake_vm: Callable[..., FakeVm],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Running ones, deaf ones, ended ones; files and numbers, too."""
    monkeypatch.setattr(keeper, "sweep", lambda: None)
    fake_vm("web")
    fake_vm("db", stubborn=True)
    fake_vm("old").kill()
    known.remember("/etc/hosts")

    assert pyvmctl("reset", word) == 0
    said = sorted(pyvmctl.err.splitlines())
    if word == "all" and os.geteuid() == 0:
        assert said.pop() == "removed switches that nobody uses"
    assert said == [
        "forced to terminate vm 1",
        "forced to terminate vm 2",
        "forgot vm 1: web",
        "forgot vm 2: db",
        "forgot vm 3: old",
    ]
    assert not survey.survey()
    assert not known.files()
    assert runroot.vm_id("new") == 1


def test_a_vm_of_that_name_is_meant_first(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """One called vms is reset like any other; among names the word is a name."""
    fake_vm("web")
    assert pyvmctl("reset", "web", "vms") == 3
    fake_vm("vms")
    assert pyvmctl("reset", "vms") == 0
    assert pyvmctl.err == "reset vm 2 successfully\n"
    assert "asked: reset host-qmp-system-reset" in log_of(run_root, "vms")
    assert len(survey.survey()) == 2


def test_reset_alone_resets_nothing(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Where vmctl would end all VMs."""
    fake_vm()
    assert pyvmctl("reset") == 2
    assert "name the VMs to reset, or all by -a" in pyvmctl.err
    assert len(survey.survey()) == 1


def test_one_that_cannot_be_forgotten_keeps_no_other(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is the exit status."""
    for name in ("a", "b"):
        fake_vm(name)

    def fails(info: survey.VmInfo) -> None:
        if info.name == "a":
            raise HostError("outlives", vm="a")
        verb_control.force(info)

    monkeypatch.setattr(verb_reset, "force", fails)
    assert pyvmctl("reset", "vms") == 1
    assert pyvmctl.err.splitlines() == [
        "pyvmctl: a: outlives",
        "forced to terminate vm 2",
        "forgot vm 2: b",
    ]
    assert [info.name for info in survey.survey()] == ["a"]


def test_reset_switches_removes_bridges_that_nobody_uses(pyvmctl: Pyvmctl) -> None:
    """Of ours: one with an interface, and one that somebody else made, stay."""
    with namespace() as ns:
        for name in ("vm-idle", "vm-used", "br0"):
            ns.run("ip", "link", "add", name, "type", "bridge")
            if name != "br0":
                ns.run("ip", "link", "set", name, "alias", f"{BRIDGE_ALIAS}{name[3:]}")
        ns.run("ip", "tuntap", "add", "tap0", "mode", "tap")
        ns.run("ip", "link", "set", "tap0", "master", "vm-used")
        assert pyvmctl("reset", "switches") == 0
        assert pyvmctl.err == "removed switches that nobody uses\n"
        assert set(ns.links()) == {"vm-used", "br0", "tap0"}
