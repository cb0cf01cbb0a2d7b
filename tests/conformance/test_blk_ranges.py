"""Block device: DISCARD and WRITE_ZEROES (virtio 1.2 §5.2.6)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    MAX_DISCARD,
    MAX_RANGES,
    MAX_ZEROES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_WRITE_ZEROES,
)
from tests.blklab import Answer, BlkLab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)
NR_SECTORS = SIZE // 512
CLEARS = (T_DISCARD, T_WRITE_ZEROES)


@pytest.fixture(params=["writeback", "none"])
def blk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlkLab]:
    """A device through the page cache, and one past it."""
    with BlkLab(tmp_path, SIZE, content=PATTERN, cache=request.param) as lab:
        lab.start(BLK_F_FLUSH)
        yield lab


def holes(path: Path) -> int:
    """Bytes of a file that have no space."""
    status = path.stat()
    return status.st_size - 512 * status.st_blocks


def cleared(*spans: tuple[int, int]) -> bytes:
    """Return what the image holds after these sectors became zeroes."""
    data = bytearray(PATTERN)
    for sector, count in spans:
        data[512 * sector : 512 * (sector + count)] = bytes(512 * count)
    return bytes(data)


def test_5_2_6_2_discard_frees_the_ranges(blk: BlkLab) -> None:
    """For discard the device MAY deallocate; here it does, every range of the request."""
    ranges = SEGMENT.pack(8, 16, 0) + SEGMENT.pack(128, 8, 0) + SEGMENT.pack(256, 0, 0)

    assert blk.ask(T_DISCARD, 0, ranges) == Answer(S_OK, 1, b"")

    assert holes(blk.image) == 24 * 512
    assert blk.image.read_bytes() == cleared((8, 16), (128, 8))


@pytest.mark.parametrize("flags", [0, SEGMENT_F_UNMAP])
@pytest.mark.parametrize(("sector", "count"), [(8, 16), (3, 1), (1, 40), (0, NR_SECTORS)])
def test_5_2_6_2_zeroes_are_read_after_write_zeroes(
    blk: BlkLab, flags: int, sector: int, count: int
) -> None:
    """After WRITE_ZEROES reads MUST return zeroes, whether unmap was set or clear."""
    assert blk.ask(T_WRITE_ZEROES, 0, SEGMENT.pack(sector, count, flags)) == Answer(S_OK, 1, b"")

    assert blk.image.read_bytes() == cleared((sector, count))


def test_only_unmap_frees_space(blk: BlkLab) -> None:
    """Without unmap the space stays the guest's; with it, it is free."""
    blk.ask(T_WRITE_ZEROES, 0, SEGMENT.pack(0, 128, 0))
    assert holes(blk.image) <= 0

    blk.ask(T_WRITE_ZEROES, 0, SEGMENT.pack(0, 128, SEGMENT_F_UNMAP))
    assert holes(blk.image) == 65536


@pytest.mark.parametrize("kind", CLEARS)
@pytest.mark.parametrize("flags", [2, 3, 1 << 31, 0xFFFF_FFFF])
def test_5_2_6_2_unknown_flags_are_unsupported(blk: BlkLab, kind: int, flags: int) -> None:
    """The device MUST answer UNSUPP if any unknown flag is set, and does nothing."""
    ranges = SEGMENT.pack(0, 8, flags)
    assert blk.ask(kind, 0, ranges).status == S_UNSUPP
    if kind == T_DISCARD:
        assert blk.ask(kind, 0, SEGMENT.pack(8, 8, 0) + ranges).status == S_UNSUPP

    assert blk.image.read_bytes() == PATTERN


def test_5_2_6_2_discard_with_unmap_is_unsupported(blk: BlkLab) -> None:
    """The device MUST answer UNSUPP to a discard whose unmap flag is set."""
    ranges = SEGMENT.pack(0, 8, SEGMENT_F_UNMAP)

    assert blk.ask(T_DISCARD, 0, ranges).status == S_UNSUPP

    assert blk.image.read_bytes() == PATTERN


@pytest.mark.parametrize("kind", CLEARS)
@pytest.mark.parametrize(
    ("sector", "count"),
    [(NR_SECTORS, 1), (NR_SECTORS - 1, 2), (1 << 55, 8), ((1 << 64) - 1, 2), (0, 0xFFFF_FFFF)],
)
def test_ranges_beyond_capacity_are_errors(blk: BlkLab, kind: int, sector: int, count: int) -> None:
    """A range that leaves the disk is an error, and the ranges before it are not done."""
    ranges = SEGMENT.pack(sector, count, 0)
    assert blk.ask(kind, 0, ranges).status == S_IOERR
    assert blk.ask(T_DISCARD, 0, SEGMENT.pack(0, 8, 0) + ranges).status == S_IOERR

    assert blk.image.read_bytes() == PATTERN


@pytest.mark.parametrize("kind", CLEARS)
@pytest.mark.parametrize("length", [0, 1, 15, 17, 31])
def test_5_2_6_1_data_is_whole_ranges(blk: BlkLab, kind: int, length: int) -> None:
    """Data MUST be a multiple of a range's 16 bytes, and not empty."""
    assert blk.ask(kind, 0, bytes(length)).status == S_IOERR


def test_the_limits_are_those_announced(tmp_path: Path) -> None:
    """max_..._seg and max_..._sectors are enforced: a request does not take for ever."""
    with BlkLab(tmp_path, 1 << 30) as blk:
        blk.start(BLK_F_FLUSH)
        for kind, most, nr_ranges in (
            (T_DISCARD, MAX_DISCARD, MAX_RANGES),
            (T_WRITE_ZEROES, MAX_ZEROES, 1),
        ):
            at = 36 if kind == T_DISCARD else 48
            assert blk.read_config(at, 4) == most // 512
            assert blk.read_config(at + 4, 4) == nr_ranges
            assert blk.ask(kind, 0, SEGMENT.pack(8, most // 512, 0)).status == S_OK
            assert blk.ask(kind, 0, SEGMENT.pack(8, most // 512 + 1, 0)).status == S_IOERR
            assert blk.ask(kind, 0, SEGMENT.pack(0, 8, 0) * nr_ranges).status == S_OK
            assert blk.ask(kind, 0, SEGMENT.pack(0, 8, 0) * (nr_ranges + 1)).status == S_IOERR


def test_data_for_the_driver_is_ignored(blk: BlkLab) -> None:
    """Room for data that these requests do not have stays as it was, and counts as such."""
    assert blk.ask(T_DISCARD, 0, SEGMENT.pack(0, 8, 0), room=8) == Answer(S_OK, 0, b"\xee" * 8)


def test_ranges_may_be_scattered(blk: BlkLab) -> None:
    """A range may lie across descriptors."""
    data = SEGMENT.pack(8, 8, 0) + SEGMENT.pack(24, 8, 0)

    answer = blk.ask_raw([HEADER.pack(T_DISCARD, 0, 0), data[:5], data[5:19], data[19:]], [1])

    assert answer == Answer(S_OK, 1, b"")
    assert blk.image.read_bytes() == cleared((8, 8), (24, 8))


def test_5_2_6_2_zeroes_are_stable_in_writethrough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WRITE_ZEROES is a write: a driver that cannot flush finds it on the medium."""
    synced: list[int] = []
    with BlkLab(tmp_path, SIZE, content=PATTERN) as blk:
        blk.start(0)
        monkeypatch.setattr(os, "fdatasync", synced.append)
        blk.ask(T_WRITE_ZEROES, 0, SEGMENT.pack(0, 8, 0))
        assert len(synced) == 1
        blk.ask(T_DISCARD, 0, SEGMENT.pack(0, 8, 0))
        assert len(synced) == 1
