"""vmm.linux: bzImage headers, where the kernel and initrd go, and the zero page."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

import pytest

from config.errors import ConfigError
from tests.unit import boot_images as make
from tests.unit.boot_images import MIB
from vmm import boot
from vmm.loader import CMDLINE, ZERO_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guest() -> Iterator[make.Guest]:
    it = make.Guest(16 * MIB, above=MIB)
    yield it
    it.close()


def field(guest: make.Guest, offset: int, format_: str) -> int:
    return guest.words(ZERO_PAGE + offset, format_)[0]


# The kernel's place


def test_the_kernel_is_entered_at_200_behind_its_load_address(guest: make.Guest) -> None:
    """64-bit protocol: code at pref_address, RIP 0x200 further, RSI the zero page (boot.rst)."""
    payload = os.urandom(0x1000)

    entry = guest.load(make.bzimage(payload, setup_sects=7))

    assert entry.mode == "long"
    assert entry.rip == 2 * MIB + 0x200
    assert dict(entry.regs)["rsi"] == ZERO_PAGE
    assert guest.memory.read(2 * MIB, 0x1000) == payload


def test_setup_sects_0_means_4(guest: make.Guest) -> None:
    """An old image that says 0 setup sectors has 4 (boot.rst, setup_sects)."""
    entry = guest.load(make.bzimage(b"\x90" * 0x400, setup_sects=0))

    assert guest.memory.read(entry.rip, 16) == b"\x90" * 16


def test_what_follows_the_kernel_in_the_file_is_not_loaded(guest: make.Guest) -> None:
    """Syssize counts; a signature behind it, as Debian's images have, stays out of RAM."""
    guest.fill(0)

    guest.load(make.bzimage(b"\x90" * 0x400) + b"signature")

    assert guest.memory.read(2 * MIB + 0x400, 9) == bytes(9)


@pytest.mark.parametrize(
    ("changes", "load"),
    [
        ({"pref_address": 4 * MIB}, 4 * MIB),
        ({"pref_address": 0}, 2 * MIB),  # no preference: 1 MiB, aligned
        ({"pref_address": 3 * MIB}, 4 * MIB),  # aligned up
        ({"pref_address": 3 * MIB, "alignment": 0x1000}, 3 * MIB),
        ({"pref_address": 3 * MIB, "relocatable": 0, "alignment": 0}, 3 * MIB),
        ({"pref_address": 0, "relocatable": 0}, MIB),
    ],
)
def test_the_load_address(guest: make.Guest, changes: dict[str, int], load: int) -> None:
    """pref_address is kept, aligned for a relocatable kernel; code32_start tells the choice."""
    entry = guest.load(make.bzimage(**changes))  # type: ignore[arg-type]

    assert entry.rip == load + 0x200
    assert field(guest, 0x214, "<I") == load


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0x20A}, r"32-bit only: its boot protocol is 2\.10, and the 64-bit entry came"),
        ({"version": 0x206}, r"32-bit only: its boot protocol is 2\.06"),
        ({"xloadflags": 0}, "32-bit only kernel: it has no 64-bit entry .use an amd64 kernel"),
        ({"xloadflags": 0xFFFE}, "32-bit only kernel"),
        ({"loadflags": 0}, "a zImage"),
        ({"alignment": 0}, "damaged: kernel_alignment is 0x0"),
        ({"alignment": 0x3000}, "damaged: kernel_alignment is 0x3000"),
        ({"payload": b""}, "damaged: its header says 0 bytes of kernel"),
        ({"payload": b"\0" * 0x200}, "damaged: its header says 512 bytes of kernel"),
        ({"init_size": 14 * MIB + 1}, r"up to 16\.1 MiB, the VM's ends at 16 MiB .*at least 17M"),
        ({"pref_address": 16 * MIB}, r"up to 19 MiB, the VM's ends at 16 MiB .*at least 19M"),
        ({"pref_address": 16 * MIB, "relocatable": 0}, r"at least 19M"),
        ({"init_size": 0xFFFFFFFF}, "can never fit"),
        ({"payload": bytes(14 * MIB + 16), "init_size": 0}, r"up to 16\.1 MiB, the VM's ends at"),
        ({"pref_address": 1 << 63}, "can never fit"),
        ({"pref_address": 1 << 63, "relocatable": 0}, "can never fit"),
        ({"pref_address": 0x8000, "relocatable": 0}, "0x8000-0x307fff, which is not RAM"),
    ],
)
def test_kernels_that_cannot_start(
    guest: make.Guest, changes: dict[str, int], message: str
) -> None:
    """What is too old, 32-bit, damaged or too large is refused: file, reason and remedy."""
    with pytest.raises(ConfigError, match=rf"kernel kernel\.img.*{message}"):
        guest.load(make.bzimage(**changes))  # type: ignore[arg-type]


def test_a_truncated_kernel_says_how_long_it_should_be(guest: make.Guest) -> None:
    """Syssize tells the length, and the message too."""
    with pytest.raises(ConfigError, match=r"truncated: it ends before byte 2048 \(copy it again"):
        guest.load(make.bzimage()[:-1])


@pytest.mark.parametrize("jump", [b"\x90\x6a", b"\xeb\x65", b"\xeb\xff"])
def test_a_setup_header_must_end_somewhere(guest: make.Guest, jump: bytes) -> None:
    """The header's end is in its jump; too early, too late, or no jump mean damage."""
    image = bytearray(make.bzimage())
    image[0x200:0x202] = jump

    with pytest.raises(ConfigError, match="damaged: its setup header has no sensible end"):
        guest.load(bytes(image))


# The zero page


def test_the_zero_page_has_the_header_and_nothing_else_of_the_file(guest: make.Guest) -> None:
    """boot_params is zero but for the header and what a loader writes (boot.rst)."""
    guest.fill(0xFF)
    image = bytearray(make.bzimage(setup_sects=4))
    image[:0x1F1] = b"\xee" * 0x1F1
    image[0x270:0xA00] = b"\xee" * (0xA00 - 0x270)

    guest.load(bytes(image))

    page = guest.memory.read(ZERO_PAGE, 4096)
    assert b"\xee" not in page
    assert page[0x26C:0x270] == bytes(4)  # behind the header's end
    assert page[0x1FE:0x208] == image[0x1FE:0x208]
    assert page[0x22C:0x23C] == image[0x22C:0x23C]
    assert page[0x258:0x264] == image[0x258:0x264]
    assert page[:0x70] == bytes(0x70)  # screen_info and friends: no display
    assert page[0x78:0x1E8] == bytes(0x1E8 - 0x78)


@pytest.mark.parametrize("kernel", [make.bzimage(), make.elf()])
def test_the_zero_page_says_what_a_bios_would(guest: make.Guest, kernel: bytes) -> None:
    """Loader id, load flags, command line, RSDP and the memory map are filled in."""
    guest.load(kernel, cmdline="root=/dev/vda")

    assert field(guest, 0x210, "<B") == 0xFF  # type_of_loader: none assigned
    assert field(guest, 0x211, "<B") == 1  # LOADED_HIGH, no heap
    assert field(guest, 0x228, "<I") == CMDLINE
    assert guest.string(CMDLINE) == b"root=/dev/vda"
    assert field(guest, 0x218, "<I") == field(guest, 0x21C, "<I") == 0  # no initrd
    assert field(guest, 0x070, "<Q") == make.RSDP
    assert field(guest, 0x1E8, "<B") == len(guest.e820) == 4
    table = [guest.words(ZERO_PAGE + 0x2D0 + 20 * n, "<QQI") for n in range(5)]
    assert table == [*guest.e820, (0, 0, 0)]


def test_a_vmlinux_gets_a_header_of_its_own(guest: make.Guest) -> None:
    """A vmlinux brings no setup header: magic, version and limits are made up for it."""
    entry = guest.load(make.elf(entry=2 * MIB + 8))

    assert (entry.mode, entry.rip) == ("long", 2 * MIB + 8)
    assert dict(entry.regs)["rsi"] == ZERO_PAGE
    assert field(guest, 0x1FE, "<H") == 0xAA55
    assert field(guest, 0x202, "<I") == int.from_bytes(b"HdrS", "little")
    assert field(guest, 0x206, "<H") == 0x20C


# Command line and initrd


@pytest.mark.parametrize("limit", [0, 255, 2047])
def test_cmdline_size_is_the_limit(guest: make.Guest, limit: int) -> None:
    """cmdline_size characters fit, one more is refused with both numbers."""
    kernel = make.bzimage(cmdline_size=limit)

    guest.load(kernel, cmdline="x" * limit)
    assert guest.string(CMDLINE) == b"x" * limit

    with pytest.raises(
        ConfigError, match=rf"has {limit + 1} bytes, kernel kernel\.img takes at most {limit} \(sho"
    ):
        guest.load(kernel, cmdline="x" * (limit + 1))


def test_the_room_for_the_command_line_is_a_limit_too(guest: make.Guest) -> None:
    """A header that allows more than our 64 KiB does not get more."""
    kernel = make.bzimage(cmdline_size=0xFFFFFFFF)

    guest.load(kernel, cmdline="x" * 65535)
    with pytest.raises(ConfigError, match="takes at most 65535"):
        guest.load(kernel, cmdline="x" * 65536)


def test_a_vmlinux_takes_2047_characters(guest: make.Guest) -> None:
    """x86's COMMAND_LINE_SIZE is 2048 with the NUL; Linux would cut the rest in silence."""
    guest.load(make.elf(), cmdline="x" * 2047)

    with pytest.raises(ConfigError, match="takes at most 2047"):
        guest.load(make.elf(), cmdline="x" * 2048)


@pytest.mark.parametrize("size", [1, 4096, 4097, MIB])
def test_the_initrd_goes_to_the_top_of_low_ram(guest: make.Guest, size: int) -> None:
    """The initrd ends in the last page of RAM below 4 GiB, starts on a page, and is whole."""
    initrd = os.urandom(size)

    guest.load(make.bzimage(), initrd)

    start, length = guest.words(ZERO_PAGE + 0x218, "<II")
    assert start % 4096 == 0
    assert 16 * MIB - 4096 < start + length <= 16 * MIB
    assert guest.memory.read(start, length) == initrd


def test_initrd_addr_max_is_its_last_byte(guest: make.Guest) -> None:
    """The kernel's highest address for an initrd is kept to the byte (boot.rst)."""
    kernel = make.bzimage(initrd_addr_max=10 * MIB - 1)

    guest.load(kernel, bytes(4096))
    assert field(guest, 0x218, "<I") == 10 * MIB - 4096

    guest.load(make.bzimage(initrd_addr_max=10 * MIB - 2), bytes(4096))
    assert field(guest, 0x218, "<I") == 10 * MIB - 8192


def test_the_initrd_goes_below_a_kernel_that_fills_the_top(guest: make.Guest) -> None:
    """Where the kernel leaves no room above itself, the initrd ends where the kernel starts."""
    guest.load(make.bzimage(pref_address=4 * MIB, init_size=12 * MIB), bytes(MIB))

    assert field(guest, 0x218, "<I") == 3 * MIB


def test_an_initrd_that_does_not_fit_says_how_much_memory_is_needed(guest: make.Guest) -> None:
    """Its size, the end it would need, and the memory setting that does it; that one works."""
    kernel, initrd = make.bzimage(init_size=10 * MIB), bytes(5 * MIB + 1)

    with pytest.raises(
        ConfigError,
        match=r"initrd /srv/initrd.img \(5\.1 MiB\) does not fit: it needs RAM up to 17\.1 MiB,"
        r" the VM's ends at 16 MiB \(set memory to at least 18M",
    ):
        guest.load(kernel, initrd)

    larger = make.Guest(18 * MIB)
    larger.load(kernel, initrd)
    larger.close()


def test_more_memory_does_not_help_below_initrd_addr_max(guest: make.Guest) -> None:
    """An initrd too large for the kernel's own limit is told so, without a memory size."""
    with pytest.raises(
        ConfigError, match=r"does not fit between the kernel and 6 MiB.*make the initrd smaller"
    ):
        guest.load(make.bzimage(initrd_addr_max=6 * MIB - 1), bytes(3 * MIB))


def test_a_kernel_that_lands_on_our_tables_is_refused(guest: make.Guest) -> None:
    """A vmlinux linked below 1 MiB collides with the page tables; both are named."""
    low = make.elf([make.Part(b"\xf4" * 0x2000, paddr=0x10000)], entry=0x10000)

    with pytest.raises(
        ConfigError,
        match=r"the GDT at 0x10000-0x1002f overlaps segment 0 of kernel kernel\.img at 0x10000",
    ):
        guest.load(low)


# The real thing


def installed_kernels() -> list[str]:
    return sorted(glob.glob("/boot/vmlinuz-*"))


def test_an_installed_kernel_loads() -> None:
    """The distribution's bzImage loads into 256 MiB: its code is in RAM, byte by byte."""
    kernels = [path for path in installed_kernels() if os.access(path, os.R_OK)]
    if not kernels:
        pytest.skip("no readable /boot/vmlinuz-*: install linux-image-amd64")
    with open(kernels[-1], "rb") as file:
        image = file.read()
    guest = make.Guest(256 * MIB)
    with boot.open_images(make.config(kernels[-1], kernels[-1], "console=ttyS0")) as files:
        entry = boot.load(guest.memory, guest.e820, files, make.RSDP)

    setup = (image[0x1F1] + 1) * 512
    size = 16 * int.from_bytes(image[0x1F4:0x1F8], "little")
    assert guest.memory.read(entry.rip - 0x200, size) == image[setup : setup + size]
    start, length = guest.words(ZERO_PAGE + 0x218, "<II")
    assert guest.memory.read(start, length) == image  # as its own initrd
    assert field(guest, 0x238, "<I") == 2047
    guest.close()
