"""Block device, device operation: what each request does (virtio 1.2 §5.2.6)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    MAX_BYTES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_FLUSH,
    T_FLUSH_OUT,
    T_GET_ID,
    T_IN,
    T_OUT,
)
from tests.blklab import Answer, BlkLab, record_calls
from tools.viodriver import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)
CACHES = ("writeback", "none")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., BlkLab]]:
    """Return a function that makes a device with these settings, its driver ready."""
    made: list[BlkLab] = []

    def make_(features: int = BLK_F_FLUSH, **settings: Any) -> BlkLab:
        lab = BlkLab(tmp_path, SIZE, content=PATTERN, **settings)
        made.append(lab)
        lab.start(features)
        return lab

    yield make_
    for lab in made:
        lab.__exit__(None, None, None)


@pytest.fixture(params=CACHES)
def blk(request: pytest.FixtureRequest, make: Callable[..., BlkLab]) -> BlkLab:
    """A device through the page cache, and one past it."""
    return make(cache=request.param)


# Reads and writes


def test_5_2_6_read(blk: BlkLab) -> None:
    """IN fills data with sectors; the used length is data and status."""
    assert blk.ask(T_IN, 2, room=1024) == Answer(S_OK, 1025, PATTERN[1024:2048])


def test_5_2_6_write(blk: BlkLab) -> None:
    """OUT stores data in sectors; the used length is the status alone."""
    assert blk.ask(T_OUT, 3, b"w" * 512) == Answer(S_OK, 1, b"")

    assert blk.image.read_bytes() == PATTERN[:1536] + b"w" * 512 + PATTERN[2048:]


def test_5_2_6_many_descriptors(blk: BlkLab) -> None:
    """Data may be scattered over descriptors of any length."""
    data = os.urandom(4096)

    written = blk.ask_raw([HEADER.pack(T_OUT, 0, 8), data[:1], data[1:700], data[700:]], [1])
    read = blk.ask_raw([HEADER.pack(T_IN, 0, 8)], [3, 4000, 93, 1])

    assert written == Answer(S_OK, 1, b"")
    assert read == Answer(S_OK, 4097, data)


def test_2_7_4_framing_means_nothing(blk: BlkLab) -> None:
    """Header and status are found by counting bytes, wherever descriptors begin and end."""
    header, data = HEADER.pack(T_OUT, 0, 1), b"f" * 512

    for readable in (
        [header + data],
        [header[:1], header[1:5], header[5:], data],
        [header[:10], header[10:] + data[:100], data[100:]],
        [bytes([byte]) for byte in header] + [data],
    ):
        assert blk.ask_raw(readable, [1]).status == S_OK
    header = HEADER.pack(T_IN, 0, 1)
    for writable in ([513], [512, 1], [100, 413], [1] * 200 + [313]):
        assert blk.ask_raw([header[:7], header[7:]], writable) == Answer(S_OK, 513, data)


def test_5_2_6_no_data(blk: BlkLab) -> None:
    """A read or write of nothing succeeds, even where the disk ends."""
    for kind in (T_IN, T_OUT):
        assert blk.ask(kind, SIZE // 512) == Answer(S_OK, 1, b"")


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SIZE // 512, 512),
        (SIZE // 512 - 1, 1024),
        ((1 << 64) - 1, 512),
        ((1 << 55) + 1, 512),  # × 512 it has 65 bits
        (1 << 54, 512),  # × 512 it is 2⁶³
    ],
)
def test_5_2_6_2_beyond_capacity(blk: BlkLab, sector: int, length: int) -> None:
    """A request that leaves the disk is an error, and neither reads nor makes anything."""
    assert blk.ask(T_IN, sector, room=length) == Answer(S_IOERR, 0, b"\xee" * length)
    assert blk.ask(T_OUT, sector, bytes(length)) == Answer(S_IOERR, 1, b"")

    assert blk.image.read_bytes() == PATTERN


def test_5_2_6_the_last_sector(blk: BlkLab) -> None:
    """The disk can be used to its end."""
    assert blk.ask(T_OUT, SIZE // 512 - 1, b"e" * 512).status == S_OK
    assert blk.ask(T_IN, SIZE // 512 - 2, room=1024).data == PATTERN[-1024:-512] + b"e" * 512


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_5_2_6_1_data_is_whole_sectors(blk: BlkLab, length: int) -> None:
    """The driver MUST use multiples of 512 bytes; anything else is an error."""
    assert blk.ask(T_IN, 0, room=length) == Answer(S_IOERR, 0, b"\xee" * length)
    assert blk.ask(T_OUT, 0, bytes(length)) == Answer(S_IOERR, 1, b"")

    assert blk.image.read_bytes() == PATTERN


def test_5_2_6_data_in_the_wrong_direction(blk: BlkLab) -> None:
    """A write with data for the driver, or a read with data of the driver's, is an error."""
    assert blk.ask(T_IN, 0, b"x" * 512, room=512).status == S_IOERR
    assert blk.ask(T_IN, 0, b"x" * 512).status == S_IOERR
    assert blk.ask(T_OUT, 0, b"x" * 512, room=512).status == S_IOERR

    assert blk.image.read_bytes() == PATTERN


def test_one_request_has_a_bound(make: Callable[..., BlkLab]) -> None:
    """More bytes than seg_max × size_max are refused: nobody waits that long for a register."""
    blk = make()
    blk.device.setting("resize", 2 * MAX_BYTES)
    header, gpa, piece = HEADER.pack(T_IN, 0, 0), 8 << 20, 1 << 20
    nr_pieces, rest = divmod(MAX_BYTES, piece)

    for length, status in ((rest, S_OK), (rest + 512, S_IOERR)):
        request = blk.queues[0].place([header], [1], indirect=False)
        first, last = request.segments
        data = [Segment(gpa, piece, writable=True)] * nr_pieces
        data.append(Segment(gpa, length, writable=True))
        blk.queues[0].submit(blk.queues[0].place_at([first, *data, last]))
        blk.collect()
        assert blk.memory.read(last.gpa, 1)[0] == status


# Flush


@pytest.mark.parametrize("kind", [T_FLUSH, T_FLUSH_OUT])
def test_5_2_6_flush(blk: BlkLab, kind: int) -> None:
    """FLUSH, also by its old name, succeeds; data in it, which it should not have, is ignored."""
    assert blk.ask(kind) == Answer(S_OK, 1, b"")
    assert blk.ask(kind, 0, b"x" * 16).status == S_OK
    assert blk.ask(kind, 0, room=16) == Answer(S_OK, 0, b"\xee" * 16)


def test_5_2_6_2_flush_syncs_the_image(
    make: Callable[..., BlkLab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completed flush has made the writes before it stable: the image was synced."""
    blk = make()
    order = record_calls(monkeypatch, "pwritev", "fdatasync")

    blk.offer([HEADER.pack(T_OUT, 0, 0), b"1" * 512], [1])
    blk.offer([HEADER.pack(T_FLUSH, 0, 0)], [1])
    blk.offer([HEADER.pack(T_OUT, 0, 1), b"2" * 512], [1])
    assert [answer.status for answer in blk.answers()] == [S_OK] * 3

    assert order == ["pwritev", "fdatasync", "pwritev"]


# GET_ID


@pytest.mark.parametrize(
    ("serial", "expected"),
    [("", bytes(20)), ("disk-7", b"disk-7" + bytes(14)), ("x" * 20, b"x" * 20)],
)
def test_5_2_6_get_id(make: Callable[..., BlkLab], serial: str, expected: bytes) -> None:
    """GET_ID gives the serial, padded with NUL; one of 20 bytes has no NUL."""
    assert make(serial=serial).ask(T_GET_ID, room=20) == Answer(S_OK, 21, expected)


def test_cve_2021_3546_get_id_is_clipped_to_the_buffer(make: Callable[..., BlkLab]) -> None:
    """A shorter buffer gets as much as it holds, a longer one is not filled up."""
    blk = make(serial="0123456789abcdefghij")

    assert blk.ask(T_GET_ID, room=4) == Answer(S_OK, 5, b"0123")
    assert blk.ask(T_GET_ID, room=22) == Answer(S_OK, 20, b"0123456789abcdefghij\xee\xee")
    assert blk.ask_raw([HEADER.pack(T_GET_ID, 0, 0)], [3, 17, 1]).data == b"0123456789abcdefghij"


# Unknown


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 9, 10, 12, 14, 15, 0x8000_0000, 0xFFFF_FFFF])
def test_5_2_6_unsupported(blk: BlkLab, kind: int) -> None:
    """What was not offered, SCSI commands and barriers of old among it, is UNSUPP."""
    assert blk.ask(kind, room=96) == Answer(S_UNSUPP, 0, b"\xee" * 96)
    assert blk.ask(kind, 0, b"x" * 512) == Answer(S_UNSUPP, 1, b"")

    assert blk.image.read_bytes() == PATTERN
