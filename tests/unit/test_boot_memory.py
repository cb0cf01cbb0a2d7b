"""vmm.loader: who gets which part of guest RAM, and the tables a vCPU starts with."""

from __future__ import annotations

from itertools import pairwise
from struct import unpack_from
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from tests.unit import boot_images as make
from vmm.boot import E820Range
from vmm.loader import BOOT_CS, BOOT_DS, BOOT_TSS, MIB, PAGE, Target, mib

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guest() -> Iterator[make.Guest]:
    it = make.Guest(16 * MIB, above=4 * MIB)
    yield it
    it.close()


@pytest.fixture
def target(guest: make.Guest) -> Target:
    return Target(guest.memory, guest.e820, 0, None, "")


def test_ram_may_be_claimed_up_to_its_last_byte(target: Target) -> None:
    """All of a RAM range can be taken, in pieces that touch, and not one byte more."""
    target.claim(MIB, 14 * MIB, "a")
    target.claim(15 * MIB, MIB, "b")

    with pytest.raises(ConfigError, match=r"a at 0x100000-0xefffff"):
        target.claim(15 * MIB - 1, 1, "c")


@pytest.mark.parametrize(
    ("gpa", "size", "message"),
    [
        (16 * MIB - 1, 2, r"up to 16\.1 MiB, the VM's ends at 16 MiB \(set memory to at least 17M"),
        (0x9FBFF, 2, r"is not RAM \(a kernel for a PC is linked at 1 MiB or above"),
        (0xA0000, 1, r"is not RAM"),
        (MIB - 1, 2, r"is not RAM"),
        (0xFEE00000, 4096, r"can never fit: a VM has no RAM from 3840 MiB to 4096 MiB"),
        (1 << 32, 4096, r"can never fit"),  # there is RAM, but no protocol reaches it
        ((1 << 64) - 1, 1 << 64, r"can never fit"),
    ],
)
def test_what_is_not_ram_cannot_be_claimed(
    target: Target, gpa: int, size: int, message: str
) -> None:
    """A claim outside RAM below 4 GiB is refused, and says what would help."""
    with pytest.raises(ConfigError, match=message):
        target.claim(gpa, size, "it")


def test_overlaps_are_refused_by_both_names(target: Target) -> None:
    """Two claims for the same byte are told with both owners and addresses."""
    target.claim(2 * MIB, PAGE, "the kernel")

    with pytest.raises(
        ConfigError, match=r"the rest at 0x200fff-0x201ffe overlaps the kernel at 0x200000-0x200fff"
    ):
        target.claim(2 * MIB + PAGE - 1, PAGE, "the rest")


def test_a_claim_does_not_cross_regions() -> None:
    """Where one RAM range lies in two memory regions, each claim is inside one of them."""
    guest = make.Guest(4 * MIB)
    e820 = [E820Range(0, 64 * MIB, 1)]  # says more than there is
    target = Target(guest.memory, e820, 0, None, "")

    assert target.ram_end == 4 * MIB
    assert target.lowest(3 * MIB, PAGE, MIB) == MIB
    assert target.lowest(3 * MIB + 1, PAGE, MIB) is None
    guest.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 29), max_size=8, unique=True),
    st.integers(1, 6 * PAGE),
    st.sampled_from([PAGE, 4 * PAGE]),
    st.integers(0, 31),
)
def test_highest_and_lowest_find_the_best_place(
    taken: list[int], size: int, align: int, bound: int
) -> None:
    """Both searches agree with trying every page; RAM is 30 pages from 1 MiB on."""
    guest = make.Guest(MIB + 30 * PAGE)
    target = Target(guest.memory, guest.e820, 0, None, "")
    for page in taken:
        target.claim(MIB + page * PAGE, PAGE, f"page {page}")
    limit = MIB + bound * PAGE

    def free(gpa: int) -> bool:
        pages = {(gpa - MIB) // PAGE + n for n in range(-(-size // PAGE))}
        return gpa + size <= MIB + 30 * PAGE and not pages & set(taken)

    places = [MIB + page * PAGE for page in range(30) if (MIB + page * PAGE) % align == 0]
    high = [gpa for gpa in places if free(gpa) and gpa + size <= limit]
    low = [gpa for gpa in places if free(gpa) and gpa >= limit]
    assert target.highest(size, align, limit) == max(high, default=None)
    assert target.lowest(size, align, limit) == min(low, default=None)
    guest.close()


def test_clear_zeroes_exactly_what_it_is_told(guest: make.Guest, target: Target) -> None:
    """clear() leaves the bytes before and after alone, also for more than one of its chunks."""
    guest.fill(0xFF)

    target.clear(MIB + 3, 200_000)

    assert guest.memory.read(MIB, 3) == b"\xff\xff\xff"
    assert guest.memory.read(MIB + 3, 200_000) == bytes(200_000)
    assert guest.memory.read(MIB + 200_003, 1) == b"\xff"


def test_sizes_are_said_for_people() -> None:
    """Whole MiB without a fraction, others with one digit, rounded up so that it suffices."""
    assert (mib(512 * MIB), mib(MIB * 3 // 2), mib(MIB + 1)) == ("512 MiB", "1.5 MiB", "1.1 MiB")


# What the first instruction finds


def walk(guest: make.Guest, cr3: int, address: int) -> int | None:
    """Translate an address as the CPU does with 4-level paging (SDM vol. 3A §4.5)."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = guest.words(table + (address >> shift & 511) * 8, "<Q")
        if not entry & 1:  # present
            return None
        assert entry & 2  # writable
        if entry & 0x80:
            return int(entry & -(1 << shift) | address & ((1 << shift) - 1))
        table = entry & ~0xFFF
    raise AssertionError("a 4 KiB page")


def test_the_first_four_gib_map_to_themselves(guest: make.Guest, target: Target) -> None:
    """In long mode each address below 4 GiB is itself, and nothing above is mapped."""
    guest.fill(0xFF)  # what an earlier guest left must not map anything

    entry = target.start_long(MIB)

    samples = [gib << 30 | at for gib in range(4) for at in (0, 0x1234, 0x3FFFFFFF, 0x2AAAAAAA)]
    assert [walk(guest, entry.cr3, address) for address in samples] == samples
    assert {walk(guest, entry.cr3, 1 << bit) for bit in range(32, 48)} == {None}


@pytest.mark.parametrize(("long", "flags"), [(True, 0xA), (False, 0xC)])
def test_the_descriptors_are_flat(
    guest: make.Guest, target: Target, long: bool, flags: int
) -> None:
    """CS, DS and TSS are as boot.rst and PVH ask: base 0, 4 GiB, L or D by the mode."""
    entry = target.start_long(MIB) if long else target.start_protected(MIB)
    table = guest.memory.read(entry.gdt, entry.gdt_limit + 1)

    def descriptor(selector: int) -> tuple[int, int, int, int]:
        """Return base, limit, access byte and flags (SDM vol. 3A §3.4.5)."""
        limit, low, middle, access, more, high = unpack_from("<HHBBBB", table, selector)
        return low | middle << 16 | high << 24, limit | (more & 0xF) << 16, access, more >> 4

    assert descriptor(BOOT_CS) == (0, 0xFFFFF, 0x9B, flags)
    assert descriptor(BOOT_DS) == (0, 0xFFFFF, 0x93, 0xC)
    assert descriptor(BOOT_TSS) == (0, 0x67, 0x8B, 0)
    assert table[:16] == bytes(16)
    assert table[BOOT_TSS + 8 :] == bytes(8)  # the upper half of the TSS in long mode


def test_the_stack_of_long_mode_is_free_ram(target: Target) -> None:
    """RSP is aligned as the ABI asks, and a page below it belongs to nobody else."""
    entry = target.start_long(MIB, ("rsi", 7))

    rsp = dict(entry.regs)["rsp"]
    assert dict(entry.regs)["rsi"] == 7
    assert rsp % 16 == 0
    with pytest.raises(ConfigError, match="overlaps the stack"):
        target.claim(rsp - 8, 8, "it")


def test_nothing_in_low_memory_overlaps(guest: make.Guest) -> None:
    """The places of the drawing in vmm.loader keep apart and below the EBDA, all at once."""
    with make.images(make.bzimage(), None, "x" * 255):
        target = Target(guest.memory, guest.e820, 0, None, "x" * 65535)
    for name, start, size in (("info", 0x6000, PAGE), ("zero", 0x7000, PAGE)):
        target.claim(start, size, name)
    target.start_long(MIB)
    target.claim(0x20000, 0x10000, "command line")

    spans = sorted((start, end) for start, end, _ in target._taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][0] >= 0x500
    assert spans[-1][1] <= 0x9FC00
