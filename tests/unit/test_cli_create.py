"""pyvmctl create, judged by QEMU."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.unit.image_lab import (
    MIB,
    content,
    fill,
    needs_qemu_img,
    nobody_left,
    pattern,
    qcow2,
    qemu_info,
    raw,
    sound,
)
from tests.unit.test_cli_image import vm_with

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl

pytestmark = [needs_qemu_img, pytest.mark.usefixtures("here")]


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("a.qcow2", "a.qcow2", "qcow2"),
        ("A.QCOW2", "A.QCOW2", "qcow2"),
        ("qcow2:a.img", "a.img", "qcow2"),
        ("a.img", "a.img", "raw"),
        ("a", "a", "raw"),
        ("raw:a.qcow2", "a.qcow2", "raw"),
    ],
)
def test_the_name_says_the_format(
    pyvmctl: Pyvmctl, here: Path, name: str, file: str, kind: str
) -> None:
    """Prefix, else ending, else raw, as with vmctl; nobody else may read the image."""
    assert pyvmctl("create", "-s", "10M", name) == 0

    assert (pyvmctl.out, pyvmctl.err) == ("", f"{kind} imagefile created\n")
    assert qemu_info(file)["format"] == kind
    assert qemu_info(file)["virtual-size"] == 10 * MIB
    assert (here / file).stat().st_mode & 0o777 == 0o600
    nobody_left(here, file)
    if kind == "qcow2":
        sound(file)


@pytest.mark.parametrize("size", ["512", "1T", "63T"])
def test_an_empty_image_takes_hardly_any_space(pyvmctl: Pyvmctl, size: str) -> None:
    """Whatever the size, space comes with the data."""
    for name in ("a.raw", "a.qcow2"):
        if name == "a.raw" and size == "63T":
            continue  # more than ext4 has for a file
        assert pyvmctl("create", "-s", size, name) == 0
        assert os.stat(name).st_blocks * 512 <= 2 * MIB
    sound("a.qcow2")


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (("cluster-size=4K",), "cluster-size", 4096),
        (("cluster_size=2M",), "cluster-size", 2 * MIB),
        (("version=2",), "compat", "0.10"),
        (("refcount-bits=1", "cluster-size=512"), "refcount-bits", 1),
    ],
)
def test_options_of_a_qcow2_image(
    pyvmctl: Pyvmctl, options: tuple[str, ...], field: str, value: object
) -> None:
    """Each is what QEMU then sees."""
    words = [word for option in options for word in ("-o", option)]
    assert pyvmctl("create", "-s", "10M", *words, "a.qcow2") == 0

    facts = qemu_info("a.qcow2")
    assert {**facts, **facts["format-specific"]["data"]}[field] == value
    sound("a.qcow2")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a.qcow2",), "how large? (-s SIZE, -b BASE or -i INPUT)"),
        (("-s", "10M"), "the following arguments are required: IMAGE"),
        (("-s", "0", "a"), "one or more sectors"),
        (("-s", "1000", "a"), "one or more sectors"),
        (("-s", "big", "a"), "not a size"),
        (("-s", "1M", "-b", "x.raw", "-i", "y.raw", "a.qcow2"), "not allowed with argument"),
        (("-s", "1M", "-o", "cluster-size=0", "a.qcow2"), "a.qcow2: cluster size 0: a power"),
        (("-s", "1M", "-o", "cluster-size=3000", "a.qcow2"), "a.qcow2: cluster size 3000: a power"),
        (("-s", "1M", "-o", "version=4", "a.qcow2"), "version 4"),
        (("-s", "1M", "-o", "compress=yes", "a.qcow2"), "expected KEY=VALUE"),
        (("-s", "1M", "-o", "cluster-size", "a.qcow2"), "expected KEY=VALUE"),
        (("-s", "1M", "-o", "cluster-size=x", "a.qcow2"), "-o cluster-size=x: not a size"),
        (("-s", "2P", "-o", "cluster-size=512", "a.qcow2"), "take larger clusters"),
        (("-s", "1M", "-o", "version=2", "a.raw"), "a raw image has no options"),
        (("-b", "base.raw", "a.raw"), "only a qcow2 image can stand on a base"),
        (("-b", "gone.raw", "a.qcow2"), "gone.raw: cannot open: No such file"),
        (("-b", "a.qcow2", "a.qcow2"), "a.qcow2: cannot open: No such file"),
        (("-i", "gone.raw", "a.qcow2"), "gone.raw: cannot open: No such file"),
        (("-i", "base.raw", "-s", "512", "a.raw"), "512 is too small: base.raw has 1M"),
    ],
)
def test_mistakes(pyvmctl: Pyvmctl, here: Path, words: tuple[str, ...], complaint: str) -> None:
    """Status 2, one line, and no file."""
    raw("base.raw")
    assert pyvmctl("create", *words) == 2
    assert complaint in pyvmctl.err
    assert (pyvmctl.out, pyvmctl.err.count("\n")) == ("", 1)
    nobody_left(here, "base.raw")


def test_an_existing_file_is_left_alone(pyvmctl: Pyvmctl, here: Path) -> None:
    """Whatever it is, and even if it is a link to nothing."""
    (here / "a.raw").write_text("mine")
    (here / "b.raw").symlink_to("nothing")

    for name in ("a.raw", "b.raw"):
        assert pyvmctl("create", "-s", "1M", name) == 1
        assert f"{name}: exists already (--force replaces it)" in pyvmctl.err

    assert (here / "a.raw").read_text() == "mine"
    nobody_left(here, "a.raw", "b.raw")


def test_force_replaces(pyvmctl: Pyvmctl, here: Path) -> None:
    """With --force the new image takes the old one's place, name, links and mode."""
    (here / "real.raw").write_text("old")
    (here / "real.raw").chmod(0o644)
    (here / "a.raw").symlink_to("real.raw")

    assert pyvmctl("create", "--force", "-q", "-s", "1M", "a.raw") == 0

    assert (pyvmctl.out, pyvmctl.err) == ("", "")
    assert (here / "a.raw").is_symlink()
    assert (here / "real.raw").stat().st_size == MIB
    assert (here / "real.raw").stat().st_mode & 0o777 == 0o644
    nobody_left(here, "a.raw", "real.raw")


def test_force_does_not_take_a_vms_image(pyvmctl: Pyvmctl, here: Path) -> None:
    """Nor a directory."""
    qcow2("a.qcow2")
    (here / "d").mkdir()
    before = (here / "a.qcow2").read_bytes()

    with vm_with(here / "a.qcow2") as pid:
        assert pyvmctl("create", "--force", "-s", "1M", "a.qcow2") == 1
    assert f"in use: VM web has it open (vioblk0, process {pid})" in pyvmctl.err
    assert (here / "a.qcow2").read_bytes() == before
    assert pyvmctl("create", "--force", "-s", "1M", "d") == 2
    assert "is a directory" in pyvmctl.err


def test_a_place_that_is_none(pyvmctl: Pyvmctl) -> None:
    """The directory must be there."""
    assert pyvmctl("create", "-s", "1M", "no/a.raw") == 1
    assert "no/a.raw: cannot make it: No such file or directory" in pyvmctl.err


def test_names_that_need_care(pyvmctl: Pyvmctl, here: Path) -> None:
    """Names like options, names that are not UTF-8."""
    odd = os.fsdecode(b"\xff.qcow2")
    assert pyvmctl("create", "-s", "1M", "--", "-s") == 0
    assert pyvmctl("create", "-s", "1M", odd) == 0
    assert pyvmctl("create", "-b", odd, "a.qcow2") == 0

    nobody_left(here, "-s", odd, "a.qcow2")
    assert pyvmctl("image", "info", "--json", "a.qcow2") == 0
    facts = json.loads(pyvmctl.out)
    assert facts["broken"] is None
    assert os.fsencode(facts["bases"][0]["path"]) == b"\xff.qcow2"


# Bases


def test_an_overlay(pyvmctl: Pyvmctl) -> None:
    """It has the base's size, names base and format, and reads as the base does."""
    areas = [(0, 65536, 7), (3 * MIB, 100, 8)]
    pyvmctl("create", "-s", "10M", "base.qcow2")
    fill("base.qcow2", *areas)

    assert pyvmctl("create", "--json", "-b", "base.qcow2", "a.qcow2") == 0

    assert json.loads(pyvmctl.out) == {
        "path": "a.qcow2",
        "format": "qcow2",
        "size": 10 * MIB,
        "base": "base.qcow2",
        "base_format": "qcow2",
    }
    facts = qemu_info("a.qcow2")
    assert facts["backing-filename"] == "base.qcow2"
    assert facts["backing-filename-format"] == "qcow2"
    assert content("a.qcow2") == pattern(10 * MIB, *areas)
    sound("a.qcow2")


@pytest.mark.parametrize(("size", "given"), [(512, "512"), (20 * MIB, "20M"), (MIB, None)])
def test_an_overlay_may_have_another_size(pyvmctl: Pyvmctl, size: int, given: str | None) -> None:
    """Smaller or larger than its base; a base that is no whole sector is rounded up."""
    raw("base.raw", MIB - (100 if given is None else 0), b"x" * 1000)

    words = ("-s", given) if given else ()
    assert pyvmctl("create", *words, "-b", "base.raw", "a.qcow2") == 0

    assert qemu_info("a.qcow2")["virtual-size"] == size
    assert content("a.qcow2") == (b"x" * 1000).ljust(size, b"\0")[:size]


@pytest.mark.parametrize(
    ("base", "image", "written"),
    [
        ("base.raw", "a.qcow2", "base.raw"),
        ("base.raw", "sub/a.qcow2", "../base.raw"),
        ("sub/../base.raw", "a.qcow2", "base.raw"),
        ("{}/base.raw", "sub/a.qcow2", "{}/base.raw"),
        ("base.raw", "{}/sub/a.qcow2", "../base.raw"),
        ("./b:c.raw", "a.qcow2", "./b:c.raw"),
        ("base.raw", "link/a.qcow2", "{}/base.raw"),
    ],
)
def test_how_a_base_is_named(
    pyvmctl: Pyvmctl, here: Path, base: str, image: str, written: str
) -> None:
    """BASE is a path like any other; in the image it is relative to the image, and leads there."""
    (here / "sub").mkdir()
    (here / "sub" / "deep").mkdir()
    (here / "link").symlink_to("sub/deep")
    raw("base.raw")
    raw("b:c.raw")

    assert pyvmctl("create", "-b", base.format(here), image.format(here)) == 0

    facts = qemu_info(image.format(here))
    assert facts["backing-filename"] == written.format(here)
    assert pyvmctl("image", "info", "--json", image.format(here)) == 0
    assert json.loads(pyvmctl.out)["broken"] is None


def test_a_bases_format_is_not_guessed(pyvmctl: Pyvmctl) -> None:
    """What looks like qcow2 has to be called so; what does not is raw."""
    qcow2("base.img")
    raw("plain.img")

    assert pyvmctl("create", "-b", "base.img", "a.qcow2") == 2
    assert "so can a raw one" in pyvmctl.err
    assert pyvmctl("create", "-b", "base.img", "-F", "raw", "a.qcow2") == 0
    assert pyvmctl("create", "-b", "base.img", "-F", "qcow2", "b.qcow2") == 0
    assert pyvmctl("create", "-b", "qcow2:base.img", "c.qcow2") == 0
    assert pyvmctl("create", "-b", "plain.img", "d.qcow2") == 0

    found = [qemu_info(f"{name}.qcow2")["backing-filename-format"] for name in "abcd"]
    assert found == ["raw", "qcow2", "qcow2", "raw"]


def test_a_base_in_use(pyvmctl: Pyvmctl, here: Path) -> None:
    """One that a VM writes to is no base; one that others read is."""
    qcow2("base.qcow2")

    with vm_with(here / "base.qcow2"):
        assert pyvmctl("create", "-b", "base.qcow2", "a.qcow2") == 1
    assert "in use: VM web has it open" in pyvmctl.err
    with vm_with(here / "base.qcow2", readonly=True):
        assert pyvmctl("create", "-b", "base.qcow2", "a.qcow2") == 0


def test_a_chain_that_is_long_enough(pyvmctl: Pyvmctl) -> None:
    """No image is made that could not be used."""
    pyvmctl("create", "-s", "1M", "0.qcow2")
    for index in range(1, 16):
        assert pyvmctl("create", "-b", f"{index - 1}.qcow2", f"{index}.qcow2") == 0

    assert pyvmctl("create", "-b", "15.qcow2", "16.qcow2") == 2
    assert "16.qcow2: more than 16 images in a chain" in pyvmctl.err
    assert not os.path.exists("16.qcow2")


# Input


def test_an_image_made_of_another(pyvmctl: Pyvmctl) -> None:
    """-i converts, and -s makes it larger meanwhile."""
    areas = [(0, 65536, 7), (3 * MIB, 100, 8)]
    raw("in.raw", 5 * MIB)
    fill("in.raw", *areas, kind="raw")

    assert pyvmctl("create", "-i", "in.raw", "-s", "8M", "a.qcow2") == 0

    assert content("a.qcow2") == pattern(8 * MIB, *areas)
    sound("a.qcow2")
