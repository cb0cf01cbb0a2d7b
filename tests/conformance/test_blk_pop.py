"""The block device's short way from ring to request, beside the long one on the same rings."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import GuestError
from devices.blkpop import pop_usual
from devices.blkreq import HEADER, T_FLUSH, T_IN, T_OUT, parse
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_INDIRECT_DESC
from devices.guestmem import Region
from devices.inflight import inflight_bytes
from devices.uring import address
from tools.viodriver import SplitDriver, make_memory, open_driver

if TYPE_CHECKING:
    from devices.blkreq import Request
    from devices.chain import Chain
    from devices.guestmem import GuestMemory
    from devices.virtqueue import SplitQueue

N, W, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
RAM = 1 << 20
SIZE = 16
BASE = 0x1000  # of the ring
HEADERS, TABLES, DATA = 0x8000, 0xA000, 0x10000


def make(features: int = F_INDIRECT_DESC, memory: GuestMemory | None = None) -> SplitDriver:
    driver = open_driver(memory or make_memory(RAM), SIZE, BASE, features)
    return cast("SplitDriver", driver)


def same(request: Request) -> tuple[Any, ...]:
    """Return what a request is, however its status byte is found."""
    kind, offset, length, views, status, last, capacity, head = request
    places = [(address(view), len(view), view.readonly) for view in views]
    return kind, offset, length, places, address(status) + last, capacity, head


def long_way(queue: SplitQueue, limit: int) -> tuple[list[Any], str]:
    """Take up to `limit` requests by pop and parse: what they are, and what stopped it."""
    chains: list[Chain] = []
    error = ""
    try:
        while len(chains) < limit and (chain := queue.pop()) is not None:
            chains.append(chain)
    except GuestError as err:
        error = str(err)
    requests, broken = parse(chains)
    return [same(request) for request in requests], str(broken or error)


def short_way(queue: SplitQueue, limit: int) -> tuple[list[Any], str]:
    """The same, but with as many as possible by pop_usual."""
    found: list[Any] = []
    while len(found) < limit:
        found += [same(request) for request in pop_usual(queue, limit - len(found))]
        if len(found) == limit:
            break
        requests, error = long_way(queue, 1)
        found += requests
        if error or not requests:
            return found, error
    return found, ""


def compare(driver: SplitDriver, limit: int = SIZE) -> tuple[list[Any], str]:
    """Check that both ways find the same, and leave the queue in the same state."""
    queues = [cast("SplitQueue", driver.open_device()) for _ in range(2)]
    results = [way(queue, limit) for way, queue in zip((long_way, short_way), queues, strict=True)]
    assert results[0] == results[1]
    if not results[0][1]:
        assert queues[0].save() == queues[1].save()
        assert queues[0]._in_flight == queues[1]._in_flight
    return results[1]


def offer(driver: SplitDriver, kind: int = T_OUT, sector: int = 0, **changes: Any) -> None:
    """Offer the usual three descriptors at 0 to 2, with one word of one of them changed."""
    driver.memory.write(HEADERS, HEADER.pack(kind, 0, sector))
    flags = N | W if kind == T_IN else N
    rows = [[HEADERS, 16, N, 1], [DATA, 512, flags, 2], [DATA + 4096, 1, W, 0]]
    for name, value in changes.items():
        rows[int(name[1])][["addr", "length", "flags", "next"].index(name[3:])] = value
    for index, row in enumerate(rows):
        driver.desc(index, *row)
    driver.offer(0)


def test_the_usual_shape_is_taken() -> None:
    """Reads and writes of one buffer, direct and indirect, never need the long way."""
    driver = make()
    for kind in (T_IN, T_OUT):
        for indirect in (False, True):
            header = HEADER.pack(kind, 0, 7)
            shape = ([header], [4096, 1]) if kind == T_IN else ([header, 4096], [1])
            driver.submit(driver.place(*shape, indirect=indirect))
    expected, _ = compare(driver)

    queue = cast("SplitQueue", driver.open_device())
    found = [same(request) for request in pop_usual(queue, SIZE)]

    assert found == expected
    assert [(kind, offset, length) for kind, offset, length, *_ in found] == [
        (kind, 7 * 512, 4096) for kind in (T_IN, T_IN, T_OUT, T_OUT)
    ]
    assert pop_usual(queue, SIZE) == []


def test_a_limit_is_kept() -> None:
    """No more than `limit` are taken, and the next call goes on there."""
    driver = make()
    for _ in range(5):
        driver.submit(driver.place([HEADER.pack(T_IN, 0, 1)], [512, 1], indirect=True))
    queue = cast("SplitQueue", driver.open_device())

    assert [len(pop_usual(queue, limit)) for limit in (0, 2, 1, 8, 8)] == [0, 2, 1, 2, 0]


def test_requests_are_recorded_in_flight() -> None:
    """A successor of a killed process finds what was taken by the short way."""
    area = memoryview(mmap.mmap(-1, inflight_bytes(SIZE, packed=False)))
    driver = make()
    for _ in range(3):
        driver.submit(driver.place([HEADER.pack(T_IN, 0, 1)], [512, 1], indirect=True))
    killed = cast("SplitQueue", driver.open_device(area))
    taken = [request[-1] for request in pop_usual(killed, SIZE)]

    successor = driver.open_device(area)

    assert [chain.head for chain in successor.resubmit()] == taken
    assert successor.pop() is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"d0_addr": gpa} for gpa in (RAM, RAM - 8, RAM - 16, RAM - 15, (1 << 64) - 16)),
        *({"d0_length": length} for length in (0, 15, 17, 0xFFFF_FFFF)),
        *({"d0_flags": flags} for flags in (0, W, N | W, INDIRECT, N | INDIRECT, N | 8, 0xFFFF)),
        *({"d0_next": index} for index in (0, 2, SIZE, 0xFFFF)),
        *({"d1_addr": gpa} for gpa in (RAM, RAM - 511, RAM - 512, (1 << 64) - 1)),
        *({"d1_length": length} for length in (0, 1, RAM, 0xFFFF_FFFF)),
        *({"d1_flags": flags} for flags in (0, N, W, N | W, N | INDIRECT, N | 16)),
        *({"d1_next": index} for index in (0, 1, SIZE, 0xFFFF)),
        *({"d2_addr": gpa} for gpa in (RAM, RAM - 1, (1 << 64) - 1)),
        *({"d2_length": length} for length in (0, 2, 0xFFFF_FFFF)),
        *({"d2_flags": flags} for flags in (0, N, N | W, W | INDIRECT, W | 32)),
    ],
)
@pytest.mark.parametrize("kind", [T_IN, T_OUT, T_FLUSH])
def test_every_doubt_is_the_long_ways(kind: int, changes: dict[str, int]) -> None:
    """One word of a usual chain changed: both ways say the same, errors included."""
    driver = make()
    offer(driver, kind, 5, **changes)

    compare(driver)


@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC])
@pytest.mark.parametrize("length", [0, 16, 32, 47, 48, 49, 64, 0xFFFF_FFF0])
@pytest.mark.parametrize("table", [TABLES, RAM - 48, RAM - 47, (1 << 64) - 48])
def test_tables(features: int, length: int, table: int) -> None:
    """Indirect tables of all lengths and places, negotiated or not."""
    driver = make(features)
    driver.memory.write(HEADERS, HEADER.pack(T_IN, 0, 3))
    rows = ((HEADERS, 16, N, 1), (DATA, 512, N | W, 2), (DATA + 512, 1, W, 0))
    content = b"".join(DESC.pack(*row) for row in rows)
    driver.memory.write(min(table, RAM - 48), content)
    driver.desc(0, table, length, INDIRECT)
    driver.offer(0)

    compare(driver)


def test_tables_out_of_order() -> None:
    """A table is followed by its links, not by its order."""
    driver = make()
    driver.memory.write(HEADERS, HEADER.pack(T_IN, 0, 3))
    rows = ((HEADERS, 16, N, 2), (DATA + 512, 1, W, 0), (DATA, 512, N | W, 1))
    driver.memory.write(TABLES, b"".join(DESC.pack(*row) for row in rows))
    driver.desc(0, TABLES, 48, INDIRECT)
    driver.offer(0)

    [request], _ = compare(driver)

    assert request[:3] == (T_IN, 3 * 512, 512)


def test_broken_rings() -> None:
    """An avail index too far ahead, a head outside the table, a head offered twice."""
    driver = make()
    driver.set_avail_index(SIZE + 1)
    assert "ahead" in compare(driver)[1]
    driver = make()
    driver.offer(SIZE)
    assert "descriptor 16" in compare(driver)[1]
    driver = make()
    offer(driver)
    driver.offer(0)
    found, error = compare(driver)
    assert len(found) == 1
    assert "in flight" in error


def test_seams_of_ram() -> None:
    """Parts in different regions of RAM, and data across a seam, take the long way together."""
    regions = [Region(0, RAM // 2, RAM // 2), Region(RAM // 2, RAM // 2, 0)]
    for gpa in (RAM // 2 - 512, RAM // 2 - 511, RAM // 2 - 1, RAM // 2):
        for hot in (0, RAM // 2):
            driver = make(memory=make_memory(RAM, regions))
            offer(driver, T_IN, d1_addr=gpa)
            driver.memory.view(hot, 1)  # makes its region the first one looked at
            [request], _ = compare(driver)
            assert sum(length for _, length, _ in request[3]) == 512


words = st.sampled_from([0, 1, 2, 3, 4, 7, 15, 16, 17, 48, 512, 0x8000, 0xA000, RAM - 1, RAM])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(words, words, st.integers(0, 7), st.integers(0, SIZE)),
        min_size=SIZE,
        max_size=SIZE,
    ),
    heads=st.lists(st.integers(0, SIZE), max_size=SIZE),
    table=st.lists(
        st.tuples(words, words, st.integers(0, 7), st.integers(0, 4)), min_size=4, max_size=4
    ),
    kind=st.integers(0, 2),
    limit=st.integers(1, SIZE),
)
def test_random_rings(
    rows: list[tuple[int, int, int, int]],
    heads: list[int],
    table: list[tuple[int, int, int, int]],
    kind: int,
    limit: int,
) -> None:
    """Whatever a driver writes into a ring, both ways make the same of it."""
    driver = make()
    driver.memory.write(HEADERS, HEADER.pack(kind, 0, 1))
    driver.memory.write(TABLES, b"".join(DESC.pack(*row) for row in table))
    for index, row in enumerate(rows):
        driver.desc(index, *row)
    for head in heads:
        driver.offer(head)

    compare(driver, limit)
