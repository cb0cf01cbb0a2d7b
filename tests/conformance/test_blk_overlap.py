"""Block device with cache: none: requests in flight together, and every way that can end.

The ring is a `SlowRing`. The real one is under `test_blk.py`, which runs everything with both
kinds of cache.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from devices import uring
from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    S_IOERR,
    S_OK,
    SEGMENT,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.features import F_INDIRECT_DESC, F_RING_RESET
from devices.virtio import CommonCfg
from tests.blklab import Answer, BlkLab, record_calls
from tests.slowring import SlowRing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def blk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlkLab]:
    monkeypatch.setattr(uring, "Ring", SlowRing)
    with BlkLab(tmp_path, SIZE, content=PATTERN, cache="none", queues=2) as lab:
        lab.start(BLK_F_FLUSH | F_RING_RESET, arena_bytes=1 << 20)
        yield lab


@pytest.fixture
def ring(blk: BlkLab) -> SlowRing:
    return SlowRing.latest


def read(blk: BlkLab, sector: int, length: int = 4096, *, queue: int = 0) -> int:
    return blk.offer([HEADER.pack(T_IN, 0, sector)], [length, 1], queue=queue)


def kick(blk: BlkLab, queue: int = 0) -> None:
    blk.schedule(queue)
    blk.serve()


def ready(blk: BlkLab) -> None:
    """The ring's descriptor is readable."""
    [callback] = blk.watched.values()
    callback(1)


def collect(blk: BlkLab, queue: int = 0) -> dict[int, Answer]:
    """What the driver has got back so far, by token."""
    return {used.token: blk._answer(queue, used) for used in blk.queues[queue].collect()}


def good(sector: int, length: int = 4096) -> Answer:
    return Answer(S_OK, length + 1, PATTERN[512 * sector : 512 * sector + length])


def test_requests_come_back_as_they_finish(blk: BlkLab, ring: SlowRing) -> None:
    """A batch is submitted together; each request is given back when it is done, not before."""
    first, second, third = read(blk, 0), read(blk, 64), read(blk, 128)
    kick(blk)
    assert len(ring.flying) == 3
    assert collect(blk) == {}

    ring.land()
    ready(blk)
    assert collect(blk) == {third: good(128)}
    assert blk.interrupts == [0]
    ring.land()
    ring.land()
    ready(blk)
    assert collect(blk) == {second: good(64), first: good(0)}
    assert blk.interrupts == [0, 0]


def test_neighbours_fly_together(blk: BlkLab, ring: SlowRing) -> None:
    """Requests that follow each other on the disk are one entry of the ring."""
    tokens = [read(blk, 8 * i) for i in range(4)]
    kick(blk)
    assert len(ring.flying) == 1

    ring.land()
    ready(blk)

    assert collect(blk) == {token: good(8 * i) for i, token in enumerate(tokens)}


def test_a_flush_does_not_wait_for_what_it_need_not_cover(blk: BlkLab, ring: SlowRing) -> None:
    """A flush covers writes that were reported before it; one in flight may finish later."""
    slow = blk.offer([HEADER.pack(T_OUT, 0, 0), b"w" * 4096], [1])
    flush = blk.offer([HEADER.pack(T_FLUSH, 0, 0)], [1])
    kick(blk)

    ring.land()
    ready(blk)
    assert collect(blk) == {flush: Answer(S_OK, 1, b"")}
    ring.land()
    ready(blk)
    assert collect(blk) == {slow: Answer(S_OK, 1, b"")}


def test_cve_2020_16843_more_than_fit_go_on_when_there_is_room(blk: BlkLab, ring: SlowRing) -> None:
    """No more are in flight than the ring has entries; the rest is popped when there is room."""
    blk.start(F_INDIRECT_DESC, arena_bytes=1 << 20)
    for queue in (0, 1):
        for i in range(200):
            read(blk, 2 * i, 512, queue=queue)
        kick(blk, queue)
    assert len(ring.flying) == ring.entries
    assert blk.scheduled == []

    found = 0
    while ring.flying:
        ring.land()
        ready(blk)
        blk.serve()
        found += len(collect(blk)) + len(collect(blk, 1))

    assert found == 400


def test_a_failed_run_flies_again_in_parts(blk: BlkLab, ring: SlowRing) -> None:
    """Which request of a run it was shows when each is tried alone; the others succeed."""
    tokens = [read(blk, 8 * i) for i in range(3)]
    kick(blk)
    ring.land(-errno.EIO)
    ready(blk)
    assert len(ring.flying) == 3
    assert collect(blk) == {}

    ring.land()
    ring.land(-errno.EIO)
    ring.land()
    ready(blk)

    assert collect(blk) == {
        tokens[0]: good(0),
        tokens[1]: Answer(S_IOERR, 0, b"\xee" * 4096),
        tokens[2]: good(16),
    }
    assert blk.said == ["read of 4096 bytes at 0x1000: Input/output error"]


@pytest.mark.parametrize("result", [-errno.EINVAL, -errno.ECANCELED, -errno.EAGAIN, 0, 512])
def test_odd_ones_are_done_alone(blk: BlkLab, ring: SlowRing, result: int) -> None:
    """What is unaligned, short, or needs a thread that is not there, is done alone."""
    other, odd = read(blk, 64), read(blk, 0)
    kick(blk)

    ring.land(result)
    ready(blk)

    assert ring.flying == []
    assert collect(blk) == {other: good(64), odd: good(0)}


def test_a_flush_without_a_worker_thread(
    blk: BlkLab, ring: SlowRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel may not start a thread for it, a flush is done here."""
    calls = record_calls(monkeypatch, "fdatasync")
    token = blk.offer([HEADER.pack(T_FLUSH, 0, 0)], [1])
    kick(blk)
    ring.land(-errno.ECANCELED)
    ready(blk)

    assert collect(blk) == {token: Answer(S_OK, 1, b"")}
    assert calls == ["fdatasync"]


def test_an_image_that_shrank(blk: BlkLab, ring: SlowRing) -> None:
    """A read past the new end is an error that tells how much there was."""
    os.truncate(blk.image, 4096)
    token = read(blk, 0, 8192)
    kick(blk)
    ring.land()
    ready(blk)

    answer = collect(blk)[token]
    assert (answer.status, answer.written, answer.data[:4096]) == (S_IOERR, 4096, PATTERN[:4096])
    assert blk.said == ["read of 8192 bytes at 0x0: the image has shrunk to 4096 bytes"]


def test_zeroes_wait_for_what_is_in_flight(
    blk: BlkLab, ring: SlowRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeroes may go through the page cache, which must not happen beside direct requests."""
    token = read(blk, 0)
    kick(blk)
    zeroes = blk.offer([HEADER.pack(T_WRITE_ZEROES, 0, 0), SEGMENT.pack(0, 8, 0)], [1])
    monkeypatch.setattr(blk.disk, "write_zeroes", lambda *_, **__: ring.flying == [] or 1 / 0)
    kick(blk)

    assert collect(blk) == {token: good(0), zeroes: Answer(S_OK, 1, b"")}


# Ends


def test_pause_waits_and_gives_back(blk: BlkLab, ring: SlowRing) -> None:
    """After pause() nothing is in flight, and the driver has all of it."""
    tokens = [read(blk, 64 * i) for i in range(5)]
    kick(blk)

    blk.device.pause()

    assert ring.flying == ring.queued == []
    assert collect(blk) == {token: good(64 * i) for i, token in enumerate(tokens)}


def test_reset_waits_and_forgets(blk: BlkLab, ring: SlowRing) -> None:
    """After a reset nothing of the old driver's is in flight, and nothing more is reported."""
    for i in range(5):
        read(blk, 64 * i)
    kick(blk)
    used = blk.queues[0].used_index  # type: ignore[union-attr]

    blk.status = 0

    assert ring.flying == []
    assert blk.queues[0].used_index == used  # type: ignore[union-attr]
    assert blk.interrupts == []
    blk.start(BLK_F_FLUSH)
    token = read(blk, 0)
    kick(blk)
    ring.land()
    ready(blk)
    assert collect(blk) == {token: good(0)}


def test_a_queue_reset_waits(blk: BlkLab, ring: SlowRing) -> None:
    """Before one queue goes, its buffers are left alone for good; the other's requests finish."""
    read(blk, 0)
    other = read(blk, 64, queue=1)
    kick(blk)
    kick(blk, 1)

    blk.write(CommonCfg.QUEUE_SELECT, 2, 0)
    blk.write(CommonCfg.QUEUE_RESET, 2, 1)

    assert ring.flying == []
    assert collect(blk, 1) == {other: good(64)}


def test_requests_in_flight_outlive_a_broken_ring(blk: BlkLab, ring: SlowRing) -> None:
    """When the driver breaks a rule the requests in flight end in nothing, without harm."""
    read(blk, 0)
    kick(blk)
    blk.queues[0].offer(999)  # type: ignore[union-attr]
    with pytest.raises(GuestError, match="descriptor 999") as error:
        kick(blk)
    blk.registers.transport.fail(error.value)

    ring.land()
    ready(blk)

    assert collect(blk) == {}
    blk.start(BLK_F_FLUSH)


def test_what_a_killed_process_had_in_flight_comes_first(blk: BlkLab, ring: SlowRing) -> None:
    """Nothing is begun while the disk may still do what was asked before, and then all of it."""
    ring.nr_old = 2
    for queue in (0, 1, 1):
        read(blk, 8, queue=queue)
    for _ in range(2):
        kick(blk)
        kick(blk, 1)
        assert ring.flying == []
        ring.land_old()
        ready(blk)
    blk.serve()
    assert len(ring.flying) == 3
    while ring.flying:
        ring.land()
        ready(blk)
    assert list(collect(blk).values()) == [good(8)]
    assert list(collect(blk, 1).values()) == [good(8), good(8)]


@pytest.mark.parametrize("how", ["reset", "pause", "queue reset", "resize"])
def test_who_wants_peace_waits_for_a_killed_process_too(
    blk: BlkLab, ring: SlowRing, how: str
) -> None:
    """Guest memory and image are left alone afterwards, also by what it had asked for."""
    ring.nr_old = 3
    if how == "reset":
        blk.status = 0
    elif how == "pause":
        blk.device.pause()
    elif how == "queue reset":
        assert blk.disable(0)
    else:
        assert blk.device.setting("resize", 2 * SIZE) == 2 * SIZE
    assert ring.nr_old == 0


def test_the_ring_is_the_kernels(tmp_path: Path) -> None:
    """The real ring: 64 reads at once, of memory and lengths that O_DIRECT likes and dislikes."""
    with BlkLab(tmp_path, SIZE, content=PATTERN, cache="none") as blk:
        blk.start(BLK_F_FLUSH)
        lengths = [512, 4096, 1024, 8192]
        tokens = {read(blk, 16 * i, lengths[i % 4]): i for i in range(64)}
        answers = {used.token: blk._answer(0, used) for used in blk.collect()}

    assert answers == {token: good(16 * i, lengths[i % 4]) for token, i in tokens.items()}
