"""What fw_cfg tells SeaBIOS: memory, processors, ACPI tables, what to boot from.

Formats are those of QEMU's pc machine; which of its items SeaBIOS reads is in src/fw/paravirt.c,
src/fw/romfile_loader.c and src/boot.c there. Items that are not here read as zeros, which stand
for what we want: no boot menu to wait for, no NUMA, IRQ 0 on GSI 0.
"""

from __future__ import annotations

from struct import Struct, pack
from typing import TYPE_CHECKING, Final

from devices.spec import SPECS, VIRTIO_VENDOR
from vmm import acpi
from vmm.loader import E820_RAM, E820_RESERVED
from vmm.memory import ABOVE_4G, PCI_WINDOW_END, split
from vmm.pcifunc import Header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.acpi import AcpiTables
    from vmm.pci import PciBus

# Old items (QEMU include/standard-headers/linux/qemu_fw_cfg.h), 16 bits each.
NOGRAPHIC: Final = 0x0004  # 1: print on COM1, as there is no screen
NB_CPUS: Final = 0x0005
MAX_CPUS: Final = 0x000F

NEVER: Final = 0xFFFFFFFF  # do not reset when there is nothing to boot

_E820: Final = Struct("<QQI")  # start, size, type

# The loader's script: 128 bytes each, the command first (src/fw/romfile_loader.h).
_COMMAND_SIZE: Final = 128
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_HIGH, _FSEG = 1, 2  # zones: anywhere below 4 GiB, or where an RSDP is looked for
_ALIGN_RSDP: Final = 16

TABLES_FILE: Final = "etc/acpi/tables"
RSDP_FILE: Final = "etc/acpi/rsdp"

# Open Firmware's name of what boots from a virtio device, by its virtio id (virtio 1.2 §5).
# SeaBIOS compares slots, targets and units, and takes any word for the rest.
_NET, _DISK, _SCSI = 1, SPECS["vioblk"].virtio_id, 8
_PATHS: Final = {
    "disk": (_DISK, "scsi@{:x}/disk@0,0"),
    "cdrom": (_SCSI, "scsi@{:x}/channel@0/disk@0,0"),
    "net": (_NET, "ethernet@{:x}/ethernet-phy@0"),
}


def items(vcpus: int) -> dict[int, bytes]:
    """Return the old items."""
    return {
        NOGRAPHIC: pack("<H", 1),
        NB_CPUS: pack("<H", vcpus),
        MAX_CPUS: pack("<H", vcpus),
    }


def files(memory: int, tables: AcpiTables, order: Sequence[str], pci: PciBus) -> dict[str, bytes]:
    """Return every file by its name. `memory` is in bytes; `order` as in vm.yaml, may be ()."""
    made = {
        "etc/e820": e820(memory),
        "etc/boot-fail-wait": pack("<I", NEVER),
        "etc/screen-and-debug": pack("<I", 0),  # the debug console need not repeat the screen
        **acpi_files(tables),
    }
    if order:
        made["bootorder"] = bootorder(order, pci)
    return made


def e820(memory: int) -> bytes:
    """Return the memory map: SeaBIOS itself cuts out what it takes below 1 MiB."""
    low, high = split(memory)
    ranges = [
        (0, low, E820_RAM),
        (PCI_WINDOW_END, ABOVE_4G - PCI_WINDOW_END, E820_RESERVED),
        (ABOVE_4G, high, E820_RAM),
    ]
    return b"".join(_E820.pack(*item) for item in ranges if item[1])


def bootorder(order: Iterable[str], pci: PciBus) -> bytes:
    """Return device paths, first to last. HALT at the end: nothing else is tried."""
    lines = []
    for what in order:
        virtio_id, path = _PATHS[what]
        for slot, function in pci.functions():
            ids = [function.read(*field.value[:2]) for field in (Header.VENDOR, Header.SUBSYSTEM)]
            if ids == [VIRTIO_VENDOR, virtio_id]:
                lines.append("/pci@i0cf8/" + path.format(slot))
    return "\n".join([*lines, "HALT"]).encode() + b"\0"


def acpi_files(tables: AcpiTables) -> dict[str, bytes]:
    """Return the tables, the RSDP, and the script that puts them anywhere in memory.

    Pointers hold offsets into the file they point to; the loader adds where that file is, and
    then redoes the checksums. `tables` was built for address 0.
    """
    if tables.base_gpa:
        raise ValueError("tables for a loader begin at address 0")
    blob = bytearray(tables.blob)
    script = [
        _command(_ALLOCATE, pack("<56sIB", RSDP_FILE.encode(), _ALIGN_RSDP, _FSEG)),
        _command(_ALLOCATE, pack("<56sIB", TABLES_FILE.encode(), acpi.TABLES, _HIGH)),
    ]
    for offset, size in tables.pointers:
        target = int.from_bytes(blob[offset : offset + size], "little") - acpi.TABLES
        blob[offset : offset + size] = target.to_bytes(size, "little")
        name, at = _place(offset)
        fields = pack("<56s56sIB", name, TABLES_FILE.encode(), at, size)
        script.append(_command(_ADD_POINTER, fields))
    for offset, start, length in tables.checksums:
        name, at = _place(offset)
        fields = pack("<56sIII", name, at, _place(start)[1], length)
        script.append(_command(_ADD_CHECKSUM, fields))
    rsdp = next(table for table in tables.tables if table.name == "RSDP")
    return {
        "etc/table-loader": b"".join(script),
        RSDP_FILE: bytes(blob[: rsdp.length]),
        TABLES_FILE: bytes(blob[acpi.TABLES :]),
    }


def _place(offset: int) -> tuple[bytes, int]:
    """Return which file an offset of the blob is in, and where there."""
    if offset < acpi.TABLES:
        return RSDP_FILE.encode(), offset
    return TABLES_FILE.encode(), offset - acpi.TABLES


def _command(command: int, fields: bytes) -> bytes:
    return (pack("<I", command) + fields).ljust(_COMMAND_SIZE, b"\0")
