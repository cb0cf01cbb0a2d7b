"""GuestMemory: what is RAM, what is not, and what happens at the seams."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import GuestError, HostError
from devices.guestmem import GuestMemory, Region
from tools.viodriver import make_memfd, make_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
MEMFD_PAGES = 16

# Three neighbours: the first two meet in the memfd too, the third only in guest addresses.
# Then a hole, then a region at 4 GiB.
REGIONS = (
    Region(0x10000, 2 * PAGE, 0),
    Region(0x12000, PAGE, 2 * PAGE),
    Region(0x13000, PAGE, 8 * PAGE),
    Region(1 << 32, 2 * PAGE, 10 * PAGE),
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with make_memory(MEMFD_PAGES * PAGE, REGIONS) as guest:
        yield guest


def test_view_is_the_guests_own_memory() -> None:
    """What is written through a view is seen by every other mapping of the memfd."""
    fd = make_memfd(4 * PAGE)
    with GuestMemory(fd, [Region(0x1000, 2 * PAGE, PAGE)]) as guest:
        guest.view(0x1010, 4)[:] = b"abcd"
        assert os.pread(fd, 4, PAGE + 0x10) == b"abcd"
        os.pwrite(fd, b"wxyz", PAGE + 0x10)
        assert guest.read(0x1010, 4) == b"wxyz"
    os.close(fd)


def test_regions_that_meet_in_the_memfd_are_one_view(memory: GuestMemory) -> None:
    """A range across neighbours that are contiguous in both address spaces is one view."""
    assert len(memory.view(0x11FF0, 32)) == 32
    assert [len(view) for view in memory.views(0x11FF0, 32)] == [32]


def test_regions_that_meet_only_in_guest_addresses_are_two_views(memory: GuestMemory) -> None:
    """Guest-contiguous is not host-contiguous: the range is split, and lands in both places."""
    pieces = memory.views(0x12FF0, 32)
    assert [len(piece) for piece in pieces] == [16, 16]
    pieces[0][:], pieces[1][:] = b"a" * 16, b"b" * 16
    assert memory.read(0x12FF0, 32) == b"a" * 16 + b"b" * 16
    assert memory.read(0x13000, 16) == b"b" * 16
    with pytest.raises(GuestError, match="not in one piece"):
        memory.view(0x12FF0, 32)


def test_write_crosses_a_seam_or_does_nothing(memory: GuestMemory) -> None:
    """A write across neighbours reaches both; one that would leave RAM writes not even a part."""
    memory.write(0x12FF8, b"0123456789abcdef")
    assert memory.read(0x12FF8, 16) == b"0123456789abcdef"
    with pytest.raises(GuestError):
        memory.write(0x13FF8, b"0123456789abcdef")
    assert memory.read(0x13FF8, 8) == bytes(8)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 1),
        (0xFFFF, 1),  # below the first region
        (0xFFFF, 2),  # begins below it
        (0x13FFF, 2),  # ends in the hole
        (0x14000, 1),
        (0x13000, 1 << 32),  # bridges the hole
        ((1 << 32) + 2 * PAGE, 1),  # just past the end
        ((1 << 64) - 1, 2),  # wraps
        ((1 << 64) - 8, 0xFFFF_FFFF),
    ],
)
def test_what_is_not_ram_is_refused(memory: GuestMemory, gpa: int, length: int) -> None:
    """A range with one byte outside the regions is a GuestError, by every way in."""
    with pytest.raises(GuestError, match=f"{gpa:#x}"):
        memory.view(gpa, length)
    with pytest.raises(GuestError, match=f"{gpa:#x}"):
        memory.views(gpa, length)
    with pytest.raises(GuestError, match=f"{gpa:#x}"):
        memory.read(gpa, length)


def test_a_negative_length_is_refused(memory: GuestMemory) -> None:
    """No arithmetic of a caller's makes a slice that counts from the end."""
    for call in (memory.view, memory.views, memory.read):
        with pytest.raises(GuestError):
            call(0x10010, -1)


def test_a_window_shows_only_itself() -> None:
    """A device given one page of the guest reaches that page and nothing else of the memfd."""
    fd = make_memfd(4 * PAGE)
    with GuestMemory(fd, [Region(0x8000, PAGE, 2 * PAGE)]) as window:
        window.write(0x8000, b"x" * PAGE)
        for gpa in (0, 0x7FFF, 0x9000):
            with pytest.raises(GuestError):
                window.view(gpa, 1)
    assert os.pread(fd, 4 * PAGE, 0) == bytes(2 * PAGE) + b"x" * PAGE + bytes(PAGE)
    os.close(fd)


def test_a_device_without_memory_reaches_none() -> None:
    """No region, no byte: whatever is asked for is refused."""
    with GuestMemory(make_memfd(PAGE), []) as nothing:
        for gpa in (0, 1, PAGE, 1 << 63):
            with pytest.raises(GuestError):
                nothing.view(gpa, 1)
            with pytest.raises(GuestError):
                nothing.views(gpa, 1)
        with pytest.raises(GuestError):
            nothing.view(0, 0)


@pytest.mark.parametrize(
    ("regions", "complaint"),
    [
        ([Region(0, 0, 0)], "empty"),
        ([Region(0, -PAGE, 0)], "empty"),
        ([Region(0x10, PAGE, 0)], "page aligned"),
        ([Region(0, PAGE + 1, 0)], "page aligned"),
        ([Region(0, PAGE, 8)], "page aligned"),
        ([Region(0, PAGE, -PAGE)], "page aligned"),
        ([Region(0, 2 * PAGE, 0), Region(PAGE, PAGE, 4 * PAGE)], "overlaps"),
        ([Region((1 << 64) - PAGE, 2 * PAGE, 0)], "address space"),
        ([Region(0, PAGE, MEMFD_PAGES * PAGE)], "leaves its file"),
        ([Region(0, (MEMFD_PAGES + 1) * PAGE, 0)], "leaves its file"),
        ([Region(0, PAGE, 1 << 63)], "leaves its file"),
    ],
)
def test_region_lists_are_checked_before_mapping(regions: list[Region], complaint: str) -> None:
    """A bad list from whoever started us is a HostError that says which region and why.

    A region past the end of the file would be a SIGBUS later (CVE-2020-10722).
    """
    fd = make_memfd(MEMFD_PAGES * PAGE)
    try:
        with pytest.raises(HostError, match=complaint):
            GuestMemory(fd, regions)
    finally:
        os.close(fd)


def test_regions_keep_what_was_given(memory: GuestMemory) -> None:
    """`regions` lists them sorted and unmerged, as the VM process made them."""
    assert memory.regions == REGIONS


def test_close_refuses_while_a_view_lives(memory: GuestMemory) -> None:
    """Memory is never pulled away under a view."""
    view = memory.view(0x10000, 16)
    guest = make_memory(PAGE)
    inner = guest.view(0, 16)
    with pytest.raises(BufferError):
        guest.close()
    assert len(view) == len(inner) == 16


@given(
    gpa=st.integers(0x10000 - 2 * PAGE, 0x14000 + PAGE)
    | st.integers((1 << 32) - 64, (1 << 32) + 3 * PAGE),
    length=st.integers(0, 3 * PAGE),
)
def test_views_agree_with_a_byte_map(gpa: int, length: int) -> None:
    """Whatever the range: views() gives exactly its bytes, or refuses if one byte is missing."""
    place = {
        region.gpa + i * PAGE: region.offset + i * PAGE
        for region in REGIONS
        for i in range(region.size // PAGE)
    }
    fd = make_memfd(MEMFD_PAGES * PAGE)
    for page in range(MEMFD_PAGES):
        os.pwrite(fd, bytes([page]) * PAGE, page * PAGE)
    with GuestMemory(fd, REGIONS) as guest:
        offsets = [place.get(at & -PAGE) for at in range(gpa, gpa + length)]
        if None in offsets:
            with pytest.raises(GuestError):
                guest.views(gpa, length)
        else:
            expected = bytes(offset // PAGE for offset in offsets if offset is not None)
            assert guest.read(gpa, length) == expected
    os.close(fd)
