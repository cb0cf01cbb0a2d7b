"""What a network device's first process makes of what the others say, and the other way round."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError, GuestError
from devices import netlink, netremote
from devices.netlimit import Limit, Shares
from devices.netlink import Captured, Link, LinkError
from devices.netport import Counters
from devices.netremote import Remotes
from devices.spec import COUNTERS_SIZE, COUNTERS_STRIDE, SPECS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timer:
    """Fires when it is told to."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback, self.armed = callback, False

    def arm(self, seconds: float, every: float = 0.0) -> None:
        self.armed = True

    def disarm(self) -> None:
        self.armed = False


class Lead:
    """A device and its process, as Remotes sees both."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"up": True}
        self.shown: list[Captured] = []
        self.kept_frames: list[bytes] = []
        self.losses: list[OSError] = []
        self.said: list[str] = []
        self.told: list[str] = []
        self.called: list[int] = []
        self.watched: dict[int, Callable[[int], None]] = {}
        self.timers: list[Timer] = []

    def pair_state(self, number: int) -> dict[str, Any]:
        return {**self.state, "pair": number}

    def captured(self, frame: Captured) -> None:
        self.shown.append(frame)

    def kept(self, frame: bytes) -> None:
        self.kept_frames.append(frame)

    def port_lost(self, err: OSError) -> None:
        self.losses.append(err)

    def log(self, level: int, text: str) -> None:
        self.said.append(text)

    def tell(self, word: str) -> None:
        self.told.append(word)

    def call(self, index: int) -> None:
        self.called.append(index)

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(callback))
        return self.timers[-1]

    def schedule(self, index: int) -> None:
        raise NotImplementedError

    def checkpoint(self) -> None:
        """See Host."""

    def config_changed(self) -> None:
        raise NotImplementedError


class Bench:
    """Remotes of one pair, and the other end of its connection."""

    def __init__(self) -> None:
        self.lead = Lead()
        mine, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        self.fd = mine.detach()
        self.bell = os.eventfd(0)
        self.remotes = Remotes(self.lead, self.lead, {3: (self.fd, self.bell)})

    def heard(self) -> dict[str, Any]:
        """Return the state that the pair was sent."""
        message = self.end.recv(1 << 20)
        assert message[:1] == b"S"
        state: dict[str, Any] = json.loads(message[1:])
        return state

    def says(self, message: bytes) -> None:
        """Have the pair say something, and the first process read it."""
        self.end.send(message)
        self.lead.watched[self.fd](1)

    @property
    def given_up(self) -> bool:
        return self.fd not in self.lead.watched


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One pair, number 3."""
    made = Bench()
    yield made
    made.end.close()
    os.close(made.bell)
    if not made.given_up:
        os.close(made.fd)


def test_a_state_is_sent_once_and_waited_for(bench: Bench) -> None:
    """The answer to an older one does not count; what has not changed is not said again."""
    bench.remotes.follow(wait=False)
    first = bench.heard()
    assert (first["pair"], first["up"]) == (3, True)
    bench.lead.state = {"up": False}
    bench.end.send(netlink.followed(first["number"], [(1, 2), None]))
    bench.end.send(netlink.followed(first["number"] + 1, [(3, 4), (5, 6)]))
    bench.remotes.follow()
    assert bench.heard()["up"] is False
    assert bench.remotes.cursors(3) == ((3, 4), (5, 6))
    bench.remotes.follow()
    bench.end.setblocking(False)
    with pytest.raises(BlockingIOError):
        bench.end.recv(1)
    assert bench.lead.told == []


def test_one_that_does_not_answer_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM process is told which, and nobody waits for it again."""
    monkeypatch.setattr(netremote, "DEADLINE", 0.05)
    bench.remotes.follow()
    assert bench.given_up
    assert bench.lead.told == ["pair-3-1"]
    assert "does not answer" in bench.lead.said[0]
    bench.remotes.follow()


def test_one_that_has_died_is_not_waited_for(bench: Bench) -> None:
    """Its successor is told everything, by a connection of its own; nobody complains of it."""
    bench.end.close()
    bench.remotes.follow()
    assert (bench.lead.told, bench.lead.said) == (["pair-3-1"], [])
    mine, bench.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.setblocking(False)
    bench.fd = mine.detach()
    for value in (3, [4, 2], [3], [3, "2"], None):
        with pytest.raises(ConfigError, match="no pair"):
            bench.remotes.take(value, bench.fd)
    bench.remotes.take([3, 2], bench.fd)
    state = bench.heard()
    bench.says(netlink.followed(state["number"], [None, None]))
    bench.remotes.follow()
    assert not bench.given_up


@pytest.mark.parametrize(
    "nonsense",
    [b"?", b"S{}", b"F", b"F" + bytes(13), b"C", b"C\7" + bytes(8), b"L\0", bytes(80 << 10)],
)
def test_nonsense_ends_the_connection(bench: Bench, nonsense: bytes) -> None:
    """Whatever a process says that was taken over, only its own place is lost."""
    bench.says(nonsense)
    assert bench.given_up
    assert bench.lead.told == ["pair-3-1"]


def test_what_a_pair_tells(bench: Bench) -> None:
    """Frames, a lost port, a call; what the guest did wrong is raised where the loop catches it."""
    frame = Captured(2, 7, 100, b"abc")
    bench.says(b"".join(netlink.captured(frame)))
    bench.says(b"K" + b"header, frame")
    bench.says(netlink.lost(OSError(5, "Input/output error")))
    assert bench.lead.shown == [frame]
    assert bench.lead.kept_frames == [b"header, frame"]
    assert [(err.errno, err.strerror) for err in bench.lead.losses] == [(5, "Input/output error")]
    os.eventfd_write(bench.bell, 1)
    bench.lead.watched[bench.bell](1)
    assert bench.lead.called == [6, 7]
    bench.says(b"Gavail index is 9 ahead\xff")
    [timer] = bench.lead.timers
    assert timer.armed
    with pytest.raises(GuestError, match="9 ahead"):
        timer.callback()
    bench.says(b"Gmore")
    bench.remotes.reset()
    assert not timer.armed
    timer.callback()


def test_a_link_that_is_full_is_no_place_to_wait() -> None:
    """What may be lost is; what may not waits until a deadline."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.setblocking(False)
    with mine, other:
        link = Link(mine.fileno())
        while link.attempt([bytes(60_000)]):
            pass
        with pytest.raises(LinkError, match="takes no messages"):
            link.send(bytes(60_000), 0)
        assert link.receive(10) is None
        other.send(bytes(11))
        with pytest.raises(LinkError, match="more than 10"):
            link.receive(10)


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shared_limits() -> None:
    """Three processes together get what is allowed, however unevenly they want it."""
    clock = Clock()
    page = memoryview(bytearray(COUNTERS_SIZE)).cast("Q")
    limits = []
    for number in range(3):
        shares = Shares(page, number, 3)
        limit = Limit(1000, 0, shares.books("tx"))
        assert limit._bytes is not None
        limit._bytes._clock, limit._bytes._at = clock, clock.now
        limits.append(limit)
    sent = [0, 0, 0]
    for tick in range(1000):
        clock.now += 0.01
        for number, limit in enumerate(limits):
            if tick % (number + 1) == 0 and limit.wait() <= 0:
                limit.take(10)
                sent[number] += 10
    assert 10_000 * 0.95 <= sum(sent) <= 10_000 + 3 * 100 + 30
    assert min(sent) > 0
    page[COUNTERS_STRIDE + 24 + 2] = (1 << 64) - 1  # one that was taken over writes anything
    assert limits[0].wait() <= 0.1
    limits[1].take(10)


def test_counting_goes_on_where_a_predecessor_was() -> None:
    """Frames, bytes, and drops by their reasons."""
    page = memoryview(bytearray(COUNTERS_SIZE)).cast("Q")
    first = Counters("rx")
    first.frames, first.bytes = 3, 500
    first.drop("no buffers")
    first.publish(page)
    again = Counters("rx")
    again.resume(page)
    assert again.facts() == first.facts()
    again.drop("no buffers")
    again.add(first)
    assert again.facts() == {"frames": 6, "bytes": 1000, "drops": {"no buffers": 3}}
    assert len(SPECS["vionet"].counters) <= 24  # behind them are the words of Shares
