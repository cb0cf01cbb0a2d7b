"""vmm.multiboot: headers, flat and ELF loading, and the information structure (0.6.96)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from tests.unit import boot_images as make
from tests.unit.boot_images import MIB
from vmm import multiboot
from vmm.boot import E820Range
from vmm.loader import CMDLINE, START_INFO, Extent

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guest() -> Iterator[make.Guest]:
    it = make.Guest(8 * MIB, above=MIB)
    yield it
    it.close()


# The header (§3.1)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 0xFFFF), st.booleans())
def test_the_header_is_found_on_4_byte_boundaries_only(
    before: bytes, flags: int, addresses: bool
) -> None:
    """A right header is found where its offset is a multiple of 4, else not (§3.1.1)."""
    fields = (1, 2, 3, 4, 5) if addresses else ()
    flags |= 0x10000 if addresses else 0
    data = before + make.multiboot_header(flags, fields)

    header = multiboot.find(data)

    if len(before) % 4:
        assert header is None
    else:
        assert header is not None
        assert header[:2] == (len(before), flags)
        assert header[2:] == (fields or (0,) * 5)


def test_a_false_header_does_not_hide_the_true_one() -> None:
    """The magic number by chance, its checksum wrong, is passed over."""
    false = make.multiboot_header(checksum=1)

    header = multiboot.find(false + false[:4] + make.multiboot_header(2))

    assert header is not None
    assert (header.offset, header.flags) == (16, 2)


@pytest.mark.parametrize(("offset", "found"), [(8192 - 12, True), (8192 - 8, False)])
def test_the_header_lies_in_the_first_8_kib(offset: int, found: bool) -> None:
    """All of the header must be in the first 8192 bytes (§3.1)."""
    assert bool(multiboot.find(bytes(offset) + make.multiboot_header())) == found


@pytest.mark.parametrize(
    ("flags", "bits"), [(0x10008, "bit 3"), (0x18010, "bit 4, bit 15"), (0x1FFFF, "bit 3, bit 4")]
)
def test_required_features_we_lack_are_refused_by_bit(
    guest: make.Guest, flags: int, bits: str
) -> None:
    """Of bits 0-15 a loader must refuse those it does not know (§3.1.2)."""
    with pytest.raises(ConfigError, match=f"requires what pyvmd does not have: {bits}"):
        guest.load(make.multiboot_flat(flags=flags))


@pytest.mark.parametrize("flags", [0x10000, 0x10007, 0xFFFF0003])
def test_other_flags_are_fine(guest: make.Guest, flags: int) -> None:
    """Alignment, memory and video wishes are known; bits 17-31 may be ignored."""
    assert guest.load(make.multiboot_flat(flags=flags)).rip == 2 * MIB + 64


# Flat files (§3.1.3)


def test_a_flat_file_loads_by_its_addresses(guest: make.Guest) -> None:
    """Bytes from load_addr's place in the file on, then zeros up to bss_end_addr."""
    guest.fill(0xFF)
    data = make.multiboot_flat(before=32)

    entry = guest.load(data)

    assert (entry.mode, entry.rip, entry.cr3) == ("protected", 2 * MIB + 64, 0)
    assert dict(entry.regs) == {"rax": 0x2BADB002, "rbx": START_INFO}
    loaded = guest.memory.read(2 * MIB, 0x1001)
    assert loaded == data + bytes(0x1000 - len(data)) + b"\xff"


def test_a_flat_file_may_leave_out_its_head(guest: make.Guest) -> None:
    """load_addr may belong to the header itself: what is before it in the file is not loaded."""
    guest.fill(0xFF)
    data = make.multiboot_flat(before=32, load=3 * MIB, header=3 * MIB, entry=3 * MIB, bss_end=0)

    guest.load(data)

    assert guest.memory.read(3 * MIB, 100) == data[32:]
    assert guest.memory.read(3 * MIB + 100, 1) == b"\xff"  # no bss


def test_load_end_addr_leaves_out_the_tail(guest: make.Guest) -> None:
    """What is behind load_end_addr in the file, symbols perhaps, is not loaded."""
    guest.fill(0xFF)

    guest.load(make.multiboot_flat(load_end=2 * MIB + 70, bss_end=2 * MIB + 72))

    assert guest.memory.read(2 * MIB + 64, 9) == b"\xf4" * 6 + b"\0\0\xff"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": 2 * MIB - 4}, "addresses in its Multiboot header contradict"),
        ({"header": 2 * MIB + 36}, "addresses in its Multiboot header contradict"),
        ({"load_end": 2 * MIB}, "addresses in its Multiboot header contradict"),
        ({"load_end": 1 * MIB}, "addresses in its Multiboot header contradict"),
        ({"entry": 2 * MIB - 1}, "addresses in its Multiboot header contradict"),
        ({"entry": 2 * MIB + 0x1000}, "addresses in its Multiboot header contradict"),
        ({"load_end": 2 * MIB + 133}, r"truncated: it ends before byte 133"),
        ({"bss_end": 9 * MIB}, r"up to 9 MiB, the VM's ends at 8 MiB \(set memory to at least 9M"),
        ({"bss_end": 0xFFFFFFFF}, "can never fit"),
        ({"load": 0xA0000, "entry": 0xA0040, "bss_end": 0}, "which is not RAM"),
        ({"load": 0x6000, "entry": 0x6040, "bss_end": 0}, "the start info at 0x6000.* overlaps ke"),
    ],
)
def test_bad_addresses_are_refused(
    guest: make.Guest, changes: dict[str, int], message: str
) -> None:
    """Addresses that contradict each other, the file or RAM end in ConfigError."""
    with pytest.raises(ConfigError, match=message) as caught:
        guest.load(make.multiboot_flat(**changes))

    assert "kernel kernel.img" in str(caught.value)


def test_no_addresses_and_no_elf_is_refused(guest: make.Guest) -> None:
    """Without bit 16 the file must be ELF; the message names both ways out."""
    with pytest.raises(ConfigError, match=r"no load addresses, and it is not ELF \(set bit 16"):
        guest.load(make.multiboot_header() + b"\xf4" * 100)


# ELF


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("entry", [2 * MIB + 12, 0xC020000C])
def test_an_elf_loads_by_its_program_headers(guest: make.Guest, bits: int, entry: int) -> None:
    """Segments go to p_paddr; a virtual e_entry is translated by its segment."""
    assert guest.load(make.multiboot_elf(bits=bits, entry=entry)).rip == 2 * MIB + 12
    assert guest.memory.read(2 * MIB, 4) == multiboot.HEADER_MAGIC


def test_an_elf_entry_outside_its_segments_is_refused(guest: make.Guest) -> None:
    """An entry that is in no segment, physical or virtual, is refused."""
    with pytest.raises(ConfigError, match="its entry point 0x900000 is outside its segments"):
        guest.load(make.multiboot_elf(entry=9 * MIB))


def test_the_headers_addresses_win_over_elf(guest: make.Guest) -> None:
    """Bit 16 in an ELF file: loaded as flat (§3.1.2)."""
    body = make.multiboot_header(0x10003, (3 * MIB, 3 * MIB, 0, 0, 3 * MIB + 32)) + b"\xf4" * 68

    entry = guest.load(make.elf([make.Part(body)], bits=32))

    assert entry.rip == 3 * MIB + 32
    assert guest.memory.read(3 * MIB, len(body)) == body


# The information (§3.3)


def test_the_information_tells_memory_command_line_and_loader(guest: make.Guest) -> None:
    """Fields that are valid have their flag, all others are zero."""
    guest.fill(0xFF)

    guest.load(make.multiboot_flat(), cmdline="a b")

    info = guest.words(START_INFO, "<29I")
    flags, lower, upper, boot_device, cmdline, modules, _ = info[:7]
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper) == (639, 7 * 1024)  # KiB below the EBDA, and from 1 MiB to the top
    assert (boot_device, modules) == (0, 0)
    assert cmdline == CMDLINE
    assert guest.string(cmdline) == b"a b"
    assert guest.string(info[16]) == b"pyvmd"
    used = {0, 1, 2, 4, 6, 11, 12, 16}
    assert all(word == 0 for at, word in enumerate(info) if at not in used)


def test_the_memory_map(guest: make.Guest) -> None:
    """The map has every line of ours, RAM above 4 GiB too; size counts what follows it."""
    guest.load(make.multiboot_flat())

    length, at = guest.words(START_INFO + 44, "<II")
    lines = []
    end = at + length
    while at < end:
        size, start, count, type_ = guest.words(at, "<IQQI")
        lines.append(E820Range(start, count, type_))
        at += 4 + size
    assert at == end
    assert lines == guest.e820


def test_the_initrd_is_module_0_behind_the_kernel(guest: make.Guest) -> None:
    """The module is whole, page aligned, right behind the kernel's bss, and has a name."""
    initrd = os.urandom(5001)

    guest.load(make.multiboot_flat(), initrd)

    count, table = guest.words(START_INFO + 20, "<II")
    start, end, name, reserved = guest.words(table, "<IIII")
    assert (count, reserved) == (1, 0)
    assert (start, end) == (2 * MIB + 0x1000, 2 * MIB + 0x1000 + 5001)
    assert guest.memory.read(start, 5001) == initrd
    assert guest.string(name) == b"initrd.img"  # not the host's whole path


def test_a_module_that_does_not_fit(guest: make.Guest) -> None:
    """Too large an initrd says how much memory would do."""
    with pytest.raises(ConfigError, match=r"initrd /srv/initrd.img .*set memory to at least 9M"):
        guest.load(make.multiboot_flat(), bytes(6 * MIB))


def test_a_very_long_module_name_is_cut(guest: make.Guest) -> None:
    """A name of any length stays inside the page of the information."""
    name = "n" * 5000
    info = multiboot._information(guest.e820, CMDLINE, Extent(0, 1), name)

    assert len(info) == 4096
    assert info.endswith(b"nnn\0")
