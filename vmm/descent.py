"""Brings a guest down when a client wants that, and decides what it means that it is down.

The ladder knows when to ask and for how long to wait; the ways know how. Here they meet the VM:
each step is told in the log and as an event, and its end becomes the VM's, or its reset.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from config.errors import EXIT_DONE, HostError
from vmm import control, ending, log
from vmm.ending import Ending
from vmm.ladder import REBOOT, STOP, Ladder, Step
from vmm.ways import VMMCI, CtrlAltDelWay, PowerButtonWay, VmmciWay

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.model import VmmciConfig
    from devices.loop import Timer
    from vmm.board import Board
    from vmm.plug import Devices

_NOWHERE: Final = {"way": "", "state": ""}


class Vm(Protocol):
    """What it does to its VM."""

    def end(self, end: Ending) -> None:
        """Leave the loop."""

    def restart(self, reason: str, cause: str) -> None:
        """Reset the machine in place."""

    def announce(self, event: str, data: dict[str, Any] | None = None) -> None:
        """Tell the clients of the control socket."""


class Descent:
    """The way down of one guest. For the loop's thread."""

    def __init__(
        self,
        vm: Vm,
        devices: Devices,
        board: Board,
        timer: Callable[[Callable[[], None]], Timer],
        config: VmmciConfig,
    ) -> None:
        self._vm, self._vmmci = vm, VmmciWay(devices)
        button = PowerButtonWay(board, partial(vm.announce, "POWERDOWN"))
        self._ladder = Ladder(
            (self._vmmci, button, CtrlAltDelWay(board)),
            timer,
            (config.ack_timeout, config.shutdown_timeout),
            report=self._stepped,
            gave_up=self._gave_up,
        )

    @property
    def goal(self) -> str:
        """What the guest is asked for: STOP, REBOOT or ""."""
        return self._ladder.goal

    @property
    def step(self) -> dict[str, Any] | None:
        """Where it stands, for JSON; None while nobody has asked for anything."""
        return self._ladder.step

    def check(self, goal: str) -> None:
        """Raise HostError if the guest is to stop, and so must not begin anew."""
        if self.goal == STOP and goal != STOP:
            hint = "start it again when it has ended; 'pyvmctl kill' ends it at once"
            raise HostError("is being stopped", hint=hint)

    def ask(self, goal: str) -> dict[str, Any]:
        """Ask a guest that runs; return where that stands, and whether it had been asked before."""
        again = self.step is not None
        if not again:
            log.info(f"the guest is asked to {goal}")
        self._ladder.start(goal)
        return {"again": again, "goal": goal, **(self.step or _NOWHERE)}

    def went_down(self, detail: str, cause: str) -> bool:
        """The guest is down, by reset or power-off: do what was wanted, or return False."""
        goal = self._ladder.over()
        detail += f", as asked to {goal}"
        if goal == REBOOT:
            self._vm.restart(detail, control.CAUSE_GUEST_RESET)
        elif goal == STOP:
            self._vm.end(Ending(cause, detail, EXIT_DONE, guest=True, how=ending.STOPPED))
        return bool(goal)

    def said(self, device: str, word: str) -> bool:
        """Act on a device's event, which may be a lie; return False if it means nothing here."""
        act = {"acknowledged": self._ladder.taken, "announced": self._ladder.announced}.get(word)
        if device != VMMCI or act is None:
            return False
        act()
        return True

    def forget(self) -> None:
        """The machine is reset, its vCPUs are gone: nothing that the old guest said counts.

        What it wrote last has reached the device by now, and what the device made of that has
        reached us when the command is withdrawn. In any other order it would be the new guest's.
        """
        self._vmmci.withdraw()
        self._ladder.over()

    def cancel(self) -> None:
        """The VM ends: nothing is awaited any more."""
        self._ladder.over()

    def _gave_up(self, goal: str, detail: str) -> None:
        """The guest is not down, and its time is up."""
        if goal == REBOOT:
            self._vm.restart(f"asked to reboot, but {detail}", control.CAUSE_HOST_RESET)
        elif goal == STOP:
            how, status = ending.TIMEOUT, ending.EXIT_TIMEOUT
            self._vm.end(
                Ending(control.CAUSE_QUIT, f"asked to stop, but {detail}", status, how=how)
            )
        else:  # it switched itself off, as far as a guest without soft-off can
            cause, how = control.CAUSE_GUEST_SHUTDOWN, ending.GUEST_POWEROFF
            self._vm.end(Ending(cause, "guest power-off (vmmci)", EXIT_DONE, guest=True, how=how))

    def _stepped(self, step: Step) -> None:
        log.info(f"{step.goal or 'power-off'}: {step.way} {step.state}: {step.detail}")
        self._vm.announce("X_PYVMD_LADDER", step._asdict())
