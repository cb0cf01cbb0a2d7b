"""qcow2 disks of a real VM: SeaBIOS and a boot sector use them, QEMU looks afterwards."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.guestvm import GuestVm, pyvmctl
from tests.kvm.test_firmware import (
    COUNT,
    FIRST_HARD_DISK,
    boots,
    disk,
    needs_seabios,
    said,
    sector,
)
from tests.unit.image_lab import content, needs_qemu_img, sound

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.kvm, needs_seabios, needs_qemu_img]


def test_a_vm_on_overlays(tmp_path: Path, start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """It boots from a chain, writes to the overlay only, and nobody else may meanwhile."""
    disk(tmp_path / "base.raw", sector("on an overlay, ", FIRST_HARD_DISK + 1))
    disk(tmp_path / "data.raw", b"", b"the second disk\n")
    made: tuple[tuple[str, ...], ...] = (
        ("create", "-b", "base.raw", "middle.qcow2"),
        ("create", "-b", "middle.qcow2", "-o", "cluster-size=4K", "top.qcow2"),
        ("image", "convert", "data.raw", "data.qcow2"),
    )
    for words in made:
        paths = [str(tmp_path / word) if "." in word else word for word in words]
        assert pyvmctl(*paths).returncode == 0
    base = (tmp_path / "base.raw").read_bytes()
    middle = (tmp_path / "middle.qcow2").read_bytes()
    top, data = str(tmp_path / "top.qcow2"), str(tmp_path / "data.qcow2")

    rows = [{"path": path, "format": "qcow2"} for path in (top, data)]
    vm = start_vm(boots(boot={"firmware": "seabios", "order": ["disk"]}, disks=rows))
    vm.console.expect(r"SeaBIOS \(version")
    facts = {row["name"]: row for row in vm.status()["live"]["devices"]}
    assert facts["vioblk0"]["format"] == "qcow2"
    assert facts["vioblk0"]["bases"] == [
        {"path": str(tmp_path / "middle.qcow2"), "format": "qcow2"},
        {"path": str(tmp_path / "base.raw"), "format": "raw"},
    ]
    info = pyvmctl("image", "info", "--json", top)
    assert "VM bios has it open (vioblk0, " in json.loads(info.stdout)["in_use"]
    middle_path = str(tmp_path / "middle.qcow2")
    for words in (("check", top), ("resize", data, "2M"), ("commit", middle_path)):
        refused = pyvmctl("image", *words)
        assert refused.returncode == 1
        assert "in use: VM bios has it open" in refused.stderr
    resized = pyvmctl("disk", "resize", "bios", "1", "3M")
    assert (resized.returncode, resized.stderr) == (0, "bios/vioblk1: 3M\n")

    for _ in range(2):  # it resets once
        vm.console.expect(said("on an overlay, the second disk\n"))
    assert vm.wait() == 0

    assert content(top)[COUNT] == 2
    assert (tmp_path / "base.raw").read_bytes() == base
    assert (tmp_path / "middle.qcow2").read_bytes() == middle
    assert len(content(data)) == 3 << 20
    for path in (top, data):
        sound(path)
    assert pyvmctl("image", "check", top).returncode == 0
