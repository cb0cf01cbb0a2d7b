"""pyvmctl image commit and rebase, judged by QEMU."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.unit.image_lab import (
    MIB,
    allocated,
    content,
    fill,
    interrupting,
    needs_qemu_img,
    pattern,
    qcow2,
    qemu_img,
    qemu_info,
    raw,
    signals_count,
    sound,
)
from tests.unit.test_cli_image import vm_with
from vmm import imagecopy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl

pytestmark = [needs_qemu_img, pytest.mark.usefixtures("here")]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Let signals reach the commands."""
    with signals_count():
        yield


# commit


@pytest.mark.parametrize("keep", [False, True])
def test_commit(pyvmctl: Pyvmctl, chain: bytes, keep: bool) -> None:
    """The base shows what the overlay did; the overlay is emptied, and reads as before."""
    assert pyvmctl("image", "commit", *(["-d"] if keep else []), "a.qcow2") == 0

    assert pyvmctl.err == "b.qcow2: has what a.qcow2 held\n"
    assert content("b.qcow2") == chain
    assert content("a.qcow2") == chain
    assert qemu_info("b.qcow2")["backing-filename"] == "c.raw"
    assert qemu_info("a.qcow2")["backing-filename"] == "b.qcow2"
    mapped = json.loads(qemu_img("map", "--output=json", "a.qcow2"))
    assert any(run["depth"] == 0 and run["data"] for run in mapped) is keep
    for name in ("a.qcow2", "b.qcow2"):
        sound(name)


def test_commit_into_a_raw_base(pyvmctl: Pyvmctl) -> None:
    """Data, and zeroes that hide data of the base; the base grows."""
    raw("base.raw", 4 * MIB)
    fill("base.raw", (0, 4 * MIB, 7), kind="raw")
    pyvmctl("create", "-b", "base.raw", "-s", "6M", "a.qcow2")
    fill("a.qcow2", (MIB, MIB, 0), (3 * MIB, 1000, 8), (5 * MIB, 1000, 9))
    expected = content("a.qcow2")

    assert pyvmctl("image", "commit", "--json", "a.qcow2") == 0

    facts = json.loads(pyvmctl.out)
    assert (facts["base"], facts["emptied"]) == ("base.raw", True)
    assert content("base.raw", "raw") == expected == content("a.qcow2")


def test_commit_into_a_larger_base(pyvmctl: Pyvmctl) -> None:
    """The base keeps its size and what is behind the overlay's end."""
    raw("base.raw", 4 * MIB)
    fill("base.raw", (0, 4 * MIB, 7), kind="raw")
    pyvmctl("create", "-b", "base.raw", "-s", "2M", "a.qcow2")
    fill("a.qcow2", (0, MIB, 8))

    assert pyvmctl("image", "commit", "a.qcow2") == 0

    assert content("base.raw", "raw") == pattern(4 * MIB, (0, 4 * MIB, 7), (0, MIB, 8))


def test_commit_needs_an_overlay(pyvmctl: Pyvmctl) -> None:
    """An image without a base has nowhere to go."""
    pyvmctl("create", "-s", "1M", "a.qcow2")
    raw("a.raw")

    assert pyvmctl("image", "commit", "a.qcow2") == 2
    assert "a.qcow2: stands on no base" in pyvmctl.err
    assert pyvmctl("image", "commit", "a.raw") == 2
    assert "a.raw: stands on no base" in pyvmctl.err


def test_commit_needs_the_base_for_itself(pyvmctl: Pyvmctl, here: Path, chain: bytes) -> None:
    """A VM that reads the base would see it change."""
    with vm_with(here / "b.qcow2", readonly=True):
        assert pyvmctl("image", "commit", "a.qcow2") == 1
    assert "base b.qcow2 of a.qcow2: in use: VM web" in pyvmctl.err
    assert content("a.qcow2") == chain


def test_an_interrupted_commit(
    pyvmctl: Pyvmctl, monkeypatch: pytest.MonkeyPatch, chain: bytes
) -> None:
    """Both images are sound, and the overlay reads as before."""
    monkeypatch.setattr(imagecopy, "write", interrupting(imagecopy.write, 1, signal.SIGINT))

    assert pyvmctl("image", "commit", "a.qcow2") == 130

    assert content("a.qcow2") == chain
    for name in ("a.qcow2", "b.qcow2"):
        sound(name)


# rebase


@pytest.fixture
def other() -> None:
    """Make other.raw, partly different from what a.qcow2's bases show."""
    raw("other.raw", 5 * MIB)
    fill("other.raw", (0, 2 * MIB, 1), (4 * MIB, MIB, 9), kind="raw")


def test_rebase(pyvmctl: Pyvmctl, chain: bytes, other: None) -> None:
    """On another base the overlay reads as before."""
    assert pyvmctl("image", "rebase", "-b", "other.raw", "a.qcow2") == 0

    assert pyvmctl.err == "a.qcow2: stands on other.raw\n"
    facts = qemu_info("a.qcow2")
    assert facts["backing-filename"] == "other.raw"
    assert facts["backing-filename-format"] == "raw"
    assert content("a.qcow2") == chain
    sound("a.qcow2")


def test_rebase_onto_nothing(pyvmctl: Pyvmctl, chain: bytes) -> None:
    """An overlay that stands alone holds all that its bases did."""
    assert pyvmctl("image", "rebase", "--json", "-b", "", "a.qcow2") == 0

    assert json.loads(pyvmctl.out) == {"path": "a.qcow2", "base": None, "base_format": None}
    with open("a.qcow2", "rb") as file:
        assert b"b.qcow2" not in file.read(65536)
    assert "backing-filename" not in qemu_info("a.qcow2")
    assert content("a.qcow2") == chain
    sound("a.qcow2")


def test_rebase_onto_the_bases_base(pyvmctl: Pyvmctl, chain: bytes) -> None:
    """The image between is left out; only what it held is copied."""
    before = allocated("a.qcow2")

    assert pyvmctl("image", "rebase", "-b", "c.raw", "a.qcow2") == 0

    assert content("a.qcow2") == chain
    assert allocated("a.qcow2") - before < 2 * MIB  # of 10M: b.qcow2 held 1M and a little
    sound("a.qcow2")


def test_rebase_copies_nothing_without_need(pyvmctl: Pyvmctl, chain: bytes) -> None:
    """Onto a copy of its base an overlay gains no data."""
    qemu_img("convert", "-O", "qcow2", "b.qcow2", "copy.qcow2")
    before = qemu_img("map", "--output=json", "a.qcow2").count('"depth": 0')

    assert pyvmctl("image", "rebase", "-b", "copy.qcow2", "a.qcow2") == 0

    assert content("a.qcow2") == chain
    assert qemu_img("map", "--output=json", "a.qcow2").count('"depth": 0') == before


def test_rebase_of_an_image_that_stands_alone(pyvmctl: Pyvmctl) -> None:
    """It gets a base, and hides it where it was zero."""
    raw("base.raw", 4 * MIB)
    fill("base.raw", (0, 4 * MIB, 7), kind="raw")
    pyvmctl("create", "-s", "4M", "a.qcow2")
    fill("a.qcow2", (MIB, 1000, 8))

    assert pyvmctl("image", "rebase", "-b", "base.raw", "a.qcow2") == 0

    assert content("a.qcow2") == pattern(4 * MIB, (MIB, 1000, 8))
    assert qemu_info("a.qcow2")["backing-filename"] == "base.raw"
    sound("a.qcow2")


def test_rebase_unsafe(pyvmctl: Pyvmctl, chain: bytes) -> None:
    """-u writes a name and nothing else; the old base need not be there any more."""
    os.rename("b.qcow2", "moved.img")
    before = allocated("a.qcow2")

    assert pyvmctl("image", "rebase", "-b", "moved.img", "-F", "qcow2", "a.qcow2") == 2
    assert "cannot open: No such file" in pyvmctl.err
    assert "pyvmctl image rebase -u" in pyvmctl.err
    assert pyvmctl("image", "rebase", "-u", "-b", "moved.img", "-F", "qcow2", "a.qcow2") == 0

    assert content("a.qcow2") == chain
    assert allocated("a.qcow2") == before
    sound("a.qcow2")


def test_rebase_tells_a_format(pyvmctl: Pyvmctl) -> None:
    """The remedy that is named for a base of unknown format works as it is printed."""
    raw("base.img", MIB, b"base")
    qcow2("a.qcow2", base="base.img")
    assert pyvmctl("image", "convert", "a.qcow2", "out.raw") == 2
    remedy = pyvmctl.err.split("say so with: pyvmctl ")[1].split(",")[0].split()

    assert pyvmctl(*remedy) == 0

    assert pyvmctl("image", "convert", "a.qcow2", "out.raw") == 0
    assert content("out.raw", "raw").startswith(b"base")


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (("a.qcow2",), 2, "on which base? (-b BASE, or -b '' for none)"),
        (("-b", "gone.raw", "a.qcow2"), 2, "gone.raw: cannot open"),
        (("-b", "a.qcow2", "a.qcow2"), 1, "a.qcow2: in use: it is named twice"),
        (("-b", "over.qcow2", "a.qcow2"), 1, "in use: it is named twice"),
        (("-u", "-b", "./a.qcow2", "a.qcow2"), 2, "a.qcow2: cannot stand on itself"),
        (("-u", "-b", "c.img", "a.qcow2"), 2, "c.img: of which format? (-F raw, or -F qcow2)"),
        (("-b", "c.raw", "c.raw"), 1, "in use"),
        (("-u", "-b", "x.raw", "c.raw"), 2, "c.raw: is a raw image"),
        (("-b", "", "c.raw"), 2, "c.raw: a raw image stands on no base"),
        (("-u", "-b", "x" * 1024 + ".raw", "a.qcow2"), 2, "a.qcow2: qcow2 header: "),
    ],
)
def test_rebase_mistakes(
    pyvmctl: Pyvmctl, chain: bytes, words: tuple[str, ...], status: int, complaint: str
) -> None:
    """Nothing is changed."""
    pyvmctl("create", "-b", "a.qcow2", "over.qcow2")
    assert pyvmctl("image", "rebase", *words) == status
    assert complaint in pyvmctl.err
    assert content("a.qcow2") == chain
    sound("a.qcow2")


def test_rebase_onto_a_chain_that_is_long_enough(pyvmctl: Pyvmctl) -> None:
    """No chain is made that could not be used."""
    pyvmctl("create", "-s", "1M", "0.qcow2")
    for index in range(1, 16):
        pyvmctl("create", "-b", f"{index - 1}.qcow2", f"{index}.qcow2")
    pyvmctl("create", "-s", "1M", "a.qcow2")

    assert pyvmctl("image", "rebase", "-b", "15.qcow2", "a.qcow2") == 2
    assert "a.qcow2: more than 16 images in a chain" in pyvmctl.err
    assert pyvmctl("image", "rebase", "-b", "14.qcow2", "a.qcow2") == 0


def test_an_interrupted_rebase(
    pyvmctl: Pyvmctl, monkeypatch: pytest.MonkeyPatch, chain: bytes
) -> None:
    """The image stands where it stood, is sound, and reads as before."""
    monkeypatch.setattr(imagecopy, "write", interrupting(imagecopy.write, 2, signal.SIGTERM))

    assert pyvmctl("image", "rebase", "-b", "", "a.qcow2") == 128 + signal.SIGTERM

    assert "stopped by SIGTERM" in pyvmctl.err
    assert qemu_info("a.qcow2")["backing-filename"] == "b.qcow2"
    assert content("a.qcow2") == chain
    sound("a.qcow2")
