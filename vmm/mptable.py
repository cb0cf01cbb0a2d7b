"""The MP table: processors and interrupt routing for kernels without ACPI (Intel MP 1.4 §4).

Floating pointer and configuration table in one piece, in the last KiB below 640 KiB, which is
where guests look and the memory map says "reserved". 32 processors fit, with four bytes left.
Interrupt lines go where the ACPI tables send them, except the SCI, which needs ACPI anyway.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING, Final

from vmm.acpi import IO_APIC, IO_APIC_ID, LOCAL_APIC, SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable

ADDRESS: Final = 0x9FC00  # GPA of the floating pointer; the table follows it
SIZE_MAX: Final = 0xA0000 - ADDRESS

OEM_ID: Final = b"PYVMD   "
PRODUCT_ID: Final = b"PC          "
SPEC_REVISION: Final = 4  # 1.4

LOCAL_APIC_VERSION: Final = 0x14
IO_APIC_VERSION: Final = 0x11
ENABLED: Final = 1
BOOTSTRAP: Final = 2
CPU_SIGNATURE: Final = 0x600
CPU_FEATURES: Final = 1 << 0 | 1 << 9  # FPU, APIC; the rest is CPUID's

PCI_BUS: Final = 0
ISA_BUS: Final = 1
ISA_IRQS: Final = (0, 1, 4, 8)  # PIT, keyboard, COM1, RTC

INT, NMI, EXTINT = 0, 1, 3  # interrupt types
CONFORMS: Final = 0  # polarity and trigger as the source bus has them
ACTIVE_HIGH_LEVEL: Final = 0x0D
ALL_LOCAL_APICS: Final = 0xFF


def build(vcpus: int, intx_gsi: Callable[[int], int]) -> bytes:
    """Return what belongs at ADDRESS. Raises ValueError if so many processors do not fit."""
    entries = [
        pack(
            "<BBBBII8x",
            0,
            cpu,
            LOCAL_APIC_VERSION,
            ENABLED | (BOOTSTRAP if cpu == 0 else 0),
            CPU_SIGNATURE,
            CPU_FEATURES,
        )
        for cpu in range(vcpus)
    ]
    entries += [
        pack("<BB6s", 1, PCI_BUS, b"PCI   "),
        pack("<BB6s", 1, ISA_BUS, b"ISA   "),
        pack("<BBBBI", 2, IO_APIC_ID, IO_APIC_VERSION, ENABLED, IO_APIC),
    ]
    for irq in ISA_IRQS:
        entries.append(_interrupt(3, INT, CONFORMS, (ISA_BUS, irq), (IO_APIC_ID, irq)))
    for slot in range(1, SLOTS):
        inta = slot << 2  # a PCI source is slot and pin
        gsi = intx_gsi(slot)
        entries.append(_interrupt(3, INT, ACTIVE_HIGH_LEVEL, (PCI_BUS, inta), (IO_APIC_ID, gsi)))
    # The 8259 on LINT0, NMI on LINT1.
    entries.append(_interrupt(4, EXTINT, CONFORMS, (ISA_BUS, 0), (ALL_LOCAL_APICS, 0)))
    entries.append(_interrupt(4, NMI, CONFORMS, (ISA_BUS, 0), (ALL_LOCAL_APICS, 1)))

    body = b"".join(entries)
    header = pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP",
        44 + len(body),
        SPEC_REVISION,
        0,  # checksum, set below
        OEM_ID,
        PRODUCT_ID,
        0,  # no OEM table
        0,
        len(entries),
        LOCAL_APIC,
        0,  # no extended table
        0,
        0,
    )
    # Feature bytes all 0: there is a table, and the 8259 is wired to LINT0 (no IMCR).
    pointer = pack("<4sIBBB5x", b"_MP_", ADDRESS + 16, 1, SPEC_REVISION, 0)
    blob = _with_checksum(pointer, 10) + _with_checksum(header + body, 7)
    if len(blob) > SIZE_MAX:
        raise ValueError(
            f"an MP table for {vcpus} processors has {len(blob)} bytes, over {SIZE_MAX}"
        )
    return blob


def _interrupt(
    entry: int, kind: int, flags: int, source: tuple[int, int], pin: tuple[int, int]
) -> bytes:
    """Route (bus, its interrupt) to (APIC, its pin): entry type 3 to I/O, 4 to local APICs."""
    return pack("<BBHBBBB", entry, kind, flags, *source, *pin)


def _with_checksum(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes((-sum(data) & 0xFF,)) + data[offset + 1 :]
