r"""The ACPI tables: how a guest learns of its processors, interrupts, devices and power switch.

    RSDP ─┬─► RSDT ─┐
          └─► XSDT ─┴─► FADT ─┬─► FACS   global lock, wake-up vector
                    ├─► MADT  └─► DSDT   devices, PCI routing, \_S5, in AML
                    └─► SPCR             the serial console

build() lays them out as one blob, addresses and checksums final, and lists every address field
and checksum in it, which is what a firmware's table loader has to redo when it moves them.

The power button is the fixed one of PM1a: a driver needs no AML and no general-purpose event for
it, and the machine has neither.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm import aml, pm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm.aml import Value

OEM_ID: Final = b"PYVMD "
OEM_TABLE_ID: Final = b"PYVMDPC "
CREATOR_ID: Final = b"PYVM"
REVISION: Final = 1  # of our tables' contents

SLOTS: Final = 32
SCI: Final = 9
COM1, COM1_IRQ = 0x3F8, 4
LOCAL_APIC: Final = 0xFEE00000
IO_APIC: Final = 0xFEC00000
# What KVM's I/O APIC holds after a reset. Four bits, so it could not stay clear of 32 vCPUs.
IO_APIC_ID: Final = 0
PCI_MEMORY: Final = (0xF0000000, 0xFEBFFFFF)

HEADER_SIZE: Final = 36
CHECKSUM: Final = 9  # offset in every table with that header
TABLES: Final = 64  # offset of the first table: RSDP rounded up, so that FACS stays aligned

_ACTIVE_HIGH_LEVEL: Final = 0x0D  # MPS INTI flags (ACPI 6.3 §5.2.12.5)


class Table(NamedTuple):
    """One table in the blob."""

    name: str
    offset: int
    length: int


class Pointer(NamedTuple):
    """A field that holds a GPA inside the blob; little-endian, `size` bytes."""

    offset: int
    size: int


class Checksum(NamedTuple):
    """A byte that makes [start, start + length) sum to 0. To be redone in list order."""

    offset: int
    start: int
    length: int


class AcpiTables(NamedTuple):
    """The tables, ready to be placed at `base_gpa`, which is also where the RSDP is.

    Everything from TABLES on may be moved apart from the RSDP by multiples of 64.
    """

    base_gpa: int
    blob: bytes
    tables: tuple[Table, ...]
    pointers: tuple[Pointer, ...]
    checksums: tuple[Checksum, ...]


def build(vcpus: int, intx_gsi: Callable[[int], int], *, base_gpa: int) -> AcpiTables:
    """Build the tables for `vcpus` processors; `intx_gsi(slot)` is the GSI of a slot's INTA.

    `base_gpa` is a multiple of 64, and in 0xE0000–0xFFFC0 if the guest is to find the RSDP.
    """
    blob = _Blob(base_gpa)
    facs = blob.add("FACS", _facs())
    dsdt = blob.add("DSDT", _table(b"DSDT", 2, _dsdt(vcpus, intx_gsi)))
    fadt = blob.add("FACP", _fadt())
    blob.point(fadt + 36, 4, facs)
    blob.point(fadt + 40, 4, dsdt)
    blob.point(fadt + 140, 8, dsdt)
    gsis = {intx_gsi(slot) for slot in range(1, SLOTS)}
    described = (
        fadt,
        blob.add("APIC", _madt(vcpus, sorted({SCI, *gsis}))),
        blob.add("SPCR", _spcr()),
    )
    rsdt = blob.add_root(b"RSDT", 4, described)
    xsdt = blob.add_root(b"XSDT", 8, described)
    blob.add_rsdp(rsdt, xsdt)
    return blob.finish()


class _Blob:
    """Places tables and remembers what depends on where they are."""

    def __init__(self, base_gpa: int) -> None:
        if base_gpa % TABLES:
            raise ValueError(f"ACPI tables at {base_gpa:#x}: not a multiple of {TABLES}")
        self._base = base_gpa
        self._data = bytearray(TABLES)
        self._tables = [Table("RSDP", 0, 36)]
        self._pointers: list[Pointer] = []
        self._checksums: list[Checksum] = []

    def add(self, name: str, data: bytes) -> int:
        """Append a table; returns its offset."""
        self._data += bytes(-len(self._data) % 64)
        offset = len(self._data)
        self._data += data
        self._tables.append(Table(name, offset, len(data)))
        if name != "FACS":  # the one without a checksum: guest and firmware write to it
            self._checksums.append(Checksum(offset + CHECKSUM, offset, len(data)))
        return offset

    def add_root(self, signature: bytes, width: int, tables: Iterable[int]) -> int:
        """Append RSDT or XSDT: pointers to `tables`, each `width` bytes."""
        targets = tuple(tables)
        body = bytes(width * len(targets))
        offset = self.add(signature.decode(), _table(signature, 1, body))
        for at, target in enumerate(targets):
            self.point(offset + HEADER_SIZE + width * at, width, target)
        return offset

    def add_rsdp(self, rsdt: int, xsdt: int) -> None:
        """Fill in the RSDP, revision 2 (§5.2.5.3)."""
        pack_into("<8sB6sB", self._data, 0, b"RSD PTR ", 0, OEM_ID, 2)
        pack_into("<I", self._data, 20, 36)
        self.point(16, 4, rsdt)
        self.point(24, 8, xsdt)
        self._checksums += [Checksum(8, 0, 20), Checksum(32, 0, 36)]

    def point(self, offset: int, size: int, target: int) -> None:
        """Make the field at `offset` point to the table at `target`."""
        self._data[offset : offset + size] = (self._base + target).to_bytes(size, "little")
        self._pointers.append(Pointer(offset, size))

    def finish(self) -> AcpiTables:
        """Set the checksums."""
        for offset, start, length in self._checksums:
            self._data[offset] = -sum(self._data[start : start + length]) & 0xFF
        return AcpiTables(
            self._base,
            bytes(self._data),
            tuple(self._tables),
            tuple(self._pointers),
            tuple(self._checksums),
        )


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the common header (§5.2.6) before `body`."""
    creator = (OEM_ID, OEM_TABLE_ID, REVISION, CREATOR_ID, REVISION)
    return pack("<4sIBB6s8sI4sI", signature, HEADER_SIZE + len(body), revision, 0, *creator) + body


def _io_register(port: int, size: int) -> bytes:
    """Generic Address Structure (§5.2.3.2) of an I/O port, `size` bytes wide, accessed whole."""
    access = {1: 1, 2: 2, 4: 3}[size]
    return pack("<BBBBQ", 1, 8 * size, 0, access, port)


def _facs() -> bytes:
    """FACS version 2 (§5.2.10): nobody sleeps here and nobody holds the global lock."""
    return pack("<4sI24xB31x", b"FACS", 64, 2)


def _fadt() -> bytes:
    """FADT revision 6 (§5.2.9); what is not listed is 0, which means "not there"."""
    table = bytearray(_table(b"FACP", 6, bytes(276 - HEADER_SIZE)))
    for offset, layout, value in (
        (46, "H", SCI),  # SCI_INT
        # SMI_CMD (48) stays 0: the machine is in ACPI mode from the start.
        (56, "I", pm.PM1A_EVT),
        (64, "I", pm.PM1A_CNT),
        (76, "I", pm.PM_TMR),
        (88, "B", 4),  # PM1_EVT_LEN
        (89, "B", 2),  # PM1_CNT_LEN
        (91, "B", 4),  # PM_TMR_LEN
        (96, "H", 0x0FFF),  # P_LVL2_LAT above 100 µs: no C2
        (98, "H", 0x0FFF),  # P_LVL3_LAT above 1000 µs: no C3
        (108, "B", 0x32),  # CENTURY: its place in CMOS memory
        # IAPC_BOOT_ARCH: legacy devices, 8042; no VGA, no PCIe ASPM.
        (109, "H", 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4),
        # Flags: WBINVD works, C1 on every processor, no sleep button, no RTC wake bit in PM1a,
        # reset register. Bit 4 clear: the power button is in PM1a.
        (112, "I", 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10),
        (128, "B", pm.RESET_HARD | pm.RESET_GO),  # RESET_VALUE
    ):
        pack_into("<" + layout, table, offset, value)
    for offset, register in (
        (116, _io_register(pm.RESET_PORT, 1)),  # RESET_REG
        (148, pack("<BBBBQ", 1, 32, 0, 2, pm.PM1A_EVT)),  # X_PM1a_EVT_BLK: two of 16 bits
        (172, _io_register(pm.PM1A_CNT, 2)),  # X_PM1a_CNT_BLK
        (208, _io_register(pm.PM_TMR, 4)),  # X_PM_TMR_BLK
    ):
        table[offset : offset + len(register)] = register
    return bytes(table)


def _madt(vcpus: int, level_gsis: Iterable[int]) -> bytes:
    """MADT (§5.2.12): APIC ids are vCPU numbers; GSIs are ISA interrupts, 0 included."""
    body = pack("<II", LOCAL_APIC, 1)  # PCAT_COMPAT: there are 8259s as well
    for cpu in range(vcpus):
        body += pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += pack("<BBBBII", 1, 12, IO_APIC_ID, 0, IO_APIC, 0)
    for gsi in level_gsis:
        body += pack("<BBBBIH", 2, 10, 0, gsi, gsi, _ACTIVE_HIGH_LEVEL)
    body += pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI on LINT1 of all processors
    return _table(b"APIC", 4, body)


def _spcr() -> bytes:
    """SPCR revision 2: a 16550 at COM1, 115200 8N1, an ANSI terminal."""
    body = pack("<B3x", 0) + _io_register(COM1, 1)
    body += pack("<BBI", 3, COM1_IRQ, COM1_IRQ)  # by 8259 and by I/O APIC
    body += pack("<BBBBBB", 7, 0, 1, 0, 3, 0)  # 115200, no parity, one stop bit, no flow control
    body += pack("<HHBBBIBI", 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0, 0)  # not on PCI
    return _table(b"SPCR", 2, body)


def _dsdt(vcpus: int, intx_gsi: Callable[[int], int]) -> bytes:
    processors = (
        aml.device(f"C{cpu:03X}", aml.name("_HID", "ACPI0007"), aml.name("_UID", cpu))
        for cpu in range(vcpus)
    )
    return aml.name("\\_S5", aml.package(pm.SLP_TYP_S5, pm.SLP_TYP_S5, 0, 0)) + aml.scope(
        "\\_SB",
        *processors,
        _pci(intx_gsi),
        _isa_device("COM1", "PNP0501", 1, aml.io(COM1, 8), aml.irq(COM1_IRQ)),
        _isa_device("RTC", "PNP0B00", 0, aml.io(0x70, 2), aml.irq(8)),
        _isa_device("KBD", "PNP0303", 0, aml.io(0x60, 1), aml.io(0x64, 1), aml.irq(1)),
    )


def _isa_device(path: str, hid: str, uid: int, *where: bytes) -> bytes:
    return aml.device(
        path,
        aml.name("_HID", aml.eisa_id(hid)),
        aml.name("_UID", uid),
        aml.name("_CRS", aml.resources(*where)),
    )


def _pci(intx_gsi: Callable[[int], int]) -> bytes:
    """Return the host bridge: what reaches the bus, and where each slot's INTA goes (§6.2.13)."""
    routes: list[Value] = [
        aml.package(slot << 16 | 0xFFFF, 0, 0, intx_gsi(slot)) for slot in range(1, SLOTS)
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0),
                aml.io(0xCF8, 8),  # configuration ports: the bridge's own
                aml.word_io(0x0000, 0x0CF7),
                aml.word_io(0x0D00, 0xFFFF),
                aml.dword_memory(*PCI_MEMORY),
            ),
        ),
        aml.name("_PRT", aml.package(*routes)),
    )
