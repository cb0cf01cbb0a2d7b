"""devices.raw with O_DIRECT: what is aligned goes to the disk, the rest through a buffer."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.raw import Raw
from tests.unit.raw_lab import PATTERN, SIZE, opened, pages, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def direct(image: Path) -> Iterator[Raw]:
    try:
        with opened(image, os.O_RDWR | os.O_DIRECT) as disk:
            yield disk
    except OSError as err:
        pytest.skip(f"{image.parent}: {err.strerror} with O_DIRECT")


def test_aligned_transfers_are_direct(direct: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned memory, offset and length go to the disk at once."""
    monkeypatch.setattr(Raw, "_bounce", None)
    memory = pages(8192)

    assert direct.read(pieces(memory, 4096, 4096), 4096, 8192) == 8192
    assert memory[:] == PATTERN[4096:12288]
    assert direct.write(pieces(memory, 4096), 0, 4096) == 4096


@pytest.mark.parametrize("skew", [1, 16, 512])
def test_unaligned_memory_goes_through_a_buffer(direct: Raw, image: Path, skew: int) -> None:
    """Where the kernel wants aligned memory and gets none, the bytes still arrive."""
    memory = pages(16384)
    view = memoryview(memory)[skew : skew + 4096]

    assert direct.read([view], 8192, 4096) == 4096
    assert view == PATTERN[8192 : 8192 + 4096]
    view[:] = b"z" * 4096
    assert direct.write([view.toreadonly()], 8192, 4096) == 4096
    assert image.read_bytes()[8192 : 8192 + 4096] == b"z" * 4096


@pytest.mark.parametrize(
    ("offset", "length"), [(777, 513), (0, 1), (4095, 2), (100, SIZE - 100), (4096, 8191)]
)
def test_unaligned_offsets_go_through_a_buffer(
    direct: Raw, image: Path, offset: int, length: int
) -> None:
    """What is part of a block can be read and written; its neighbours keep their bytes."""
    memory = pages(SIZE + 8)
    views = pieces(memory, 1, length - 1) if length > 1 else pieces(memory, 1)

    assert direct.read(views, offset, length) == length
    assert memory[:length] == PATTERN[offset : offset + length]
    memory[:length] = b"q" * length
    assert direct.write(views, offset, length, stable=True) == length

    assert image.read_bytes() == PATTERN[:offset] + b"q" * length + PATTERN[offset + length :]


def test_an_image_that_ends_inside_a_page_keeps_its_size(direct: Raw, image: Path) -> None:
    """The last sectors of an odd image are reachable, and writing them does not make it longer."""
    os.truncate(image, SIZE - 1024)
    view = memoryview(pages(4096))[1:513]

    assert direct.read([view], SIZE - 1536, 512) == 512
    assert view == PATTERN[SIZE - 1536 : SIZE - 1024]
    view[:] = b"e" * 512
    assert direct.write([view], SIZE - 1536, 512) == 512

    assert image.read_bytes() == PATTERN[: SIZE - 1536] + b"e" * 512


def test_a_buffered_read_ends_where_the_image_does(direct: Raw, image: Path) -> None:
    """Nothing is made up past the end, also where the buffer held something before."""
    direct.read([memoryview(pages(8192))[1:4097]], 0, 4096)
    os.truncate(image, 700)
    view = memoryview(pages(8192))[1:1025]

    assert direct.read([view], 512, 1024) == 188
    assert view == PATTERN[512:700] + bytes(836)
    assert direct.read([view], 4096, 512) == 0


def test_a_buffered_write_past_the_end_leaves_zeroes(direct: Raw, image: Path) -> None:
    """Between the old end and what is written are zeroes, not what the buffer held before."""
    direct.read([memoryview(pages(8192))[1:4097]], 0, 4096)
    os.truncate(image, 700)

    direct.write([memoryview(pages(4096))[1:101]], 1000, 100)

    assert image.read_bytes() == PATTERN[:700] + bytes(400)


def test_an_error_in_the_buffer_is_an_error(direct: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL makes us try; whatever comes then is the answer."""
    numbers = [errno.EINVAL, errno.EIO]

    def fail(*_: Any) -> int:
        number = numbers.pop(0)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        direct.read([memoryview(pages(4096))], 0, 4096)

    assert not numbers


def test_a_direct_image_loses_nothing_by_a_failed_flush(
    direct: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without page cache the writes reported their own errors, and a later flush may succeed."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        direct.flush()
    monkeypatch.setattr(os, "fdatasync", sync)

    direct.flush()
