"""vmm.elf and vmm.pvh: reading ELF as pyelftools does, placing segments, starting by PVH."""

from __future__ import annotations

import glob
import io
import lzma
import os
import sys
from typing import TYPE_CHECKING

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from config.errors import ConfigError
from tests.unit import boot_images as make
from tests.unit.boot_images import MIB
from vmm import boot, bootfile, elf
from vmm.loader import CMDLINE, START_INFO

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guest() -> Iterator[make.Guest]:
    it = make.Guest()
    yield it
    it.close()


@pytest.fixture(scope="module")
def vmlinux() -> bytes:
    """The ELF inside the newest installed bzImage."""
    kernels = sorted(path for path in glob.glob("/boot/vmlinuz-*") if os.access(path, os.R_OK))
    if not kernels:
        pytest.skip("no readable /boot/vmlinuz-*: install linux-image-amd64")
    with open(kernels[-1], "rb") as file:
        image = file.read()
    setup = (image[0x1F1] + 1) * 512
    offset, size = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    payload = image[setup + offset : setup + offset + size]
    if not payload.startswith(b"\xfd7zXZ"):
        pytest.skip(f"{kernels[-1]} is not packed with xz, and Python unpacks no other")
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)


# Reading, with pyelftools as the oracle


def compare(data: bytes) -> elf.Elf:
    """Parse with both, and check that all we keep of the file is the same."""
    file = ELFFile(io.BytesIO(data))
    with make.images(data) as files:
        ours = elf.parse(bootfile.image_of(files.kernel, "file", "kernel"))
        notes = list(ours.notes())
    names = {"PT_LOAD": 1, "PT_NOTE": 4}
    headers = [segment.header for segment in file.iter_segments()]
    kept = ("p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align")
    assert [segment[1:] for segment in ours.segments] == [
        tuple(header[name] for name in kept) for header in headers
    ]
    for segment, header in zip(ours.segments, headers, strict=True):
        if header.p_type in names:
            assert segment.type == names[header.p_type]
    assert ours.entry == file.header.e_entry
    theirs = [
        (note.n_name.encode(), note.n_descdata if hasattr(note, "n_descdata") else note.n_desc)
        for segment in file.iter_segments()
        if isinstance(segment, NoteSegment)
        for note in segment.iter_notes()
    ]
    assert [note.name for note in notes] == [name for name, _ in theirs]
    assert [note.desc for note in notes if note.name == b"Xen"] == [
        desc for name, desc in theirs if name == b"Xen"
    ]
    return ours


@pytest.mark.parametrize(
    "data",
    [
        make.elf(),
        make.elf(bits=32),
        make.pvh(),
        make.pvh(bits=32, desc_size=4),
        make.pvh(more=make.note(b"Linux", 256, b"x") + make.note(b"", 0, b"12345")),
        make.multiboot_elf(),
    ],
)
def test_parse_agrees_with_pyelftools(data: bytes) -> None:
    """Headers, segments and notes of our own small files are read right."""
    compare(data)


def test_parse_agrees_with_pyelftools_on_this_interpreter() -> None:
    """The same for a file from a real linker, with notes of both alignments."""
    with open(os.path.realpath(sys.executable), "rb") as file:
        assert compare(file.read()).machine == elf.EM_X86_64


def test_parse_agrees_with_pyelftools_on_an_installed_kernel(vmlinux: bytes) -> None:
    """The same for a vmlinux, whose notes tell its PVH entry."""
    ours = compare(vmlinux)

    assert len(ours.loads()) >= 3


def test_a_note_with_alignment_8_is_read(guest: make.Guest) -> None:
    """Where p_align is 8, descriptors and notes start on multiples of 8."""
    notes = make.note(b"GNU", 5, b"twelve bytes", 8) + make.note(
        b"Xen", 18, (2 * MIB).to_bytes(8, "little"), 8
    )
    kernel = make.elf([make.Part(b"\xf4" * 64), make.Part(notes, type=4, align=8)])

    assert guest.load(kernel).mode == "protected"


def test_a_malformed_note_ends_the_notes(guest: make.Guest) -> None:
    """A descriptor said to be longer than its segment is not read; the kernel has no PVH entry."""
    notes = bytearray(make.note(b"Xen", 18, (2 * MIB).to_bytes(8, "little")))
    notes[4] = 9  # descsz
    kernel = make.elf([make.Part(b"\xf4" * 64), make.Part(bytes(notes), type=4)])

    assert guest.load(kernel).mode == "long"


# Placing


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_go_where_they_say(guest: make.Guest, bits: int) -> None:
    """Each PT_LOAD is at p_paddr, its bss is zero, and other types are not loaded."""
    guest.fill(0xFF)
    parts = [
        make.Part(os.urandom(1000), paddr=3 * MIB, vaddr=0xC0300000, memsz=5000),
        make.Part(b"hello", paddr=2 * MIB + 7, vaddr=2 * MIB + 7),
        make.Part(b"", paddr=4 * MIB, vaddr=0, memsz=100),
        make.Part(b"stack", paddr=5 * MIB, type=0x6474E551),
        make.Part(b"", paddr=1 << 31, memsz=0),
        make.Part(make.note(b"Xen", 18, (2 * MIB + 8).to_bytes(4, "little")), type=4),
    ]

    entry = guest.load(make.elf(parts, bits=bits, entry=0))

    assert entry.rip == 2 * MIB + 8
    assert guest.memory.read(3 * MIB, 5001) == parts[0].data + bytes(4000) + b"\xff"
    assert guest.memory.read(2 * MIB + 6, 7) == b"\xffhello\xff"
    assert guest.memory.read(4 * MIB, 101) == bytes(100) + b"\xff"
    assert guest.memory.read(5 * MIB, 5) == b"\xff" * 5


HALT = b"\xf4" * 64


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (make.elf(bits=32), "a 32-bit ELF with neither a PVH note nor a Multiboot header"),
        (make.elf(machine=183), "ELF for machine 183, not x86 .use an amd64 kernel"),
        (make.elf(encoding=2), "ELF of a class or byte order that no PC has"),
        (make.elf(kind=1), r"an object file \(a kernel module\?\), not an executable"),
        (make.elf(kind=4), "a core dump, not an executable"),
        (make.elf(kind=9), "ELF of type 9, not an executable"),
        (make.elf([]), "damaged ELF: 0 program headers of 56 bytes"),
        (make.elf([make.Part(b"")] * 129), "damaged ELF: 129 program headers"),
        (make.elf([make.Part(HALT, type=2)]), r"its entry point 0x200000 is not the physical"),
        (make.elf(entry=0xFFFFFFFF81000000), r"its entry point 0xffffffff81000000 is not the phy"),
        (make.elf([make.Part(HALT, memsz=63)]), "segment 0 has 64 bytes for 63 of RAM"),
        (make.elf([make.Part(HALT, memsz=8 * MIB)]), r"up to 10 MiB, the VM's ends at 8 MiB"),
        (make.elf([make.Part(HALT, memsz=1 << 63)]), "can never fit"),
        (
            make.elf([make.Part(HALT), make.Part(HALT, paddr=2 * MIB + 63)]),
            "segment 1 of kernel kernel.img at 0x20003f-0x20007e overlaps segment 0 of",
        ),
        (
            make.elf([make.Part(HALT), make.Part(HALT, paddr=0xB8000)]),
            "segment 1 of kernel kernel.img wants 0xb8000-0xb803f, which is not RAM",
        ),
        (make.pvh(2 * MIB + 256), "damaged: its PVH entry 0x200100 is outside its segments"),
        (make.pvh(2 * MIB + (1 << 32)), "damaged: its PVH entry 0x100200000 is outside"),
    ],
)
def test_bad_elf_is_refused(guest: make.Guest, kernel: bytes, message: str) -> None:
    """What cannot be a kernel, or not one for this VM, is refused with file and reason."""
    with pytest.raises(ConfigError, match=message) as caught:
        guest.load(kernel)

    assert "kernel kernel.img" in str(caught.value)


def test_an_elf_with_nothing_to_load_is_refused(guest: make.Guest) -> None:
    """A PVH note in a file without PT_LOAD, as a debug file has, does not start."""
    notes = make.note(b"Xen", 18, (2 * MIB).to_bytes(4, "little"))
    with pytest.raises(ConfigError, match="outside its segments"):
        guest.load(make.elf([make.Part(notes, type=4)]))


def test_the_whole_kernel_is_counted_where_it_does_not_fit(guest: make.Guest) -> None:
    """The remedy is for the highest segment, so that following it once is enough."""
    parts = [make.Part(HALT, paddr=address * MIB) for address in (7, 8, 20)]

    with pytest.raises(ConfigError, match="set memory to at least 21M"):
        guest.load(make.elf(parts, entry=7 * MIB))


# PVH


@pytest.mark.parametrize(("bits", "desc_size"), [(64, 8), (64, 4), (32, 4)])
def test_pvh_starts_where_its_note_says(guest: make.Guest, bits: int, desc_size: int) -> None:
    """PHYS32_ENTRY is RIP, in 32-bit mode with paging off; EBX points at the start info."""
    entry = guest.load(make.pvh(bits=bits, desc_size=desc_size))

    assert (entry.mode, entry.rip, entry.cr3) == ("protected", 2 * MIB + 16, 0)
    assert dict(entry.regs) == {"rbx": START_INFO}


def test_pvh_start_info(guest: make.Guest) -> None:
    """hvm_start_info version 1 tells command line, RSDP and memory map; no module, no list."""
    guest.fill(0xFF)

    guest.load(make.pvh(), cmdline="console=ttyS0")

    magic, version, flags, modules, _, cmdline, rsdp, table, lines, reserved = guest.words(
        START_INFO, "<IIIIQQQQII"
    )
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 0, 0)
    assert cmdline == CMDLINE
    assert guest.string(cmdline) == b"console=ttyS0"
    assert rsdp == make.RSDP
    assert [guest.words(table + 24 * n, "<QQII") for n in range(lines)] == [
        (*area, 0) for area in guest.e820
    ]


def test_pvh_takes_the_initrd_as_its_module(guest: make.Guest) -> None:
    """The one module is the initrd, page aligned and clear of the kernel."""
    initrd = os.urandom(5000)

    guest.load(make.pvh(), initrd)

    (modules,) = guest.words(START_INFO + 12, "<I")
    (table,) = guest.words(START_INFO + 16, "<Q")
    start, size, cmdline, reserved = guest.words(table, "<QQQQ")
    assert (modules, size, cmdline, reserved) == (1, 5000, 0, 0)
    assert start == 8 * MIB - 8192
    assert guest.memory.read(start, size) == initrd


def test_linux_by_pvh_keeps_its_limit(guest: make.Guest) -> None:
    """PVH has no limit for the command line, but a kernel with a Linux note has 2047 bytes."""
    linux = make.pvh(more=make.note(b"Linux", 256, b"\0\0\0\0"))

    guest.load(make.pvh(), cmdline="x" * 2048)
    guest.load(linux, cmdline="x" * 2047)
    with pytest.raises(ConfigError, match="takes at most 2047"):
        guest.load(linux, cmdline="x" * 2048)


def test_an_installed_kernel_loads_by_pvh(vmlinux: bytes) -> None:
    """The distribution's vmlinux loads by its PVH note; each segment is in RAM as in the file."""
    guest = make.Guest(256 * MIB)
    with make.images(vmlinux) as files:
        entry = boot.load(guest.memory, guest.e820, files, make.RSDP)
        kernel = elf.parse(bootfile.image_of(files.kernel, "vmlinux", "kernel"))
        names = {note.name for note in kernel.notes()}

    assert entry.mode == "protected"
    assert kernel.holds(entry.rip)
    assert b"Linux" in names  # what the limit of its command line hangs on
    for part in kernel.loads():
        loaded = guest.memory.read(part.paddr, part.memsz)
        assert loaded[: part.filesz] == vmlinux[part.offset : part.offset + part.filesz]
        assert not any(loaded[part.filesz :])
    guest.close()
