"""Small kernels of every kind, and a guest to load them into. The tests of vmm.boot use these.

Each builder takes the header fields a test wants to bend; what it returns boots as it stands.
"""

from __future__ import annotations

import os
from struct import Struct, pack, pack_into
from typing import TYPE_CHECKING, NamedTuple

from config.model import BootConfig
from devices.guestmem import GuestMemory, Region
from vmm import boot
from vmm.boot import BootImages, E820Range, Entry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIB = 1 << 20
RSDP = 0xE0000
RESERVED = (0x9FC00, MIB)  # where BIOS data and ACPI tables are: no loader may touch it

_EHDR = {32: Struct("<4sBBB9xHHIIIIIHHHHHH"), 64: Struct("<4sBBB9xHHIQQQIHHHHHH")}


class Guest:
    """RAM of a few MiB on a memfd, with the memory map a guest of pyvmd gets."""

    def __init__(self, size: int = 8 * MIB, above: int = 0) -> None:
        """Make `size` bytes below the hole and `above` bytes from 4 GiB on."""
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size + above)
        high = [Region(1 << 32, above, size)] if above else []
        self.memory = GuestMemory(self.fd, [Region(0, size, 0), *high])
        self.e820 = [
            E820Range(0, RESERVED[0], 1),
            E820Range(RESERVED[0], RESERVED[1] - RESERVED[0], 2),
            E820Range(MIB, size - MIB, 1),
            *([E820Range(1 << 32, above, 1)] if above else []),
        ]

    def fill(self, byte: int) -> None:
        """Set all RAM below 4 GiB to `byte`, as a guest that ran before may have."""
        size = self.memory.regions[0].size
        self.memory.write(0, bytes([byte]) * size)

    def load(self, kernel: bytes, initrd: bytes | None = None, cmdline: str = "") -> Entry:
        """Load images from memory."""
        with images(kernel, initrd, cmdline) as files:
            return boot.load(self.memory, self.e820, files, RSDP)

    def string(self, gpa: int) -> bytes:
        """Return the NUL-terminated string at `gpa`."""
        return self.memory.read(gpa, 0x10000).split(b"\0")[0]

    def words(self, gpa: int, format_: str) -> tuple[int, ...]:
        """Unpack integers at `gpa`."""
        layout = Struct(format_)
        return layout.unpack(self.memory.read(gpa, layout.size))

    def close(self) -> None:
        """Free the RAM."""
        self.memory.close()
        os.close(self.fd)


def images(kernel: bytes, initrd: bytes | None = None, cmdline: str = "") -> BootImages:
    """Return open images with the given contents, named kernel.img and initrd.img."""
    files = [None if data is None else _memfd(data) for data in (kernel, initrd)]
    assert files[0] is not None
    return BootImages(files[0], "kernel.img", files[1], "/srv/initrd.img", cmdline)


def config(kernel: Path | str, initrd: Path | str = "", cmdline: str = "") -> BootConfig:
    """Return the part of vm.yaml that names the files."""
    return BootConfig(kernel=str(kernel), initrd=str(initrd), cmdline=cmdline)


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("image")
    os.write(fd, data)
    return fd


def bzimage(
    payload: bytes = b"\xf4" * 0x400,
    *,
    setup_sects: int = 1,
    version: int = 0x20F,
    loadflags: int = 1,
    xloadflags: int = 1,
    alignment: int = 0x200000,
    relocatable: int = 1,
    pref_address: int = 2 * MIB,
    init_size: int = 3 * MIB,
    cmdline_size: int = 255,
    initrd_addr_max: int = 0x7FFFFFFF,
) -> bytes:
    """Return a bzImage; `payload` is its protected-mode code (boot.rst)."""
    file = bytearray(512 * ((setup_sects or 4) + 1)) + payload
    file[0x1F1] = setup_sects
    pack_into("<I", file, 0x1F4, len(payload) // 16)
    file[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"  # the header ends at 0x26c
    file[0x202:0x206] = b"HdrS"
    pack_into("<H", file, 0x206, version)
    file[0x211] = loadflags
    pack_into("<II", file, 0x22C, initrd_addr_max, alignment)
    pack_into("<BxHI", file, 0x234, relocatable, xloadflags, cmdline_size)
    pack_into("<QI", file, 0x258, pref_address, init_size)
    file[0x26C:0x270] = b"code"  # what follows the header is no part of it
    return bytes(file)


class Part(NamedTuple):
    """A program header and its bytes."""

    data: bytes
    paddr: int = 2 * MIB
    vaddr: int = 2 * MIB
    memsz: int | None = None  # None: as long as data
    type: int = 1  # PT_LOAD
    align: int = 4


def elf(
    parts: Sequence[Part] = (Part(b"\xf4" * 64, memsz=256),),
    *,
    bits: int = 64,
    entry: int = 2 * MIB,
    machine: int | None = None,
    kind: int = 2,
    encoding: int = 1,
) -> bytes:
    """Return an ELF file of these parts, their bytes one after the other."""
    header = _EHDR[bits]
    entry_size = 56 if bits == 64 else 32
    at = header.size + entry_size * len(parts)
    table = body = b""
    for part in parts:
        size = len(part.data)
        memsz = size if part.memsz is None else part.memsz
        offset = at + len(body)
        if bits == 64:
            fields = (part.type, 7, offset, part.vaddr, part.paddr, size, memsz, part.align)
            table += pack("<IIQQQQQQ", *fields)
        else:
            fields = (part.type, offset, part.vaddr, part.paddr, size, memsz, 7, part.align)
            table += pack("<8I", *fields)
        body += part.data
    machine = (62 if bits == 64 else 3) if machine is None else machine
    ident = (b"\x7fELF", bits // 32, encoding, 1)
    rest = (kind, machine, 1, entry, header.size, 0, 0, header.size, entry_size, len(parts))
    return header.pack(*ident, *rest, 0, 0, 0) + table + body


def note(name: bytes, type_: int, desc: bytes, align: int = 4) -> bytes:
    """Return one ELF note."""
    data = pack("<III", len(name) + 1, len(desc), type_) + name + b"\0"
    data += bytes(-len(data) % align) + desc
    return data + bytes(-len(data) % align)


def pvh(
    entry: int = 2 * MIB + 16, *, bits: int = 64, desc_size: int = 8, more: bytes = b""
) -> bytes:
    """Return an ELF kernel with PHYS32_ENTRY among its notes."""
    notes = (
        note(b"Xen", 6, b"linux\0") + more + note(b"Xen", 18, entry.to_bytes(desc_size, "little"))
    )
    code = Part(b"\xf4" * 64, memsz=256)
    return elf([code, Part(notes, type=4)], bits=bits)


def multiboot_header(flags: int = 3, addresses: Sequence[int] = (), checksum: int = 0) -> bytes:
    """Return a header; `checksum` is added to the right one."""
    magic = 0x1BADB002
    sum_ = (checksum - magic - flags) % (1 << 32)
    return pack("<3I", magic, flags, sum_) + pack(f"<{len(addresses)}I", *addresses)


def multiboot_elf(flags: int = 3, *, bits: int = 32, entry: int = 2 * MIB + 12) -> bytes:
    """Return an ELF with a Multiboot header at the start of its code."""
    code = multiboot_header(flags) + b"\xf4" * 52
    return elf([Part(code, vaddr=0xC0200000, memsz=256, align=4)], bits=bits, entry=entry)


def multiboot_flat(
    *,
    before: int = 32,
    load: int = 2 * MIB,
    header: int | None = None,
    load_end: int = 0,
    bss_end: int = 2 * MIB + 0x1000,
    entry: int = 2 * MIB + 64,
    flags: int = 0x10003,
) -> bytes:
    """Return a flat file whose header, `before` bytes into it, has the load addresses."""
    where = load + before if header is None else header
    return (
        b"\xcc" * before
        + multiboot_header(flags, (where, load, load_end, bss_end, entry))
        + b"\xf4" * 68
    )
