"""Block device: many requests at once — merged, bounded, in order, and each with its own result."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from devices.blkreq import BLK_F_FLUSH, HEADER, S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
from devices.blkserve import BATCH
from devices.features import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
)
from devices.inflight import inflight_bytes
from devices.vioblk import BUDGET
from tests.blklab import Answer, BlkLab, record_calls
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SIZE = 4 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def blk(tmp_path: Path) -> Iterator[BlkLab]:
    with BlkLab(tmp_path, SIZE, content=PATTERN) as lab:
        lab.start(BLK_F_FLUSH)
        yield lab


def read(blk: BlkLab, sector: int, length: int = 512) -> None:
    """Offer a read."""
    blk.offer([HEADER.pack(T_IN, 0, sector)], [length, 1])


def write(blk: BlkLab, sector: int, data: bytes) -> None:
    """Offer a write."""
    blk.offer([HEADER.pack(T_OUT, 0, sector), data], [1])


def good(sector: int, length: int = 512) -> Answer:
    return Answer(S_OK, length + 1, PATTERN[512 * sector : 512 * sector + length])


# Merging


def test_reads_that_follow_each_other_are_one_call(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours on the disk, popped together, cost one preadv; each gets its own bytes."""
    for sector in range(8, 24):
        read(blk, sector)
    calls = record_calls(monkeypatch, "preadv")

    assert blk.answers() == [good(sector) for sector in range(8, 24)]

    assert calls == ["preadv"]


def test_writes_that_follow_each_other_are_one_call(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for writes, whatever their lengths."""
    data = os.urandom(3584)
    write(blk, 2, data[:512])
    write(blk, 3, data[512:2560])
    write(blk, 7, data[2560:])
    calls = record_calls(monkeypatch, "pwritev")

    assert blk.answers() == [Answer(S_OK, 1, b"")] * 3

    assert calls == ["pwritev"]
    assert blk.image.read_bytes() == PATTERN[:1024] + data + PATTERN[4608:]


def test_only_neighbours_are_merged(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap, a step back, the other direction, or a flush between them ends a run."""
    read(blk, 0)
    read(blk, 2)  # gap
    read(blk, 1)  # back
    write(blk, 2, b"w" * 512)  # other direction
    write(blk, 3, b"w" * 512)
    blk.offer([HEADER.pack(T_FLUSH, 0, 0)], [1])
    write(blk, 4, b"w" * 512)
    read(blk, 5)
    calls = record_calls(monkeypatch, "preadv", "pwritev", "fdatasync")

    answers = blk.answers()

    assert [answer.status for answer in answers] == [S_OK] * 8
    expected = ["preadv", "preadv", "preadv", "pwritev", "fdatasync", "pwritev", "preadv"]
    assert calls == expected


def test_a_read_after_a_write_of_the_same_batch_sees_it(blk: BlkLab) -> None:
    """Requests are done in the order they came."""
    write(blk, 7, b"1" * 512)
    read(blk, 7)
    write(blk, 7, b"2" * 512)
    read(blk, 7)

    answers = blk.answers()

    assert [answer.data for answer in answers] == [b"", b"1" * 512, b"", b"2" * 512]


def test_a_run_fits_one_system_call(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes 1024 views at once: a run ends before it would have more."""
    views: list[int] = []
    preadv = os.preadv

    def watch(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        views.append(len(buffers))
        return preadv(fd, buffers, offset)

    [queue] = blk.start(F_INDIRECT_DESC)
    for sector in range(0, 2 * BATCH, 2):
        blk.offer([HEADER.pack(T_IN, 0, sector)], [1024 // 64] * 64 + [1])
    monkeypatch.setattr(os, "preadv", watch)

    assert blk.answers() == [good(sector, 1024) for sector in range(0, 2 * BATCH, 2)]

    assert max(views) <= 1024
    assert len(views) == 2
    assert queue.outstanding == 0


# Faults inside a run


def test_an_error_hits_only_the_request_it_belongs_to(
    blk: BlkLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the host cannot read one sector of a run, only its request fails."""
    preadv = os.preadv

    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= 5 * 512 < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    for sector in range(4, 8):
        read(blk, sector)
    monkeypatch.setattr(os, "preadv", fail)

    answers = blk.answers()

    bad = Answer(S_IOERR, 0, b"\xee" * 512)
    assert answers == [good(4), bad, good(6), good(7)]
    assert blk.said == ["read of 512 bytes at 0xa00: Input/output error"]


def test_a_full_disk_inside_a_run(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that find room are done, once and where they belong; only the others fail."""
    pwritev = os.pwritev
    full_from = 3 * 512

    def fill(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        data = b"".join(buffers)[: max(full_from - offset, 0)]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(fd, [data], offset, flags)

    for i in range(4):
        write(blk, i, bytes([65 + i]) * 512)
    monkeypatch.setattr(os, "pwritev", fill)

    assert [answer.status for answer in blk.answers()] == [S_OK, S_OK, S_OK, S_IOERR]

    assert blk.image.read_bytes() == b"A" * 512 + b"B" * 512 + b"C" * 512 + PATTERN[1536:]
    [line] = blk.said
    assert line.startswith("write of 512 bytes at 0x600: No space left on device (the host's file")


def test_an_image_that_shrank_inside_a_run(blk: BlkLab) -> None:
    """Requests before the new end succeed; the one across it tells how much it got."""
    os.truncate(blk.image, 5 * 512 + 100)
    for sector in range(3, 7):
        read(blk, sector)

    answers = blk.answers()

    assert answers[:2] == [good(3), good(4)]
    assert answers[2] == Answer(S_IOERR, 100, good(5).data[:100] + b"\xee" * 412)
    assert answers[3] == Answer(S_IOERR, 0, b"\xee" * 512)
    assert blk.said[0] == "read of 512 bytes at 0xa00: the image has shrunk to 2660 bytes"


# Turns, calls and kicks


def test_a_batch_is_given_back_with_one_call(blk: BlkLab) -> None:
    """One interrupt for each batch, not for each request."""
    for sector in range(BATCH):
        read(blk, 3 * sector)

    blk.answers()

    assert blk.interrupts == [0]


def test_the_drivers_wish_for_silence_is_kept(blk: BlkLab) -> None:
    """No call where the driver suppressed them, with and without EVENT_IDX."""
    for features in (0, F_EVENT_IDX):
        [queue] = blk.start(features)
        blk.interrupts.clear()
        queue.disable_calls()
        read(blk, 0)
        assert len(blk.answers()) == 1
        assert blk.interrupts == []


def test_cve_2019_3900_a_budget_ends_a_turn(blk: BlkLab) -> None:
    """Who asks for much is served in turns, so that others get theirs: nothing is lost."""
    length = 128 << 10
    nr_requests = 2 * BUDGET // length
    blk.device.setting("resize", 64 << 20)
    [queue] = blk.start(F_INDIRECT_DESC, arena_bytes=12 << 20)
    for i in range(nr_requests):
        read(blk, 256 * i, length)
    live = blk.registers.transport.live[0]
    assert live is not None
    blk.scheduled.clear()

    turns = 1
    while blk.device.kick(0, live):
        turns += 1

    assert turns == 3  # two that reach the budget, and one that finds nothing
    assert len(queue.collect()) == nr_requests


def test_every_queue_serves_any_request(tmp_path: Path) -> None:
    """With MQ a request may come on any queue, and is answered there."""
    with BlkLab(tmp_path, SIZE, content=PATTERN, queues=4) as blk:
        blk.start(1 << 12)
        for index in range(4):
            blk.offer([HEADER.pack(T_IN, 0, index)], [512, 1], queue=index)
        for index in range(4):
            assert blk.answers(index) == [good(index)]
        assert blk.interrupts == [0, 1, 2, 3]


def test_in_order_holds(blk: BlkLab) -> None:
    """With IN_ORDER, used entries come in the order of the requests, errors among them."""
    for features in (0, F_IN_ORDER):
        [queue] = blk.start(features)
        sectors = [0, 1, 1 << 40, 2, 3, 9, SIZE // 512, 4]
        tokens = [blk.offer([HEADER.pack(T_IN, 0, sector)], [512, 1]) for sector in sectors]
        assert [used.token for used in blk.collect()] == tokens
        assert queue.outstanding == 0


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_packed_rings(tmp_path: Path, cache: str) -> None:
    """The device does not know the layout of its queues."""
    with BlkLab(tmp_path, SIZE, content=PATTERN, packed=True, cache=cache) as blk:
        blk.start(F_RING_PACKED | F_INDIRECT_DESC | BLK_F_FLUSH)
        data = os.urandom(1024)
        assert blk.ask(T_OUT, 5, data) == Answer(S_OK, 1, b"")
        assert blk.ask(T_IN, 5, room=1024) == Answer(S_OK, 1025, data)


# What a killed predecessor left


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_spdk_3766_requests_of_a_killed_predecessor_are_done(tmp_path: Path, cache: str) -> None:
    """Chains that were popped and never given back are served first by the next process."""
    area = memoryview(mmap.mmap(-1, inflight_bytes(256, packed=False)))
    with BlkLab(tmp_path, SIZE, content=PATTERN, cache=cache, inflight=area) as killed:
        [queue] = killed.start(BLK_F_FLUSH)
        for sector in range(80):
            read(killed, 2 * sector)
        live = killed.registers.transport.live[0]
        assert live is not None
        assert len(live.pop_batch(50)) == 50  # and here it was killed

    with BlkLab(
        tmp_path, SIZE, content=PATTERN, cache=cache, inflight=area, memory=killed.memory
    ) as blk:
        assert blk.negotiate(BLK_F_FLUSH | F_VERSION_1)
        assert blk.enable(0, queue)
        blk.queues = [queue]
        blk.status = READY
        answers = blk.answers()

    assert sorted(answers) == sorted(good(2 * sector) for sector in range(80))
