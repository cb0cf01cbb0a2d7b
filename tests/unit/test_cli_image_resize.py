"""pyvmctl image resize, judged by QEMU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.unit.image_lab import (
    MIB,
    allocated,
    content,
    fill,
    needs_qemu_img,
    nobody_left,
    pattern,
    qcow2,
    qemu_img,
    qemu_info,
    raw,
    sound,
)
from tests.unit.test_cli_image import vm_with

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl

pytestmark = [needs_qemu_img, pytest.mark.usefixtures("here")]

AREAS = ((0, 65536, 1), (200_704, 4096, 2), (5 * MIB, 512, 3), (9 * MIB, MIB, 4))


# resize


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_resize_grows(pyvmctl: Pyvmctl, kind: str) -> None:
    """To a size, or by one; what is there stays, what is new reads as zeroes."""
    name = f"a.{kind}"
    qemu_img("create", "-q", "-f", kind, name, "10M")
    fill(name, *AREAS, kind=kind)

    assert pyvmctl("image", "resize", name, "12M") == 0
    assert pyvmctl.err == f"{name}: 12M\n"
    assert pyvmctl("image", "resize", "--json", name, "+2G") == 0
    size = 2 * 1024 * MIB + 12 * MIB
    assert json.loads(pyvmctl.out) == {
        "path": name, "format": kind, "size": size, "before": 12 * MIB
    }  # fmt: skip

    assert qemu_info(name)["virtual-size"] == size
    assert pyvmctl("image", "resize", "-q", "--shrink", name, "11M") == 0
    assert content(name, kind) == pattern(11 * MIB, *AREAS)


def test_a_grown_overlay_does_not_show_more_of_its_base(pyvmctl: Pyvmctl) -> None:
    """What the base has behind the overlay's end was cut off, and comes back as zeroes."""
    raw("base.raw", 10 * MIB)
    fill("base.raw", (0, 10 * MIB, 7), kind="raw")
    pyvmctl("create", "-b", "base.raw", "-s", "3M", "a.qcow2")

    assert pyvmctl("image", "resize", "a.qcow2", "8M") == 0

    assert content("a.qcow2") == pattern(8 * MIB, (0, 3 * MIB, 7))
    sound("a.qcow2")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_shrinking_has_to_be_meant(pyvmctl: Pyvmctl, kind: str) -> None:
    """Without --shrink nothing is lost."""
    name = f"a.{kind}"
    qemu_img("create", "-q", "-f", kind, name, "10M")

    assert pyvmctl("image", "resize", name, "5M") == 2
    assert "has 10M, and what is behind 5M would be lost (--shrink cuts it)" in pyvmctl.err
    assert qemu_info(name)["virtual-size"] == 10 * MIB
    assert pyvmctl("image", "resize", name, "10M") == 0


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_shrinking(pyvmctl: Pyvmctl, here: Path, kind: str) -> None:
    """What is left reads as before; a qcow2 image keeps its shape, mode and base."""
    name = f"a.{kind}"
    options = ("-o", "cluster_size=4k,compat=0.10") if kind == "qcow2" else ()
    qemu_img("create", "-q", "-f", kind, *options, name, "10M")
    fill(name, *AREAS, kind=kind)
    (here / name).chmod(0o644)
    size = 5 * MIB + 512

    assert pyvmctl("image", "resize", "--shrink", name, str(size)) == 0

    assert content(name, kind) == pattern(10 * MIB, *AREAS)[:size]
    assert (here / name).stat().st_mode & 0o777 == 0o644
    nobody_left(here, name)
    if kind == "qcow2":
        assert qemu_info(name)["cluster-size"] == 4096
        assert qemu_info(name)["format-specific"]["data"]["compat"] == "0.10"
        sound(name)


def test_shrinking_an_overlay(pyvmctl: Pyvmctl, chain: bytes) -> None:
    """It stays one: what it does not hold itself comes from its base still."""
    before = allocated("a.qcow2")

    assert pyvmctl("image", "resize", "--shrink", "a.qcow2", "9M") == 0

    assert content("a.qcow2") == chain[: 9 * MIB]
    assert qemu_info("a.qcow2")["backing-filename"] == "b.qcow2"
    assert allocated("a.qcow2") <= before
    sound("a.qcow2")


def test_shrinking_keeps_zeroes_over_a_base(pyvmctl: Pyvmctl) -> None:
    """What the overlay says is zero stays zero, though the base has data there."""
    raw("base.raw", 4 * MIB)
    fill("base.raw", (0, 4 * MIB, 7), kind="raw")
    pyvmctl("create", "-b", "base.raw", "a.qcow2")
    fill("a.qcow2", (MIB, MIB, 0))

    assert pyvmctl("image", "resize", "--shrink", "a.qcow2", "3M") == 0

    assert content("a.qcow2") == pattern(3 * MIB, (0, 3 * MIB, 7), (MIB, MIB, 0))
    sound("a.qcow2")


def test_shrinking_would_lose_snapshots(pyvmctl: Pyvmctl) -> None:
    """Then it is refused, with what to do."""
    pyvmctl("create", "-s", "10M", "a.qcow2")
    qemu_img("snapshot", "-c", "one", "a.qcow2")

    assert pyvmctl("image", "resize", "--shrink", "a.qcow2", "5M") == 2
    assert "a.qcow2: its 1 internal snapshots would be lost" in pyvmctl.err
    assert "one" in qemu_img("snapshot", "-l", "a.qcow2")


def test_resize_of_an_image_in_use(pyvmctl: Pyvmctl, here: Path) -> None:
    """A VM's disk is resized by its VM."""
    qcow2("a.qcow2")

    with vm_with(here / "a.qcow2"):
        assert pyvmctl("image", "resize", "a.qcow2", "20M") == 1
    assert "in use: VM web" in pyvmctl.err
