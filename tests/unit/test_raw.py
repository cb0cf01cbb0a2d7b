"""devices.raw: raw images and block devices behind the Disk protocol."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError
from devices import raw
from devices.raw import Raw
from tests.loopdev import look_again, loop_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def open_raw() -> Iterator[Callable[..., Raw]]:
    """Return a function that opens a path as a disk; its descriptor is closed with the test."""
    opened: list[int] = []

    def open_(path: Path | str, flags: int = os.O_RDWR) -> Raw:
        opened.append(os.open(path, flags))
        return Raw(opened[-1])

    yield open_
    for fd in opened:
        os.close(fd)


@pytest.fixture
def disk(image: Path, open_raw: Callable[..., Raw]) -> Raw:
    return open_raw(image)


def pieces(data: bytearray | mmap.mmap, *lengths: int) -> list[memoryview]:
    """Cut memory into consecutive views of these lengths."""
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(data)[at : at + length])
        at += length
    return views


def pages(length: int) -> mmap.mmap:
    """Page-aligned memory."""
    return mmap.mmap(-1, length)


def holes(path: Path) -> int:
    """Bytes of a file that have no space."""
    status = path.stat()
    return status.st_size - 512 * status.st_blocks


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


def test_a_transfer_that_stops_goes_on_where_it_stopped(
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


def test_a_write_that_stops_goes_on_where_it_stopped(
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


# O_DIRECT


@pytest.fixture
def direct(image: Path, open_raw: Callable[..., Raw]) -> Raw:
    try:
        disk = open_raw(image, os.O_RDWR | os.O_DIRECT)
    except OSError as err:
        pytest.skip(f"{image.parent}: {err.strerror} with O_DIRECT")
    return disk


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


# Discard and zeroes


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

    assert sizes == [33 << 20, 512]
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


# Size


def test_size_and_rights_are_those_of_the_descriptor(
    image: Path, open_raw: Callable[..., Raw]
) -> None:
    """A disk is as large as its image, and writable if the descriptor is."""
    assert (open_raw(image).size, open_raw(image).readonly) == (SIZE, False)
    assert open_raw(image, os.O_RDONLY).readonly


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

    assert "truncate" in error.value.hint
    assert image.stat().st_size == SIZE


def test_a_readonly_image_is_not_grown(image: Path, open_raw: Callable[..., Raw]) -> None:
    """A read-only image can only be looked at again."""
    disk = open_raw(image, os.O_RDONLY)

    with pytest.raises(ConfigError, match="read-only"):
        disk.resize(2 * SIZE)

    disk.resize(0)


# Block devices


def test_a_block_device(image: Path, open_raw: Callable[..., Raw]) -> None:
    """Everything a file does, a block device does, by its own requests where they differ."""
    with loop_device(str(image)) as path:
        disk = open_raw(path)
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


def test_a_block_device_that_grew(image: Path, open_raw: Callable[..., Raw]) -> None:
    """A block device is resized by others; we look again."""
    with loop_device(str(image)) as path:
        disk = open_raw(path)
        with pytest.raises(ConfigError, match="a block device has the size it has"):
            disk.resize(2 * SIZE)
        os.truncate(image, 2 * SIZE)
        look_again(path)
        disk.resize(0)
        assert disk.size == 2 * SIZE


def test_zeroes_for_part_of_a_block(image: Path, open_raw: Callable[..., Raw]) -> None:
    """A device of 4 KiB blocks still gets its sectors zeroed, by writing them."""
    with loop_device(str(image), block_size=4096) as path:
        disk = open_raw(path)
        assert disk.granularity == 4096
        disk.write_zeroes(512, 1024, unmap=True)
        disk.flush()
        data = bytearray(4096)
        disk.read([memoryview(data)], 0, 4096)

    assert data == PATTERN[:512] + bytes(1024) + PATTERN[1536:4096]
