"""What several files of this tier use: a runtime directory, fake VM processes, the command."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli_fakes import FakeVm, Pyvmctl
from tests.unit.cli_start_lab import StartLab
from vmm import daemon, log, survey, verb_control, verb_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory for this test alone, and short deadlines for its fake VMs."""
    path = tmp_path / "run"
    path.mkdir(0o700)
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(path))
    monkeypatch.setattr(verb_status, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(verb_control, "FORCE_SECONDS", 0.3)
    return path


@pytest.fixture
def fake_vm(run_root: Path) -> Iterator[Callable[..., FakeVm]]:
    """Makes fake VMs and ends what is left of them."""
    made: list[FakeVm] = []

    def make(*words: str, **answers: Any) -> FakeVm:
        made.append(FakeVm(*words, **answers))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def pyvmctl(run_root: Path, capsys: pytest.CaptureFixture[str]) -> Pyvmctl:
    """The command, in this process."""
    return Pyvmctl(capsys)


@pytest.fixture
def lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[StartLab]:
    """A place to start VMs in; what still runs at the end is killed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(daemon, "CANCEL_SECONDS", 0.5)
    made = StartLab(tmp_path, monkeypatch, capsys)
    yield made
    for info in survey.survey():
        if info.pid:
            os.kill(info.pid, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    log.setup(stderr=True)
