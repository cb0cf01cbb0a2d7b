"""Memory behind a vhost-user socket: regions that overlap, wrap, leave their file, come and go."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from devices.features import F_RING_PACKED, F_VERSION_1
from devices.vhostback import PROTOCOL
from devices.vhostfront import MemoryRegion
from devices.vhostmem import SLOTS_MAX
from devices.vhostwire import MEM_REGION, MEM_SLOT, MEM_TABLE, U64, Front
from tests.vhostlab import DEADLINE, HVA, Child, Program, Session
from tools.viodriver import make_memfd

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
SIZE = 1 << 20
TOP = 1 << 64


@pytest.fixture
def memory() -> Iterator[int]:
    fd = make_memfd(SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("gpa", "size", "hva", "offset"),
    [
        (0, 0, HVA, 0),
        (0, SIZE + PAGE, HVA, 0),
        (0, SIZE, HVA, PAGE),
        (0, PAGE, HVA, SIZE),
        (0, PAGE, HVA, TOP - PAGE),
        (0, TOP - PAGE, HVA, PAGE),
        (TOP - PAGE, 2 * PAGE, HVA, 0),
        (0, 2 * PAGE, TOP - PAGE, 0),
        (0, PAGE, HVA, 1 << 63),
        (1, PAGE, HVA, 0),
        (0, PAGE + 1, HVA, 0),
        (0, PAGE, HVA, 512),
    ],
)
def test_a_region_that_cannot_be(memory: int, gpa: int, size: int, hva: int, offset: int) -> None:
    """Empty, beyond its file, around the end of an address space, not in pages."""
    row = MEM_REGION.pack(gpa, size, hva, offset)
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        before = child.nr_fds()
        assert not child.accepts(Front.SET_MEM_TABLE, MEM_TABLE.pack(1, 0) + row, [memory])
        assert not child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + row, [memory])
        assert (child.nr_fds(), child.nr_maps()) == (before, 0)


@pytest.mark.parametrize(
    ("gpa", "hva"),
    [(0, HVA + SIZE), (PAGE, HVA + SIZE), (4 * PAGE - PAGE, HVA + SIZE), (SIZE, HVA + PAGE)],
)
def test_regions_that_overlap(memory: int, gpa: int, hva: int) -> None:
    """In guest addresses or in the front end's."""
    first = MEM_REGION.pack(0, 4 * PAGE, HVA, 0)
    other = MEM_REGION.pack(gpa, 4 * PAGE, hva, SIZE // 2)
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        table = MEM_TABLE.pack(2, 0) + first + other
        assert not child.accepts(Front.SET_MEM_TABLE, table, [memory, memory])
        assert child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + first, [memory])
        assert not child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + other, [memory])
        assert child.nr_maps() == 1


@pytest.mark.parametrize(
    ("count", "rows", "fds"), [(1, 2, 2), (2, 1, 2), (2, 2, 1), (9, 0, 0), (0xFFFF_FFFF, 1, 1)]
)
def test_a_table_that_does_not_add_up(memory: int, count: int, rows: int, fds: int) -> None:
    """Count, bytes and descriptors have to say the same."""
    table = MEM_TABLE.pack(count, 0)
    table += b"".join(MEM_REGION.pack(n * PAGE, PAGE, HVA + n * PAGE, 0) for n in range(rows))
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        before = child.nr_fds()
        assert not child.accepts(Front.SET_MEM_TABLE, table, [memory] * fds)
        assert (child.nr_fds(), child.nr_maps()) == (before, 0)


def test_files_that_are_no_memory() -> None:
    """Pipes, sockets, devices, and what may only be read."""
    row = MEM_REGION.pack(0, PAGE, HVA, 0)
    ours, theirs = os.pipe()
    readable = os.open(__file__, os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDWR)
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        for fd in (ours, theirs, readable, null):
            assert not child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + row, [fd])
    for fd in (ours, theirs, readable, null):
        os.close(fd)


def test_a_region_that_is_added_again(memory: int) -> None:
    """QEMU 7.2 does so for each pair of queues; it goes when it has been removed as often."""
    row = MEM_SLOT.pack(0) + MEM_REGION.pack(0, 4 * PAGE, HVA, 0)
    copy, other = os.dup(memory), make_memfd(SIZE)
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        before = child.nr_fds()
        assert child.accepts(Front.ADD_MEM_REG, row, [memory])
        assert child.accepts(Front.ADD_MEM_REG, row, [copy])
        assert not child.accepts(Front.ADD_MEM_REG, row, [other])
        assert child.accepts(Front.REM_MEM_REG, row)
        assert child.nr_maps() == 1
        assert child.accepts(Front.REM_MEM_REG, row)
        assert not child.accepts(Front.REM_MEM_REG, row)
        assert (child.nr_fds(), child.nr_maps()) == (before, 0)
        table = MEM_TABLE.pack(2, 0) + row[MEM_SLOT.size :] * 2
        assert not child.accepts(Front.SET_MEM_TABLE, table, [memory, copy])
    os.close(copy)
    os.close(other)


def test_as_many_regions_as_it_says(memory: int) -> None:
    """And not one more; all of them can be taken away again."""
    rows = [MEM_REGION.pack(n * PAGE, PAGE, HVA + n * PAGE, n * PAGE) for n in range(SLOTS_MAX + 1)]
    with Child("viornd") as child:
        child.negotiate(PROTOCOL)
        before = child.nr_fds()
        assert U64.unpack(child.ask(Front.GET_MAX_MEM_SLOTS).payload) == (SLOTS_MAX,)
        for row in rows[:-1]:
            assert child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + row, [memory])
        assert not child.accepts(Front.ADD_MEM_REG, MEM_SLOT.pack(0) + rows[-1], [memory])
        assert child.nr_maps() == SLOTS_MAX
        for row in rows[:-1]:
            assert child.accepts(Front.REM_MEM_REG, MEM_SLOT.pack(0) + row)
        assert (child.nr_fds(), child.nr_maps()) == (before, 0)


@pytest.mark.parametrize("layout", [0, F_RING_PACKED])
def test_regions_come_and_go_while_rings_run(layout: int) -> None:
    """The table sent again, another region, one less: no request is lost, none is doubled.

    In the jail, and as often as memory hotplug would never do it.
    """
    with Program("viornd") as program, Session(program.connect(), 8 << 20) as session:
        session.begin(layout)
        pid = program.device_pid()
        extra = MemoryRegion(1 << 32, 1 << 20, HVA + (1 << 32), 0, session.fd)
        counts = set()
        for _ in range(200):
            assert session.ask(0, room=(64,))[0] == 64
            session.front.add_region(extra)
            assert session.ask(0, room=(64,))[0] == 64
            session.front.remove_region(extra)
            assert session.ask(0, room=(64,))[0] == 64
            session.front.share([session.region])
            session.front.status()  # it has closed what came with the message before
            counts.add(len(os.listdir(f"/proc/{pid}/fd")))
        assert len(counts) == 1
        with open(f"/proc/{pid}/maps") as maps:
            assert sum("memfd:guest" in line for line in maps) == 1


def test_a_ring_whose_memory_goes_away() -> None:
    """It is an error of that ring, told by its eventfd; nothing crashes, and a reset mends it."""
    with Program("viornd") as program, Session(program.connect()) as session:
        session.begin()
        session.front.remove_region(session.region)
        assert session.wait(session.errs[0], DEADLINE)
        assert session.front.status() & 0x40
        session.front.reset_device()
        assert not session.front.status()
        session.resume()
        session.make_queues(session.features, 0, 0)
        session.queues[0] = session.queues[0].__class__(
            session.memory, 128, 0x10000, session.features
        )
        session.front.stop_queue(0)
        session.start(0, 0)
        assert session.ask(0, room=(64,))[0] == 64


def test_memory_that_is_cut_short_ends_its_connection_only() -> None:
    """SIGBUS in the process of that connection; the next one is served."""
    with Program("viornd") as program:
        with Session(program.connect()) as session:
            short = os.memfd_create("short")
            os.ftruncate(short, 1 << 20)
            session.begin()
            session.front.add_region(MemoryRegion(1 << 32, 1 << 20, HVA + (1 << 32), 0, short))
            session.queues[0].add([], [64])
            # The buffer of that request is in the memory that is cut short.
            session.memory.write(session.queues[0].desc_gpa, (1 << 32).to_bytes(8, "little"))
            os.ftruncate(short, 0)
            session.kick(0)
            program.wait_said(f"killed by signal {signal.SIGBUS.value}")
            os.close(short)
        with Session(program.connect()) as session:
            session.begin(F_VERSION_1)
            assert session.ask(0, room=(64,))[0] == 64
