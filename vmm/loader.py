"""What the boot loaders share: the guest RAM they fill, and the ways a vCPU can start.

A boot protocol is an agreement on three things: where the kernel's bytes go, which tables the
loader leaves beside them, and what the registers hold at the first instruction. Each of
`linux`, `pvh` and `multiboot` is one such agreement; this module is the ground they stand on.

Low memory at the first instruction (vmd's places where it has one). The guest may overwrite
all of it as soon as it has read what it wants:

    0x00000  real-mode vectors and BIOS data area, left alone
    0x06000  start info: hvm_start_info or the Multiboot information, with its lists  (1 page)
    0x07000  zero page: Linux's struct boot_params                                    (1 page)
    0x0f000  a stack that grows down from 0x10000                                     (1 page)
    0x10000  GDT: null, unused, code, data, TSS                                     (48 bytes)
    0x11000  page tables: PML4, PDPT, four page directories                          (6 pages)
    0x20000  command line, NUL terminated                                    (at most 64 KiB)
    0x30000  free up to 0x9fc00; the kernel and its initrd go to 1 MiB and above
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import GuestMemory
    from vmm.bootfile import Image

KIB: Final = 1 << 10
MIB: Final = 1 << 20
PAGE: Final = 4096
FOUR_GIB: Final = 1 << 32
RAM_LIMIT: Final = 0xF0000000  # no memory size puts RAM between here and 4 GiB (design §7)

START_INFO: Final = 0x6000
ZERO_PAGE: Final = 0x7000
STACK_TOP: Final = 0x10000
GDT: Final = 0x10000
PML4: Final = 0x11000
PDPT: Final = 0x12000
PAGE_DIRECTORIES: Final = 0x13000  # four, one per GiB
CMDLINE: Final = 0x20000
CMDLINE_SPACE: Final = 64 * KIB  # the terminating NUL included
HIGH_MEMORY: Final = MIB

E820_RAM: Final = 1
E820_RESERVED: Final = 2

# Linux fixes the first two selectors (boot.rst, "32-bit" and "64-bit Boot Protocol"); PVH and
# Multiboot leave them to the loader. In the GDT their descriptors are flat: base 0, 4 GiB.
BOOT_CS: Final = 0x10
BOOT_DS: Final = 0x18
BOOT_TSS: Final = 0x20

LONG: Final = "long"
PROTECTED: Final = "protected"
REAL: Final = "real"

_GDT: Final = Struct("<6Q")
_CODE64: Final = 0x00AF9B00_0000FFFF  # present, ring 0, execute/read, L=1
_CODE32: Final = 0x00CF9B00_0000FFFF  # the same with D=1 instead of L
_DATA: Final = 0x00CF9300_0000FFFF  # present, ring 0, read/write
_TSS: Final = 0x00008B00_00000067  # busy, base 0, limit 0x67: what PVH asks for

_TABLE: Final = Struct("<512Q")
_DIRECTORIES: Final = Struct("<2048Q")
_PRESENT_WRITABLE: Final = 0x3
_PAGE_2M: Final = 0x83  # present, writable, PS: this entry maps 2 MiB

_ZEROS: Final = bytes(64 * KIB)


class E820Range(NamedTuple):
    """One line of the memory map given to the guest; `type` as in ACPI 6.5 §15 (E820_*)."""

    start: int
    size: int
    type: int


class Entry(NamedTuple):
    """Where and how vCPU 0 starts; every other general register is 0.

    `mode` is "long" (64-bit, paging on, the first 4 GiB mapped to themselves), "protected"
    (32-bit, paging off) or "real". In the first two CS is BOOT_CS, the other segments are
    BOOT_DS, TR is BOOT_TSS, all flat; interrupts are off; the GDT is in place at `gdt`. "real"
    is a CPU out of reset: CS F000 with base 0xFFFF0000, all other fields of no account.
    """

    mode: str
    rip: int
    regs: tuple[tuple[str, int], ...] = ()  # general registers by their 64-bit names
    cr3: int = 0  # GPA of the PML4 in "long" mode
    gdt: int = 0
    gdt_limit: int = 0  # in bytes, minus one, as GDTR has it


class Extent(NamedTuple):
    """A stretch of guest memory; (0, 0) when there is none."""

    gpa: int
    size: int


class Target:
    """One load in progress: the guest's RAM, and who has taken which part of it.

    Only RAM below 4 GiB is given out, since no protocol here reaches further at its entry.
    Each stretch must be claimed before it is filled, so that nothing a hostile image asks
    for lands outside RAM or on top of something else.
    """

    def __init__(
        self,
        memory: GuestMemory,
        e820: Sequence[E820Range],
        rsdp: int,
        initrd: Image | None,
        cmdline: str,
    ) -> None:
        self.e820, self.rsdp, self.initrd = e820, rsdp, initrd
        self._memory = memory
        self._cmdline = _encode(cmdline)
        self._ram: list[tuple[int, int]] = []  # start, end
        for area in e820:
            for region in memory.regions:  # a view must not cross from one into the next
                start = max(area.start, region.gpa)
                end = min(area.start + area.size, region.gpa + region.size, FOUR_GIB)
                if area.type == E820_RAM and start < end:
                    self._ram.append((start, end))
        self._ram.sort()
        self._taken: list[tuple[int, int, str]] = []  # start, end, whose
        self.ram_end = max((end for _, end in self._ram), default=0)

    def claim(self, gpa: int, size: int, what: str) -> None:
        """Take [gpa, gpa + size) for `what`. Raises ConfigError if it is not RAM, or taken."""
        end = gpa + size
        if not any(start <= gpa and end <= stop for start, stop in self._ram):
            if gpa < HIGH_MEMORY:
                raise ConfigError(
                    f"{what} wants {_span(gpa, size)}, which is not RAM",
                    hint="a kernel for a PC is linked at 1 MiB or above",
                )
            raise self.too_small(f"{what} at {_span(gpa, size)}", end)
        for start, stop, owner in self._taken:
            if gpa < stop and start < end:
                raise ConfigError(
                    f"{what} at {_span(gpa, size)} overlaps {owner} at"
                    f" {_span(start, stop - start)}",
                    hint="link the kernel at 1 MiB or above, its segments apart",
                )
        self._taken.append((gpa, end, what))
        self._taken.sort()

    def lowest(self, size: int, align: int, floor: int) -> int | None:
        """Return the lowest free GPA ≥ `floor` for `size` bytes; `align` is a power of two."""
        for start, stop in self._ram:
            gpa = align_up(max(start, floor), align)
            for taken, end, _ in self._taken:
                if gpa < end and taken < gpa + size:
                    gpa = align_up(end, align)
            if gpa + size <= stop:
                return gpa
        return None

    def highest(self, size: int, align: int, ceiling: int) -> int | None:
        """Return the highest free GPA in high memory whose last byte is below `ceiling`."""
        for start, stop in reversed(self._ram):
            gpa = (min(stop, ceiling) - size) & -align
            for taken, end, _ in reversed(self._taken):
                if gpa < end and taken < gpa + size:
                    gpa = (taken - size) & -align
            if gpa >= max(start, HIGH_MEMORY):
                return gpa
        return None

    def put(self, gpa: int, data: bytes | bytearray, what: str) -> None:
        """Claim a place for `data` and copy it there."""
        self.claim(gpa, len(data), what)
        self._memory.write(gpa, data)

    def fill(self, gpa: int, size: int, image: Image, offset: int) -> None:
        """Read `size` bytes at `offset` of `image` straight into RAM claimed before."""
        with self._memory.view(gpa, size) as view:  # an error's traceback must not pin the RAM
            image.read_into(view, offset)

    def clear(self, gpa: int, size: int) -> None:
        """Zero RAM claimed before; after a guest reset it holds the last guest's bytes."""
        with self._memory.view(gpa, size) as view:
            for at in range(0, size, len(_ZEROS)):
                part = min(len(_ZEROS), size - at)
                view[at : at + part] = _ZEROS[:part]

    def put_cmdline(self, limit: int, kernel: Image) -> int:
        """Place the command line and return its GPA; `limit` is in bytes without the NUL.

        Raises ConfigError if it is longer.
        """
        limit = min(limit, CMDLINE_SPACE - 1)
        if len(self._cmdline) > limit:
            raise ConfigError(
                f"the command line has {len(self._cmdline)} bytes, {kernel} takes at most {limit}",
                hint="shorten boot.cmdline",
            )
        self.put(CMDLINE, self._cmdline + b"\0", "the command line")
        return CMDLINE

    def put_initrd(self, ceiling: int) -> Extent:
        """Place the initrd, if any, as high as RAM and `ceiling` allow, page aligned."""
        image = self.initrd
        if image is None:
            return Extent(0, 0)
        return self._load_initrd(image, self.highest(image.size, PAGE, ceiling), ceiling)

    def put_module(self) -> Extent:
        """Place the initrd, if any, right behind the kernel, page aligned."""
        image = self.initrd
        if image is None:
            return Extent(0, 0)
        return self._load_initrd(image, self.lowest(image.size, PAGE, self._high_end()), FOUR_GIB)

    def _load_initrd(self, image: Image, gpa: int | None, ceiling: int) -> Extent:
        """Fill in the initrd at `gpa`; None says that there was no room below `ceiling`."""
        if gpa is None:
            what = f"{image} ({mib(image.size)})"
            limit = min(ceiling, RAM_LIMIT)
            needed = align_up(self._high_end(), PAGE) + align_up(image.size, PAGE)
            if needed > limit:
                raise ConfigError(
                    f"{what} does not fit between the kernel and {mib(limit)}, where it must end",
                    hint="make the initrd smaller",
                )
            raise self.too_small(what, needed)
        self.claim(gpa, image.size, str(image))
        self.fill(gpa, image.size, image, 0)
        return Extent(gpa, image.size)

    def too_small(self, what: str, end: int) -> ConfigError:
        """Return the error for something that would need RAM up to `end`."""
        if end > RAM_LIMIT:
            return ConfigError(
                f"{what} can never fit: a VM has no RAM from {mib(RAM_LIMIT)} to 4096 MiB",
                hint="the image is damaged, or not for a PC",
            )
        return ConfigError(
            f"{what} does not fit: it needs RAM up to {mib(end)}, the VM's ends at"
            f" {mib(self.ram_end)}",
            hint=f"set memory to at least {-(-end // MIB)}M",
        )

    def start_long(self, rip: int, *regs: tuple[str, int]) -> Entry:
        """Write GDT and page tables; return the entry for 64-bit code at `rip`.

        Four page directories of 512 entries, 2 MiB each, map the first 4 GiB to themselves.
        """
        self.put(GDT, _GDT.pack(0, 0, _CODE64, _DATA, _TSS, 0), "the GDT")
        root = _TABLE.pack(PDPT | _PRESENT_WRITABLE, *[0] * 511)
        first = PAGE_DIRECTORIES | _PRESENT_WRITABLE
        pointers = _TABLE.pack(*range(first, first + 4 * PAGE, PAGE), *[0] * 508)
        leaves = _DIRECTORIES.pack(*range(_PAGE_2M, _PAGE_2M + FOUR_GIB, 2 * MIB))
        self.put(PML4, root + pointers + leaves, "the page tables")
        self.claim(STACK_TOP - PAGE, PAGE, "the stack")
        return Entry(LONG, rip, (*regs, ("rsp", STACK_TOP)), PML4, GDT, _GDT.size - 1)

    def start_protected(self, rip: int, *regs: tuple[str, int]) -> Entry:
        """Write the GDT; return the entry for 32-bit code at `rip`, which brings its stack."""
        self.put(GDT, _GDT.pack(0, 0, _CODE32, _DATA, _TSS, 0), "the GDT")
        return Entry(PROTECTED, rip, regs, 0, GDT, _GDT.size - 1)

    def _high_end(self) -> int:
        """Return the end of what is taken in high memory."""
        return max(HIGH_MEMORY, *(end for _, end, _ in self._taken))


def align_up(value: int, align: int) -> int:
    """Round up to a multiple of `align`, a power of two."""
    return (value + align - 1) & -align


def mib(size: int) -> str:
    """Say a size for people, rounded up: "29.8 MiB", "512 MiB"."""
    tenths = -(-size * 10 // MIB)
    whole, rest = divmod(tenths, 10)
    return f"{whole}.{rest} MiB" if rest else f"{whole} MiB"


def _span(gpa: int, size: int) -> str:
    return f"{gpa:#x}-{gpa + size - 1:#x}"


def _encode(cmdline: str) -> bytes:
    """Return the command line as the guest will read it. Raises ConfigError."""
    try:
        data = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as err:
        raise ConfigError(
            f"boot.cmdline: character {err.start} is not text", hint="remove it"
        ) from err
    if b"\0" in data:
        raise ConfigError(
            f"boot.cmdline: byte {data.index(0)} is NUL, which would end it there",
            hint="remove it",
        )
    return data
