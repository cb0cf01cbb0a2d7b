"""Boot through firmware on this host's own KVM: the ROM itself, then SeaBIOS and what it starts.

A KVM that emulates real mode needs 3 s for SeaBIOS and 8 s more for GRUB, so each boot here is
looked at from many sides.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from struct import unpack_from
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.guestvm import GuestVm, pyvmctl
from tests.kvm.lab import GUESTS, lab
from vmm import acpi
from vmm.firmware import installed
from vmm.pci import SEABIOS_GSIS, intx_gsi
from vmm.pcifunc import PciFunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.guestmem import GuestMemory

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(400)]
needs_seabios = pytest.mark.skipif(not installed(), reason="no SeaBIOS (apt-get install seabios)")

KIB, MIB = 1 << 10, 1 << 20
GRUB: Final = Path("/usr/lib/grub/i386-pc")
FIRST_HARD_DISK: Final = 0x80
# Of sector.bin: where its label is, the drive it looks at, and the sector it counts boots in.
LABEL, OTHER, COUNT = 0x1D0, 0x1CF, 2 * 512


def sector(label: str, other: int) -> bytes:
    """Return a boot sector that says `label` and what is in sector 1 of BIOS drive `other`."""
    code = bytearray(Path(GUESTS, "real/sector.bin").read_bytes())
    code[OTHER] = other
    code[LABEL : LABEL + len(label)] = label.encode()
    return bytes(code)


def said(text: str) -> str:
    """Match what a boot sector says: SeaBIOS holds back what it prints, to the last dots of it."""
    return "[.\\n]*".join(map(re.escape, text))


def disk(path: Path, *sectors: bytes) -> dict[str, Any]:
    """Write a disk of 1 MiB that begins with such sectors; return its row of vm.yaml."""
    path.write_bytes(b"".join(data.ljust(512, b"\0") for data in sectors).ljust(MIB, b"\0"))
    return {"path": str(path), "format": "raw"}


def boots(**keys: Any) -> dict[str, Any]:
    """Return a vm.yaml with SeaBIOS; `keys` add to it."""
    return {"name": "bios", "memory": "64M", "boot": {"firmware": "seabios"}, **keys}


# The ROM.


def test_rom(tmp_path: Path) -> None:
    """Execution starts at F000:FFF0; the ROM is read-only, its copy is RAM, fresh after a reset."""
    code = Path(GUESTS, "real/rom.bin").read_bytes()
    image = tmp_path / "rom"
    image.write_bytes(code.ljust(64 * KIB - 16, b"\0") + bytes.fromhex("ea000000f0").ljust(16))
    with lab(firmware=str(image)) as bench:
        bench.run()
        assert bench.lines == ["rom", "rom"]
        assert bench.status == 0x14 << 1 | 1
        assert bench.resets == ["port 0xCF9"]


# What SeaBIOS makes of the machine.


def tables(memory: GuestMemory) -> dict[str, bytes]:
    """Find the RSDP as a guest does, follow it, and return each table; all must sum to 0."""
    area = memory.read(0xF0000, 0x10000)
    at = area.index(b"RSD PTR ")
    assert at % 16 == 0
    rsdp = area[at : at + 36]
    assert not sum(rsdp[:20]) & 0xFF
    assert not sum(rsdp) & 0xFF
    found = {}

    def table(gpa: int) -> bytes:
        data = memory.read(gpa, unpack_from("<I", memory.read(gpa, 8), 4)[0])
        name = data[:4].decode()
        assert name == "FACS" or not sum(data) & 0xFF, name
        found[name] = data
        return data

    roots = table(unpack_from("<I", rsdp, 16)[0]), table(unpack_from("<Q", rsdp, 24)[0])
    pointers = [
        [int.from_bytes(root[at : at + width], "little") for at in range(36, len(root), width)]
        for root, width in zip(roots, (4, 8), strict=True)
    ]
    assert pointers[0] == pointers[1]
    for gpa in pointers[0]:
        table(gpa)
    facs, dsdt = unpack_from("<II", found["FACP"], 36)
    assert unpack_from("<Q", found["FACP"], 140)[0] == dsdt
    table(facs)
    table(dsdt)
    return found


def interrupts(memory: GuestMemory, source_bus: int) -> dict[int, int]:
    """Return the MP table's routes of a bus: interrupt there → pin of the I/O APIC."""
    area = memory.read(0xF0000, 0x10000)
    (header,) = unpack_from("<I", area, area.index(b"_MP_") + 4)
    table = memory.read(header, unpack_from("<4sH", memory.read(header, 6))[1])
    assert not sum(table) & 0xFF
    at, routes = 44, {}
    while at < len(table):
        kind = table[at]
        if kind == 3 and table[at + 4] == source_bus:
            routes[table[at + 5]] = table[at + 7]
        at += 20 if kind == 0 else 8
    return routes


@needs_seabios
def test_what_seabios_finds() -> None:
    """It knows memory, CPUs and interrupts, installs our tables, and says there is no disk."""
    with lab(firmware="seabios", vcpus=2, memory=64 * MIB) as bench:
        for _ in range(5):
            card = PciFunction("card", 0x1234, 0x5678, 0xFF0000)
            card.use_intx(0)
            bench.machine.board.pci.add(card)
        bench.run(until=lambda: b"No bootable device" in bench.serial)
        bench.machine.pause()
        memory = bench.machine.ram.memory
        text = "\n".join(bench.lines)
        assert b"SeaBIOS (version " in bench.serial
        assert "fw_cfg DMA interface supported" in text
        assert "Found 2 cpu(s) max supported 2 cpu(s)" in text
        assert "0000000000100000 - 0000000003ff" in text  # RAM, less its own top
        assert "00000000fec00000 - 0000000100000000 = 2 RESERVED" in text
        assert "PS2 keyboard initialized" in text
        for trouble in ("WARNING", "Timeout", "failed", "pci_slot_get_irq called"):
            assert trouble not in text

        found = tables(memory)
        assert set(found) == {"RSDT", "XSDT", "FACP", "FACS", "DSDT", "APIC", "SPCR"}
        ours = acpi.build(2, lambda slot: intx_gsi(slot, SEABIOS_GSIS), base_gpa=0)
        for name, offset, length in ours.tables:
            if name in {"DSDT", "APIC", "SPCR"}:  # those without pointers are ours byte for byte
                assert found[name] == ours.blob[offset : offset + length]
        pins = {slot << 2: intx_gsi(slot, SEABIOS_GSIS) for slot in range(1, 6)}
        assert interrupts(memory, 0) == pins
        lines = [bench.machine.board.pci.functions()[slot][1].read(0x3C, 1) for slot in range(1, 6)]
        assert lines == list(pins.values())


# What it boots.


@needs_seabios
def test_two_disks_and_a_reset(
    tmp_path: Path, start_vm: Callable[[dict[str, Any]], GuestVm]
) -> None:
    """The first disk boots, both can be read, one be written; a reset goes through it all again."""
    images = [
        disk(tmp_path / "a", sector("the first disk, ", FIRST_HARD_DISK + 1)),
        disk(tmp_path / "b", sector("the wrong disk, ", FIRST_HARD_DISK), b"the second disk\n"),
    ]
    order = {"firmware": "seabios", "order": ["net", "disk"]}
    vm = start_vm(boots(boot=order, disks=images, vcpus=2))
    for _ in range(2):
        vm.console.expect(r"SeaBIOS \(version")
        vm.console.expect(
            "Booting from Hard Disk[.\n]*" + said("the first disk, the second disk\n")
        )
    assert vm.wait() == 0
    assert (tmp_path / "a").read_bytes()[COUNT] == 2
    assert "resets: port 0xCF9" in vm.log()
    assert "guest power-off (ACPI S5)" in vm.log()
    assert "warning" not in vm.log()


@needs_seabios
def test_nothing_to_boot(tmp_path: Path, start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """A disk that the order leaves out is not tried; SeaBIOS says that it is stuck, and stays."""
    image = disk(tmp_path / "a", sector("the wrong disk", 0))
    vm = start_vm(boots(boot={"firmware": "seabios", "order": ["cdrom"]}, disks=[image]))
    vm.console.expect(r"No bootable device\.")
    assert "resets" not in vm.log()
    assert vm.status()["state"] == "running"
    assert pyvmctl("stop", "-f", "bios").returncode == 0


@needs_seabios
@pytest.mark.skipif(
    not (GRUB / "boot.img").exists(), reason="no GRUB (apt-get install grub-pc-bin)"
)
def test_grub(tmp_path: Path, start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """GRUB starts from a disk, reads its own files there, and switches off by ACPI."""
    assert shutil.which("grub-mkimage"), "apt-get install grub-common"
    config, core = tmp_path / "grub.cfg", tmp_path / "core.img"
    config.write_text(
        "serial --unit=0 --speed=115200\nterminal_output serial\necho GRUB is up\nhalt\n"
    )
    command = f"grub-mkimage -O i386-pc -p / -o {core} -c {config}"
    modules = "biosdisk serial terminal echo halt"
    subprocess.run([*command.split(), *modules.split()], check=True)
    image = disk(tmp_path / "disk", (GRUB / "boot.img").read_bytes(), core.read_bytes())
    vm = start_vm(boots(disks=[image]))
    vm.console.expect("GRUB is up")
    assert vm.wait() == 0
    assert "guest power-off (ACPI S5)" in vm.log()


@needs_seabios
@pytest.mark.skipif(not shutil.which("xorriso"), reason="no xorriso (apt-get install xorriso)")
def test_cdrom(tmp_path: Path, start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """The CD-ROM boots, before a disk that could, or after one that is empty; it reads the disk."""
    tree, iso = tmp_path / "tree", tmp_path / "disc.iso"
    tree.mkdir()
    (tree / "boot.bin").write_bytes(sector("the CD-ROM, ", FIRST_HARD_DISK).ljust(2048, b"\0"))
    command = f"xorriso -as mkisofs -quiet -o {iso} -b boot.bin -no-emul-boot -boot-load-size 4"
    subprocess.run([*command.split(), str(tree)], check=True, capture_output=True)
    for order, first, failed in (
        (["cdrom", "disk"], sector("the wrong disk", 0), ""),
        (["disk", "cdrom"], b"", r"Boot failed: not a bootable disk\n\n"),
    ):
        image = disk(tmp_path / "disk", first, b"the disk\n")
        boot = {"firmware": "seabios", "order": order}
        vm = start_vm(boots(boot=boot, disks=[image], cdrom=str(iso)))
        says = "Booting from DVD/CD[.\n]*" + said("the CD-ROM, the disk\nread-only\n")
        text = vm.console.expect(rf"(?s)\A.*{says}").group()
        assert vm.wait() == 0
        assert bool(failed) == bool(re.search(failed or "Boot failed", text))


def test_no_firmware(runtime_dir: str, tmp_path: Path) -> None:
    """What is no firmware fails at start, by one line that names it."""
    image = tmp_path / "disk.img"
    image.write_bytes(sector("x", 0).ljust(MIB, b"\0"))
    file = tmp_path / "vm.yaml"
    file.write_text(f"name: bios\nboot: {{firmware: {image}}}\n")
    done = pyvmctl("start", str(file))
    assert done.returncode == 2
    assert f"firmware {image}: no jump at its reset vector" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [name for name in os.listdir(runtime_dir) if not name.startswith(".")]
