"""The guest's vmmci module: it compiles without a word, and fits the device."""

from __future__ import annotations

import os
import shutil

import pytest

from devices.spec import SPECS, Block, Legacy
from tools.guest import kernel, module


def modules() -> str:
    """Return the module directory of a kernel whose headers are installed, or skip."""
    try:
        found = "/lib/modules/" + kernel.newest_kernel().partition("vmlinuz-")[2]
    except kernel.GuestImageError as err:
        pytest.skip(str(err))
    for tool in ("gcc", "make", "strip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (tools/setup)")
    if not os.path.isdir(f"{found}/build"):
        pytest.skip("linux-headers-amd64 is not installed (tools/setup)")
    return found


def test_it_builds_without_warnings() -> None:
    """Against Debian's headers, with the kernel's extra warnings as errors."""
    built = module.build(modules())
    assert built.startswith(b"\x7fELF")
    assert b"alias=pci:v00000B5Dd00000777sv*sd*bc*sc*i*" in built
    assert b"license=Dual BSD/GPL" in built


def test_its_registers_are_the_devices() -> None:
    """Ids and offsets in the C source are those of the device."""
    with open(module.SOURCES[0], encoding="utf-8") as file:
        found = dict(
            line.split()[1:3]
            for line in file
            if line.startswith("#define") and len(line.split()) > 2
        )
    spec = SPECS["vmmci"]
    assert int(found["VMMCI_VENDOR"], 16) == spec.vendor
    assert int(found["VMMCI_DEVICE"], 16) == spec.transitional_id
    device = int(Legacy.DEVICE)
    wanted = {
        "REG_STATUS": int(Legacy.DEVICE_STATUS),
        "REG_ISR": int(Legacy.ISR),
        "REG_COMMAND": device,
        "REG_SECONDS": device + 4,
        "REG_SECONDS_HIGH": device + 8,
        "REG_MICROSECONDS": device + 12,
        "REG_END": device + spec.config_length,
    }
    assert {name: int(found[name]) for name in wanted} == wanted
    assert Block.LEGACY >= 0x1000  # so that no guest reaches the registers below it


def test_headers_that_are_missing_are_named(tmp_path: os.PathLike[str]) -> None:
    """The remedy is in the error."""
    with pytest.raises(kernel.GuestImageError, match="linux-headers-amd64"):
        module.build(str(tmp_path))
