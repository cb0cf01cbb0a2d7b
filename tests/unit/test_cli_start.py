"""pyvmctl start: from the command to a VM process that stands on its own."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from tests.descriptors import open_files
from tests.unit.cli_fakes import DEADLINE
from tests.unit.cli_start_lab import TWO, YAML, ends, fails, runs
from vmm import survey, vm
from vmm.owner import Owner, resolve, user_name

if TYPE_CHECKING:
    from config.model import VmConfig
    from tests.unit.cli_start_lab import Report, StartLab
    from vmm.rundir import RunDir


# it starts


def test_start_returns_once_the_guest_runs(lab: StartLab) -> None:
    """Detached: the command is back with the VM running, and says id, name and pid."""
    lab.vm_is(runs)

    assert lab.start() == 0
    assert (lab.out, lab.err) == (
        "",
        f"started vm 1 successfully: web, pid {lab.pid()}\n",
    )
    assert survey.lookup("web").state == "running"


def test_the_vm_process_has_let_go_of_its_starter(lab: StartLab) -> None:
    """A session of its own, /dev/null for 0 to 2, the root directory, no pipe to the starter."""
    lab.vm_is(runs)
    assert lab.start() == 0
    pid = lab.pid()

    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    fds = open_files(pid)
    assert [fds[number] for number in range(3)] == ["/dev/null"] * 3
    with open(f"/proc/{pid}/status") as status:
        assert "Umask:\t0077\n" in status.read()


def test_the_vm_process_keeps_nothing_that_its_caller_had_open(lab: StartLab) -> None:
    """A script's lock file must not stay locked for as long as the VM lives."""
    lab.vm_is(runs)
    with open(lab.root / ".mine", "w") as mine:
        assert lab.start() == 0
        pid = lab.pid()
        links = open_files(pid).values()
        assert mine.name not in links
    assert f"{lab.root}/web/lock" in links


def test_start_json(lab: StartLab) -> None:
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


def test_a_vm_that_ends_leaves_no_running_files(lab: StartLab) -> None:
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


def test_standard_input_can_be_the_vm_yaml(lab: StartLab, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_all_enabled_or_the_named(names: list[str], expected: list[str], lab: StartLab) -> None:
    """Without names: all but those with `enable: no`; with names: exactly those."""
    lab.vm_is(runs)
    lab.yaml.write_text(TWO)

    assert lab.start(*names) == 0
    assert [info.name for info in survey.survey()] == sorted(expected)


def test_one_that_fails_keeps_none_of_the_others(lab: StartLab) -> None:
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
    words: list[str], complaint: str, lab: StartLab
) -> None:
    """Unknown names, and -c or -F for several VMs."""
    lab.yaml.write_text(TWO)

    assert lab.start(*words) == 2
    assert lab.err.startswith("pyvmctl: ")
    assert complaint in lab.err
    assert lab.nothing_left()


def test_no_enabled_vm_is_status_2(lab: StartLab) -> None:
    """A file whose only VM has `enable: no` starts it when named, and says so otherwise."""
    lab.vm_is(runs)
    lab.yaml.write_text(YAML + "enable: no\n")

    assert lab.start() == 2
    assert "is enabled (name the one to start: web)" in lab.err
    assert lab.start("web") == 0


# in the foreground


@pytest.mark.parametrize("status", [0, 1, 7])
def test_foreground_has_the_vms_own_status(status: int, lab: StartLab) -> None:
    """-F: this process is the VM; it says when the guest runs and ends with the VM's status."""
    lab.vm_is(ends(status))

    assert lab.start("-F") == status
    assert lab.err == f"started vm 1 successfully: web, pid {os.getpid()}\n"
    assert survey.lookup("web").exit["status"] == status


def test_foreground_failures_are_ordinary_errors(lab: StartLab) -> None:
    """No report, no pipe: the error itself, and nothing left behind."""
    lab.vm_is(fails(HostError("no KVM")))

    assert lab.start("-F") == 1
    assert lab.err.endswith("pyvmctl: no KVM\n")
    assert lab.nothing_left()


def test_a_fault_after_the_start_is_recorded(lab: StartLab) -> None:
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


def test_start_c_of_a_vm_that_ends_at_once(lab: StartLab) -> None:
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
    for words, unknown, tool in (
        ("nobody-of-that-name", "user 'nobody-of-that-name'", "useradd"),
        (":no-such-group", "group 'no-such-group'", "groupadd"),
        ("root:no-such-group", "group 'no-such-group'", "groupadd"),
    ):
        with pytest.raises(HostError) as caught:
            resolve(words, "web")
        remedy = f"{tool} makes one; a number needs no name"
        assert str(caught.value) == f"web: owner '{words}': no {unknown} on this host ({remedy})"


def test_an_owner_that_is_not_there_stops_the_start(lab: StartLab) -> None:
    """Found out before anything is built."""
    lab.vm_is(runs)
    lab.yaml.write_text(YAML + "owner: nobody-of-that-name\n")

    assert lab.start() == 1
    assert "web: owner 'nobody-of-that-name': no user 'nobody-of-that-name' on" in lab.err
    assert lab.nothing_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a VM away")
def test_an_owner_gets_the_vm(lab: StartLab) -> None:
    """Root's VM with an owner: directory and sockets are the owner's."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        sock = rundir.listen_control()
        with sock:
            vm.give(rundir)
            return runs(config, rundir, report)

    lab.vm_is(run)
    lab.yaml.write_text(YAML + "owner: 65534:65534\n")

    assert lab.start() == 0
    status = os.stat(lab.root / "web" / "control.sock")
    assert (status.st_uid, status.st_gid) == (65534, 65534)


def test_a_vm_cannot_be_given_away_by_its_user(
    lab: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host refuses: the start fails with what to know, and the VM does not run on."""
    from vmm.rundir import RunDir as Real

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        vm.give(rundir)
        return runs(config, rundir, report)

    monkeypatch.setattr(Real, "give", refuse)
    lab.vm_is(run)
    lab.yaml.write_text(YAML + "owner: 65534\n")

    assert lab.start() == 1
    assert "cannot make uid 65534 the owner: Operation not permitted" in lab.err
    assert lab.nothing_left()
