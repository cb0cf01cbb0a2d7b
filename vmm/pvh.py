"""PVH: the boot protocol of an ELF kernel with a Xen note, used by Linux, FreeBSD and others.

It was made for Xen and needs nothing of it: a note gives a 32-bit entry point, EBX points at
a list of facts. The CPU is in flat protected mode with paging off; a kernel that wants 64 bits
builds its own page tables. The layouts are Xen's public headers elfnote.h and
arch-x86/hvm/start_info.h; all of it lies in one page at START_INFO:

    0x6000  hvm_start_info, version 1                                       56 bytes
            one hvm_modlist_entry, for the initrd                           32 bytes
            hvm_memmap_table_entry, as many as the memory map has lines     24 bytes each
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from vmm import elf
from vmm.linux import COMMAND_LINE_SIZE, INITRD_MAX
from vmm.loader import CMDLINE_SPACE, START_INFO

if TYPE_CHECKING:
    from vmm.loader import Entry, Target

XEN: Final = b"Xen"
LINUX: Final = b"Linux"
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18

START_MAGIC: Final = 0x336EC578  # "xEn3", bit 7 of the E set
VERSION: Final = 1  # the first with a memory map

# magic version flags nr_modules, modlist_paddr cmdline_paddr rsdp_paddr memmap_paddr,
# memmap_entries reserved
_START_INFO: Final = Struct("<4I4QII")
_MODULE: Final = Struct("<4Q")  # paddr size cmdline_paddr reserved
_MEMMAP: Final = Struct("<QQI4x")  # addr size type; types are those of e820

MODULES: Final = START_INFO + _START_INFO.size
MEMMAP: Final = MODULES + _MODULE.size


def entry_point(kernel: elf.Elf) -> int | None:
    """Return what PHYS32_ENTRY says, or None without that note. Raises ConfigError."""
    for note in kernel.notes():
        if note.name == XEN and note.type == XEN_ELFNOTE_PHYS32_ENTRY:
            entry = int.from_bytes(note.desc, "little")  # 4 bytes, or 8 in 64-bit kernels
            if not kernel.holds(entry):
                raise kernel.image.wrong(
                    f"damaged: its PVH entry {entry:#x} is outside its segments", "copy it again"
                )
            return entry
    return None


def load(target: Target, kernel: elf.Elf, entry: int) -> Entry:
    """Load an ELF kernel and start it at `entry`. Raises ConfigError."""
    elf.load_segments(target, kernel)
    cmdline = target.put_cmdline(_cmdline_limit(kernel), kernel.image)
    initrd = target.put_initrd(INITRD_MAX + 1)
    info = bytearray(
        _START_INFO.pack(
            START_MAGIC,
            VERSION,
            0,
            1 if initrd.size else 0,
            MODULES,
            cmdline,
            target.rsdp,
            MEMMAP,
            len(target.e820),
            0,
        )
    )
    info += _MODULE.pack(initrd.gpa, initrd.size, 0, 0)
    for area in target.e820:
        info += _MEMMAP.pack(*area)
    target.put(START_INFO, info, "the start info")
    return target.start_protected(entry, ("rbx", START_INFO))


def _cmdline_limit(kernel: elf.Elf) -> int:
    """Return how many bytes the kernel takes. PVH has no limit, but Linux cuts in silence."""
    if any(note.name == LINUX for note in kernel.notes()):
        return COMMAND_LINE_SIZE - 1
    return CMDLINE_SPACE - 1
