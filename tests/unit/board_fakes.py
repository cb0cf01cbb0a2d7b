"""What a board device is wired to in tests: an interrupt line, a clock, timers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.loop import Timer

if TYPE_CHECKING:
    from collections.abc import Callable


class Line:
    """An interrupt line that remembers what was driven on it."""

    def __init__(self) -> None:
        self.changes: list[bool] = []
        self.level = False

    def __call__(self, level: bool) -> None:
        assert level != self.level, "driven to the level it has"
        self.level = level
        self.changes.append(level)

    def take(self) -> list[bool]:
        """Return the changes since this was last called."""
        changes, self.changes = self.changes, []
        return changes

    def rises(self) -> int:
        """How often an edge-triggered controller would have seen it rise."""
        return sum(self.changes)


class FakeTimer(Timer):
    """A timer that fires when its clock is moved past it."""

    def __init__(self, clock: FakeClock, callback: Callable[[], None]) -> None:
        self.clock, self.callback = clock, callback
        self.due: float | None = None
        self.armings = 0

    def arm(self, seconds: float, every: float = 0.0) -> None:
        """Remember when to fire."""
        assert seconds > 0
        assert not every
        self.armings += 1
        self.due = self.clock.now + seconds

    def disarm(self) -> None:
        """Forget it."""
        self.due = None


class FakeClock:
    """Seconds that pass only when told to; owns the timers made by timer()."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.timers: list[FakeTimer] = []

    def __call__(self) -> float:
        return self.now

    def timer(self, callback: Callable[[], None]) -> FakeTimer:
        """Stand in for Loop.timer."""
        self.timers.append(FakeTimer(self, callback))
        return self.timers[-1]

    def pass_by(self, seconds: float) -> int:
        """Let time pass and fire what comes due, in order; returns how many fired."""
        end, fired = self.now + seconds, 0
        while armed := [t for t in self.timers if t.due is not None and t.due <= end]:
            timer = min(armed, key=lambda t: t.due or 0.0)
            assert timer.due is not None
            self.now, timer.due = max(self.now, timer.due), None
            timer.callback()
            fired += 1
            assert fired < 100_000, "a timer fires for ever"
        self.now = end
        return fired
