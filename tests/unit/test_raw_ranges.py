"""devices.raw: discarding and zeroing, in whatever way a file system can."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from devices import raw
from devices.raw import Raw
from tests.loopdev import loop_device
from tests.unit.raw_lab import PATTERN, SIZE, holes, opened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[Raw]:
    with opened(image) as disk:
        yield disk


def test_discard_frees_space(disk: Raw, image: Path) -> None:
    """The blocks go back to the file system, the size stays."""
    disk.discard(65536, 131072)

    assert holes(image) == 131072
    assert image.stat().st_size == SIZE
    assert image.read_bytes()[:65536] == PATTERN[:65536]


def test_an_image_that_cannot_discard_keeps_its_data(
    disk: Raw, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discard is a hint; where it cannot be taken nothing happens, and it is asked for once."""
    calls = refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)

    disk.discard(0, 4096)
    disk.discard(0, 4096)

    assert calls == [raw._PUNCH_HOLE]
    assert image.read_bytes() == PATTERN


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (512, 512), (4096, 65536), (1024, 9728)])
def test_zeroes_are_zeroes(disk: Raw, image: Path, unmap: bool, offset: int, length: int) -> None:
    """Whatever the file system does about it, the range reads as zeroes and the rest does not."""
    disk.write_zeroes(offset, length, unmap=unmap)

    expected = bytearray(PATTERN)
    expected[offset : offset + length] = bytes(length)
    assert image.read_bytes() == expected


def test_zeroes_with_unmap_free_space_and_without_keep_it(disk: Raw, image: Path) -> None:
    """With unmap a hole is enough; without it the driver wants the space to stay its own."""
    disk.write_zeroes(0, 65536, unmap=False)
    assert holes(image) <= 0

    disk.write_zeroes(0, 65536, unmap=True)
    assert holes(image) == 65536


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_zeroes_are_written_where_nothing_else_works(
    disk: Raw, image: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, number: int
) -> None:
    """Without fallocate(2), or for parts of blocks, zeroes are written."""
    refuse_fallocate(monkeypatch, number)

    disk.write_zeroes(512, SIZE - 1024, unmap=unmap)

    assert image.read_bytes() == PATTERN[:512] + bytes(SIZE - 1024) + PATTERN[-512:]


def test_many_zeroes_are_written_in_few_calls(
    disk: Raw, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback repeats one page of zeroes, and ends where it should."""
    refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)
    sizes = []
    write = os.pwritev

    def watch(fd: int, views: Sequence[memoryview], offset: int, flags: int) -> int:
        sizes.append(sum(map(len, views)))
        return write(fd, views, offset, flags)

    monkeypatch.setattr(os, "pwritev", watch)
    disk.resize(40 << 20)

    disk.write_zeroes(0, (33 << 20) + 512, unmap=False)

    assert sizes == [(33 << 20) + 512]
    assert image.stat().st_size == 40 << 20


def test_a_refusal_of_one_way_is_remembered(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file system cannot do is not asked of it for every request."""
    calls = refuse_fallocate(monkeypatch, errno.EOPNOTSUPP)

    for _ in range(3):
        disk.write_zeroes(0, 512, unmap=True)

    assert calls == [raw._PUNCH_HOLE, raw._ZERO_RANGE]


def test_no_space_for_zeroes_is_an_error(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """An errno that another way would not avoid comes through."""
    refuse_fallocate(monkeypatch, errno.ENOSPC)

    with pytest.raises(OSError, match="No space left"):
        disk.write_zeroes(0, 512, unmap=False)


def test_nothing_to_clear(disk: Raw, image: Path) -> None:
    """Ranges of no length are done at once."""
    disk.discard(512, 0)
    disk.write_zeroes(512, 0, unmap=True)

    assert image.read_bytes() == PATTERN


def refuse_fallocate(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Make fallocate(2) fail; return the list of the modes it is called with."""
    modes: list[int] = []

    class Libc:
        @staticmethod
        def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
            modes.append(mode)
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(raw, "_libc", Libc)
    return modes


def test_zeroes_for_part_of_a_block(image: Path) -> None:
    """A device of 4 KiB blocks still gets its sectors zeroed, by writing them."""
    with loop_device(str(image), block_size=4096) as path, opened(path) as disk:
        assert disk.granularity == 4096
        disk.write_zeroes(512, 1024, unmap=True)
        disk.flush()
        data = bytearray(4096)
        disk.read([memoryview(data)], 0, 4096)

    assert data == PATTERN[:512] + bytes(1024) + PATTERN[1536:4096]
