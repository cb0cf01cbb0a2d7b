"""Requests past the page cache started in one pass, beside the long way on the same rings."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import GuestError
from devices import uring
from devices.blkfly import request_of
from devices.blkreq import HEADER, S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
from devices.chain import DESC
from devices.features import F_INDIRECT_DESC
from devices.qcow2 import Qcow2
from tests.blklab import Answer, record_calls
from tests.blkrows import CHANGES, CONTENT, DATA, HEADERS, RAM, SIZE, TABLES, RowsLab
from tests.qcow2lab import needs_qemu, qemu_img
from tests.slowring import SlowRing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FlyLab(RowsLab):
    """A disk past the page cache; `quick`: by the short way."""

    def __init__(self, directory: Path, *, quick: bool = True, **more: Any) -> None:
        super().__init__(directory, cache="none", **more)
        self.ring = SlowRing.latest
        self.launched: list[int] = []  # how many requests each start was of
        start = self.ring.start

        def start_(fd: int, transfers: Any) -> None:
            self.launched.append(len(transfers))
            start(fd, transfers)

        self.ring.start = start_  # type: ignore[method-assign]
        if not quick:
            self.device._is_plain = lambda *_: False  # type: ignore[method-assign]

    def kick(self, queue: int = 0) -> None:
        """The driver kicks."""
        self.schedule(queue)
        self.serve()

    def ready(self) -> None:
        """Something has come back."""
        [callback] = self.watched.values()
        callback(1)

    def land_all(self) -> None:
        """All comes back that flies, and what is started meanwhile."""
        while self.ring.flying or self.ring.has_results:
            self.ring.flying.reverse()  # in the order of their start
            while self.ring.flying:
                self.ring.land()
            self.ready()
            self.serve()

    def want(self, sector: int, length: int = 512) -> int:
        """Offer a read; return its token."""
        return self.offer([HEADER.pack(T_IN, 0, sector)], [length, 1])

    def found(self) -> dict[int, Answer]:
        """What has come back to the driver, by token."""
        return {used.token: self._answer(0, used) for used in self.driver.collect()}

    def serve_all(self) -> None:
        self.kick()
        self.land_all()


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uring, "Ring", SlowRing)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FlyLab]:
    with FlyLab(tmp_path, packed=request.param) as lab:
        yield lab


def good(sector: int, length: int = 512) -> Answer:
    return Answer(S_OK, length + 1, CONTENT[512 * sector : 512 * sector + length])


def test_requests_of_the_usual_shape(lab: FlyLab) -> None:
    """They are started together, come back as they finish, and each is counted."""
    first, second = lab.want(8), lab.want(64, 4096)
    third = lab.offer([HEADER.pack(T_OUT, 0, 128), b"w" * 1024], [1])
    lab.kick()
    assert lab.launched == [3]
    assert lab.found() == {}
    lab.ring.land()
    lab.ready()
    assert lab.found() == {third: Answer(S_OK, 1, b"")}
    assert lab.image.read_bytes()[128 * 512 :][:1024] == b"w" * 1024
    lab.land_all()
    assert lab.found() == {first: good(8), second: good(64, 4096)}
    assert list(lab.device.totals[:5]) == [2, 512 + 4096, 1, 1024, 0]


def test_what_was_added_meanwhile_needs_no_kick(lab: FlyLab) -> None:
    """It is started as soon as something has come back; a kick is asked for what comes later."""
    lab.want(8)
    lab.kick()
    lab.driver.kick_needed()
    lab.want(64)
    assert lab.driver.kick_needed()
    lab.ring.land()
    lab.ready()
    assert lab.launched == [1, 1]
    lab.want(128)
    assert lab.driver.kick_needed()
    lab.kick()
    lab.land_all()
    assert sorted(answer.data for answer in lab.found().values()) == sorted(
        good(sector).data for sector in (8, 64, 128)
    )


def test_what_was_added_and_is_of_another_shape(lab: FlyLab) -> None:
    """The queue is served as after a kick."""
    first = lab.want(8)
    lab.kick()
    flush = lab.offer([HEADER.pack(T_FLUSH, 0, 0)], [1])
    lab.ring.land()
    lab.ready()
    assert lab.scheduled == [0]
    lab.serve()
    lab.land_all()
    assert lab.found() == {first: good(8), flush: Answer(S_OK, 1, b"")}


def test_nothing_is_started_on_the_way_to_rest(lab: FlyLab) -> None:
    """Draining ends, whatever the driver adds."""
    lab.want(8)
    lab.kick()
    lab.want(64)
    lab.device.pause()
    assert lab.launched == [1]
    assert lab.ring.flying == []
    assert len(lab.found()) == 1


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_neighbours_are_the_long_way_s(lab: FlyLab, kind: int) -> None:
    """It makes one request of them."""
    for sector in (64, 8, 9, 10, 100):
        if kind == T_IN:
            lab.want(sector)
        else:
            lab.offer([HEADER.pack(T_OUT, 0, sector), b"w" * 512], [1])
    lab.kick()
    assert lab.launched == [1]
    assert len(lab.ring.flying) == 3
    lab.land_all()
    assert [answer.status for answer in lab.found().values()] == [S_OK] * 5
    nr_reads, bytes_read, nr_writes, bytes_written, _ = lab.device.totals[:5]
    expected = (5, 2560, 0, 0) if kind == T_IN else (0, 0, 5, 2560)
    assert (nr_reads, bytes_read, nr_writes, bytes_written) == expected


@pytest.mark.parametrize("result", [-errno.EINVAL, -errno.EAGAIN, 0, 100])
def test_what_the_kernel_does_not_do(
    lab: FlyLab, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done in another way, with nothing else in flight; others are not touched."""
    first, second = lab.want(8), lab.want(64)
    lab.kick()
    calls = record_calls(monkeypatch, "preadv")
    lab.ring.land(result)
    lab.ready()
    assert lab.found() == {first: good(8), second: good(64)}
    assert len(calls) == 2  # one of them the slow ring's own


def test_an_error_of_the_medium(lab: FlyLab) -> None:
    """IOERR, and a line in the log."""
    token = lab.want(8)
    lab.kick()
    lab.ring.land(-errno.EIO)
    lab.ready()
    assert lab.found()[token].status == S_IOERR
    assert lab.said == ["read of 512 bytes at 0x1000: Input/output error"]


def test_a_failed_write_is_not_of_guest_memory(lab: FlyLab) -> None:
    """What the long way gets cannot be written to: it is the driver's."""
    token = lab.offer([HEADER.pack(T_OUT, 0, 8), b"w" * 512], [1])
    lab.kick()
    [flight] = lab.device._server._quick.values()  # type: ignore[attr-defined]
    kind, offset, length, views, *_ = request_of(flight)
    assert (kind, offset, length) == (T_OUT, 4096, 512)
    assert views[0].readonly
    lab.ring.land(-errno.EAGAIN)
    lab.ready()
    assert lab.found() == {token: Answer(S_OK, 1, b"")}


def test_a_head_that_is_in_flight(lab: FlyLab) -> None:
    """Offered again it breaks the ring, as ever; so does one offered twice at once."""
    lab.offer_rows(T_IN, 8)
    lab.kick()
    lab.offer_table(TABLES)
    lab.schedule(0)
    with pytest.raises(GuestError, match=r"offered again while in flight"):
        lab.serve()


def test_no_more_than_there_is_room_for(lab: FlyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is started when there is."""
    monkeypatch.setattr(SlowRing, "entries", 10)
    tokens = {lab.want(3 * index) for index in range(30)}
    lab.kick()
    assert len(lab.ring.flying) == 10
    lab.land_all()
    assert set(lab.found()) == tokens


def test_a_reset_with_requests_in_flight(lab: FlyLab) -> None:
    """They are waited for and forgotten."""
    for sector in (8, 64):
        lab.want(sector)
    lab.kick()
    lab.device.reset()
    assert lab.ring.flying == []
    assert lab.device._server.room == SlowRing.entries


def test_writes_that_have_to_reach_the_medium(tmp_path: Path) -> None:
    """In writethrough the long way takes them."""
    with FlyLab(tmp_path) as lab:
        lab.start(F_INDIRECT_DESC)
        [lab.driver] = lab.queues
        token = lab.offer([HEADER.pack(T_OUT, 0, 8), b"w" * 512], [1])
        lab.kick()
        assert lab.launched == []
        lab.land_all()
        assert lab.found() == {token: Answer(S_OK, 1, b"")}


# Beside the long way.


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("kind", [T_IN, T_OUT, T_FLUSH, 1 << 31])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_doubt_is_the_long_way_s(
    kind: int, changes: dict[str, int], packed: bool, tmp_path: Path
) -> None:
    """One word changed: both do the same, to the byte."""
    outcomes = []
    for quick in (True, False):
        with FlyLab(tmp_path / str(quick), quick=quick, packed=packed) as lab:
            lab.offer_rows(kind, 5, **changes)
            outcomes.append(lab.outcome())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("sector", [SIZE // 512 - 1, SIZE // 512, 1 << 55, (1 << 64) - 1])
def test_the_end_of_the_disk(kind: int, sector: int, tmp_path: Path) -> None:
    """What reaches beyond is refused by both."""
    outcomes = []
    for quick in (True, False):
        with FlyLab(tmp_path / str(quick), quick=quick) as lab:
            lab.offer_rows(kind, sector)
            outcomes.append(lab.outcome())
    assert outcomes[0] == outcomes[1]


words = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 48, 512, 4096, HEADERS, DATA, RAM - 1, RAM])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    table=st.lists(
        st.tuples(words, words, st.integers(0, 7), st.integers(0, 4)), min_size=3, max_size=3
    ),
    kind=st.integers(0, 2),
    packed=st.booleans(),
)
def test_random_tables(
    table: list[tuple[int, int, int, int]], kind: int, packed: bool, tmp_path: Path
) -> None:
    """Whatever a table holds, both do the same."""
    outcomes = []
    for quick in (True, False):
        with FlyLab(tmp_path / str(quick), quick=quick, packed=packed) as lab:
            lab.offer_rows(kind, 5)
            lab.memory.write(TABLES, b"".join(DESC.pack(*row) for row in table))
            outcomes.append(lab.outcome())
    assert outcomes[0] == outcomes[1]


@needs_qemu
def test_a_qcow2_image(tmp_path: Path) -> None:
    """Clusters that are known and in place are started, others take the long way first."""
    (tmp_path / "plain").write_bytes(CONTENT[: SIZE // 2])
    qemu_img("convert", "-O", "qcow2", tmp_path / "plain", tmp_path / "image")
    content = (tmp_path / "image").read_bytes()
    with FlyLab(tmp_path, content=content, make_disk=Qcow2) as lab:
        for expected in ([], [1]):  # its table is not in memory the first time
            token = lab.want(9, 1024)
            lab.kick()
            lab.land_all()
            assert lab.launched == expected
            assert lab.found() == {token: good(9, 1024)}
        for expected in ([1], []):
            lab.launched.clear()
            token = lab.offer([HEADER.pack(T_OUT, 0, 9), b"q" * 512], [1])
            lab.kick()
            lab.land_all()
            assert lab.launched == expected
            assert lab.found()[token].status == (S_OK if expected else S_IOERR)
            lab.disk.file.corrupt("a test says so")
