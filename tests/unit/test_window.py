"""The window on the page cache: what it serves, what it leaves, and pages that cannot be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from devices import window
from devices.raw import Raw
from devices.window import MOST, NR_PIECES, PIECE, WORTHWHILE
from tests.blklab import record_calls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
CONTENT = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Raw]:
    """An image with a window, nothing mapped."""
    (tmp_path / "disk.img").write_bytes(CONTENT)
    fd = os.open(tmp_path / "disk.img", os.O_RDWR)
    raw = Raw(fd)
    raw.attempts()
    if raw.window is None:
        pytest.skip("no window on files below the directory of temporary files")
    yield raw
    raw.finish()
    os.close(fd)


def read(disk: Raw, offset: int, length: int = 512) -> bytes:
    """Read by the attempt; what it did not do is missing."""
    buffer = bytearray(length)
    got = disk.attempts()[0]([memoryview(buffer)], offset)
    return bytes(buffer[: max(got, 0)])


def write(disk: Raw, offset: int, data: bytes) -> int:
    return disk.attempts()[1]([memoryview(data)], offset)


def warm(disk: Raw, offset: int = 0) -> None:
    """Have the piece there mapped."""
    for _ in range(WORTHWHILE):
        read(disk, offset)
    assert disk.window is not None
    assert offset // PIECE in disk.window.pieces


def test_a_piece_is_mapped_where_there_is_traffic(
    disk: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it is worthwhile; then transfers take no system call."""
    calls = record_calls(monkeypatch, "preadv", "pwritev")
    warm(disk)
    assert calls == ["preadv"] * WORTHWHILE
    assert read(disk, 1000) == CONTENT[1000:1512]
    assert write(disk, 2048, b"x" * 1024) == 1024
    assert read(disk, 2048, 1024) == b"x" * 1024
    assert len(calls) == WORTHWHILE
    assert os.pread(disk.fd, 1024, 2048) == b"x" * 1024


def test_both_ways_see_each_others_data(disk: Raw) -> None:
    """It is one page cache."""
    warm(disk)
    os.pwrite(disk.fd, b"system call", 4096)
    assert read(disk, 4096, 11) == b"system call"
    write(disk, 4096, b"window")
    assert os.pread(disk.fd, 11, 4096) == b"window call"


def test_what_the_window_leaves(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large transfers, several views, none, what ends outside of the piece."""
    warm(disk)
    calls = record_calls(monkeypatch, "preadv")
    buffer = memoryview(bytearray(2 * MOST))
    attempt = disk.attempts()[0]
    assert attempt([buffer[: MOST + 512]], 0) == MOST + 512
    assert attempt([buffer[:512], buffer[512:1024]], 0) == 1024
    assert attempt([], 0) == 0
    assert attempt([buffer[:512]], SIZE - 256) == 256
    assert len(calls) == 4
    assert attempt([buffer[:MOST]], 0) == MOST
    assert len(calls) == 4


def test_a_file_that_grows(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind the old end is served, too, once there is traffic."""
    warm(disk)
    os.ftruncate(disk.fd, 2 * SIZE)
    os.pwrite(disk.fd, b"new", SIZE)
    assert read(disk, SIZE, 3) == b"new"
    warm(disk, SIZE)
    calls = record_calls(monkeypatch, "preadv")
    assert read(disk, SIZE, 3) == b"new"
    assert not calls


def test_the_oldest_piece_gives_way(disk: Raw) -> None:
    """There is an end to what is mapped."""
    os.ftruncate(disk.fd, (NR_PIECES + 2) * PIECE)
    for number in range(NR_PIECES + 2):
        warm(disk, number * PIECE)
    assert disk.window is not None
    assert list(disk.window.pieces) == list(range(2, NR_PIECES + 2))


def test_a_file_that_is_cut_short(disk: Raw) -> None:
    """The system call tells; nothing is mapped any more, and later all is as before."""
    warm(disk)
    os.ftruncate(disk.fd, 4096)
    assert read(disk, 8192) == b""
    assert disk.window is not None
    assert not disk.window.pieces
    assert read(disk, 0) == CONTENT[:512]
    os.ftruncate(disk.fd, SIZE)
    warm(disk)
    assert read(disk, 8192) == bytes(512)


def test_a_write_where_no_page_can_be_had(disk: Raw) -> None:
    """The system call does it."""
    warm(disk)
    os.ftruncate(disk.fd, 4096)
    assert write(disk, 8192, b"y" * 512) == 512
    assert os.pread(disk.fd, 512, 8192) == b"y" * 512


def test_a_read_only_image(tmp_path: Path) -> None:
    """It has a window to read only."""
    (tmp_path / "disk.img").write_bytes(CONTENT)
    fd = os.open(tmp_path / "disk.img", os.O_RDONLY)
    disk = Raw(fd)
    warm(disk)
    assert read(disk, 512) == CONTENT[512:1024]
    with pytest.raises(OSError, match="Bad file descriptor"):
        write(disk, 0, b"z")
    disk.finish()
    os.close(fd)


def test_who_has_no_window(tmp_path: Path) -> None:
    """Neither what is no file, nor a file past the page cache."""
    (tmp_path / "disk.img").write_bytes(CONTENT)
    ends = os.pipe()
    assert not window.suits(ends[0])
    for fd in ends:
        os.close(fd)
    try:
        fd = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_DIRECT)
    except OSError as err:
        pytest.skip(f"no O_DIRECT here: {err.strerror}")
    disk = Raw(fd)
    disk.attempts()
    assert disk.window is None
    os.close(fd)


ELSEWHERE = """
import mmap, os, sys, tempfile
from devices import buserror
buserror.install()
with tempfile.TemporaryFile() as file:
    file.truncate(8192)
    view = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    view[4096]
print("survived")
"""


def test_a_bus_error_elsewhere_is_fatal() -> None:
    """Only what is guarded is mended."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], check=False, stdout=subprocess.PIPE, timeout=100
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, b"")


# Spots: what a request looks up.


def test_spots_of_a_raw_image_are_its_pieces(disk: Raw) -> None:
    """There are none before there is a piece, and none of one that is not mapped any more."""
    assert disk.window is not None
    spots = disk.window.spots
    assert not spots[0]
    assert not dict(spots)  # what is nowhere is looked for again
    warm(disk)
    assert bytes(spots[0]) == CONTENT
    assert list(spots) == [0]
    disk.window.clear()
    assert not dict(spots)
    assert not spots[0]


def test_spots_of_blocks(disk: Raw) -> None:
    """They are wherever `find` says, as long as that is in a piece, and as far as the file goes."""
    assert disk.window is not None
    warm(disk)
    os.ftruncate(disk.fd, SIZE - 1024)
    disk.window.clear()
    warm(disk)
    places = {7: 4096, 8: SIZE - 4096, 9: -2, 10: PIECE}
    disk.window.divide(12, places.__getitem__)
    spots = disk.window.spots
    assert bytes(spots[7]) == CONTENT[4096:8192]
    assert bytes(spots[8]) == CONTENT[-4096:-1024]
    assert not spots[9]
    assert not spots[10]
    assert list(spots) == [7, 8]
    places[7] = 8192  # whoever moves a block forgets its spot
    assert bytes(spots.pop(7)) == CONTENT[4096:8192]
    assert bytes(spots[7]) == CONTENT[8192:12288]


def test_spots_are_forgotten_before_a_piece_is_unmapped(disk: Raw) -> None:
    """Of any piece: which one they are in is not remembered."""
    assert disk.window is not None
    os.ftruncate(disk.fd, (NR_PIECES + 1) * PIECE)
    for number in range(NR_PIECES):
        warm(disk, number * PIECE)
    assert disk.window.spots[1]
    warm(disk, NR_PIECES * PIECE)
    assert not dict(disk.window.spots)


def test_no_more_spots_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it begins anew."""
    monkeypatch.setattr(window, "MOST_SPOTS", 3)
    spots = window.Spots(9, lambda number: memoryview(bytes((number,))))
    for number in range(8):
        assert bytes(spots[number]) == bytes((number,))
        assert len(spots) <= 3
    assert list(spots) == [6, 7]


def test_neighbours_that_were_done_together_are_traffic_as_well(disk: Raw) -> None:
    """Else a sequential driver would never have a window."""
    assert disk.window is not None
    views = [memoryview(bytearray(512)) for _ in range(16)]
    for _ in range(WORTHWHILE // 16):
        assert not disk.window.pieces
        assert disk.read(views, 0, 16 * 512) == 16 * 512
    assert list(disk.window.pieces) == [0]
    piece = disk.window.pieces[0]
    for _ in range(WORTHWHILE):  # what it does not serve, either, does not have it mapped anew
        disk.read(views, 0, 16 * 512)
    assert disk.window.pieces[0] is piece


def test_large_writes_are_no_traffic(disk: Raw) -> None:
    """Where they do not use the window."""
    assert disk.window is not None
    disk.window.most_written = window.MOST_WRITTEN
    data = bytes(2 * window.MOST_WRITTEN)
    for _ in range(WORTHWHILE):
        assert disk.write([memoryview(data)], 0, len(data)) == len(data)
    assert not disk.window.pieces
