"""The ladder with a clock of its own: which way is asked when, and what ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm.ladder import REBOOT, STOP, Ladder, Step

if TYPE_CHECKING:
    from collections.abc import Callable

ACK, DOWN = 3.0, 120.0


class FakeTimer:
    """One timer of a clock that only tests move."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.left: float | None = None

    def arm(self, seconds: float, every: float = 0.0) -> None:
        assert not every
        self.left = seconds

    def disarm(self) -> None:
        self.left = None

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        while self.left is not None and self.left <= seconds:
            seconds, self.left = seconds - self.left, None
            self._callback()
        if self.left is not None:
            self.left -= seconds


class FakeWay:
    """A way that is possible or not, and notes what it is asked."""

    def __init__(self, name: str, why_not: str = "") -> None:
        self.name, self.why_not = name, why_not
        self.asked: list[str] = []
        self.noticed = False
        self.within: Callable[[], None] = lambda: None  # runs while asking

    def ask(self, goal: str) -> str:
        self.asked.append(goal)
        self.within()
        return self.why_not

    def was_taken(self) -> bool:
        return self.noticed


class Lab:
    """A ladder of three ways."""

    def __init__(self) -> None:
        self.ways = [FakeWay(name) for name in ("a", "b", "c")]
        self.steps: list[Step] = []
        self.gave_up: list[tuple[str, str]] = []
        self.ladder = Ladder(
            self.ways,
            self._timer,  # type: ignore[arg-type]
            (ACK, DOWN),
            report=self.steps.append,
            gave_up=lambda goal, detail: self.gave_up.append((goal, detail)),
        )

    def _timer(self, callback: Callable[[], None]) -> FakeTimer:
        self.timer = FakeTimer(callback)
        return self.timer

    def told(self) -> list[str]:
        """The steps in short."""
        return [f"{step.way} {step.state}" for step in self.steps]

    def asked(self) -> list[list[str]]:
        """What each way was asked."""
        return [way.asked for way in self.ways]


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.mark.parametrize("goal", [STOP, REBOOT])
def test_the_first_way_is_asked_alone(goal: str, lab: Lab) -> None:
    """It is taken and the guest goes down: no other way is tried, no time is left running."""
    lab.ladder.start(goal)
    assert lab.ladder.step == {"goal": goal, "way": "a", "state": "asked"}
    lab.timer.pass_(ACK - 0.5)
    lab.ladder.taken()
    lab.timer.pass_(DOWN - 0.5)
    assert lab.ladder.over() == goal
    lab.timer.pass_(10 * DOWN)
    assert lab.asked() == [[goal], [], []]
    assert lab.told() == ["a asked", "a taken"]
    assert not (lab.gave_up)
    assert not (lab.ladder.step)
    assert not (lab.ladder.goal)


def test_ways_that_are_not_possible_are_passed_over(lab: Lab) -> None:
    """At once, each with its reason."""
    lab.ways[0].why_not, lab.ways[1].why_not = "no driver", "nobody listens"
    lab.ladder.start(STOP)
    assert lab.told() == ["a unable", "b unable", "c asked"]
    assert [step.detail for step in lab.steps[:2]] == ["no driver", "nobody listens"]


def test_each_way_has_its_time(lab: Lab) -> None:
    """What is ignored is followed by the next way, and the last one by the end."""
    lab.ladder.start(STOP)
    for told in ("a ignored", "b ignored"):
        lab.timer.pass_(ACK - 0.5)
        assert told not in lab.told()
        lab.timer.pass_(0.5)
        assert told in lab.told()
        assert lab.gave_up == []
    lab.timer.pass_(ACK)
    assert lab.gave_up == [(STOP, "the guest took note of nothing")]
    assert lab.told()[-1] == "c ignored"
    assert lab.timer.left is None
    assert lab.ladder.step is None


def test_a_way_that_is_asked_for_is_taken(lab: Lab) -> None:
    """A way that cannot speak up is looked at when its time is over."""
    lab.ladder.start(STOP)
    lab.ways[0].noticed = True
    lab.timer.pass_(ACK)
    assert lab.told() == ["a asked", "a taken"]
    lab.timer.pass_(DOWN - 0.5)
    assert lab.gave_up == []
    lab.timer.pass_(0.5)
    assert lab.gave_up == [(STOP, "the guest took note and was not down 120 s later")]
    assert lab.asked() == [[STOP], [], []]


def test_an_answer_that_comes_while_asking(lab: Lab) -> None:
    """The guest was quicker than the question's return: its time to go down has begun."""
    lab.ways[0].within = lab.ladder.taken
    lab.ladder.start(STOP)
    assert lab.told() == ["a taken"]
    assert lab.timer.left == DOWN


def test_acknowledging_again_gains_no_time(lab: Lab) -> None:
    """Or a guest could stay for ever by doing so again and again."""
    lab.ladder.start(STOP)
    lab.ladder.taken()
    for _ in range(3):
        lab.timer.pass_(DOWN / 3)
        lab.ladder.taken()
    assert [goal for goal, _ in lab.gave_up] == [STOP]


def test_asking_again_begins_nothing_anew(lab: Lab) -> None:
    """Neither a second question nor more time."""
    lab.ladder.start(STOP)
    lab.timer.pass_(2)
    lab.ladder.start(STOP)
    assert lab.asked() == [[STOP], [], []]
    lab.timer.pass_(ACK - 2)
    assert lab.told() == ["a asked", "a ignored", "b asked"]


def test_the_goal_may_change_on_the_way(lab: Lab) -> None:
    """The guest goes down either way; the ways that are still to come ask for the new goal."""
    lab.ladder.start(REBOOT)
    lab.ladder.start(STOP)
    lab.timer.pass_(ACK)
    assert lab.asked() == [[REBOOT], [STOP], []]
    assert lab.ladder.over() == STOP


def test_a_word_that_comes_late_means_nothing(lab: Lab) -> None:
    """Nobody has asked, or it was over: acknowledgements are of no use."""
    lab.ladder.taken()
    assert not (lab.steps)
    assert not (lab.timer.left)
    assert not (lab.ladder.over())
    lab.ladder.start(STOP)
    lab.ladder.over()
    lab.ladder.taken()
    assert lab.told() == ["a asked"]
    assert lab.timer.left is None


def test_a_guest_that_goes_down_by_itself(lab: Lab) -> None:
    """It announces that once, and has the short time for it; there is no goal to carry out."""
    lab.ladder.announced()
    lab.ladder.announced()
    assert lab.told() == ["guest announced"]
    assert lab.timer.left == ACK
    lab.timer.pass_(ACK)
    assert [goal for goal, _ in lab.gave_up] == [""]


def test_a_guest_that_announces_and_resets(lab: Lab) -> None:
    """It was a reboot of its own: over, and nothing was wanted."""
    lab.ladder.announced()
    assert lab.ladder.over() == ""
    lab.timer.pass_(DOWN)
    assert lab.gave_up == []


def test_a_stop_while_it_goes_down_by_itself(lab: Lab) -> None:
    """Nobody needs to ask; but when it is down, that is to be the end."""
    lab.ladder.announced()
    lab.ladder.start(STOP)
    assert lab.asked() == [[], [], []]
    lab.ladder.announced()
    assert lab.ladder.over() == STOP


def test_an_announcement_while_it_is_asked_changes_nothing(lab: Lab) -> None:
    """A guest on its way down says so, too; its time goes on."""
    lab.ladder.start(STOP)
    lab.ladder.taken()
    lab.timer.pass_(1)
    lab.ladder.announced()
    assert lab.timer.left == DOWN - 1
    assert lab.told() == ["a asked", "a taken"]


def test_it_can_be_used_again(lab: Lab) -> None:
    """After a reboot everything begins at the first way."""
    for _ in range(2):
        lab.ladder.start(REBOOT)
        lab.timer.pass_(ACK)
        assert lab.ladder.step == {"goal": REBOOT, "way": "b", "state": "asked"}
        assert lab.ladder.over() == REBOOT
    assert lab.asked() == [[REBOOT] * 2, [REBOOT] * 2, []]


def test_giving_up_may_start_anew(lab: Lab) -> None:
    """By the time that is told, the ladder is free: whoever hears of it may ask for another."""
    seen = []
    lab.ladder = Ladder(
        [FakeWay("a", "no")],
        lab._timer,  # type: ignore[arg-type]
        (ACK, DOWN),
        report=lab.steps.append,
        gave_up=lambda goal, detail: seen.append((goal, lab.ladder.step)),
    )
    lab.ladder.start(STOP)
    assert seen == [(STOP, None)]
