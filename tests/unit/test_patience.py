"""A device looks for work a little longer only where that has paid."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from devices import patience
from devices.patience import LOOK, QUICK, REST_MOST, Patience

if TYPE_CHECKING:
    from devices.virtqueue import VirtQueue


class Clock:
    """Time goes on with each look at it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = LOOK / 10

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class FakeQueue:
    """Has work after so many looks."""

    def __init__(self) -> None:
        self.after = 1 << 30
        self.looks = 0

    def has_work(self) -> bool:
        self.looks += 1
        return self.looks > self.after


class Lab:
    """A patience, its clock and its queue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.queue, self.patience = Clock(), FakeQueue(), Patience()
        monkeypatch.setattr(patience, "monotonic", self.clock)

    def look(self) -> bool:
        self.queue.looks = 0
        return self.patience.look(cast("VirtQueue", self.queue))

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds
        self.patience.woken()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


def test_work_that_comes_seldom_is_not_looked_for(lab: Lab) -> None:
    for _ in range(3):
        lab.sleep(2 * QUICK)
        assert not lab.look()
        assert lab.queue.looks == 0


def test_work_in_quick_succession_is(lab: Lab) -> None:
    lab.sleep(1)
    assert not lab.look()
    lab.sleep(QUICK / 2)
    lab.queue.after = 3
    assert lab.look()
    assert lab.queue.looks == 4


def test_a_look_ends(lab: Lab) -> None:
    lab.look()
    lab.sleep(QUICK / 2)
    assert not lab.look()
    assert 5 < lab.queue.looks < 15


def test_in_vain_means_longer_rests(lab: Lab) -> None:
    """1, 2, 4, … sleeps without a look, up to a limit; one that pays begins anew."""
    rests = [0]
    while len(rests) <= REST_MOST.bit_length() + 2:
        lab.sleep(QUICK / 2)
        assert not lab.look()
        if lab.queue.looks:
            rests.append(0)
        else:
            rests[-1] += 1
    powers = [1 << number for number in range(REST_MOST.bit_length())]
    assert rests[:-1] == [*rests[:1], *powers, REST_MOST]
    lab.queue.after = 0
    while not lab.look():
        lab.sleep(QUICK / 2)
    lab.queue.after = 1 << 30
    for looks in (True, False, True):
        assert not lab.look()
        assert bool(lab.queue.looks) is looks
        lab.sleep(QUICK / 2)
