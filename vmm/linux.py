"""Linux by its own boot protocol, entered in 64-bit mode (Documentation/arch/x86/boot.rst).

A bzImage is two programs in one file. The first, up to 32 KiB of real-mode code, asks a BIOS
about the machine; we skip it and answer its questions ourselves. The second is the kernel
proper with its decompressor in front, and that is what we load:

    file    0x000  boot sector; from 0x1f1 on it holds the setup header
            0x200  real-mode code, `setup_sects` sectors
            (setup_sects + 1) * 512   protected-mode code, `syssize` * 16 bytes
    memory  load                      that code; its 64-bit entry is at load + 0x200
            load + init_size          the end of what it needs to unpack itself

The answers go into the *zero page*, struct boot_params: a page of zeros, the setup header
copied to the very offset it has in the file, and around it what the BIOS would have told, for
us the memory map and the RSDP. RSI points at it. Zeros in screen_info mean "no display", so
the kernel leaves VGA alone.

An ELF vmlinux is the kernel without decompressor: segments go where they say, and the entry
expects the same zero page, whose header the loader has to make up.
"""

from __future__ import annotations

from struct import Struct, pack_into, unpack_from
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm import elf
from vmm.loader import HIGH_MEMORY, PAGE, ZERO_PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.bootfile import Image
    from vmm.loader import E820Range, Entry, Target


class Field(NamedTuple):
    """A field of boot_params; where the setup header has it, the offset in the file as well."""

    offset: int
    format: str


# zero-page.rst
ACPI_RSDP_ADDR: Final = Field(0x070, "<Q")
E820_ENTRIES: Final = Field(0x1E8, "<B")
# boot.rst, "The Real-Mode Kernel Header"
SETUP_SECTS: Final = Field(0x1F1, "<B")
SYSSIZE: Final = Field(0x1F4, "<I")  # 16-byte paragraphs
BOOT_FLAG: Final = Field(0x1FE, "<H")
JUMP: Final = Field(0x200, "<B")
JUMP_OFFSET: Final = Field(0x201, "<B")  # the header ends here + 0x202
HEADER: Final = Field(0x202, "<I")
VERSION: Final = Field(0x206, "<H")
TYPE_OF_LOADER: Final = Field(0x210, "<B")
LOADFLAGS: Final = Field(0x211, "<B")
CODE32_START: Final = Field(0x214, "<I")
RAMDISK_IMAGE: Final = Field(0x218, "<I")
RAMDISK_SIZE: Final = Field(0x21C, "<I")
CMD_LINE_PTR: Final = Field(0x228, "<I")
INITRD_ADDR_MAX: Final = Field(0x22C, "<I")  # of its last byte
KERNEL_ALIGNMENT: Final = Field(0x230, "<I")
RELOCATABLE_KERNEL: Final = Field(0x234, "<B")
XLOADFLAGS: Final = Field(0x236, "<H")
CMDLINE_SIZE: Final = Field(0x238, "<I")  # without the NUL
PREF_ADDRESS: Final = Field(0x258, "<Q")
INIT_SIZE: Final = Field(0x260, "<I")

E820_TABLE: Final = 0x2D0
_E820_ENTRY: Final = Struct("<QQI")

HEADER_START: Final = 0x1F1
HEADER_KNOWN: Final = 0x268  # where the header of protocol 2.12 ends
HEADER_ROOM: Final = 0x290  # where boot_params goes on with something else
BOOT_MAGIC: Final = 0xAA55
HEADER_MAGIC: Final = 0x53726448  # "HdrS"
SHORT_JUMP: Final = 0xEB
PROTOCOL_2_12: Final = 0x20C  # the first with xloadflags
LOADED_HIGH: Final = 1
XLF_KERNEL_64: Final = 1
UNREGISTERED_LOADER: Final = 0xFF
ENTRY_64: Final = 0x200
SECTOR: Final = 512

COMMAND_LINE_SIZE: Final = 2048  # x86, the NUL included; a vmlinux has no header to say so
INITRD_MAX: Final = 0x7FFFFFFF  # what every x86-64 bzImage says


class ZeroPage:
    """struct boot_params in the making."""

    def __init__(self, header: bytes = b"") -> None:
        """Start from zeros and, at its place, the setup header of a bzImage."""
        self.page = bytearray(PAGE)
        self.page[HEADER_START : HEADER_START + len(header)] = header

    def get(self, field: Field) -> int:
        """Return a field."""
        value: int = unpack_from(field.format, self.page, field.offset)[0]
        return value

    def set(self, field: Field, value: int) -> None:
        """Store a field; `value` must fit it."""
        pack_into(field.format, self.page, field.offset, value)

    def set_memory_map(self, e820: Sequence[E820Range]) -> None:
        """Store the memory map: our own, far shorter than the 128 lines there is room for."""
        self.set(E820_ENTRIES, len(e820))
        for number, area in enumerate(e820):
            _E820_ENTRY.pack_into(self.page, E820_TABLE + number * _E820_ENTRY.size, *area)


def is_bzimage(head: bytes) -> bool:
    """Tell a Linux image, bzImage or older, from the first bytes of the file."""
    return (
        len(head) >= HEADER.offset + 4
        and unpack_from(BOOT_FLAG.format, head, BOOT_FLAG.offset)[0] == BOOT_MAGIC
        and unpack_from(HEADER.format, head, HEADER.offset)[0] == HEADER_MAGIC
    )


def load_bzimage(target: Target, kernel: Image) -> Entry:
    """Load what is_bzimage() recognised. Raises ConfigError."""
    zero = _read_header(kernel)
    setup_size = ((zero.get(SETUP_SECTS) or 4) + 1) * SECTOR
    size = zero.get(SYSSIZE) * 16
    if size <= ENTRY_64:
        raise kernel.wrong(f"damaged: its header says {size} bytes of kernel", "copy it again")
    needed = max(size, zero.get(INIT_SIZE))
    load = _load_address(target, kernel, zero, needed)
    target.claim(load, needed, str(kernel))
    target.fill(load, size, kernel, setup_size)
    zero.set(CODE32_START, load)
    return _start(target, kernel, zero, load + ENTRY_64)


def load_vmlinux(target: Target, kernel: elf.Elf) -> Entry:
    """Load an x86-64 ELF kernel whose e_entry takes a zero page in RSI. Raises ConfigError."""
    if not kernel.holds(kernel.entry):
        raise kernel.image.wrong(
            f"its entry point {kernel.entry:#x} is not the physical address of anything in it",
            "use the bzImage, or a kernel with CONFIG_PVH",
        )
    elf.load_segments(target, kernel)
    zero = ZeroPage()
    zero.set(BOOT_FLAG, BOOT_MAGIC)
    zero.set(HEADER, HEADER_MAGIC)
    zero.set(VERSION, PROTOCOL_2_12)
    zero.set(CMDLINE_SIZE, COMMAND_LINE_SIZE - 1)
    zero.set(INITRD_ADDR_MAX, INITRD_MAX)
    return _start(target, kernel.image, zero, kernel.entry)


def _read_header(kernel: Image) -> ZeroPage:
    """Return a zero page with the setup header of a bzImage that has a 64-bit entry."""
    zero = ZeroPage(kernel.read(HEADER_START, HEADER_ROOM - HEADER_START))
    version = zero.get(VERSION)
    if version < PROTOCOL_2_12:
        raise kernel.wrong(
            f"32-bit only: its boot protocol is {version >> 8}.{version & 0xFF:02},"
            " and the 64-bit entry came with 2.12 (Linux 3.8)",
            "use a newer amd64 kernel",
        )
    if not zero.get(LOADFLAGS) & LOADED_HIGH:
        raise kernel.wrong("a zImage, for low memory", "use a bzImage")
    if not zero.get(XLOADFLAGS) & XLF_KERNEL_64:
        raise kernel.wrong("32-bit only kernel: it has no 64-bit entry", "use an amd64 kernel")
    end = HEADER.offset + zero.get(JUMP_OFFSET)
    if zero.get(JUMP) != SHORT_JUMP or not HEADER_KNOWN <= end <= HEADER_ROOM:
        raise kernel.wrong("damaged: its setup header has no sensible end", "copy it again")
    zero.page[end:HEADER_ROOM] = bytes(HEADER_ROOM - end)  # code, no longer header
    return zero


def _load_address(target: Target, kernel: Image, zero: ZeroPage, needed: int) -> int:
    """Choose where the protected-mode code goes: at pref_address, or aligned above it.

    Not below it, although a relocatable kernel would allow that: the decompressor moves
    itself up to pref_address all the same, past the end of what we would have reserved.
    """
    preferred = zero.get(PREF_ADDRESS) or HIGH_MEMORY
    if not zero.get(RELOCATABLE_KERNEL):
        return preferred
    align = zero.get(KERNEL_ALIGNMENT)
    if not align or align & (align - 1):
        raise kernel.wrong(f"damaged: kernel_alignment is {align:#x}", "copy it again")
    load = target.lowest(needed, align, max(preferred, HIGH_MEMORY))
    if load is None:
        raise target.too_small(str(kernel), max(preferred, HIGH_MEMORY) + needed)
    return load


def _start(target: Target, kernel: Image, zero: ZeroPage, rip: int) -> Entry:
    """Fill in what a loader has to tell, place it, and enter in 64-bit mode."""
    zero.set(TYPE_OF_LOADER, UNREGISTERED_LOADER)
    zero.set(LOADFLAGS, LOADED_HIGH)  # no CAN_USE_HEAP: the real-mode code does not run
    zero.set(CMD_LINE_PTR, target.put_cmdline(zero.get(CMDLINE_SIZE), kernel))
    initrd = target.put_initrd(zero.get(INITRD_ADDR_MAX) + 1)
    zero.set(RAMDISK_IMAGE, initrd.gpa)
    zero.set(RAMDISK_SIZE, initrd.size)
    zero.set(ACPI_RSDP_ADDR, target.rsdp)
    zero.set_memory_map(target.e820)
    target.put(ZERO_PAGE, zero.page, "the zero page")
    return target.start_long(rip, ("rsi", ZERO_PAGE))
