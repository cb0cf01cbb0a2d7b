"""vmm.fwfiles: what SeaBIOS is told, read back the way SeaBIOS reads it."""

from __future__ import annotations

import re
from struct import unpack, unpack_from
from typing import TYPE_CHECKING, Any

import pytest

from devices.spec import SPECS, VIRTIO_VENDOR
from vmm import acpi, fwfiles
from vmm.bus import Bus
from vmm.pci import SEABIOS_GSIS, PciBus, intx_gsi
from vmm.pcifunc import PciFunction

if TYPE_CHECKING:
    from vmm.acpi import AcpiTables

MIB, GIB = 1 << 20, 1 << 30
HOLE = 0xF0000000
VIRTIO = {"net": 1, "disk": SPECS["vioblk"].virtio_id, "rng": SPECS["viornd"].virtio_id, "scsi": 8}


def bus(*kinds: str) -> PciBus:
    """Return a bus with such devices, the first in slot 1."""
    made = PciBus(Bus("port"), Bus("address"))
    for kind in kinds:
        if kind == "other":  # somebody else's device whose subsystem id looks like a disk's
            ids: dict[str, Any] = {"subsystem": (0x0B5D, VIRTIO["disk"])}
            made.add(PciFunction("other", 0x8086, 0x100E, 0x020000, **ids))
            continue
        number = VIRTIO[kind]
        made.add(PciFunction(kind, VIRTIO_VENDOR, 0x1040 + number, 0, subsystem=(0x0B5D, number)))
    return made


def seabios_matches(pattern: str, path: str) -> bool:
    """SeaBIOS's own comparison: * is any run without /, and a prefix that ends at a / is enough."""
    words = re.escape(pattern).replace(r"\*", "[^/]*")
    return re.fullmatch(f"{words}(/.*)?", path) is not None


# The memory map.


@pytest.mark.parametrize(
    ("size", "ram"),
    [
        (16 * MIB, [(0, 16 * MIB)]),
        (HOLE, [(0, HOLE)]),
        (HOLE + 4096, [(0, HOLE), (1 << 32, 4096)]),
        (6 * GIB, [(0, HOLE), (1 << 32, 6 * GIB - HOLE)]),
    ],
)
def test_e820(size: int, ram: list[tuple[int, int]]) -> None:
    """All of RAM, below 4 GiB in one piece, since SeaBIOS takes its end for the amount."""
    table = fwfiles.e820(size)
    rows = [unpack_from("<QQI", table, at) for at in range(0, len(table), 20)]
    assert len(table) % 20 == 0
    assert [row[:2] for row in rows if row[2] == 1] == ram
    assert [row for row in rows if row[2] != 1] == [(0xFEC00000, 0x1400000, 2)]


def test_old_items() -> None:
    """Processors that are there and that may be, a console on the serial line; 16 bits each."""
    assert fwfiles.items(3) == {0x0004: b"\1\0", 0x0005: b"\3\0", 0x000F: b"\3\0"}


# Boot order.


def test_bootorder_bytes() -> None:
    """Kinds in the order of vm.yaml, devices of a kind in the order of their slots."""
    pci = bus("rng", "net", "disk", "other", "disk", "scsi")
    assert fwfiles.bootorder(["cdrom", "disk", "net"], pci) == (
        b"/pci@i0cf8/scsi@6/channel@0/disk@0,0\n"
        b"/pci@i0cf8/scsi@3/disk@0,0\n"
        b"/pci@i0cf8/scsi@5/disk@0,0\n"
        b"/pci@i0cf8/ethernet@2/ethernet-phy@0\n"
        b"HALT\0"
    )
    assert fwfiles.bootorder(["disk"], pci).count(b"\n") == 2
    assert fwfiles.bootorder(["cdrom"], bus("rng", "disk")) == b"HALT\0"


def test_bootorder_slots_are_hexadecimal() -> None:
    """Slot 10 is "a"."""
    assert b"/scsi@a/" in fwfiles.bootorder(["disk"], bus(*["rng"] * 9, "disk"))


def test_seabios_finds_its_devices_in_the_list() -> None:
    """The patterns that SeaBIOS makes of a device meet its line and no other's."""
    pci = bus("rng", "net", "disk", "disk", "scsi")
    text = fwfiles.bootorder(["disk", "cdrom"], pci).rstrip(b"\0").decode()
    lines = text.split("\n")
    for pattern, line in (
        ("/pci@i0cf8/*@3", 0),
        ("/pci@i0cf8/*@4", 1),
        ("/pci@i0cf8/*@5/*@0/*@0,0", 2),
        ("HALT", 3),
    ):
        assert [n for n, text in enumerate(lines) if seabios_matches(pattern, text)] == [line]


def test_files() -> None:
    """Without an order there is no bootorder, and the firmware has its own."""
    tables = acpi.build(1, intx_gsi, base_gpa=0)
    names = {
        *("etc/e820", "etc/boot-fail-wait", "etc/screen-and-debug"),
        *("etc/table-loader", "etc/acpi/tables", "etc/acpi/rsdp"),
    }
    made = fwfiles.files(64 * MIB, tables, (), bus("disk"))
    assert set(made) == names
    assert made["etc/boot-fail-wait"] == b"\xff" * 4
    assert made["etc/screen-and-debug"] == bytes(4)
    assert set(fwfiles.files(64 * MIB, tables, ("net",), bus("disk"))) == {*names, "bootorder"}


# ACPI.


def carry_out(files: dict[str, bytes], places: dict[str, int]) -> dict[str, bytearray]:
    """Play the table loader (romfile_loader.c), every entry checked as it does."""
    script, loaded = files["etc/table-loader"], dict[str, bytearray]()
    assert len(script) % 128 == 0

    def word(raw: bytes) -> str:
        assert raw[55] == 0
        return raw.rstrip(b"\0").decode()

    for at in range(0, len(script), 128):
        (command,) = unpack_from("<I", script, at)
        fields = script[at + 4 : at + 128]
        if command == 1:
            name, align, zone = word(fields[:56]), *unpack_from("<IB", fields, 56)
            assert not align & (align - 1)
            assert places[name] % align == 0
            assert zone == (2 if places[name] >= 0xF0000 and places[name] < MIB else 1)
            loaded[name] = bytearray(files[name])
        elif command == 2:
            dest, target = loaded[word(fields[:56])], word(fields[56:112])
            offset, size = unpack_from("<IB", fields, 112)
            assert size in (1, 2, 4, 8)
            assert target in loaded
            value = int.from_bytes(dest[offset : offset + size], "little") + places[target]
            dest[offset : offset + size] = value.to_bytes(size, "little")
        elif command == 3:
            dest = loaded[word(fields[:56])]
            offset, start, length = unpack_from("<III", fields, 56)
            assert start + length <= len(dest)
            dest[offset] = (dest[offset] - sum(dest[start : start + length])) & 0xFF
        else:
            pytest.fail(f"command {command}")
    return loaded


@pytest.mark.parametrize("vcpus", [1, 4, 32])
def test_the_loader_makes_what_direct_boot_gets(vcpus: int) -> None:
    """Tables moved by the script are those built for that place, byte for byte."""

    def build(base: int) -> AcpiTables:
        return acpi.build(vcpus, lambda slot: intx_gsi(slot, SEABIOS_GSIS), base_gpa=base)

    tables, rsdp = 0x3FFC000, 0xF5B40
    places = {"etc/acpi/rsdp": rsdp, "etc/acpi/tables": tables}
    loaded = carry_out(fwfiles.acpi_files(build(0)), places)
    fixed = build(tables - acpi.TABLES).blob
    assert loaded["etc/acpi/tables"] == fixed[acpi.TABLES :]
    assert loaded["etc/acpi/rsdp"] == fixed[:36]


def test_tables_for_a_loader_begin_at_zero() -> None:
    """Else every pointer would be off by where they begin."""
    with pytest.raises(ValueError, match="address 0"):
        fwfiles.acpi_files(acpi.build(1, intx_gsi, base_gpa=0xE0000))


def test_the_script_allocates_first() -> None:
    """A pointer to a file that is not loaded yet would be dropped."""
    script = fwfiles.acpi_files(acpi.build(1, intx_gsi, base_gpa=0))["etc/table-loader"]
    commands = [unpack("<I", script[at : at + 4])[0] for at in range(0, len(script), 128)]
    assert commands == sorted(commands)
    assert commands.count(1) == 2
