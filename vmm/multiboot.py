"""Multiboot 1: the protocol of GRUB, for small and hand-made kernels (specification 0.6.96).

A kernel shows that it speaks Multiboot by a header in its first 8 KiB, on a 4-byte boundary:
magic, flags, and a checksum that makes the three sum to zero (§3.1.1). It is loaded as ELF, or
as flat bytes by five addresses in that header, "the a.out kludge", so that a kernel needs no
linker that knows a file format (§3.1.3). It starts in flat 32-bit protected mode, paging off,
EAX holding a magic number and EBX the address of the information structure (§3.2). That, with
all it points at but the command line, lies in one page at START_INFO:

    0x6000  multiboot_info                                                 116 bytes
            one module entry, for the initrd                                16 bytes
            the memory map                                                  24 bytes a line
            strings: boot loader name, name of the module
"""

from __future__ import annotations

import os.path
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm import elf
from vmm.loader import CMDLINE_SPACE, E820_RAM, FOUR_GIB, HIGH_MEMORY, KIB, PAGE, START_INFO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.bootfile import Image
    from vmm.loader import E820Range, Entry, Extent, Target

SEARCH: Final = 8 * KIB  # the whole header lies in the first so many bytes
HEADER_MAGIC: Final = b"\x02\xb0\xad\x1b"
BOOT_MAGIC: Final = 0x2BADB002  # in EAX
LOADER_NAME: Final = b"pyvmd\0"

_HEADER: Final = Struct("<III")  # magic flags checksum
_ADDRESSES: Final = Struct("<IIIII")  # header_addr load_addr load_end_addr bss_end_addr entry_addr

# Header flags (§3.1.2). Of bits 0-15 a loader must know each one that is set; of the others
# it may ignore what it does not know.
REQUIRED: Final = 0xFFFF
ALIGN_MODULES: Final = 1 << 0  # we always do
WANT_MEMORY: Final = 1 << 1  # we always tell
WANT_VIDEO: Final = 1 << 2  # a wish; the information says that there is no display
HAS_ADDRESSES: Final = 1 << 16
KNOWN: Final = ALIGN_MODULES | WANT_MEMORY | WANT_VIDEO

# Information flags (§3.3): which fields of multiboot_info are valid
INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MEMORY_MAP: Final = 1 << 6
INFO_LOADER_NAME: Final = 1 << 9

# flags mem_lower mem_upper, -boot_device, cmdline mods_count mods_addr, -syms, mmap_length
# mmap_addr, -drives and config_table, boot_loader_name, -apm, VBE, framebuffer
_INFO: Final = Struct("<III 4x III 16x II 12x I 48x")
_MODULE: Final = Struct("<IIII")  # mod_start mod_end string reserved
_MEMORY_MAP: Final = Struct("<IQQI")  # size of the rest, base_addr length type (as in e820)

MODULE: Final = START_INFO + _INFO.size
MEMORY_MAP: Final = MODULE + _MODULE.size


class Header(NamedTuple):
    """A Multiboot header whose checksum is right; the addresses only with HAS_ADDRESSES."""

    offset: int  # in the file
    flags: int
    header_addr: int
    load_addr: int
    load_end_addr: int  # 0: the end of the file
    bss_end_addr: int  # 0: no bss
    entry_addr: int


def find(head: bytes) -> Header | None:
    """Return the first valid header in the first bytes of a file, of which SEARCH count."""
    head = head[:SEARCH]
    at = head.find(HEADER_MAGIC)
    while at >= 0:
        if at % 4 == 0 and at + _HEADER.size <= len(head):
            header = _header_at(head, at)
            if header is not None:
                return header
        at = head.find(HEADER_MAGIC, at + 1)
    return None


def load(target: Target, image: Image, header: Header) -> Entry:
    """Load a kernel that has `header` and start it. Raises ConfigError."""
    unknown = header.flags & REQUIRED & ~KNOWN
    if unknown:
        bits = ", ".join(f"bit {bit}" for bit in range(16) if unknown >> bit & 1)
        raise image.wrong(f"its Multiboot header requires what pyvmd does not have: {bits}")
    # Where both forms are there, the header's addresses win over ELF's (§3.1.2, bit 16).
    entry = _load_flat(target, image, header)
    if entry is None:
        entry = _load_elf(target, image)
    cmdline = target.put_cmdline(CMDLINE_SPACE - 1, image)
    # Behind the kernel, not at the end of RAM: small kernels map no more than they see there.
    module = target.put_module()
    name = os.path.basename(target.initrd.path) if target.initrd else ""
    target.put(START_INFO, _information(target.e820, cmdline, module, name), "the start info")
    return target.start_protected(entry, ("rax", BOOT_MAGIC), ("rbx", START_INFO))


def _header_at(head: bytes, at: int) -> Header | None:
    magic, flags, checksum = _HEADER.unpack_from(head, at)
    if (magic + flags + checksum) % FOUR_GIB:
        return None
    if not flags & HAS_ADDRESSES:
        return Header(at, flags, 0, 0, 0, 0, 0)
    if at + _HEADER.size + _ADDRESSES.size > len(head):
        return None
    return Header(at, flags, *_ADDRESSES.unpack_from(head, at + _HEADER.size))


def _load_flat(target: Target, image: Image, header: Header) -> int | None:
    """Load by the addresses in the header and return the entry; None if it has none."""
    if not header.flags & HAS_ADDRESSES:
        return None
    start, entry = header.load_addr, header.entry_addr
    offset = header.offset - (header.header_addr - start)
    size = (header.load_end_addr - start) if header.load_end_addr else image.size - offset
    end = max(start + size, header.bss_end_addr)
    if not 0 <= offset <= header.offset or size <= 0 or not start <= entry < end:
        raise image.wrong(
            "damaged: the addresses in its Multiboot header contradict each other",
            "load_addr ≤ header_addr, load_addr ≤ entry_addr < the end",
        )
    target.claim(start, end - start, str(image))
    target.fill(start, size, image, offset)
    target.clear(start + size, end - start - size)
    return entry


def _load_elf(target: Target, image: Image) -> int:
    """Load by ELF program headers and return the entry as a physical address."""
    if image.read(0, len(elf.MAGIC)) != elf.MAGIC:
        raise image.wrong(
            "its Multiboot header has no load addresses, and it is not ELF",
            "set bit 16 of the header's flags, or link it as ELF",
        )
    kernel = elf.parse(image)
    entry = kernel.physical_entry()
    if entry is None:
        raise image.wrong(f"its entry point {kernel.entry:#x} is outside its segments")
    elf.load_segments(target, kernel)
    return entry


def _information(e820: Sequence[E820Range], cmdline: int, module: Extent, name: str) -> bytes:
    """Return multiboot_info and what it points at, to be placed at START_INFO (§3.3)."""
    memory_map = b"".join(_MEMORY_MAP.pack(_MEMORY_MAP.size - 4, *area) for area in e820)
    loader_name = MEMORY_MAP + len(memory_map)
    module_name = loader_name + len(LOADER_NAME)
    lower, upper = _ram_from(e820, 0), _ram_from(e820, HIGH_MEMORY)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME
    info = _INFO.pack(
        flags,
        lower // KIB,
        upper // KIB,
        cmdline,
        1 if module.size else 0,
        MODULE,
        len(memory_map),
        MEMORY_MAP,
        loader_name,
    )
    entry = _MODULE.pack(module.gpa, module.gpa + module.size, module_name, 0)
    data = info + entry + memory_map + LOADER_NAME + os.fsencode(name)
    return data[: PAGE - 1] + b"\0"


def _ram_from(e820: Sequence[E820Range], start: int) -> int:
    """Return how many bytes of RAM follow `start` without a hole, below 4 GiB."""
    for area in e820:
        if area.type == E820_RAM and area.start <= start < area.start + area.size:
            return min(area.start + area.size, FOUR_GIB) - start
    return 0
