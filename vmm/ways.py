"""The ways to ask a guest to go down, best first: vmmci, the power button, Ctrl-Alt-Del."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.errors import PyvmError
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.board import Board
    from vmm.plug import Devices

VMMCI: Final = "vmmci"  # name of the device
_ASKED: Final = "asked"  # devices.vmmci: the answer of its setting `command`
_WORDS: Final = {"stop": "shutdown", "reboot": "reboot"}  # goal of the ladder → command


class VmmciWay:
    """The guest's vmmci driver: asked for exactly what is wanted, and says that it heard."""

    name = "vmmci"

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def ask(self, goal: str) -> str:
        """Set the command register, if a driver listens."""
        return self._command(_WORDS[goal])

    def was_taken(self) -> bool:
        """Return False: a driver that acknowledges is heard at once, by Ladder.taken()."""
        return False

    def withdraw(self) -> None:
        """Forget the command: the guest that was asked is no more."""
        if self._devices.alive(VMMCI):
            why_not = self._command("none")
            if why_not:
                log.error(f"keeps its command: {why_not}", VMMCI)

    def _command(self, word: str) -> str:
        try:
            answer = self._devices.set(VMMCI, "command", word)
        except PyvmError as err:  # it is not there, has died, or talks nonsense
            return err.what
        return "" if answer == _ASKED else str(answer)[:80]


class PowerButtonWay:
    """The ACPI power button: what it does is for the guest to say, usually a shutdown."""

    name = "power button"

    def __init__(self, board: Board, pressed: Callable[[], None]) -> None:
        self._pm, self._pressed = board.pm, pressed

    def ask(self, _goal: str) -> str:
        """Press it, if the guest has its interrupt on."""
        if not self._pm.power_button():
            return "the guest does not listen to it"
        self._pressed()
        return ""

    def was_taken(self) -> bool:
        """Tell whether the guest has cleared the button's status bit."""
        return not self._pm.button_waits()


class CtrlAltDelWay:
    """Ctrl-Alt-Del on the PS/2 keyboard: what it does is for the guest to say, usually a reboot."""

    name = "Ctrl-Alt-Del"

    def __init__(self, board: Board) -> None:
        self._keyboard = board.i8042

    def ask(self, _goal: str) -> str:
        """Type it, if the guest has the keyboard on."""
        return "" if self._keyboard.ctrl_alt_del() else "the guest has its keyboard off"

    def was_taken(self) -> bool:
        """Tell whether the guest has read the keys."""
        return not self._keyboard.keys_wait()
