"""The short ways from ring to frames and buffers, beside the way round by chains.

Both sides see the same random ring, good and bad chains mixed, and must come to the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from devices import netpop
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_INDIRECT_DESC
from devices.guestmem import GuestMemory, Region
from devices.inflight import inflight_bytes
from devices.netpop import Buffers, frame_of, pop_buffers, pop_frames
from devices.virtqueue import QueueState, SplitQueue, open_queue
from tests.rng import seeded
from tools.viodriver import SplitDriver, make_memfd

if TYPE_CHECKING:
    from random import Random

    from devices.virtqueue import Chain, VirtQueue

SIZE = 64
SEAM = 1 << 19
REGIONS = (Region(0, SEAM, 0), Region(SEAM, SEAM, 2 * SEAM))  # not adjacent in the file
BASE, TABLES, DATA = 0x1000, 0x8000, 0x20000


class Twins:
    """Two device sides of one ring; only one of them knows the short way."""

    def __init__(self, features: int) -> None:
        fd = make_memfd(4 * SEAM)
        self.memory = GuestMemory(fd, REGIONS)
        os.close(fd)
        self.driver = SplitDriver(self.memory, SIZE, BASE, features)
        d = self.driver
        areas = (d.desc_gpa, d.avail_gpa, d.used_gpa)
        queues = [open_queue(self.memory, SIZE, *areas, features=features) for _ in range(2)]
        assert isinstance(queues[0], SplitQueue)
        self.short, self.long = queues


def address(rng: Random, length: int) -> int:
    """Mostly in RAM, rarely across the seam or outside."""
    choice = rng.random()
    if choice < 0.005:
        return SEAM - rng.randrange(1, length + 2)
    if choice < 0.006:
        return 2 * SEAM - rng.randrange(length + 1)
    if choice < 0.008:
        return rng.randrange(1 << 64)
    return DATA + 16 * rng.randrange(20_000)


def make_chain(rng: Random, twins: Twins, free: list[int], flag: int) -> int:
    """Write a random chain; return its head."""
    count = rng.choice((1, 1, 1, 2, 3, 5))
    lengths = [rng.choice((0, 1, 10, 12, 13, 60, 1514, 4096)) for _ in range(count)]
    flags = [flag if rng.random() > 0.005 else rng.randrange(8) for _ in range(count)]
    indirect = rng.random() < (0.4 if twins.short.features else 0.005)
    if indirect:
        head, table = free.pop(), TABLES + 256 * rng.randrange(64)
        rows = b""
        for i, (length, bits) in enumerate(zip(lengths, flags, strict=True)):
            more = DESC_F_NEXT if i + 1 < count else 0
            next_ = i + 1 if rng.random() > 0.01 else rng.randrange(8)
            rows += DESC.pack(address(rng, length), length, bits | more, next_)
        twins.memory.write(table, rows)
        size = len(rows) if rng.random() > 0.01 else rng.randrange(100)
        twins.driver.desc(head, table, size, DESC_F_INDIRECT)
        return head
    places = [free.pop() for _ in range(count)]
    for i, (place, length, bits) in enumerate(zip(places, lengths, flags, strict=True)):
        more = DESC_F_NEXT if i + 1 < count else 0
        next_ = places[i + 1] if more else rng.randrange(SIZE)
        twins.driver.desc(place, address(rng, length), length, bits | more, next_)
    return places[0] if rng.random() > 0.005 else rng.randrange(1 << 16)


def fill(rng: Random, twins: Twins, flag: int) -> None:
    """Offer random chains as far as there are descriptors."""
    free = list(range(SIZE))
    rng.shuffle(free)
    while len(free) >= 5 and rng.random() < 0.95:
        twins.driver.offer(make_chain(rng, twins, free, flag))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC])
@pytest.mark.parametrize("header_bytes", [10, 12])
def test_frames_by_both_ways(features: int, seed: int, header_bytes: int) -> None:
    """Same frames, same bytes, same heads in flight; and what is broken is broken for both."""
    rng = seeded(seed)
    nr_frames = nr_broken = 0
    for _ in range(60):
        twins = Twins(features)
        fill(rng, twins, 0)
        while True:
            limit = rng.choice((1, 3, 64))
            try:
                found = pop_frames(twins.short, limit, header_bytes)
            except GuestError as err:
                with pytest.raises(GuestError, match=str(err)[:12].replace("+", ".")):
                    frame_of(must(twins.long), header_bytes)
                nr_broken += 1
                break
            if not found:
                assert twins.long.pop() is None
                break
            for head, size, iov in found:
                other = frame_of(must(twins.long), header_bytes)
                assert (head, size) == other[:2]
                assert b"".join(iov) == b"".join(other[2])
                assert not iov or (type(iov[0]) is bytes and len(iov[0]) == header_bytes)
            nr_frames += len(found)
            assert list(twins.short._in_flight.items()) == list(twins.long._in_flight.items())
    assert nr_frames > 300
    assert nr_broken > 5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC])
def test_buffers_by_both_ways(features: int, seed: int) -> None:
    """The same for buffers to fill."""
    rng = seeded(seed)
    nr_chains = nr_broken = 0
    for _ in range(60):
        twins = Twins(features)
        fill(rng, twins, DESC_F_WRITE)
        short, long = Buffers(), Buffers()
        while True:
            try:
                more = pop_buffers(twins.short, rng.choice((1, 3, 64)), short)
            except GuestError:
                with pytest.raises(GuestError):  # noqa: PT012  wherever it comes to it
                    while len(long.heads) <= len(short.heads):
                        long.add(must(twins.long))
                nr_broken += 1
                break
            while len(long.heads) < len(short.heads):
                long.add(must(twins.long))
            assert (short.heads, short.sizes, short.spans) == (long.heads, long.sizes, long.spans)
            assert [len(view) for view in short.views] == [len(view) for view in long.views]
            assert not any(view.readonly for view in short.views)
            assert list(twins.short._in_flight.items()) == list(twins.long._in_flight.items())
            if not more:
                assert twins.long.pop() is None
                break
        nr_chains += len(short.heads)
    assert nr_chains > 300
    assert nr_broken > 5


def test_the_short_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the shapes that drivers make; else the tests above would compare a way with itself."""
    twins = Twins(F_INDIRECT_DESC)
    monkeypatch.setattr(SplitQueue, "pop", lambda _: pytest.fail("by the long way"))
    twins.driver.add([bytes(100)])
    twins.driver.add([bytes(66), bytes(4096), bytes(1000)])
    twins.driver.add([bytes(12), bytes(60)], indirect=False)
    assert [size for _, size, _ in pop_frames(twins.short, 2, 12)] == [88, 5150]
    buffers = Buffers()
    twins = Twins(0)
    for _ in range(3):
        twins.driver.add([], [2048])
    assert pop_buffers(twins.short, 64, buffers)
    assert buffers.sizes == [2048] * 3


def test_a_header_alone_in_its_descriptor_is_gathered() -> None:
    """The short way leaves it alone."""
    twins = Twins(0)
    twins.driver.add([bytes(12), bytes(60)], indirect=False)
    assert netpop._usual_frames(twins.short, 4, 12) == []  # type: ignore[arg-type]
    [(_, size, iov)] = pop_frames(twins.short, 4, 12)
    assert (size, [len(part) for part in iov]) == (60, [12, 60])


def test_a_head_that_is_in_flight_is_not_taken_again() -> None:
    """Neither way: the driver is told that it has broken a rule."""
    twins = Twins(0)
    request = twins.driver.place([bytes(100)])
    twins.driver.submit(request)
    twins.driver.offer(request.head)
    assert len(pop_frames(twins.short, 64, 12)) == 1
    with pytest.raises(GuestError, match="in flight"):
        pop_frames(twins.short, 64, 12)
    twins = Twins(0)
    request = twins.driver.place([], [100])
    twins.driver.submit(request)
    twins.driver.offer(request.head)
    buffers = Buffers()
    assert pop_buffers(twins.short, 64, buffers)
    with pytest.raises(GuestError, match="in flight"):
        pop_buffers(twins.short, 64, buffers)


def post(twins: Twins, buffers: Buffers, *descs: tuple[int, int, int, int]) -> list[int]:
    """Offer descriptors 0, 1, … as (addr, length, flags, next), take them; return their sizes."""
    for index, desc in enumerate(descs):
        twins.driver.desc(index, *desc)
        twins.driver.offer(index)
    pop_buffers(twins.short, SIZE, buffers)
    return buffers.sizes


def give_back(twins: Twins, buffers: Buffers) -> None:
    """Have the driver own them all again; views are kept for the next time."""
    twins.short.push_batch([(head, 0) for head in buffers.heads])
    buffers.drop(len(buffers.heads), len(buffers.views))


def test_a_buffer_posted_again_has_the_same_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its link says. One posted elsewhere, or with another length, has its own."""
    monkeypatch.setattr(SplitQueue, "pop", lambda _: pytest.fail("by the long way"))
    twins, buffers = Twins(0), Buffers()
    post(twins, buffers, (DATA, 100, DESC_F_WRITE, 0), (DATA + 4096, 200, DESC_F_WRITE, 7))
    first = list(buffers.views)
    give_back(twins, buffers)
    post(twins, buffers, (DATA, 100, DESC_F_WRITE, 3), (DATA + 4096, 200, DESC_F_WRITE, 1))
    assert [a is b for a, b in zip(buffers.views, first, strict=True)] == [True, True]
    give_back(twins, buffers)
    changed = (DATA + 8, 100, DESC_F_WRITE, 0), (DATA + 4096, 201, DESC_F_WRITE, 7)
    assert post(twins, buffers, *changed) == [100, 201]
    buffers.views[0][:4] = b"here"
    buffers.views[1][200:] = b"!"
    assert twins.memory.read(DATA + 8, 4) == b"here"
    assert twins.memory.read(DATA + 4096 + 200, 1) == b"!"


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ((DATA, 100, 0, 0), "readable"),
        ((DATA, 100, DESC_F_WRITE | DESC_F_INDIRECT, 0), "indirect"),
        ((2 * SEAM - 50, 100, DESC_F_WRITE, 0), "not all RAM"),
        ((1 << 63, 100, DESC_F_WRITE, 0), "not RAM"),
    ],
)
def test_what_was_seen_good_does_not_make_another_good(
    bad: tuple[int, int, int, int], error: str
) -> None:
    """Every field that matters is looked at each time, whatever the head had before."""
    twins, buffers = Twins(0), Buffers()
    post(twins, buffers, (DATA, 100, DESC_F_WRITE, 0))
    give_back(twins, buffers)
    with pytest.raises(GuestError, match=error):
        post(twins, buffers, bad)
    assert buffers.heads == []


def test_a_head_offered_twice_at_once_is_refused() -> None:
    """As it is when the first is in flight already."""
    twins, buffers = Twins(0), Buffers()
    twins.driver.desc(0, DATA, 100, DESC_F_WRITE)
    twins.driver.offer(0)
    twins.driver.offer(0)
    assert pop_buffers(twins.short, SIZE, buffers)
    assert buffers.heads == [0]
    with pytest.raises(GuestError, match="in flight"):
        pop_buffers(twins.short, SIZE, buffers)


@pytest.mark.parametrize("start", [SIZE - 3, 0xFFFF - 2])
def test_buffers_over_the_end_of_the_ring(start: int) -> None:
    """They come in two portions, and each is noted where it was popped, so that it can go back."""
    twins, buffers = Twins(0), Buffers()
    twins.driver.start_at(start)
    twins.short.load(QueueState(start, start))
    for index in range(10):
        twins.driver.desc(index, DATA + 4096 * index, 100, DESC_F_WRITE)
        twins.driver.offer(index)
    portions = []
    while pop_buffers(twins.short, SIZE, buffers):
        portions.append(len(buffers.heads))
    assert portions == [3, 10]
    assert buffers.heads == list(range(10))
    assert list(twins.short._in_flight.values()) == [(start + n) & 0xFFFF for n in range(10)]
    assert twins.short.rewind(10)
    assert twins.short.save() == (start, start)


def test_buffers_are_noted_for_a_successor() -> None:
    """A process that is killed now leaves word of them, oldest first."""
    twins, buffers = Twins(0), Buffers()
    d, area = twins.driver, memoryview(bytearray(inflight_bytes(SIZE, packed=False)))
    areas = (d.desc_gpa, d.avail_gpa, d.used_gpa)
    queue = open_queue(twins.memory, SIZE, *areas, features=0, inflight=area)
    for index in (5, 2, 9):
        d.desc(index, DATA + 4096 * index, 100, DESC_F_WRITE)
        d.offer(index)
    assert pop_buffers(queue, SIZE, buffers)
    successor = open_queue(twins.memory, SIZE, *areas, features=0, inflight=area)
    assert [chain.head for chain in successor.resubmit()] == [5, 2, 9]


def test_a_buffer_below_the_hot_mapping_is_where_the_driver_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only the mapping looked at last is searched, and the short way goes on."""
    monkeypatch.setattr(SplitQueue, "pop", lambda _: pytest.fail("by the long way"))
    twins, buffers = Twins(0), Buffers()
    twins.memory.view(SEAM, 1)
    assert twins.memory.hot.start == SEAM
    post(twins, buffers, (DATA, 100, DESC_F_WRITE, 0))
    buffers.views[0][:4] = b"here"
    assert twins.memory.read(DATA, 4) == b"here"


def test_an_index_ahead_of_the_ring_is_refused_whatever_is_in_it() -> None:
    """Though every entry up to the ring's end is a good buffer."""
    twins, buffers = Twins(0), Buffers()
    for index in range(SIZE):
        twins.driver.desc(index, DATA, 100, DESC_F_WRITE)
        twins.driver.offer(index)
    twins.driver.set_avail_index(SIZE + 1)
    with pytest.raises(GuestError, match="ahead"):
        pop_buffers(twins.short, SIZE, buffers)
    assert buffers.heads == []


def test_what_is_kept_of_buffers_seen_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses a driver uses; and nothing is kept once it is gone."""
    monkeypatch.setattr(netpop, "SEEN_MAX", 10)
    twins, buffers = Twins(0), Buffers()
    for n in range(40):
        rows = [(DATA + 64 * (8 * n + i), 60, DESC_F_WRITE, 0) for i in range(8)]
        assert post(twins, buffers, *rows) == [60] * 8
        give_back(twins, buffers)
        assert len(buffers.seen) <= 10 + 8
    assert buffers.seen
    buffers.clear()
    assert not buffers.seen


def must(queue: VirtQueue) -> Chain:
    """Pop what has to be there."""
    chain = queue.pop()
    assert chain is not None
    return chain
