"""How a guest is asked to go down: one way after the other, until one is taken.

    start(goal) ─► ask ──taken in time──► wait ──down──► what `goal` says: over() tells
                    │ ▲                     │
       not possible,│ │next way             └─ shutdown_timeout ─► gave_up(goal)
       or ignored   └─┘  none left ─► gave_up(goal)

A way that the guest has taken is the last one: to ask twice could turn a shutdown into a reboot.
Whether the guest then powers off or resets says nothing about the goal. A power button can only
ask for the one and Ctrl-Alt-Del only for the other, so the goal decides what the VM makes of it.

Knows no device, no socket and no clock: a state machine, for the loop's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.loop import Timer

STOP: Final = "stop"  # the VM is to end
REBOOT: Final = "reboot"  # it is to start over

# States of a way.
ASKED: Final = "asked"
TAKEN: Final = "taken"  # the guest has taken note
UNABLE: Final = "unable"  # it cannot be asked this way
IGNORED: Final = "ignored"  # it did not take note in time
OVERDUE: Final = "overdue"  # it took note, and is not down in time
ANNOUNCED: Final = "announced"  # it says itself that it goes down, unasked


class Way(Protocol):
    """One way to ask."""

    name: str

    def ask(self, goal: str) -> str:
        """Ask; return "" or why that is not possible. May call Ladder.taken()."""

    def was_taken(self) -> bool:
        """Tell whether the guest has taken note since."""


class Step(NamedTuple):
    """Something that has happened on the way down."""

    goal: str  # STOP or REBOOT; "" for a guest that goes down unasked
    way: str
    state: str
    detail: str  # in words


class Ladder:
    """Where a VM is on its way down."""

    def __init__(
        self,
        ways: Sequence[Way],
        timer: Callable[[Callable[[], None]], Timer],
        times: tuple[float, float],
        *,
        report: Callable[[Step], None],
        gave_up: Callable[[str, str], None],
    ) -> None:
        """`times` in seconds: to take note, and from then to be down.

        `report(step)` hears of each step, `gave_up(goal, detail)` when the last time has run out.
        """
        self._ways, (self._ack, self._down) = ways, times
        self._report, self._gave_up = report, gave_up
        self._timer = timer(self._expired)
        self._at = 0  # index of the way in use
        self.goal = self._state = ""

    @property
    def step(self) -> dict[str, Any] | None:
        """Where it stands, for JSON; None while nobody has asked for anything."""
        if not self._state:
            return None
        return {"goal": self.goal, "way": self._way, "state": self._state}

    def start(self, goal: str) -> None:
        """Begin to ask. On the way already, only the goal changes: no time begins anew."""
        if self._state:
            self.goal = goal
            return
        self.goal, self._at = goal, -1
        self._next()

    def taken(self) -> None:
        """The guest has taken note of what it was last asked."""
        if self._state == ASKED:
            self._step(TAKEN, f"has {self._down:g} s to go down")
            self._timer.arm(self._down)

    def announced(self) -> None:
        """The guest says unasked that it is about to power off, or to reset."""
        if not self._state:
            self._at = -1
            self._step(ANNOUNCED, f"goes down by itself, within {self._ack:g} s")
            self._timer.arm(self._ack)

    def over(self) -> str:
        """Forget everything, for the guest is down; return the goal, "" if there was none."""
        goal, self.goal, self._state = self.goal, "", ""
        self._timer.disarm()
        return goal

    @property
    def _way(self) -> str:
        return self._ways[self._at].name if self._at >= 0 else "guest"

    def _next(self) -> None:
        """Ask in the next way that is possible; give up if there is none."""
        while self._at + 1 < len(self._ways):
            self._at += 1
            self._state = ASKED  # before asking: the answer may come within
            why_not = self._ways[self._at].ask(self.goal)
            if not why_not:
                if self._state == ASKED:
                    self._step(ASKED, f"has {self._ack:g} s to take note")
                    self._timer.arm(self._ack)
                return
            self._step(UNABLE, why_not)
        self._give_up("the guest took note of nothing")

    def _expired(self) -> None:
        """A time has run out."""
        if self._state == ASKED:
            if self._ways[self._at].was_taken():
                self.taken()
            else:
                self._step(IGNORED, f"not taken note of within {self._ack:g} s")
                self._next()
        elif self._state == TAKEN:
            self._step(OVERDUE, f"not down after {self._down:g} s")
            self._give_up(f"the guest took note and was not down {self._down:g} s later")
        elif self._state == ANNOUNCED:
            self._give_up(f"the guest announced it, and still ran {self._ack:g} s later")

    def _give_up(self, detail: str) -> None:
        self._gave_up(self.over(), detail)

    def _step(self, state: str, detail: str) -> None:
        self._state = state
        self._report(Step(self.goal, self._way, state, detail))
