"""pyvmctl status --jail: the processes of a VM, as /proc has them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from vmm import jailview

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.unit.cli_fakes import FakeVm, Pyvmctl

HEADING = "    PID     USER FILTERS NONEWPRIVS       CAPS  ROOT FDS        PROCESS NAMESPACES\n"


def test_no_vm_is_a_heading(pyvmctl: Pyvmctl) -> None:
    """Nothing runs, nothing is shown, and that is no error."""
    assert pyvmctl("status", "--jail") == 0
    assert (pyvmctl.out, pyvmctl.err) == (HEADING, "")
    assert pyvmctl("status", "--jail", "--json") == 0
    assert json.loads(pyvmctl.out) == []


def test_a_vm_process_that_is_not_confined_shows_as_such(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """One that has no filter and sees the host's files is said to, whatever vm.yaml wants."""
    pid = fake_vm().pid

    assert pyvmctl("status", "--jail", "web") == 0
    [heading, line] = pyvmctl.out.splitlines()
    cells = line.split()
    assert heading + "\n" == HEADING
    assert cells[0] == str(pid)
    assert (cells[2], cells[3], cells[5]) == ("0", "no", "host")
    assert cells[7:] == ["web", "-"]


def test_json_has_every_fact(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """One object per process, with what the columns have no room for."""
    pid = fake_vm().pid

    assert pyvmctl("status", "--jail", "--json", "web") == 0
    [found] = json.loads(pyvmctl.out)
    assert (found["process"], found["pid"], found["uid"]) == ("web", pid, os.geteuid())
    assert (found["seccomp_filters"], found["no_new_privs"]) == (0, False)
    assert found["namespaces"] == dict.fromkeys(jailview.NAMESPACES.values(), False)
    assert found["root_empty"] is False
    assert set(found["capabilities"]) == {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"}
    assert found["limits"].keys() == {"processes", "open files", "core file size", "data size"}
    assert found["descriptors"] > 0


def test_an_unknown_name_is_told_as_ever(pyvmctl: Pyvmctl) -> None:
    """--jail changes what is shown of a VM, not which VMs there are."""
    assert pyvmctl("status", "--jail", "nobody") == 3
    assert "nobody" in pyvmctl.err


def test_a_process_that_is_gone_has_no_facts() -> None:
    """It may end between the look at its parent and the look at itself."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert jailview.facts(pid) is None  # a zombie confines nobody
    os.waitpid(pid, 0)
    assert jailview.facts(pid) is None


def test_an_older_kernel_leaves_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.9 nobody counted filters; what is not known is not made up."""
    files = {"status": "State:\tS\nUid:\t1\t1\t1\t1\nSeccomp:\t2\n", "stat": "", "mountinfo": ""}
    monkeypatch.setattr(jailview, "_read", lambda _pid, name: files.get(name, ""))
    found = jailview.facts(1)
    assert found is not None
    assert (found["seccomp_filters"], found["no_new_privs"]) == (None, None)
    assert found["limits"] == {}


def test_a_title_cannot_pass_for_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line is the process's own to write: only ours are believed to be names."""
    titles = {1: "pyvmd: web/vioblk0\0\0\0", 2: "sshd: root\0"}
    monkeypatch.setattr(jailview, "_read", lambda pid, _name: titles[pid])
    assert [jailview._title(pid) for pid in titles] == ["web/vioblk0", "process 2"]
