"""Defects other monitors had in their block devices, one test for each, named after it.

A test here fails on a device that has the defect. What belongs to queues is in test_lessons.py.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import GuestError
from devices import blkreq, uring
from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    MAX_RANGES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SEGMENT,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.guestmem import Region
from devices.spec import BUSY
from tests.blklab import MEMORY, Answer, BlkLab
from tests.slowring import SlowRing
from tools.viodriver import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def blk(tmp_path: Path) -> Iterator[BlkLab]:
    with BlkLab(tmp_path, SIZE, content=PATTERN) as lab:
        lab.start(BLK_F_FLUSH)
        yield lab


def kick(blk: BlkLab) -> None:
    blk.schedule(0)
    blk.serve()


@pytest.mark.parametrize(
    ("length", "writable"), [(0, [512]), (1, []), (1, [512]), (15, []), (15, [1])]
)
def test_cve_2019_18960_header_shorter_than_a_header(
    blk: BlkLab, length: int, writable: list[int]
) -> None:
    """What is too short for a header is no request, whatever lengths it claims."""
    blk.offer([length] if length else [], writable)

    with pytest.raises(GuestError, match=f"block request of {length} bytes to read"):
        kick(blk)


def test_cve_2022_2132_a_header_in_pieces(blk: BlkLab) -> None:
    """Header, data and status may share descriptors, or each byte have its own."""
    header = HEADER.pack(T_OUT, 0, 9)
    for readable in (
        [header + b"w" * 512],
        [header[:3], header[3:] + b"w" * 100, b"w" * 412],
        [*(bytes([byte]) for byte in header), b"w" * 512],
    ):
        assert blk.ask(T_OUT, 9, bytes(512)).status == S_OK
        assert blk.ask_raw(readable, [1]) == Answer(S_OK, 1, b"")
        assert blk.ask_raw([HEADER.pack(T_IN, 0, 9)], [513]).data == b"w" * 512


def test_cve_2024_7730_no_room_for_the_status(blk: BlkLab) -> None:
    """A request must have room for its status byte; empty elements give none."""
    for writable in ([], [0], [0, 0]):
        blk.start(BLK_F_FLUSH)
        header = Segment(0x1000, 16, writable=False)
        empty = [Segment(0x2000, 0, writable=True) for _ in writable]
        blk.queues[0].submit(blk.queues[0].place_at([header, *empty]))
        with pytest.raises(GuestError, match="no room for header and status"):
            kick(blk)


def test_cve_2016_6490_empty_elements(blk: BlkLab) -> None:
    """Elements of no length are legal anywhere, and move nothing."""
    header = HEADER.pack(T_OUT, 0, 0)
    assert blk.ask_raw([b"", header[:8], b"", header[8:], b"", b"w" * 512, b""], [0, 1, 0]) == (
        Answer(S_OK, 1, b"")
    )
    assert blk.ask_raw([HEADER.pack(T_IN, 0, 0)], [0, 512, 0, 0, 1]).data == b"w" * 512


def test_cve_2015_5158_unknown_types_have_no_meaning(blk: BlkLab) -> None:
    """Every type outside the table is UNSUPP; none is looked up by index."""
    known = {0, 1, 4, 5, 8, 11, 13}
    for kind in [*(set(range(64)) - known), 1 << 16, 1 << 31, (1 << 32) - 1]:
        assert blk.ask(kind, 0, bytes(16), room=512).status == S_UNSUPP
    assert blk.image.read_bytes() == PATTERN


def test_xsa_155_the_header_is_read_once(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that turns a checked header into another one gains nothing."""
    queue = blk.queues[0]
    request = queue.place([HEADER.pack(T_IN, 0, 1)], [512, 1])
    real = blkreq._unpack

    def unpack_then_change(header: memoryview) -> tuple[Any, ...]:
        fields = real(header)
        blk.memory.write(request.segments[0].gpa, HEADER.pack(T_OUT, 0, 1 << 40))
        return fields

    monkeypatch.setattr(blkreq, "_unpack", unpack_then_change)
    queue.submit(request)
    [used] = blk.collect()

    assert used.written == 513
    assert queue.data(request) == PATTERN[512:1024] + bytes([S_OK])
    assert blk.image.read_bytes() == PATTERN


def test_xsa_155_ranges_are_read_once(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are copied before they are checked: one that changes meanwhile stays as it was."""
    queue = blk.queues[0]
    request = queue.place([HEADER.pack(T_DISCARD, 0, 0), SEGMENT.pack(8, 8, 0)], [1])
    done: list[tuple[int, int]] = []

    def discard(offset: int, length: int) -> None:
        done.append((offset, length))
        blk.memory.write(request.segments[1].gpa, SEGMENT.pack(1 << 50, 1 << 31, 0))

    monkeypatch.setattr(blk.disk, "discard", discard)
    queue.submit(request)
    blk.collect()

    assert done == [(4096, 4096)]


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
def test_cve_2014_0150_counts_from_the_guest_do_not_wrap(blk: BlkLab, kind: int) -> None:
    """Sector + nr_sectors is compared in unbounded numbers: no sum comes out small."""
    for sector, count in (
        ((1 << 64) - 8, 16),
        ((1 << 55) - 8, 16),
        (1 << 55, 8),
        (1 << 32, 0xFFFF_FFFF),
    ):
        assert blk.ask(kind, 0, SEGMENT.pack(sector, count, 0)).status == S_IOERR
    assert blk.image.read_bytes() == PATTERN


def test_cve_2018_1059_data_across_a_seam_of_ram(tmp_path: Path) -> None:
    """Guest RAM that is contiguous for the guest may not be for us: data arrives in pieces."""
    seam = 8 << 20
    regions = [Region(0, seam, seam), Region(seam, seam, 0)]
    assert sum(region.size for region in regions) == MEMORY
    with BlkLab(tmp_path, SIZE, content=PATTERN, regions=regions) as blk:
        blk.start(BLK_F_FLUSH)
        queue = blk.queues[0]
        placed = queue.place([HEADER.pack(T_IN, 0, 3)], [1], indirect=False)
        header, status = placed.segments
        data = Segment(seam - 700, 1536, writable=True)
        queue.submit(queue.place_at([header, data, status]))
        [used] = blk.collect()
        assert used.written == 1537
        assert blk.memory.read(data.gpa, data.length) == PATTERN[1536:3072]


def test_cve_2024_8612_used_length_is_what_was_written(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed read does not claim its buffer was filled: the driver would hand out old memory."""
    assert blk.ask(T_IN, 1 << 30, room=4096) == Answer(S_IOERR, 0, b"\xee" * 4096)
    assert blk.ask(99, 0, room=4096).written == 0

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    assert blk.ask(T_IN, 0, room=4096) == Answer(S_IOERR, 0, b"\xee" * 4096)


def test_cve_2026_45782_the_same_head_twice_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a request is in the ring, its head offered again breaks the driver, not the device."""
    monkeypatch.setattr(uring, "Ring", SlowRing)
    with BlkLab(tmp_path, SIZE, content=PATTERN, cache="none") as blk:
        blk.start(BLK_F_FLUSH)
        queue = blk.queues[0]
        request = queue.place([HEADER.pack(T_IN, 0, 0)], [512, 1])
        queue.submit(request)
        kick(blk)
        queue.submit(request)
        with pytest.raises(GuestError, match="in flight"):
            kick(blk)
        assert len(SlowRing.latest.flying) == 1
        blk.status = 0
        assert SlowRing.latest.flying == []


def test_cve_2022_26354_requests_before_a_broken_one_are_answered(blk: BlkLab) -> None:
    """A batch with a chain that is no request: those before it are done and given back."""
    blk.offer([HEADER.pack(T_OUT, 0, 0), b"w" * 512], [1])
    blk.offer([HEADER.pack(T_OUT, 0, 1), b"w" * 512], [1])
    blk.offer([b"short"], [1])
    blk.offer([HEADER.pack(T_OUT, 0, 2), b"w" * 512], [1])

    with pytest.raises(GuestError, match="block request of 5 bytes"):
        kick(blk)

    assert len(blk.queues[0].collect()) == 2
    assert blk.interrupts == [0]
    assert blk.image.read_bytes() == b"w" * 1024 + PATTERN[1024:]


def test_fc_5762_work_for_one_request_is_bounded(blk: BlkLab) -> None:
    """Thousands of ranges in one request are refused before the first is done."""
    ranges = SEGMENT.pack(0, 8, 0) * (MAX_RANGES + 1)

    assert blk.ask(T_DISCARD, 0, ranges).status == S_IOERR

    assert blk.image.read_bytes() == PATTERN


def test_vmd_6_9_001_errors_do_not_flood_the_log(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dying host disk is a few lines, however much the guest asks; requests out of range none."""

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for _ in range(50):
        blk.ask(T_IN, 1 << 30, room=512)
    assert blk.said == []
    monkeypatch.setattr(os, "preadv", fail)
    for _ in range(500):
        assert blk.ask(T_IN, 0, room=512).status == S_IOERR

    assert 1 <= len(blk.said) <= 20
    assert blk.said[0] == "read of 512 bytes at 0x0: Input/output error"


def test_ghsa_jmr4_the_guest_cannot_choose_the_format(blk: BlkLab) -> None:
    """A qcow2 header written by the guest is 512 bytes of its disk, now and after a restart."""
    header = b"QFI\xfb" + bytes(508)

    assert blk.ask(T_OUT, 0, header).status == S_OK

    blk.start(BLK_F_FLUSH)
    assert blk.ask(T_IN, 0, room=512).data == header
    assert blk.image.read_bytes()[:512] == header


def test_the_page_of_counters_tells_of_a_wait_for_the_disk(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the host is asked for something; not before, and not afterwards, well done or not."""
    seen: list[int] = []

    def slow() -> None:
        seen.append(blk.device.totals[BUSY])
        if len(seen) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(blk.disk, "flush", slow)
    for status in (S_OK, S_IOERR):
        assert blk.device.totals[BUSY] == 0
        assert blk.ask(T_FLUSH, 0).status == status
    assert seen == [1, 1]
    assert blk.device.totals[BUSY] == 0


def test_writes_beyond_the_end_do_not_grow_the_image(blk: BlkLab) -> None:
    """Vmd's raw images grow under a guest that writes past the end; ours do not."""
    for sector in (SIZE // 512, SIZE // 512 + 1000, 1 << 40):
        assert blk.ask(T_OUT, sector, b"w" * 512).status == S_IOERR

    assert blk.image.stat().st_size == SIZE
