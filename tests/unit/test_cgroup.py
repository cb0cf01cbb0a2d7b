"""Limits by cgroups: what is written where, in a tree of plain files; who moves, on real ones."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import ConfigError, HostError
from config.load import load_text
from config.model import LimitsConfig
from vmm import cgroup, survey
from vmm.rundir import RunDir

if TYPE_CHECKING:
    from pathlib import Path

    from config.model import VmConfig
    from tests.unit.cli_start_lab import Report, StartLab

BOTH: Final = LimitsConfig(cpu=150, memory=2 << 30)
REAL: Final = "/sys/fs/cgroup/unified"


class Tree:
    """A cgroup file system of plain files, and the /proc/self of a process in it."""

    def __init__(self, path: Path, own: str, controllers: str = "cpu io memory pids") -> None:
        self.top = path / "cgroup"
        self.proc = path / "proc"
        self.proc.mkdir()
        (self.proc / "mounts").write_text(
            f"proc /proc proc rw 0 0\ncgroup2 {self.top} cgroup2 rw,relatime 0 0\n"
        )
        (self.proc / "cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
        self.here = self.group(own.strip("/"), controllers)
        self.group("", controllers)

    def group(self, name: str, controllers: str, procs: str = "") -> Path:
        """Make one."""
        made = self.top / name
        made.mkdir(parents=True, exist_ok=True)
        for file, text in (("controllers", controllers), ("subtree_control", ""), ("procs", procs)):
            (made / f"cgroup.{file}").write_text(text)
        return made

    def enter(self, limits: LimitsConfig = BOTH) -> str:
        """Put this process into a group; its path below the top."""
        return cgroup.enter("web", limits, str(self.proc)).removeprefix(str(self.top))

    def read(self, name: str) -> str:
        """What one file holds."""
        return (self.top / name).read_text()


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may do everything in a tree."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user has what was delegated to him."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


# vm.yaml


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("{cpu: 150%, memory: 2G}", BOTH),
        ("{cpu: 1%}", LimitsConfig(cpu=1)),
        ("{memory: 64M}", LimitsConfig(memory=64 << 20)),
        ("{}", LimitsConfig()),
    ],
)
def test_limits_are_read(text: str, limits: LimitsConfig) -> None:
    """Each is optional."""
    [vm] = load_text(f"name: web\nboot: {{kernel: k}}\nlimits: {text}\n", "web.yaml").vms
    assert vm.limits == limits


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{cpu: 1.5}", "limits.cpu: expected a share of CPU time such as 150%"),
        ("{cpu: 0%}", "from 1% to 102400%"),
        ("{cpu: -5%}", "limits.cpu: expected"),
        ("{cpu: ²%}", "limits.cpu: expected"),
        ("{memory: 1M}", "limits.memory: expected a size from 16M"),
        ("{pids: 5}", "limits.pids: unknown key (allowed: cpu, memory)"),
    ],
)
def test_what_is_no_limit_is_said(text: str, why: str) -> None:
    """With its place."""
    with pytest.raises(ConfigError) as caught:
        load_text(f"name: web\nboot: {{kernel: k}}\nlimits: {text}\n", "web.yaml")
    assert why in str(caught.value)


# a delegated group


def test_a_vm_gets_a_group_below_ours(tmp_path: Path, as_user: None) -> None:
    """Controllers, limits, then the process."""
    tree = Tree(tmp_path, "/user/app.scope")
    assert tree.enter() == "/user/app.scope/pyvmd-web"
    assert tree.read("user/app.scope/cgroup.subtree_control") == "+cpu +memory"
    group = "user/app.scope/pyvmd-web"
    assert tree.read(f"{group}/cpu.max") == "150000 100000"
    assert tree.read(f"{group}/memory.max") == str(2 << 30)
    assert tree.read(f"{group}/memory.oom.group") == "1"
    assert tree.read(f"{group}/cgroup.procs") == "0"


def test_only_what_is_limited_is_touched(tmp_path: Path, as_user: None) -> None:
    """No memory limit, no memory controller."""
    tree = Tree(tmp_path, "/app.scope", "cpu")
    tree.enter(LimitsConfig(cpu=50))
    assert tree.read("app.scope/cgroup.subtree_control") == "+cpu"
    assert sorted(os.listdir(tree.here / "pyvmd-web")) == ["cgroup.procs", "cpu.max"]


def test_a_process_in_the_group_goes_to_a_leaf_first(tmp_path: Path, as_user: None) -> None:
    """The kernel allows no process beside limited children; who has gone stays there."""
    tree = Tree(tmp_path, "/app.scope")
    (tree.here / "cgroup.procs").write_text(f"1\n{os.getpid()}\n")
    assert tree.enter() == "/app.scope/pyvmd-web"
    assert tree.read("app.scope/pyvmctl/cgroup.procs") == "0"
    (tree.proc / "cgroup").write_text("0::/app.scope/pyvmctl\n")
    assert cgroup.settle(BOTH, str(tree.proc)) == str(tree.here)


def test_a_group_in_use_is_left_alone(tmp_path: Path, as_user: None) -> None:
    """Of a VM of this name that another runtime directory has."""
    tree = Tree(tmp_path, "/app.scope")
    tree.group("app.scope/pyvmd-web", "", "4711\n")
    with pytest.raises(HostError, match="is in use"):
        tree.enter()
    assert not (tree.here / "pyvmd-web" / "memory.max").exists()


# where it cannot be


def test_without_delegation_the_remedy_is_named(tmp_path: Path, as_user: None) -> None:
    """The parent has given us fewer controllers."""
    tree = Tree(tmp_path, "/session.scope")
    (tree.here / "cgroup.controllers").write_text("pids")
    with pytest.raises(HostError, match=r"cannot limit VMs in .*/session.scope: .*Delegate=yes"):
        tree.enter()
    assert not (tree.here / "pyvmd-web").exists()


def test_a_host_without_controllers_says_which(tmp_path: Path, as_root: None) -> None:
    """As with the old hierarchy."""
    tree = Tree(tmp_path, "/", "cpu")
    with pytest.raises(HostError, match=r"have no memory \(boot with systemd.unified"):
        tree.enter()


def test_a_host_without_version_2(tmp_path: Path, as_root: None) -> None:
    """Nothing to look at."""
    tree = Tree(tmp_path, "/")
    (tree.proc / "mounts").write_text("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n")
    with pytest.raises(HostError, match="no cgroups of version 2"):
        tree.enter()


# root


@pytest.mark.parametrize("own", ["/", "/user/session.scope"])
def test_root_has_a_place_at_the_top(tmp_path: Path, as_root: None, own: str) -> None:
    """From the root group, and from a session that nothing is delegated to."""
    tree = Tree(tmp_path, own)
    if own != "/":
        (tree.here / "cgroup.controllers").write_text("")
    assert tree.enter() == "/pyvmd/web"
    for group in ("", "pyvmd/"):
        assert tree.read(f"{group}cgroup.subtree_control") == "+cpu +memory"
    assert tree.read("pyvmd/web/cpu.max") == "150000 100000"


def test_in_its_own_unit_root_stays(tmp_path: Path, as_root: None) -> None:
    """So that systemd ends the VM with the unit."""
    tree = Tree(tmp_path, "/system.slice/pyvmd@web.service")
    assert tree.enter() == "/system.slice/pyvmd@web.service/pyvmd-web"


def test_a_look_at_a_vm_that_has_ended_removes_its_group(
    tmp_path: Path, as_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ended; not that of one that runs, nor one with somebody in it."""
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(cgroup, "MOUNTS", (str(tmp_path), str(tmp_path / "none")))
    vm = RunDir("web")
    vm.take()
    vm.running({})
    group = tmp_path / "pyvmd" / "web"
    group.mkdir(parents=True)
    survey.survey()
    assert group.is_dir()
    vm.leave()  # as a killed process does
    (group / "somebody").mkdir()
    survey.survey()
    assert group.is_dir()
    (group / "somebody").rmdir()
    assert survey.survey()[0].state == "crashed"
    assert not group.exists()


# a real file system


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(f"{REAL}/cgroup.procs"),
    reason="needs root and cgroup version 2 beside version 1",
)
def test_real_groups_take_a_process_and_go_when_it_has_gone(tmp_path: Path) -> None:
    """By the kernel: in the group with its children, EBUSY while it lives, gone afterwards."""
    name = f"pyvmd-test-{os.getpid()}"
    os.makedirs(f"{REAL}/{cgroup.TOP}", exist_ok=True)
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            (tmp_path / "mounts").write_text(f"cgroup2 {REAL} cgroup2 rw 0 0\n")
            (tmp_path / "cgroup").write_text("0::/\n")
            cgroup.enter(name, LimitsConfig(), str(tmp_path))
            os.write(tell, b"!")
            with open("/proc/self/cgroup") as file:
                os.write(tell, file.read().encode())
            signal.pause()  # until killed
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"!"
        assert f"0::/{cgroup.TOP}/{name}\n" in os.read(ready, 4096).decode()
        cgroup.remove(name)
        assert os.path.isdir(f"{REAL}/{cgroup.TOP}/{name}")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)
    cgroup.remove(name)
    assert not os.path.exists(f"{REAL}/{cgroup.TOP}/{name}")
    os.rmdir(f"{REAL}/{cgroup.TOP}")


def test_a_start_that_fails_leaves_no_group(
    lab: StartLab, as_root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the VM process was in it."""
    monkeypatch.setattr(cgroup, "MOUNTS", (str(tmp_path),))
    group = tmp_path / "pyvmd" / "web"

    def run(_config: VmConfig, _rundir: RunDir, _report: Report) -> int:
        group.mkdir(parents=True)
        raise HostError("no kernel today")

    lab.vm_is(run)
    assert lab.start() == 1
    assert group.parent.is_dir()
    assert not group.exists()
