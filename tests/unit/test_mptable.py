"""The MP table, read the way a kernel without ACPI reads it (Intel MP 1.4 §4)."""

from __future__ import annotations

from struct import unpack_from
from typing import NamedTuple

import pytest

from vmm import memory, mptable
from vmm.pci import intx_gsi

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


class Parsed(NamedTuple):
    """The entries, by type."""

    header: bytes
    entries: dict[int, list[bytes]]


def parse(vcpus: int) -> Parsed:
    blob = mptable.build(vcpus, intx_gsi)
    signature, address, length, revision = unpack_from("<4sIBB", blob)
    assert (signature, length, revision) == (b"_MP_", 1, 4)
    assert sum(blob[:16]) & 0xFF == 0
    assert blob[11:16] == bytes(5)  # no default configuration, virtual wire mode

    config = blob[address - mptable.ADDRESS :]
    signature, size, revision = unpack_from("<4sHB", config)
    assert (signature, size, revision) == (b"PCMP", len(config), 4)
    assert sum(config) & 0xFF == 0
    count, apic = unpack_from("<HI", config, 34)
    assert apic == 0xFEE00000
    entries: dict[int, list[bytes]] = {kind: [] for kind in SIZES}
    at = 44
    for _ in range(count):
        kind = config[at]
        entries[kind].append(config[at : at + SIZES[kind]])
        at += SIZES[kind]
    assert at == size
    return Parsed(config[:44], entries)


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_processors(vcpus: int) -> None:
    """All enabled, APIC ids in order, the first one the bootstrap processor."""
    cpus = [unpack_from("<BBB", entry, 1) for entry in parse(vcpus).entries[0]]
    assert cpus == [(n, 0x14, 3 if n == 0 else 1) for n in range(vcpus)]


def test_it_fits_where_it_belongs() -> None:
    """32 processors stay inside the KiB that the memory map reserves; more are refused."""
    assert mptable.ADDRESS == memory.EBDA
    assert mptable.ADDRESS % 16 == 0
    size = len(mptable.build(32, intx_gsi))
    assert mptable.ADDRESS + size <= memory.LOW_RAM_END
    with pytest.raises(ValueError, match="33 processors"):
        mptable.build(33, intx_gsi)


def test_buses_and_io_apic() -> None:
    """PCI bus 0, an ISA bus, and the I/O APIC with the id of the MADT."""
    entries = parse(2).entries
    assert [(e[1], e[2:]) for e in entries[1]] == [(0, b"PCI   "), (1, b"ISA   ")]
    assert [unpack_from("<BBBI", e, 1) for e in entries[2]] == [(0, 0x11, 1, 0xFEC00000)]


def test_interrupts_go_where_acpi_sends_them() -> None:
    """ISA interrupts keep their number; INTA of a slot is its GSI, level and active-high."""
    routes = [unpack_from("<BHBBBB", entry, 1) for entry in parse(2).entries[3]]
    isa = [(0, 0, 1, irq, 0, irq) for irq in (0, 1, 4, 8)]
    pci = [(0, 0x0D, 0, slot << 2, 0, intx_gsi(slot)) for slot in range(1, 32)]
    assert routes == isa + pci


def test_no_pin_serves_both_buses() -> None:
    """An edge-triggered ISA interrupt never shares its pin with a level-triggered PCI one."""
    routes = [unpack_from("<BHBBBB", entry, 1) for entry in parse(1).entries[3]]
    assert not {r[5] for r in routes if r[2] == 1} & {r[5] for r in routes if r[2] == 0}


def test_local_interrupts() -> None:
    """The 8259 comes in on LINT0 and NMI on LINT1, of every processor."""
    local = [unpack_from("<BHBBBB", entry, 1) for entry in parse(2).entries[4]]
    assert local == [(3, 0, 1, 0, 0xFF, 0), (1, 0, 1, 0, 0xFF, 1)]
