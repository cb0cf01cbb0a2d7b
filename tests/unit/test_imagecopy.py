"""vmm.imagecopy: what is read, what is written, and what is left out."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError
from vmm.imagecopy import (
    BASE,
    CHUNK,
    DATA,
    ZERO,
    Run,
    blocks,
    chunks,
    copy,
    copy_differing,
    pieces,
    together,
)
from vmm.progress import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 4096


class MemoryDisk:
    """A disk in memory that notes what is done to it."""

    def __init__(self, data: bytes, granularity: int = BLOCK) -> None:
        self.data, self.size, self.granularity = bytearray(data), len(data), granularity
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self.takes = 1 << 30  # bytes of one write

    def read(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        if self.error:
            raise self.error
        self.reads.append((offset, length))
        views[0][:] = self.data[offset : offset + length]
        return length

    def write(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        if self.error:
            raise self.error
        self.writes.append((offset, length))
        self.data[offset : offset + length] = views[0]
        return min(length, self.takes)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        assert unmap
        if self.error:
            raise self.error
        self.zeroed.append((offset, length))
        self.data[offset : offset + length] = bytes(length)


@pytest.fixture
def work() -> Work:
    """Work that shows nothing."""
    return Work("test", quiet=True)


def some(length: int, seed: int = 0) -> bytes:
    """Bytes with no zero among them."""
    rng = random.Random(seed)  # noqa: S311  a test
    return bytes(rng.choices(range(1, 256), k=length))


def run_copy(source: MemoryDisk, target: MemoryDisk, *runs: Run, fresh: bool = False) -> None:
    with Work("test", quiet=True) as work:
        copy(source, target, runs, work, fresh=fresh)


def test_data_is_copied_and_zeroes_are_left_out() -> None:
    """To a fresh disk nothing is written that is zeroes: runs that say so are not even read."""
    source = MemoryDisk(some(BLOCK) + bytes(2 * BLOCK) + some(BLOCK, 1) + bytes(4 * BLOCK))
    target = MemoryDisk(bytes(8 * BLOCK))

    run_copy(source, target, Run(0, 6 * BLOCK, DATA), Run(6 * BLOCK, 2 * BLOCK, ZERO), fresh=True)

    assert target.data == source.data
    assert target.writes == [(0, BLOCK), (3 * BLOCK, BLOCK)]
    assert (target.zeroed, source.reads) == ([], [(0, 6 * BLOCK)])


def test_zeroes_replace_what_is_there() -> None:
    """On a disk that holds something, zeroes are freed ranges; what no run names stays."""
    source = MemoryDisk(bytes(2 * BLOCK) + some(2 * BLOCK))
    target = MemoryDisk(some(6 * BLOCK, 1))
    before = bytes(target.data)

    run_copy(source, target, Run(0, 3 * BLOCK, DATA), Run(4 * BLOCK, BLOCK, ZERO))

    assert target.zeroed == [(0, 2 * BLOCK), (4 * BLOCK, BLOCK)]
    assert target.writes == [(2 * BLOCK, BLOCK)]
    assert target.data[3 * BLOCK : 4 * BLOCK] == before[3 * BLOCK : 4 * BLOCK]
    assert target.data[5 * BLOCK :] == before[5 * BLOCK :]


def test_zeroes_are_left_out_in_the_targets_blocks() -> None:
    """A cluster that holds one byte is written as a whole, in one piece."""
    source = MemoryDisk(bytes(65536 + 100) + b"x" + bytes(3 * 65536 - 101))
    target = MemoryDisk(bytes(4 * 65536), granularity=65536)

    run_copy(source, target, Run(0, 4 * 65536, DATA), fresh=True)

    assert target.writes == [(65536, 65536)]


def test_no_more_than_a_chunk_at_once() -> None:
    """Large runs are read in pieces; a signal need not wait for long."""
    length = 3 * CHUNK + 5 * BLOCK
    source, target = MemoryDisk(some(length)), MemoryDisk(bytes(length))

    run_copy(source, target, Run(BLOCK, length - BLOCK, DATA), fresh=True)

    assert target.data[BLOCK:] == source.data[BLOCK:]
    assert max(size for _, size in source.reads) == CHUNK


def test_a_size_that_is_no_whole_block() -> None:
    """The last piece is as short as it is."""
    source, target = MemoryDisk(some(BLOCK + 7)), MemoryDisk(bytes(BLOCK + 7))

    run_copy(source, target, Run(0, BLOCK + 7, DATA), fresh=True)

    assert target.data == source.data


@pytest.mark.parametrize("seed", range(8))
def test_any_runs_copy_all(seed: int) -> None:
    """Whatever the runs are, both disks are equal afterwards, and only blocks were written."""
    rng = random.Random(seed)  # noqa: S311  a test
    size = rng.randrange(1, 4 * CHUNK)
    parts, runs, at = [], [], 0
    while at < size:
        length = min(rng.choice((512, BLOCK, 3 * BLOCK, CHUNK)), size - at)
        kind = rng.choice((DATA, ZERO))
        parts.append(some(length) if kind == DATA and rng.random() < 0.6 else bytes(length))
        runs.append(Run(at, length, kind))
        at += length
    source, target = MemoryDisk(b"".join(parts)), MemoryDisk(some(size, 99))

    run_copy(source, target, *runs)

    assert target.data == source.data


def test_errors_say_where(work: Work) -> None:
    """Reading, writing, freeing: each names the byte; a short write is an error, too."""
    good, bad = MemoryDisk(some(2 * BLOCK)), MemoryDisk(bytes(2 * BLOCK))
    bad.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(HostError, match="cannot write at byte 4096: No space left on device"):
        run_copy(good, bad, Run(BLOCK, BLOCK, DATA))
    with pytest.raises(HostError, match="cannot write at byte 512: No space left"):
        run_copy(good, bad, Run(512, BLOCK, ZERO))
    with pytest.raises(HostError, match="cannot read at byte 4096: No space left"):
        run_copy(bad, good, Run(BLOCK, BLOCK, DATA))
    bad.error, bad.takes = None, 100
    with pytest.raises(HostError, match="at byte 0: it took 100 bytes of 4096"):
        run_copy(good, bad, Run(0, BLOCK, DATA))


# What differs between two bases


def differing(image: MemoryDisk, other: MemoryDisk | None, *runs: Run) -> None:
    with Work("test", quiet=True) as work:
        copy_differing(image, other, runs, work)


def test_only_what_differs_is_written() -> None:
    """In blocks of the image, and only within the runs."""
    data = some(8 * BLOCK)
    image, other = MemoryDisk(data), MemoryDisk(data)
    for at in (100, 3 * BLOCK, 7 * BLOCK):
        other.data[at] ^= 1

    differing(image, other, Run(0, 6 * BLOCK, BASE))

    assert image.writes == [(0, BLOCK), (3 * BLOCK, BLOCK)]
    assert image.data == data


@pytest.mark.parametrize("other", [None, 0, 2])
def test_behind_the_end_of_a_base_are_zeroes(other: int | None) -> None:
    """No base, or a short one, reads as zeroes there."""
    image = MemoryDisk(bytes(3 * BLOCK) + some(BLOCK))

    differing(image, None if other is None else MemoryDisk(bytes(other * BLOCK)),
              Run(0, 4 * BLOCK, BASE))  # fmt: skip

    assert image.writes == [(3 * BLOCK, BLOCK)]


# Arithmetic


def test_ranges_are_cut_where_blocks_are() -> None:
    """Chunks end at multiples of a block, blocks too; nothing is lost."""
    found = list(chunks(1000, 3 * CHUNK, BLOCK))
    assert found[0][0] == 1000
    assert sum(length for _, length in found) == 3 * CHUNK
    assert all((at + length) % BLOCK == 0 for at, length in found[:-1])
    assert list(chunks(0, 0, BLOCK)) == []
    assert list(chunks(CHUNK + 512, CHUNK + 1, CHUNK)) == [
        (CHUNK + 512, CHUNK - 512),
        (2 * CHUNK, 513),
    ]
    assert list(blocks(1000, 5000, BLOCK)) == [(0, 3096), (3096, 5000)]


def test_pieces_are_as_long_as_can_be() -> None:
    """Neighbouring blocks of one kind are one piece."""
    data = bytearray(bytes(2 * BLOCK) + some(2 * BLOCK) + bytes(10))

    assert list(pieces(data, 0, BLOCK)) == [
        (0, 2 * BLOCK, True),
        (2 * BLOCK, 4 * BLOCK, False),
        (4 * BLOCK, 4 * BLOCK + 10, True),
    ]
    assert list(pieces(bytearray(), 0, BLOCK)) == []


def test_layers_side_by_side() -> None:
    """Every change of kind in any of them is a cut; shorter ones end in zeroes."""
    one = [Run(0, 10, DATA), Run(10, 20, BASE)]
    two = [Run(0, 5, ZERO), Run(5, 10, DATA)]

    assert list(together(40, one, two)) == [
        (0, 5, (DATA, ZERO)),
        (5, 5, (DATA, DATA)),
        (10, 5, (BASE, DATA)),
        (15, 15, (BASE, ZERO)),
        (30, 10, (ZERO, ZERO)),
    ]
    assert list(together(7, one)) == [(0, 7, (DATA,))]
    assert list(together(3)) == [(0, 3, ())]
