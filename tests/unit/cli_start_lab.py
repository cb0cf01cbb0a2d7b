"""`pyvmctl start` without a guest: `vm.run` is a stand-in, all around it is real.

The runtime directory, the processes, the pipe between them and the signals are as in a real start.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Final

import pytest

from vmm import cli, survey, vm

if TYPE_CHECKING:
    from collections.abc import Callable
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


class StartLab:
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
        self._before = children()
        self.out = self.err = ""

    def vm_is(self, run: Run) -> None:
        """Let VM processes do this instead of running a guest."""
        self._monkeypatch.setattr(vm, "run", run)

    def __call__(self, *words: str) -> int:
        """Run `pyvmctl start`; its exit status."""
        return self.run("start", *words)

    def run(self, *words: str) -> int:
        """Run pyvmctl with these words; its exit status."""
        try:
            return cli.main(words)
        finally:
            self.out, self.err = self._capsys.readouterr()

    def start(self, *words: str) -> int:
        """Run `pyvmctl start` with the vm.yaml."""
        return self(str(self.yaml), *words)

    def pid(self, name: str = "web") -> int:
        """The VM process's id."""
        return survey.lookup(name).pid

    def nothing_left(self) -> bool:
        """Whether no directory of a VM and no child of this test is there."""
        assert self.children() == set()
        return [name for name in os.listdir(self.root) if not name.startswith(".")] == []

    def children(self) -> set[int]:
        """Our children, dead ones too, but for those that were there before this test."""
        return children() - self._before


def children() -> set[int]:
    """The children of this process."""
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(name))
    return found


def runs(config: VmConfig, rundir: RunDir, report: Report) -> int:
    """Start well and run until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # or one could come unseen
    rundir.running({"name": config.name, "vcpus": 1, "memory": 1 << 20})
    report(None)
    signal.sigwait({signal.SIGTERM})
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
