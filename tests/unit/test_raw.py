"""devices.raw: transfers, flush and size of raw images and block devices."""

from __future__ import annotations

import errno
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError
from devices.raw import Raw
from tests.loopdev import look_again, loop_device
from tests.unit.raw_lab import PATTERN, SIZE, opened, pieces

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


# Transfers


def test_read_fills_views_in_order(disk: Raw) -> None:
    """A read scatters over views of any length."""
    memory = bytearray(4096)

    assert disk.read(pieces(memory, 100, 3900, 96), 1024, 4096) == 4096

    assert memory == PATTERN[1024 : 1024 + 4096]


def test_write_gathers_views_in_order(disk: Raw, image: Path) -> None:
    """A write takes bytes from views of any length, read-only ones too."""
    memory = bytearray(os.urandom(4096))
    views = [view.toreadonly() for view in pieces(memory, 1, 4000, 95)]

    assert disk.write(views, 8192, 4096) == 4096

    assert image.read_bytes() == PATTERN[:8192] + memory + PATTERN[8192 + 4096 :]


def test_a_read_past_the_end_tells_how_much_there_was(disk: Raw, image: Path) -> None:
    """An image cut short under us gives what it has."""
    os.truncate(image, 1536)

    assert disk.read(pieces(bytearray(4096), 512, 3584), 512, 4096) == 1024
    assert disk.read(pieces(bytearray(512), 512), 4096, 512) == 0


def test_fc_5485_a_transfer_that_stops_goes_on_where_it_stopped(
    disk: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial transfer is continued with views of its own: nothing is done twice or skipped."""
    calls: list[tuple[list[int], int]] = []
    preadv = os.preadv

    def some(fd: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append(([len(view) for view in views], offset))
        return preadv(fd, [views[0][:300]], offset)

    monkeypatch.setattr(os, "preadv", some)
    memory = bytearray(1000)
    views = pieces(memory, 300, 400, 300)

    assert disk.read(views, 0, 1000) == 1000

    assert memory == PATTERN[:1000]
    assert calls == [([300, 400, 300], 0), ([400, 300], 300), ([100, 300], 600), ([300], 700)]
    assert [len(view) for view in views] == [300, 400, 300]


def test_fc_5485_a_write_that_stops_goes_on_where_it_stopped(
    disk: Raw, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for writes, which stay stable to the end."""
    pwritev = os.pwritev
    flags_seen = set()

    def some(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.add(flags)
        return pwritev(fd, [views[0][:100]], offset, flags)

    monkeypatch.setattr(os, "pwritev", some)

    assert disk.write(pieces(bytearray(b"y" * 512), 250, 262), 512, 512, stable=True) == 512

    assert image.read_bytes()[:1536] == PATTERN[:512] + b"y" * 512 + PATTERN[1024:1536]
    assert flags_seen == {os.RWF_DSYNC}


def test_only_stable_writes_are_synchronous(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWF_DSYNC makes a write as good as flushed; without it, it is the page cache's."""
    flags_seen = []

    def watch(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        return 512

    monkeypatch.setattr(os, "pwritev", watch)
    disk.write(pieces(bytearray(512), 512), 0, 512)
    disk.write(pieces(bytearray(512), 512), 0, 512, stable=True)

    assert flags_seen == [0, os.RWF_DSYNC]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_an_error_of_the_host_is_the_callers(
    disk: Raw, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """OSError comes through; with the page cache EINVAL, too, is an error and not an alignment."""

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        disk.read(pieces(bytearray(512), 512), 0, 512)


def test_a_full_disk(tmp_path: Path, disk: Raw) -> None:
    """A write that finds no room raises, and what was there before stays."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, previous[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            disk.write(pieces(bytearray(512), 512), SIZE, 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)

    assert os.fstat(disk.fd).st_size == SIZE


# Flush


def test_flush_reaches_the_disk(disk: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is fdatasync(2) of the image, neither more nor less."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)

    disk.flush()

    assert flushed == [disk.fd]


def test_a_failed_flush_is_not_followed_by_a_good_one(
    disk: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a page it lost once: from then on no flush may claim success."""
    sync = os.fdatasync

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        disk.flush()
    monkeypatch.setattr(os, "fdatasync", sync)

    with pytest.raises(OSError, match="data was lost before") as error:
        disk.flush()
    assert error.value.errno == errno.EIO


# Size


def test_size_and_rights_are_those_of_the_descriptor(image: Path, disk: Raw) -> None:
    """A disk is as large as its image, and writable if the descriptor is."""
    assert (disk.size, disk.readonly) == (SIZE, False)
    with opened(image, os.O_RDONLY) as other:
        assert other.readonly


def test_an_image_grows_on_demand(disk: Raw, image: Path) -> None:
    """Growing makes a sparse tail of zeroes."""
    disk.resize(3 * SIZE)

    assert (disk.size, image.stat().st_size) == (3 * SIZE, 3 * SIZE)
    assert image.read_bytes()[SIZE:] == bytes(2 * SIZE)


def test_an_image_that_somebody_grew(disk: Raw, image: Path) -> None:
    """Without a size, the disk takes the one that the image has now, smaller or larger."""
    for size in (2 * SIZE, SIZE // 2):
        os.truncate(image, size)
        disk.resize(0)
        assert disk.size == size


def test_an_image_is_not_cut(disk: Raw, image: Path) -> None:
    """Shrinking loses data under a running guest; the message says how to do it all the same."""
    with pytest.raises(ConfigError, match=f"the image has {SIZE} bytes already") as error:
        disk.resize(SIZE - 512)

    assert "image resize --shrink" in error.value.hint
    assert image.stat().st_size == SIZE


def test_a_readonly_image_is_not_grown(image: Path) -> None:
    """A read-only image can only be looked at again."""
    with opened(image, os.O_RDONLY) as disk:
        with pytest.raises(ConfigError, match="read-only"):
            disk.resize(2 * SIZE)
        disk.resize(0)


# Block devices


def test_a_block_device(image: Path) -> None:
    """Everything a file does, a block device does, by its own requests where they differ."""
    with loop_device(str(image)) as path, opened(path) as disk:
        assert (disk.size, disk.readonly, disk.granularity) == (SIZE, False, 512)
        memory = bytearray(512)
        assert disk.read([memoryview(memory)], 1024, 512) == 512
        assert memory == PATTERN[1024:1536]
        disk.write([memoryview(b"w" * 512)], 1024, 512, stable=True)
        disk.write_zeroes(2048, 512, unmap=False)
        disk.write_zeroes(4096, 65536, unmap=True)
        disk.flush()
        disk.discard(131072 + 100, 65536)
        disk.discard(100, 300)
        data = bytearray(SIZE)
        disk.read([memoryview(data)], 0, SIZE)

    expected = bytearray(PATTERN)
    expected[1024:1536] = b"w" * 512
    expected[2048:2560] = bytes(512)
    expected[4096 : 4096 + 65536] = bytes(65536)
    assert data[: 131072 + 100] == expected[: 131072 + 100]
    assert data[131072 + 65536 + 512 :] == expected[131072 + 65536 + 512 :]


def test_a_block_device_that_grew(image: Path) -> None:
    """A block device is resized by others; we look again."""
    with loop_device(str(image)) as path, opened(path) as disk:
        with pytest.raises(ConfigError, match="a block device has the size it has"):
            disk.resize(2 * SIZE)
        os.truncate(image, 2 * SIZE)
        look_again(path)
        disk.resize(0)
        assert disk.size == 2 * SIZE
