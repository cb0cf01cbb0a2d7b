"""pyvmctl status, in every state a VM can be in."""

from __future__ import annotations

import json
import os
import pwd
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl

HEADING: Final = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME\n"
ME: Final = pwd.getpwuid(os.geteuid()).pw_name


def test_status_without_vms_is_a_heading(pyvmctl: Pyvmctl) -> None:
    """No VM is no error, and no runtime directory either."""
    assert pyvmctl("status") == 0
    assert (pyvmctl.out, pyvmctl.err) == (HEADING, "")
    assert pyvmctl("status", "--json") == 0
    assert json.loads(pyvmctl.out) == []


def test_status_shows_a_running_vm_as_vmctl_does(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """One row: id, pid, vCPUs, memory given and used, console, owner, state, name."""
    pid = fake_vm().pid

    assert pyvmctl("status") == 0
    assert pyvmctl.out == HEADING + (
        f"    1 {pid:>5}     2    512M   88.0M console {ME:>12}  running web\n"
    )


def test_status_json_has_the_facts_in_plain_units(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """Sizes in bytes, paths of the sockets; one object for one name, a list otherwise."""
    pid = fake_vm().pid

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
        "control": f"{run_root}/web/control.sock",
        "console": f"{run_root}/web/console.sock",
        "path": f"{run_root}/web",
        "exit": None,
    }
    assert live["status"] == "running"
    assert pyvmctl("status", "--json") == 0
    assert [one["name"] for one in json.loads(pyvmctl.out)] == ["web"]


def test_status_of_a_paused_vm(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """The state comes from the VM process itself."""
    fake_vm()
    assert pyvmctl("pause", "web") == 0

    assert pyvmctl("status", "web") == 0
    assert "   paused web\n" in pyvmctl.out


def test_status_after_kill_9(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """A VM process killed with -9 is shown as crashed, without pid, and is tidied up after."""
    fake_vm().kill()

    assert pyvmctl("status") == 0
    assert pyvmctl.out == HEADING + (
        f"    1     -     2    512M       -       - {ME:>12}  crashed web\n"
    )
    assert not (run_root / "web" / "control.sock").exists()


def test_status_of_a_vm_that_does_not_answer(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """Nobody behind the control socket: state unknown after a deadline, the rest from files."""
    pid = fake_vm(deaf=True).pid

    assert pyvmctl("status") == 0
    row = pyvmctl.out.splitlines()[1]
    assert row.endswith(f" {ME}  unknown web")
    assert f" {pid} " in row


def test_status_believes_no_types(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A VM process or its owner may write anything into answers and vm.json."""
    fake_vm(
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
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """Running VMs come first, -r hides the others, a number is an id."""
    fake_vm("old").kill()
    fake_vm("web")

    assert pyvmctl("status") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "web", "old"]
    assert pyvmctl("ls", "-r") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "web"]
    assert pyvmctl("status", "1") == 0
    assert [row.split()[-1] for row in pyvmctl.out.splitlines()] == ["NAME", "old"]


def test_status_of_a_vm_that_is_not_there(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Exit status 3, and the ones that are there are shown all the same."""
    fake_vm()

    assert pyvmctl("status", "web", "ghost") == 3
    assert pyvmctl.err.startswith("pyvmctl: no VM 'ghost' (")
    assert pyvmctl.out.endswith("running web\n")


def test_a_runtime_directory_that_others_can_write_is_refused(
    pyvmctl: Pyvmctl, run_root: Path
) -> None:
    """Sockets in a directory that anybody may write to could be anybody's: said, with a remedy."""
    run_root.chmod(0o777)

    assert pyvmctl("status") == 1
    assert f"cannot use runtime directory {run_root}" in pyvmctl.err
    assert "PYVMD_RUNTIME_DIR" in pyvmctl.err
