"""Requests served out of the window in one pass, beside the long way on the same rings."""

from __future__ import annotations

import mmap
import os
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import GuestError
from devices import vioblk
from devices.blkquick import AT_ONCE, Served, serve_quick
from devices.blkreq import BLK_F_FLUSH, HEADER, S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
from devices.chain import DESC
from devices.features import F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.inflight import inflight_bytes
from devices.spec import BUSY
from devices.virtqueue import open_queue
from devices.window import MOST, MOST_WRITTEN, WORTHWHILE
from tests.blklab import BlkLab, record_calls
from tests.blkrows import CHANGES, CONTENT, DATA, HEADERS, INDIRECT, RAM, SIZE, TABLES, RowsLab
from tests.stores import Killed, Watch, WatchedMemory
from tools.viodriver import SplitDriver, make_memfd, open_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


REGION = [Region(0, 1 << 20, 0)]


class QuickLab(RowsLab):
    """A disk whose window is open, unless `window` is False."""

    def __init__(self, directory: Path, *, window: bool = True, **more: Any) -> None:
        super().__init__(directory, **more)
        if self.disk.window is None:
            pytest.skip("no window on files below the directory of temporary files")
        if window:
            for _ in range(WORTHWHILE):
                self.ask(T_IN, room=512)
            assert self.disk.window.pieces
        else:
            self.disk.window = None
            self.disk._tries = (lambda *_: -1, lambda *_: -1)
            for _ in range(WORTHWHILE):
                self.ask(T_IN, room=512)


layouts = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def labs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[QuickLab, QuickLab]]:
    packed = request.param
    with (
        QuickLab(tmp_path / "a", packed=packed) as short,
        QuickLab(tmp_path / "b", window=False, packed=packed) as long,
    ):
        yield short, long


def quick(lab: QuickLab, limit: int = 16) -> list[tuple[int, int]]:
    """What one pass serves."""
    assert lab.disk.window is not None
    return serve_quick(lab.queue, limit, lab.disk.window, SIZE, writable=True).done


@layouts
def test_usual_requests_take_no_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Reads and writes up to a size, and each is counted."""
    with QuickLab(tmp_path, packed=packed) as lab:
        before = list(lab.device.totals[:5])
        calls = record_calls(monkeypatch, "preadv", "pwritev")
        for length in (512, 4096, MOST_WRITTEN):
            assert lab.ask(T_IN, 8, room=length).data == CONTENT[4096 : 4096 + length]
            assert lab.ask(T_OUT, 16, b"n" * length) == (S_OK, 1, b"")
            assert lab.image.read_bytes()[8192 : 8192 + length] == b"n" * length
            lab.ask(T_OUT, 16, CONTENT[8192 : 8192 + length])
        assert not calls
        asked = 512 + 4096 + MOST_WRITTEN
        changes = [now - was for was, now in zip(before, lab.device.totals, strict=False)]
        assert changes == [3, asked, 6, 2 * asked, 0]
        assert lab.ask(T_IN, 0, room=MOST).data == CONTENT[:MOST]
        assert not calls
        assert lab.ask(T_IN, 0, room=MOST + 512).status == S_OK
        assert calls == ["preadv"]


def test_large_writes_are_copies_only_where_no_page_has_to_be_made_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tmpfs, that is."""
    with QuickLab(tmp_path) as lab:
        assert lab.disk.window is not None
        calls = record_calls(monkeypatch, "pwritev")
        for most, expected in ((MOST_WRITTEN, ["pwritev"]), (MOST, [])):
            lab.disk.window.most_written = most
            assert lab.ask(T_OUT, 8, b"l" * MOST) == (S_OK, 1, b"")
            assert calls == expected
            calls.clear()


def test_the_driver_gets_something_back_after_so_many_bytes(tmp_path: Path) -> None:
    """It goes on with that meanwhile."""
    with QuickLab(tmp_path) as lab:
        lab.start(F_INDIRECT_DESC | BLK_F_FLUSH, arena_bytes=2 << 20)
        [lab.driver] = lab.queues
        for sector in range(9):
            lab.offer([HEADER.pack(T_IN, 0, sector)], [MOST, 1])
        for expected in (AT_ONCE // MOST, AT_ONCE // MOST):
            done = quick(lab)
            assert len(done) == expected
            lab.queue.pass_back(done)
        assert len(lab.collect()) == 9


@layouts
def test_a_batch_in_order(tmp_path: Path, packed: bool) -> None:
    """Later requests see what earlier ones did, and all come back in their order."""
    with QuickLab(tmp_path, packed=packed) as lab:
        tokens = []
        for turn in range(40):
            tokens.append(lab.offer([HEADER.pack(T_OUT, 0, 4), bytes((turn,)) * 512], [1]))
            tokens.append(lab.offer([HEADER.pack(T_IN, 0, 4)], [512, 1]))
        found = lab.collect()
        assert [used.token for used in found] == tokens
        reads = [lab.driver.data(used.request)[:512] for used in found[1::2]]
        assert reads == [bytes((turn,)) * 512 for turn in range(40)]


@layouts
def test_a_limit_is_kept_and_the_ring_s_end(tmp_path: Path, packed: bool) -> None:
    """No more than `limit`, nor beyond the end of the ring, in one pass."""
    with QuickLab(tmp_path, packed=packed) as lab:
        while lab.driver.cursors()[0] % 256 != 250:
            lab.ask(T_IN, room=512)
        for _ in range(12):
            lab.offer([HEADER.pack(T_IN, 0, 4)], [512, 1])
        queue = lab.queue
        for limit, expected in ((0, 0), (4, 4), (16, 2), (16, 6), (16, 0)):
            done = quick(lab, limit)
            assert len(done) == expected
            queue.pass_back(done)
        assert len(lab.driver.collect()) == 12


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("kind", [T_IN, T_OUT, T_FLUSH, 1 << 31])
def test_every_doubt_is_the_long_way_s(
    kind: int, changes: dict[str, int], labs: tuple[QuickLab, QuickLab]
) -> None:
    """One word changed: both devices do the same, to the byte."""
    outcomes = []
    for lab in labs:
        lab.offer_rows(kind, 5, **changes)
        outcomes.append(lab.outcome())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("kind", "sector"),
    [
        *((T_IN, sector) for sector in (SIZE // 512 - 1, SIZE // 512, 1 << 55, (1 << 64) - 1)),
        *((T_OUT, sector) for sector in (SIZE // 512 - 1, SIZE // 512, 1 << 55, (1 << 64) - 1)),
    ],
)
def test_the_end_of_the_disk(kind: int, sector: int, labs: tuple[QuickLab, QuickLab]) -> None:
    """What reaches beyond is refused by both."""
    outcomes = []
    for lab in labs:
        lab.offer_rows(kind, sector)
        outcomes.append(lab.outcome())
    assert outcomes[0] == outcomes[1]


def test_broken_rings(tmp_path: Path) -> None:
    """An avail index too far ahead, a head outside of the table: the long way says so."""
    for number, breaking in enumerate(("index", "head")):
        with QuickLab(tmp_path / str(number)) as lab:
            assert isinstance(lab.driver, SplitDriver)
            if breaking == "index":
                lab.driver.set_avail_index(lab.driver.cursors()[0] + 257)
            else:
                lab.driver.offer(256)
            assert quick(lab) == []
            lab.schedule(0)
            with pytest.raises(GuestError, match=r"ahead|descriptor 256"):
                lab.serve()


words = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 48, 512, 4096, HEADERS, DATA, RAM - 1, RAM])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    table=st.lists(
        st.tuples(words, words, st.integers(0, 7), st.integers(0, 4)), min_size=3, max_size=3
    ),
    kind=st.integers(0, 2),
    sector=st.integers(0, SIZE // 512),
)
def test_random_tables(
    table: list[tuple[int, int, int, int]], kind: int, sector: int, tmp_path: Path
) -> None:
    """Whatever a table holds, both devices do the same."""
    outcomes = []
    for number in range(2):
        with QuickLab(tmp_path / str(number), window=not number) as lab:
            lab.offer_rows(kind, sector)
            lab.memory.write(TABLES, b"".join(DESC.pack(*row) for row in table))
            try:
                outcomes.append(lab.outcome())
            except Exception as err:
                outcomes.append((type(err), str(err)))
    assert outcomes[0] == outcomes[1]


def test_seams_of_ram(tmp_path: Path) -> None:
    """Memory that is not in one piece is the long way's."""
    regions = [Region(0, RAM // 2, RAM // 2), Region(RAM // 2, RAM // 2, 0)]
    with QuickLab(tmp_path, regions=regions) as lab:
        lab.offer_rows(T_IN, 5, d1_addr=RAM // 2 - 256)
        [(_, written)] = lab.outcome()[1]
        assert written == 513
        assert lab.memory.read(RAM // 2 - 256, 512) == CONTENT[5 * 512 : 6 * 512]


# When not to.


def test_not_without_indirect_descriptors(tmp_path: Path) -> None:
    """A table that was not negotiated is a broken rule."""
    with BlkLab(tmp_path, SIZE, content=CONTENT) as lab:
        [driver] = cast("list[SplitDriver]", lab.start(BLK_F_FLUSH))
        for _ in range(WORTHWHILE):
            lab.ask(T_IN, room=512)
        driver.desc(0, TABLES, 48, INDIRECT)
        driver.offer(0)
        lab.schedule(0)
        with pytest.raises(GuestError, match="not negotiated"):
            lab.serve()


def test_writes_wait_for_the_medium_in_writethrough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they are no copies."""
    with BlkLab(tmp_path, SIZE, content=CONTENT) as lab:
        lab.start(F_INDIRECT_DESC)  # without FLUSH: writethrough
        for _ in range(WORTHWHILE):
            lab.ask(T_IN, room=512)
        calls = record_calls(monkeypatch, "preadv", "pwritev")
        assert lab.ask(T_IN, 3, room=512).data == CONTENT[1536:2048]
        assert not calls
        assert lab.ask(T_OUT, 3, b"s" * 512).status == S_OK
        assert calls == ["pwritev"]


def test_a_read_only_disk(tmp_path: Path) -> None:
    """Reads are served, writes refused."""
    with BlkLab(tmp_path, SIZE, content=CONTENT, readonly=True) as lab:
        lab.start(F_INDIRECT_DESC | BLK_F_FLUSH)
        for _ in range(2 * WORTHWHILE):
            assert lab.ask(T_IN, 3, room=512).data == CONTENT[1536:2048]
        assert lab.ask(T_OUT, 3, b"s" * 512).status == S_IOERR
        assert lab.image.read_bytes() == CONTENT


def test_an_image_that_is_cut_short(tmp_path: Path) -> None:
    """IOERR and a line in the log as ever; the device lives, and so does what is left."""
    with QuickLab(tmp_path) as lab:
        os.truncate(lab.image, 65536)
        for sector in (1000, 1001):
            assert lab.ask(T_IN, sector, room=512).status == S_IOERR
        assert "shrunk" in lab.said[0]
        assert lab.ask(T_IN, 3, room=512).data == CONTENT[1536:2048]
        assert lab.ask(T_OUT, 1000, b"w" * 512).status == S_OK
        assert lab.image.read_bytes()[512000:512512] == b"w" * 512


def test_in_order(tmp_path: Path) -> None:
    """With IN_ORDER, too."""
    with BlkLab(tmp_path, SIZE, content=CONTENT) as lab:
        lab.start(F_INDIRECT_DESC | F_IN_ORDER | BLK_F_FLUSH)
        for turn in range(2 * WORTHWHILE):
            sector = turn * 16
            data = CONTENT[sector * 512 : sector * 512 + 512]
            assert lab.ask(T_IN, sector, room=512).data == data


# Killed amid it.


class Killable:
    """A queue whose device may be killed at any store to ring or in-flight area."""

    def __init__(self, features: int, *, in_order: bool = False) -> None:
        self.watch = Watch(None)
        fd = make_memfd(1 << 20)
        memories = GuestMemory(fd, REGION), WatchedMemory(fd, REGION, self.watch)
        os.close(fd)
        self.driver = driver = open_driver(memories[0], 8, 0x1000, features)
        self.places = driver.desc_gpa, driver.avail_gpa, driver.used_gpa
        self.books: dict[str, Any] = {"features": features, "in_order": in_order}
        self.memory = memories[0]
        packed = bool(features & F_RING_PACKED)
        self.area = memoryview(mmap.mmap(-1, inflight_bytes(8, packed=packed)))
        watched = self.watch.view("area", self.area)
        self.queue = open_queue(memories[1], 8, *self.places, inflight=watched, **self.books)
        for _ in range(5):  # a packed batch goes round the end of the ring, as the next may
            driver.add([b"h" * 16, b"d"], [1])
            self.queue.push_batch([(chain.head, 1) for chain in self.queue.pop_batch(8)])
            driver.collect()
        self.tokens = [driver.add([b"h" * 16, b"d"], [1]) for _ in range(3)]

    def until_killed(self, work: Callable[[], None], kill_at: int) -> bool:
        """Do the work and be killed in place of its store number `kill_at`; False: it was not."""
        self.watch.kill_at = len(self.watch.log) + kill_at
        try:
            work()
        except Killed:
            return True
        finally:
            self.watch.kill_at = None
        return False

    def succeed(self) -> None:
        """A successor does what is left: each request comes back once, in its order."""
        successor = open_queue(self.memory, 8, *self.places, inflight=self.area, **self.books)
        left = successor.resubmit() + successor.pop_batch(8)
        assert all(len(chain.readable) == 2 for chain in left)
        successor.push_batch([(chain.head, 1) for chain in left])
        assert [used.token for used in self.driver.collect()] == self.tokens
        assert self.driver.outstanding == 0


rings = pytest.mark.parametrize("layout", [0, F_RING_PACKED], ids=["split", "packed"])
orders = pytest.mark.parametrize("in_order", [False, True])


@rings
@orders
def test_pass_back_survives_a_kill_at_any_store(layout: int, in_order: bool) -> None:
    """Whoever comes next finds each chain in the ring or given back, and none twice."""
    kill_at, killed = 0, True
    while killed:
        lab = Killable(layout | F_INDIRECT_DESC, in_order=in_order)
        tables = lab.queue.peek(8, 48)
        assert len(tables) == 3
        killed = lab.until_killed(
            partial(lab.queue.pass_back, [(head, 1) for head, _ in tables]), kill_at
        )
        lab.succeed()
        kill_at += 1
    assert kill_at > 5


@rings
@orders
def test_take_survives_a_kill_at_any_store(layout: int, in_order: bool) -> None:
    """Whoever comes next finds what was taken in flight, and the rest in the ring."""
    kill_at, killed = 0, True
    while killed:
        lab = Killable(layout | F_INDIRECT_DESC, in_order=in_order)
        tables = lab.queue.peek(8, 48)
        killed = lab.until_killed(partial(lab.queue.take, tables, 48), kill_at)
        if not killed:
            assert lab.queue.nr_in_flight == 3
            assert lab.queue.peek(8, 48) == []
        lab.succeed()
        kill_at += 1
    assert kill_at > 3


@rings
def test_what_was_taken_comes_back_in_any_order(layout: int) -> None:
    """As if it had been popped; and what follows is looked into only then."""
    lab = Killable(layout | F_INDIRECT_DESC)
    lab.queue.take(lab.queue.peek(2, 48), 48)
    heads = list(lab.queue._in_flight)
    chain = lab.queue.pop()
    assert chain is not None
    for head in (chain.head, heads[1], heads[0]):
        lab.queue.push(head, 1)
    found = [used.token for used in lab.driver.collect()]
    assert found == [lab.tokens[2], lab.tokens[1], lab.tokens[0]]
    assert not lab.queue.has_work()


def test_a_page_that_has_to_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM process is told so meanwhile, as with a system call: it has patience then."""
    seen: list[int] = []

    def watched(*args: Any, **more: Any) -> Served:
        seen.append(lab.device.totals[BUSY])
        return serve_quick(*args, **more)

    with QuickLab(tmp_path) as lab:
        monkeypatch.setattr(vioblk, "serve_quick", watched)
        assert lab.ask(T_IN, 3, room=512).status == S_OK
        assert seen
        assert set(seen) == {1}
        assert lab.device.totals[BUSY] == 0
