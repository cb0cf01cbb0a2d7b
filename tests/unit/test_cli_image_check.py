"""pyvmctl image check, judged by QEMU."""

from __future__ import annotations

import json
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.image_lab import (
    MIB,
    needs_qemu_img,
    qcow2,
    qemu_img,
    raw,
    sound,
)
from tests.unit.test_cli_image import vm_with

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl

pytestmark = [needs_qemu_img, pytest.mark.usefixtures("here")]


# check


def leak(path: str) -> None:
    """Give an image from qcow2() a refcount that nothing explains."""
    with open(path, "r+b") as file:
        file.truncate(5 << 16)
        file.seek((2 << 16) + 8)
        file.write(b"\0\1")


def damage(path: str) -> None:
    """Give an image from qcow2() an L1 table that has no refcount."""
    with open(path, "r+b") as file:
        file.seek((2 << 16) + 6)
        file.write(b"\0\0")


def test_check_of_a_clean_image(pyvmctl: Pyvmctl) -> None:
    """Status 0, and a word on it."""
    qcow2("a.qcow2")

    assert pyvmctl("image", "check", "a.qcow2") == 0
    assert (pyvmctl.out, pyvmctl.err) == ("", "a.qcow2: clean\n")
    assert pyvmctl("image", "check", "--json", "a.qcow2") == 0
    facts = json.loads(pyvmctl.out)
    assert (facts["corruptions"], facts["leaks"], facts["texts"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("harm", "status", "word", "repair"),
    [(leak, 10, "leaks", "leaks"), (leak, 10, "leaks", "all"), (damage, 11, "corruptions", "all")],
)
def test_check_finds_and_mends(
    pyvmctl: Pyvmctl, harm: Any, status: int, word: str, repair: str
) -> None:
    """Leaks and corruption have a status each; what was mended is clean, also for QEMU."""
    qcow2("a.qcow2")
    harm("a.qcow2")

    assert pyvmctl("image", "check", "a.qcow2") == status
    assert f"a.qcow2: 1 {word}\n" in pyvmctl.err
    assert "refcount" in pyvmctl.out
    assert pyvmctl("image", "check", "--json", "a.qcow2") == status
    assert json.loads(pyvmctl.out)[word] == 1
    qemu_img("check", "a.qcow2", status={10: 3, 11: 2}[status])

    assert pyvmctl("image", "check", "--repair", repair, "a.qcow2") == 0
    assert "clean, 1 mended" in pyvmctl.err
    sound("a.qcow2")


def test_check_mends_no_corruption_by_the_way(pyvmctl: Pyvmctl) -> None:
    """--repair leaks leaves what may cost data alone."""
    qcow2("a.qcow2")
    damage("a.qcow2")

    assert pyvmctl("image", "check", "--repair", "leaks", "a.qcow2") == 11


def test_check_without_bases(pyvmctl: Pyvmctl) -> None:
    """An image can be checked when its base is gone."""
    qcow2("a.qcow2", base="gone.raw", kind="raw")

    assert pyvmctl("image", "check", "a.qcow2") == 0


@pytest.mark.parametrize(
    ("name", "status", "complaint"),
    [
        ("a.raw", 2, "a.raw: is a raw image, which is all data"),
        ("gone.qcow2", 2, "cannot open: No such file"),
        ("odd.qcow2", 2, "odd.qcow2: qcow2 header: magic at byte 0"),
        ("short.qcow2", 2, "short.qcow2: qcow2 header: the file has 72 bytes"),
    ],
)
def test_what_cannot_be_checked(pyvmctl: Pyvmctl, name: str, status: int, complaint: str) -> None:
    """Not the statuses of a finding."""
    raw("a.raw")
    raw("odd.qcow2")
    raw("short.qcow2", 72, b"QFI\xfb" + pack(">IQIIQIIQ", 3, 0, 0, 16, MIB, 0, 1, 3 << 16))

    assert pyvmctl("image", "check", name) == status
    assert complaint in pyvmctl.err


def test_check_of_an_image_in_use(pyvmctl: Pyvmctl, here: Path) -> None:
    """What changes meanwhile cannot be judged."""
    qcow2("a.qcow2")

    with vm_with(here / "a.qcow2"):
        assert pyvmctl("image", "check", "a.qcow2") == 1
    assert "in use: VM web" in pyvmctl.err
    with vm_with(here / "a.qcow2", readonly=True):
        assert pyvmctl("image", "check", "a.qcow2") == 0
        assert pyvmctl("image", "check", "--repair", "all", "a.qcow2") == 1
