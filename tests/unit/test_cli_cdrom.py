"""pyvmctl cdrom: which disc reaches the VM process, and what is said of its answer."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.images import Access, open_image
from tests.unit.cli_fakes import log_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """An image of a disc."""
    path = tmp_path / "disc.iso"
    path.write_bytes(bytes(4096))
    return path


def test_a_disc_is_handed_over(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path, disc: Path
) -> None:
    """Opened here, with the user's rights; the VM process gets descriptor and name."""
    fake_vm()
    assert pyvmctl("cdrom", "insert", "web", os.path.relpath(disc)) == 0
    assert f"asked: vioscsi: insert disc.iso {disc} False" in log_of(run_root)
    assert pyvmctl.err == f"web/vioscsi: {disc}, tray closed\n"
    assert pyvmctl("cdrom", "insert", "-f", "1", str(disc)) == 0
    assert f"asked: vioscsi: insert disc.iso {disc} True" in log_of(run_root)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("eject", "web"), "vioscsi: eject   False"),
        (("eject", "--force", "web"), "vioscsi: eject   True"),
        (("insert", "web"), "vioscsi: load   False"),
        (("e", "web"), "vioscsi: eject   False"),
    ],
)
def test_the_tray_is_moved(
    pyvmctl: Pyvmctl,
    fake_vm: Callable[..., FakeVm],
    run_root: Path,
    words: tuple[str, ...],
    asked: str,
) -> None:
    """Without a disc to hand over: out, by force if need be, or in again."""
    fake_vm()
    assert pyvmctl("cdrom", *words) == 0
    assert f"asked: {asked}" in log_of(run_root)
    assert pyvmctl.err == "web/vioscsi: no disc, tray open\n"


def test_json(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], disc: Path) -> None:
    """One object: where disc and tray are now."""
    fake_vm()
    assert pyvmctl("cdrom", "insert", "--json", "web", str(disc)) == 0
    facts = {"vm": "web", "device": "vioscsi", "medium": str(disc), "tray_open": False}
    assert json.loads(pyvmctl.out) == facts


@pytest.mark.parametrize("answer", [None, "disc.iso", 7, {}, {"medium": 7}, {"tray_open": True}])
def test_nonsense_is_an_error(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], answer: Any
) -> None:
    """A VM process may be its guest's by now."""
    fake_vm(tray=answer)
    assert pyvmctl("cdrom", "eject", "web") == 1
    assert "the answer does not tell what is in the drive" in pyvmctl.err


def test_an_image_that_cannot_be(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path, tmp_path: Path, disc: Path
) -> None:
    """It is looked at before the VM is bothered: missing, empty, a directory, being written."""
    fake_vm()
    empty = tmp_path / "empty.iso"
    empty.touch()
    for path, words, status in (
        (tmp_path / "none.iso", "No such file", 2),
        (empty, "is empty", 2),
        (tmp_path, "is a directory", 2),
    ):
        assert pyvmctl("cdrom", "insert", "web", str(path)) == status
        assert f"disc {path}: " in pyvmctl.err
        assert words in pyvmctl.err
    writer = open_image(Access(str(disc), "image", write=True))
    assert pyvmctl("cdrom", "insert", "web", str(disc)) == 1
    assert "in use" in pyvmctl.err
    os.close(writer)
    assert "insert" not in log_of(run_root)


def test_a_vm_that_does_not_run(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], disc: Path
) -> None:
    """Its vm.yaml is the place to say it then; status 3 for one never heard of."""
    vm = fake_vm()
    vm.kill()
    assert pyvmctl("cdrom", "insert", "web", str(disc)) == 1
    assert "not running" in pyvmctl.err
    assert pyvmctl("cdrom", "eject", "nowhere") == 3


@pytest.mark.parametrize(
    "words", [(), ("eject",), ("insert",), ("burn", "web"), ("eject", "a", "b")]
)
def test_mistakes(pyvmctl: Pyvmctl, words: tuple[str, ...]) -> None:
    """Status 2."""
    assert pyvmctl("cdrom", *words) == 2
