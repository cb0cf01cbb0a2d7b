"""The dirty log: after any work of a device every page that it has changed is marked.

The driver stands still while the device works, so what differs between two looks at memory is the
device's doing. And nothing is marked but what it might have written.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from devices import nethdr as hdr
from devices.blkreq import HEADER, T_GET_ID, T_IN, T_OUT
from devices.features import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
)
from devices.guestmem import GuestMemory, Region
from devices.scsireq import DRIVE_LUN
from devices.scsireq import HEADER as SCSI_HEADER
from devices.vhostfront import MemoryRegion
from devices.vhostlog import DirtyLog
from devices.vhostwire import F_LOG_ALL, VRING_ADDR, Front, PeerError
from tests.taplab import TapLab
from tests.vhostlab import DEADLINE, HVA, Program, Session
from tests.vionetlab import OWN, PEER
from tools.viodriver import make_memfd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE = 4096
SIZE = 8 << 20
LAYOUTS = [
    F_INDIRECT_DESC,
    F_EVENT_IDX,
    F_RING_PACKED,
    F_RING_PACKED | F_EVENT_IDX | F_INDIRECT_DESC,
]


class Migration:
    """A session whose writes are logged, and what a monitor sees of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.fd = make_memfd(2 * PAGE)
        self.log = GuestMemory(self.fd, [Region(0, 2 * PAGE, 0)])
        self._before = b""

    def start(self) -> None:
        """Have writes logged, in a part of the file."""
        self.session.front.set_log(self.fd, SIZE // PAGE // 8, PAGE)

    def look(self) -> None:
        """Forget what is marked, and look at memory."""
        self.log.write(0, bytes(2 * PAGE))
        self._before = self.session.memory.read(0, SIZE)

    def marked(self) -> set[int]:
        """The pages that are marked."""
        assert not any(self.log.read(0, PAGE))  # nobody has asked for anything there
        bits = int.from_bytes(self.log.read(PAGE, PAGE), "little")
        return {page for page in range(8 * PAGE) if bits >> page & 1}

    def changed(self) -> set[int]:
        """The pages that are different."""
        old, new = self._before, self.session.memory.read(0, SIZE)
        starts = range(0, SIZE, PAGE)
        return {at // PAGE for at in starts if old[at : at + PAGE] != new[at : at + PAGE]}


def finish(session: Session, index: int, count: int) -> list[tuple[int, int]]:
    """Wait until `count` requests are back; the driver stores nothing meanwhile."""
    queue = session.queues[index]
    found = list(queue.used())
    deadline = time.monotonic() + DEADLINE
    while len(found) < count:
        assert time.monotonic() < deadline
        session.front.status()  # a turn of its loop later
        found += queue.used()
    assert len(found) == count
    return found


def writable(session: Session, index: int) -> set[int]:
    """The pages that a device may write to: buffers for it, and its part of the ring."""
    queue = session.queues[index]
    spans = [(queue.used_gpa, 6 + 8 * queue.size)]
    if session.features & F_RING_PACKED:
        spans = [(queue.used_gpa, 4), (queue.desc_gpa, 16 * queue.size)]
    for request in queue._requests.values():
        spans += [(part.gpa, part.length) for part in request.segments if part.writable]
    return {page for gpa, size in spans for page in range(gpa // PAGE, -(-(gpa + size) // PAGE))}


def turn(session: Session, migration: Migration | None, index: int) -> None:
    """Have the device do what was added, stop the ring, compare; it stays disabled."""
    queue = session.queues[index]
    queue.enable_calls()
    count, allowed = len(queue._requests), writable(session, index)
    if migration is not None:
        migration.look()
    session.front.enable_queue(index)
    found = finish(session, index, count)
    base = session.front.stop_queue(index)  # from here on nothing more may come
    if migration is not None:
        changed, marked = migration.changed(), migration.marked()
        assert changed, "the device has done nothing"
        assert changed <= marked
        assert marked <= allowed
    for head, written in found:
        for used in queue._finished(head, written):
            queue._retire(used.request)
    session.front.enable_queue(index, on=False)
    session.start(index, base)


def run(
    program: Program,
    features: int,
    count: int,
    work: Callable[[Session, Migration | None], None],
    late: bool,
) -> None:
    """Do some work with the log on from the start, or switched on while rings run, and off."""
    with Session(program.connect(), SIZE) as session:
        migration = Migration(session)
        session.front.negotiate()
        session.make_queues(features | F_VERSION_1 | (0 if late else F_LOG_ALL), count, 64)
        if not late:
            migration.start()
        session.resume()
        for index in range(count):
            session.front.enable_queue(index, on=False)  # until there is something to do
        if late:
            work(session, None)
            session.features |= F_LOG_ALL
            switch(session, migration)
        for _ in range(3):
            work(session, migration)
        session.features &= ~F_LOG_ALL
        migration.look()
        session.front.accept(session.features)
        work(session, None)
        assert not migration.marked()
        os.close(migration.fd)


def switch(session: Session, migration: Migration) -> None:
    """Switch the log on as a monitor does when a migration begins."""
    migration.start()
    session.front.accept(session.features)
    for index in range(len(session.queues)):
        ring = session.ring(index, 0)
        where = (ring.desc, ring.used, ring.avail, ring.log or 0)
        session.front.tell(Front.SET_VRING_ADDR, VRING_ADDR.pack(index, 1, *where))


@pytest.mark.parametrize("late", [False, True], ids=["first", "late"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_disks(layout: int, cache: str, late: bool, tmp_path: Path) -> None:
    """Data, statuses, ids and rings; what is written to the disk stays as it is in memory."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))

    def work(session: Session, migration: Migration | None) -> None:
        queue = session.queues[0]
        sector = 8 * int.from_bytes(os.urandom(1))
        queue.add([HEADER.pack(T_IN, 0, sector // 2)], [17 * 512, 1])
        queue.add([HEADER.pack(T_IN, 0, sector // 2)], [512, 4096, 1])
        queue.add([HEADER.pack(T_OUT, 0, sector // 2), os.urandom(8192)], [1])
        queue.add([HEADER.pack(T_GET_ID, 0, 0)], [20, 1])
        queue.add([HEADER.pack(T_IN, 0, 1 << 30)], [512, 1])  # fails
        turn(session, migration, 0)

    with Program("vioblk", str(path), "--format", "raw", "--cache", cache) as program:
        run(program, layout, 1, work, late)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropy(layout: int) -> None:
    """Buffers of any size, some of them over several pages."""

    def work(session: Session, migration: Migration | None) -> None:
        for size in (1, 100, 5000, 20000):
            session.queues[0].add([], [size])
        turn(session, migration, 0)

    with Program("viornd") as program:
        run(program, layout, 1, work, late=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drives(layout: int, tmp_path: Path) -> None:
    """Responses, sense, blocks."""
    path = tmp_path / "disc.iso"
    path.write_bytes(os.urandom(1 << 20))

    def work(session: Session, migration: Migration | None) -> None:
        block = os.urandom(1) + bytes(1)
        for cdb in (bytes(6), b"\x28\0\0\0\0" + block[:1] + b"\0\0\3"):
            header = SCSI_HEADER.pack(DRIVE_LUN, 1, 0, 0, 0) + cdb.ljust(32, b"\0")
            session.queues[2].add([header], [108, 3 * 2048])
        turn(session, migration, 2)

    with Program("vioscsi", "--cdrom", str(path)) as program:
        run(program, layout, 3, work, late=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interfaces(layout: int) -> None:
    """Frames received, in one buffer and over several, and what is left in those given back."""
    with TapLab() as tap:

        def work(session: Session, migration: Migration | None) -> None:
            rx = session.queues[0]
            for _ in range(8):
                rx.add([], [1000])
            rx.enable_calls()
            allowed = writable(session, 0)
            if migration is not None:
                migration.look()
            session.front.enable_queue(0)
            count = len(rx._requests)
            for size in (60, 1400, 60, 600):
                tap.send(OWN + PEER + b"\x08\0" + os.urandom(size))
            found: list[tuple[int, int]] = []
            while sum(written for _, written in found) < 4 * 26 + 2120:
                session.front.status()
                found += rx.used()
            base = session.front.stop_queue(0)
            if migration is not None:
                changed, marked = migration.changed(), migration.marked()
                assert changed
                assert changed <= marked <= allowed
            for head, written in found:
                for used in rx._finished(head, written):
                    rx._retire(used.request)
            assert len(rx._requests) == count - len(found)
            session.front.enable_queue(0, on=False)
            session.start(0, base)

        with Program("vionet", "--tap-fd", str(tap.fds[0]), fds=tap.fds) as program:
            run(program, layout | hdr.NET_F_MRG_RXBUF, 2, work, late=True)


def test_no_ring_is_served_without_the_log_that_was_asked_for() -> None:
    """F_LOG_ALL first, the log later: nothing is written in between."""
    with Program("viornd") as program, Session(program.connect(), SIZE) as session:
        migration = Migration(session)
        session.front.negotiate()
        session.make_queues(F_VERSION_1 | F_LOG_ALL, 1, 64)
        session.queues[0].add([], [64])
        migration.look()
        session.resume()
        session.kick(0)
        session.front.status()
        assert not migration.changed()
        migration.start()
        finish(session, 0, 1)
        session.front.stop_queue(0)
        assert migration.changed() <= migration.marked()
        os.close(migration.fd)


def test_a_write_behind_the_end_of_the_log() -> None:
    """A log that memory has outgrown: the ring is broken, and nothing is written elsewhere."""
    with Program("viornd") as program, Session(program.connect(), SIZE) as session:
        migration = Migration(session)
        session.begin(F_LOG_ALL)
        migration.start()
        session.front.add_region(MemoryRegion(1 << 32, SIZE, HVA + (1 << 32), 0, session.fd))
        queue = session.queues[0]
        queue.add([], [64])
        session.memory.write(queue.desc_gpa, (1 << 32).to_bytes(8, "little"))
        session.kick(0)
        assert session.wait(session.errs[0], DEADLINE)
        assert session.front.status() & 0x40
        with pytest.raises(PeerError):  # and a new one has to reach that far
            migration.start()
        os.close(migration.fd)


def test_the_log_tells_of_news() -> None:
    """By the eventfd of SET_LOG_FD."""
    with Program("viornd") as program, Session(program.connect(), SIZE) as session:
        migration = Migration(session)
        news = os.eventfd(0, os.EFD_NONBLOCK)
        session.begin(F_LOG_ALL)
        migration.start()
        session.front.set_log_fd(news)
        migration.look()
        session.queues[0].add([], [64])
        session.kick(0)
        assert session.wait(news, DEADLINE)
        os.close(news)
        os.close(migration.fd)


def test_bits_that_others_set_are_kept() -> None:
    """Two who mark pages of one word at the same time lose none, and read-clear loses none.

    A plain read, or and write would, within a second.
    """
    words = 64
    area = memoryview(mmap.mmap(-1, PAGE))
    pid = os.fork()
    if not pid:
        log = DirtyLog(area[: 4 * words])
        for page in range(1, 32 * words, 2):
            log.mark(page * PAGE, 1)
        os._exit(0)
    log = DirtyLog(area[: 4 * words])
    for page in range(0, 32 * words, 2):
        log.mark(page * PAGE, 1)
    os.waitpid(pid, 0)
    assert area[: 4 * words].tolist() == [0xFF] * 4 * words


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
def test_marks_are_where_they_belong(start: int) -> None:
    """Whatever the alignment of the log: bit n is page n, from its first byte on."""
    area = memoryview(mmap.mmap(-1, PAGE))
    log = DirtyLog(area[start : start + 9])
    for page in (0, 7, 8, 31, 32, 71):
        area[:] = bytes(PAGE)
        log.mark(page * PAGE + 5, 1)
        assert int.from_bytes(area[start : start + 9], "little") == 1 << page
        assert sum(area) == 1 << page % 8
    area[:] = bytes(PAGE)
    log.mark(3 * PAGE - 1, PAGE + 2)
    assert int.from_bytes(area[start:], "little") == 0b11100
    log.mark(0, 0)
    for gpa, size in ((72 * PAGE, 1), (72 * PAGE - 1, 2), (1 << 63, 1 << 63)):
        with pytest.raises(GuestError, match="behind the end of the log"):
            log.mark(gpa, size)
