"""What several files of this tier use: a runtime directory, fake VM processes, the command."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import pytest

import tests.examples  # noqa: F401  for what it sets
from tests.unit.cli_fakes import DEADLINE, FakeVm, Pyvmctl
from tests.unit.cli_start_lab import StartLab
from tests.unit.image_lab import MIB, fill, pattern, qemu_img, raw
from vmm import log, sample, survey, verb_control, verb_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHORT: Final = 0.3  # seconds; for what never comes


@pytest.fixture(scope="module")
def others_garbage_kept() -> Iterator[None]:
    """Only what these tests leave is collected: other tests' takes long, and has descriptors."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory for this test alone, and all the time that its fake VMs may need."""
    path = tmp_path / "run"
    path.mkdir(0o700)
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(path))
    monkeypatch.setattr(verb_status, "ANSWER_SECONDS", DEADLINE)
    monkeypatch.setattr(sample, "ANSWER_SECONDS", DEADLINE)
    monkeypatch.setattr(verb_control, "FORCE_SECONDS", DEADLINE)
    return path


@pytest.fixture
def fake_vm(run_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeVm]]:
    """Makes fake VMs and ends what is left of them. For one that never obeys, deadlines are short.

    Only then, since a process may have to wait for its CPU for as long.
    """
    made: list[FakeVm] = []

    def make(*words: str, **answers: Any) -> FakeVm:
        if answers.get("deaf") or answers.get("stubborn"):
            monkeypatch.setattr(verb_status, "ANSWER_SECONDS", SHORT)
            monkeypatch.setattr(verb_control, "FORCE_SECONDS", SHORT)
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
    deadly = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in deadly}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may have it ignored
    made = StartLab(tmp_path, monkeypatch, capsys)
    yield made
    for info in survey.survey():
        if info.pid:
            os.kill(info.pid, signal.SIGKILL)
    for child in made.children():
        os.waitpid(child, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    log.setup(stderr=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def chain(here: Path) -> bytes:
    """Make a.qcow2 on b.qcow2 on c.raw, each with data of its own; what a guest reads."""
    raw("c.raw", 6 * MIB)
    fill("c.raw", (0, 3 * MIB, 1), kind="raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "c.raw", "-F", "raw", "b.qcow2", "8M")
    fill("b.qcow2", (MIB, MIB, 2), (7 * MIB, 1000, 3))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "10M")
    fill("a.qcow2", (MIB + 512, 512, 5), (9 * MIB, 100_000, 6))
    return pattern(
        10 * MIB,
        (0, 3 * MIB, 1),
        (MIB, MIB, 2),
        (7 * MIB, 1000, 3),
        (MIB + 512, 512, 5),
        (9 * MIB, 100_000, 6),
    )
