"""The ACPI tables: checked by their own rules, by Intel's compiler, and against golden dumps."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from vmm import acpi, aml
from vmm.acpi import AcpiTables
from vmm.pci import INTX_GSIS, intx_gsi

GOLDEN = Path(__file__).with_name("golden")
UPDATE = os.environ.get("PYVMD_UPDATE_GOLDEN") == "1"
BASE = 0xE0000


def build(vcpus: int = 2, base_gpa: int = BASE) -> AcpiTables:
    return acpi.build(vcpus, intx_gsi, base_gpa=base_gpa)


def table(tables: AcpiTables, name: str) -> bytes:
    found = next(item for item in tables.tables if item.name == name)
    return tables.blob[found.offset : found.offset + found.length]


def dump(tables: AcpiTables) -> str:
    """Hexadecimal, a table at a time, so that a diff tells where something changed."""
    lines = []
    for name, offset, length in tables.tables:
        lines.append(f"{name} at {tables.base_gpa + offset:#x}, {length} bytes")
        data = tables.blob[offset : offset + length]
        for at in range(0, length, 16):
            row = data[at : at + 16]
            text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
            lines.append(f"  {at:04x}: {row.hex(' '):<47}  {text}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("vcpus", [1, 4])
def test_golden(vcpus: int) -> None:
    """What guests see changes only on purpose: PYVMD_UPDATE_GOLDEN=1, then read the diff."""
    golden = GOLDEN / f"acpi_{vcpus}.txt"
    text = dump(build(vcpus))
    if UPDATE:
        golden.write_text(text)
    assert golden.read_text() == text, "review with PYVMD_UPDATE_GOLDEN=1 and git diff"


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_checksums(vcpus: int) -> None:
    """Every table sums to 0, and the RSDP does so twice: its first 20 bytes, and all 36."""
    tables = build(vcpus)
    for name, offset, length in tables.tables:
        if name not in {"FACS", "RSDP"}:
            assert sum(tables.blob[offset : offset + length]) & 0xFF == 0, name
            assert table(tables, name)[:4] == name.encode()
            assert unpack_from("<I", tables.blob, offset + 4) == (length,)
    assert sum(tables.blob[:20]) & 0xFF == 0
    assert sum(tables.blob[:36]) & 0xFF == 0


@pytest.mark.parametrize("vcpus", [1, 32])
def test_blob_fits_where_guests_look(vcpus: int) -> None:
    """The RSDP is first, on a 16-byte boundary; all of it lies below 1 MiB; FACS on 64 bytes."""
    tables = build(vcpus)
    assert tables.blob.startswith(b"RSD PTR ")
    assert tables.base_gpa + len(tables.blob) <= 0x100000
    assert all((BASE + item.offset) % 64 == 0 for item in tables.tables)
    ends = [item.offset + item.length for item in tables.tables]
    starts = [item.offset for item in tables.tables]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_pointers_lead_to_the_tables() -> None:
    """From the RSDP every table is reached, by 32-bit and by 64-bit pointers alike."""
    tables = build()
    at = {item.name: BASE + item.offset for item in tables.tables}
    blob = tables.blob

    assert unpack_from("<I", blob, 16) == (at["RSDT"],)
    assert unpack_from("<Q", blob, 24) == (at["XSDT"],)
    described = [at["FACP"], at["APIC"], at["SPCR"]]
    assert list(unpack_from("<3I", table(tables, "RSDT"), 36)) == described
    assert list(unpack_from("<3Q", table(tables, "XSDT"), 36)) == described
    fadt = table(tables, "FACP")
    assert unpack_from("<II", fadt, 36) == (at["FACS"], at["DSDT"])
    # X_FIRMWARE_CTRL must be 0 when FIRMWARE_CTRL is used; X_DSDT may repeat DSDT.
    assert unpack_from("<QQ", fadt, 132) == (0, at["DSDT"])


@pytest.mark.parametrize("base_gpa", [0, 0x7FE0000, 0xE0040])
def test_a_loader_can_move_the_tables(base_gpa: int) -> None:
    """Adding a displacement to every listed pointer and redoing the checksums is all it takes."""
    moved = bytearray(build().blob)
    tables = build()
    for offset, size in tables.pointers:
        value = int.from_bytes(moved[offset : offset + size], "little") - BASE + base_gpa
        moved[offset : offset + size] = value.to_bytes(size, "little")
    for offset, _start, _length in tables.checksums:
        moved[offset] = 0
    for offset, start, length in tables.checksums:
        moved[offset] = -sum(moved[start : start + length]) & 0xFF

    assert bytes(moved) == build(base_gpa=base_gpa).blob


def test_odd_addresses_are_refused() -> None:
    """A base that would break the alignment of FACS is an error of ours, found at once."""
    with pytest.raises(ValueError, match="not a multiple of 64"):
        build(base_gpa=0xE0010)


def subtables(madt: bytes) -> list[bytes]:
    found, at = [], 44
    while at < len(madt):
        found.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    return found


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_madt(vcpus: int) -> None:
    """All processors enabled; one I/O APIC from GSI 0; level overrides; IRQ 0 stays on GSI 0."""
    madt = table(build(vcpus), "APIC")
    assert unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries = subtables(madt)

    cpus = [unpack_from("<BBI", entry, 2) for entry in entries if entry[0] == 0]
    assert cpus == [(n, n, 1) for n in range(vcpus)]
    assert [unpack_from("<BxII", e, 2) for e in entries if e[0] == 1] == [(0, 0xFEC00000, 0)]
    overrides = [unpack_from("<BBIH", entry, 2) for entry in entries if entry[0] == 2]
    gsis = sorted({9, *INTX_GSIS})
    assert overrides == [(0, gsi, gsi, 0x0D) for gsi in gsis]
    assert [unpack_from("<BHB", e, 2) for e in entries if e[0] == 4] == [(0xFF, 0, 1)]


@pytest.mark.parametrize("vcpus", [1, 32])
def test_dsdt_routes_every_slot(vcpus: int) -> None:
    """_PRT names INTA of slots 1 to 31 with the GSI the I/O APIC gets; processors match MADT."""
    dsdt = table(build(vcpus), "DSDT")
    for slot in range(1, 32):
        assert aml.package(slot << 16 | 0xFFFF, 0, 0, intx_gsi(slot)) in dsdt
    assert dsdt.count(b"ACPI0007\0") == vcpus
    assert aml.name("_UID", vcpus - 1) in dsdt


@pytest.mark.parametrize("vcpus", [1, 2, 32])
@pytest.mark.parametrize("name", ["DSDT", "FACP", "FACS", "APIC", "SPCR", "RSDT", "XSDT"])
def test_intels_compiler_reads_what_we_wrote(name: str, vcpus: int, tmp_path: Path) -> None:
    """Each table can be disassembled and compiled back, without remarks, to the same bytes."""
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")
    ours = table(build(vcpus), name)
    (tmp_path / "table.dat").write_bytes(ours)
    for command in (["iasl", "-d", "table.dat"], ["iasl", "-oa", "table.dsl"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "Invalid" not in said
        assert "ncorrect" not in said
    assert "0 Errors, 0 Warnings, 0 Remarks" in said
    theirs = (tmp_path / "table.aml").read_bytes()

    # The compiler signs its work, which changes the checksum; FACS has no header to sign.
    signed = set() if name == "FACS" else {9, *range(28, 36)}
    changed = {at for at in range(len(ours)) if ours[at : at + 1] != theirs[at : at + 1]}
    assert changed <= signed
    assert len(theirs) == len(ours)
