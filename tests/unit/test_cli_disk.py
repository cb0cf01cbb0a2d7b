"""pyvmctl disk: what a VM is asked, and what is said of its answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

import pytest

from config.errors import HostError
from tests.unit.cli_fakes import log_of
from vmm import verb_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


class FakeControl:
    """In place of QmpClient: answers with `answer`, or raises it."""

    answer: Any = None

    def __init__(self, path: str, timeout: float) -> None:
        assert path.endswith("/web/control.sock")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, name: str, **arguments: Any) -> Any:
        assert name == "block_resize"
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("0", "20G"), "vioblk0: resize = 21474836480"),
        (("vioblk1", "512K"), "vioblk1: resize = 524288"),
        (("2",), "vioblk2: resize = 0"),
        (("vioblk00",), "vioblk0: resize = 0"),
    ],
)
def test_the_vm_is_asked(
    pyvmctl: Pyvmctl,
    fake_vm: Callable[..., FakeVm],
    run_root: Path,
    words: tuple[str, ...],
    asked: str,
) -> None:
    """Disk and size reach the VM process in its own units; no size is 0."""
    fake_vm()

    pyvmctl("disk", "resize", "web", *words)

    assert f"asked: {asked}" in log_of(run_root)


def test_the_new_size_is_told(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed is what the device says it has, not what it was asked for."""
    fake_vm()
    monkeypatch.setattr(verb_disk, "QmpClient", FakeControl)
    monkeypatch.setattr(FakeControl, "answer", 10 << 30)

    assert pyvmctl("disk", "resize", "web", "0", "20G") == 0
    assert pyvmctl.err == "web/vioblk0: 10G\n"
    assert pyvmctl("disk", "resize", "--json", "1", "vioblk3") == 0
    assert json.loads(pyvmctl.out) == {"vm": "web", "device": "vioblk3", "size": 10 << 30}


def test_a_refusal_is_told(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own words, with status 1."""
    fake_vm()
    monkeypatch.setattr(verb_disk, "QmpClient", FakeControl)
    monkeypatch.setattr(FakeControl, "answer", HostError("the image has 512 bytes already"))

    assert pyvmctl("disk", "resize", "web", "0", "1K") == 1
    assert "the image has 512 bytes already" in pyvmctl.err


@pytest.mark.parametrize("answer", [None, "20G", True, 1.5, {}])
def test_nonsense_is_an_error(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    """A device may be its guest's by now: what is no size is not printed as one."""
    fake_vm()
    monkeypatch.setattr(verb_disk, "QmpClient", FakeControl)
    monkeypatch.setattr(FakeControl, "answer", answer)

    assert pyvmctl("disk", "resize", "web", "0") == 1
    assert "web/vioblk0: the answer is no size" in pyvmctl.err


def test_a_vm_that_does_not_run(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Without a VM process there is nobody to tell the guest; status 3 for one never heard of."""
    vm = fake_vm()
    vm.kill()

    assert pyvmctl("disk", "resize", "web", "0", "1G") == 1
    assert "cannot resize a disk of vm that is not running" in pyvmctl.err
    assert pyvmctl("disk", "resize", "nowhere", "0", "1G") == 3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("resize", "web"), "the following arguments are required: DISK"),
        (("shrink", "web", "0"), "invalid choice: 'shrink'"),
        (("resize", "web", "vda"), "expected a disk such as 0 or vioblk0, got 'vda'"),
        (("resize", "web", "-1"), "DISK"),
        (("resize", "web", "0", "big"), "not a size such as 512M"),
        (("resize", "web", "0", "1GB"), "1000 or 1024"),
        (("resize", "web", "0", "0"), "at least one sector"),
    ],
)
def test_mistakes(pyvmctl: Pyvmctl, words: tuple[str, ...], complaint: str) -> None:
    """Status 2, and what was expected."""
    assert pyvmctl("disk", *words) == 2
    assert complaint in pyvmctl.err
