"""The way down of a guest, from a client's wish to what becomes of the VM; no KVM, no process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from config.model import VmmciConfig
from tests.unit.test_ladder import FakeTimer
from vmm import control
from vmm.descent import Descent
from vmm.i8042 import I8042
from vmm.ladder import REBOOT, STOP
from vmm.pm import PWRBTN, Pm

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.ending import Ending

PM_STATUS, PM_ENABLE = 0, 2


class FakeDevices:
    """vmmci as the VM process sees it: what it is told, and what it answers."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.answer: Any = "asked"
        self.on_set: Callable[[], object] = lambda: None

    def alive(self, name: str) -> bool:
        assert name == "vmmci"
        return not isinstance(self.answer, Exception)

    def set(self, name: str, setting: str, value: str) -> Any:
        assert (name, setting) == ("vmmci", "command")
        self.told.append(value)
        self.on_set()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Board:
    """The chips that can ask."""

    def __init__(self) -> None:
        self.pm = Pm(
            lambda level: None,
            lambda why: None,
            timer=FakeTimer,  # type: ignore[arg-type]
        )
        self.i8042 = I8042(lambda level: None, lambda why: None)


class Lab:
    """A VM that notes what becomes of it."""

    def __init__(self) -> None:
        self.devices, self.board = FakeDevices(), Board()
        self.endings: list[Ending] = []
        self.restarts: list[tuple[str, str]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.descent = Descent(
            self,
            self.devices,  # type: ignore[arg-type]
            self.board,  # type: ignore[arg-type]
            self._timer,  # type: ignore[arg-type]
            VmmciConfig(ack_timeout=3, shutdown_timeout=120),
        )

    def _timer(self, callback: Callable[[], None]) -> FakeTimer:
        self.timer = FakeTimer(callback)
        return self.timer

    def end(self, end: Ending) -> None:
        self.endings.append(end)

    def restart(self, reason: str, cause: str) -> None:
        self.restarts.append((reason, cause))

    def announce(self, event: str, data: dict[str, Any] | None = None) -> None:
        self.events.append((event, data or {}))

    def steps(self) -> list[str]:
        """The steps that clients were told."""
        return [
            f"{data['way']} {data['state']}"
            for event, data in self.events
            if event == "X_PYVMD_LADDER"
        ]


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_vmmci_is_asked_for_what_is_wanted(lab: Lab) -> None:
    """Its own word for each goal; its acknowledgement is an event, and no other device's is."""
    assert lab.descent.ask(STOP) == {"again": False, "goal": STOP, "way": "vmmci", "state": "asked"}
    assert not lab.descent.said("viornd", "acknowledged")
    assert not lab.descent.said("vmmci", "nonsense")
    assert lab.steps() == ["vmmci asked"]
    assert lab.descent.said("vmmci", "acknowledged")
    assert lab.descent.ask(STOP) == {"again": True, "goal": STOP, "way": "vmmci", "state": "taken"}
    lab.descent.cancel()
    lab.descent.ask(REBOOT)
    assert lab.devices.told == ["shutdown", "reboot"]


@pytest.mark.parametrize(
    "answer", ["no driver", HostError("there is no device vmmci"), None, {"a": "asked"}, 1]
)
def test_without_vmmci_the_button_is_pressed(answer: Any, lab: Lab) -> None:
    """If the guest has it enabled; taken when it has cleared the status bit."""
    lab.devices.answer = answer
    lab.board.pm.write(PM_ENABLE, 2, PWRBTN)
    lab.descent.ask(STOP)
    assert lab.steps() == ["vmmci unable", "power button asked"]
    assert ("POWERDOWN", {}) in lab.events
    lab.board.pm.write(PM_STATUS, 2, PWRBTN)
    lab.timer.pass_(3)
    assert lab.steps()[-1] == "power button taken"


def test_a_button_that_nobody_takes_note_of(lab: Lab) -> None:
    """Enabled, and its status bit still set when the time is over: the keyboard is next."""
    lab.devices.answer = "no driver"
    lab.board.pm.write(PM_ENABLE, 2, PWRBTN)
    lab.descent.ask(STOP)
    lab.timer.pass_(3)
    assert lab.steps()[-2:] == ["power button ignored", "Ctrl-Alt-Del asked"]


def test_then_ctrl_alt_del_is_typed(lab: Lab) -> None:
    """Taken when the guest has read all keys."""
    lab.devices.answer = "no driver"
    lab.descent.ask(REBOOT)
    assert lab.steps() == ["vmmci unable", "power button unable", "Ctrl-Alt-Del asked"]
    while lab.board.i8042.read(4, 1) & 1:
        lab.board.i8042.read(0, 1)
    lab.timer.pass_(3)
    assert lab.steps()[-1] == "Ctrl-Alt-Del taken"


def test_a_keyboard_that_is_off_is_no_way(lab: Lab) -> None:
    """Nobody is left to be asked: the end, at once."""
    lab.devices.answer = "no driver"
    lab.board.i8042.write(0, 1, 0xF5)  # stop scanning
    assert lab.descent.ask(STOP) == {"again": False, "goal": STOP, "way": "", "state": ""}
    [end] = lab.endings
    assert (end.how, end.status, end.guest) == ("timeout", 124, False)


@pytest.mark.parametrize("cause", [control.CAUSE_GUEST_RESET, control.CAUSE_GUEST_SHUTDOWN])
def test_down_is_down(cause: str, lab: Lab) -> None:
    """Reset or power-off: asked to stop the VM ends, asked to reboot it begins anew."""
    assert not lab.descent.went_down("off", cause)
    lab.descent.ask(STOP)
    assert lab.descent.went_down("off", cause)
    [end] = lab.endings
    assert (end.reason, end.detail, end.status) == (cause, "off, as asked to stop", 0)
    assert (end.how, end.guest) == ("stop", True)
    lab.descent.ask(REBOOT)
    assert lab.descent.went_down("off", cause)
    assert lab.restarts == [("off, as asked to reboot", control.CAUSE_GUEST_RESET)]
    assert not lab.descent.went_down("off", cause)
    assert (len(lab.endings), len(lab.restarts)) == (1, 1)


def test_time_is_up(lab: Lab) -> None:
    """Asked to stop the VM is ended, asked to reboot it is reset; announced, it is a power-off."""
    for goal in (STOP, REBOOT):
        lab.descent.ask(goal)
        lab.descent.said("vmmci", "acknowledged")
        lab.timer.pass_(120)
    lab.descent.said("vmmci", "announced")
    lab.timer.pass_(3)
    stopped, off = lab.endings
    assert (stopped.how, stopped.status, stopped.guest) == ("timeout", 124, False)
    assert (off.how, off.status, off.guest) == ("guest-poweroff", 0, True)
    [(reason, cause)] = lab.restarts
    assert reason.startswith("asked to reboot, but the guest took note")
    assert cause == control.CAUSE_HOST_RESET


def test_who_stops_does_not_begin_anew(lab: Lab) -> None:
    """A reboot or reset is refused then; a stop after a reboot is not."""
    lab.descent.check(REBOOT)
    lab.descent.ask(REBOOT)
    lab.descent.check(REBOOT)
    lab.descent.check(STOP)
    lab.descent.ask(STOP)
    lab.descent.check(STOP)
    with pytest.raises(HostError, match="is being stopped"):
        lab.descent.check(REBOOT)


def test_the_old_guests_last_words_are_forgotten(lab: Lab) -> None:
    """What the device tells while the command is withdrawn is not the new guest's."""
    lab.descent.ask(REBOOT)
    lab.descent.went_down("reset", control.CAUSE_GUEST_RESET)
    lab.devices.on_set = lambda: lab.descent.said("vmmci", "announced")
    lab.descent.forget()
    assert lab.devices.told[-1] == "none"
    assert lab.descent.step is None
    lab.timer.pass_(1000)
    assert lab.endings == []


def test_a_device_that_has_died_has_nothing_to_withdraw(lab: Lab) -> None:
    """A reset does not stumble over it."""
    lab.devices.answer = HostError("has died")
    lab.descent.forget()
    assert lab.devices.told == []
