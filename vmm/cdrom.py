"""The CD-ROM drive as the VM process sees it: which disc is in it, and where its tray is.

The drive itself is a device process. What lies here is what that cannot know: the disc's name, and
the descriptor that the next process for this drive would get. Discs are opened by whoever has the
right to: at start with the starter's, later by pyvmctl, which hands the descriptor over.

All that is done to the drive has a number, and a disc that of its insert (`devices/changer.py`).
Until it is known whether an insert has been done, both discs are kept, for the next process: its
journal says which of them it needs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError
from devices.images import open_disc
from devices.spec import FIRST_DISC, TRAY_WORDS
from devices.viodev import ChannelError
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable

NAME: Final = "vioscsi"  # of the device
EMPTY: Final = "empty"  # vm.yaml's word for a drive without a disc
KEPT_MAX: Final = 4  # discs of which it is not known whether they are in


class Drive:
    """One drive. For the loop's thread."""

    name = NAME

    def __init__(self, path: str) -> None:
        """Put in the disc at `path`, or none if that is EMPTY. Raises ConfigError, HostError."""
        #: What its device process needs, and what `status --json` tells; up to date.
        self.fds: dict[str, int] = {}
        self.facts: dict[str, Any] = {"medium": None, "tray_open": False, "locked": False}
        self._paths: dict[int, str] = {}  # of the discs that are in or may be, by number
        self._in = 0  # number of the one that was in when the device last said so
        self._acts = FIRST_DISC  # number of what was done last
        if path != EMPTY:
            self._keep(FIRST_DISC, open_disc(path), path)
            self._is_in(FIRST_DISC)
        #: Sends (setting, value, descriptor or -1) to the device; returns what it says of itself.
        self.send: Callable[[str, Any, int], Any] = lambda setting, value, fd: None
        #: Called when the tray has moved, with whether it is open now.
        self.moved: Callable[[bool], None] = lambda tray_open: None

    def act(self, action: str, *, force: bool, fd: int, path: str) -> dict[str, Any]:
        """Do one of insert, load, eject; return the facts. Raises HostError."""
        if action == "insert":
            self.insert(fd, path, force=force)
        elif action == "load":
            self.load()
        else:
            self.eject(force=force)
        return self.facts

    def eject(self, *, force: bool) -> None:
        """Open the tray and take the disc away. Raises HostError, if the guest holds it say."""
        self._do("eject", force=force)

    def insert(self, fd: int, path: str, *, force: bool) -> None:
        """Put a disc in, a copy of `fd`, instead of the one there is. Raises HostError."""
        if len(self._paths) > KEPT_MAX:
            what = "has not said yet what became of the discs before this one"
            raise HostError(what, device=NAME)
        kept = os.dup(fd)  # before there is another disc in the drive than we know of
        self._keep(self._acts + 1, kept, path)
        self._do("insert", fd, force=force)

    def load(self) -> None:
        """Close the tray with the disc that lies on it. Raises HostError if there is none."""
        if not self.fds:
            raise HostError("no disc lies in the drive", device=NAME)
        self._do("load")

    def said(self, word: str) -> None:
        """Hear from the device process, which may say anything, what its guest has done."""
        tray, _, number = word.rpartition(" ")
        for (tray_open, locked), meant in TRAY_WORDS.items():
            if tray == meant and number.isdecimal():
                self._note({"tray_open": tray_open, "locked": locked})
                self._is_in(int(number))
                return
        log.limited("cdrom tray", f"says {word!r} of its tray, which means nothing", NAME)

    def close(self) -> None:
        """Take the disc out of this process."""
        self._drop(list(self._paths))

    def _do(self, action: str, fd: int = -1, *, force: bool = False) -> None:
        """Have the device do something."""
        self._acts += 1
        try:
            said = self.send(action, [force, self._acts], fd)
        except ChannelError:
            raise  # it may have been done all the same, or be done later: `said` tells
        except BaseException:
            self._drop([self._acts])
            raise
        self._note(said)
        number = said.get("disc") if isinstance(said, dict) else None
        self._is_in(number if isinstance(number, int) else 0)
        self._drop([number for number in self._paths if number != self._in])

    def _note(self, said: Any) -> None:
        """Take what the device says of itself, if it makes sense."""
        was_open = self.facts["tray_open"]
        for key in ("tray_open", "locked"):
            value = said.get(key) if isinstance(said, dict) else None
            if isinstance(value, bool):
                self.facts[key] = value
        if self.facts["tray_open"] != was_open:
            self.moved(self.facts["tray_open"])

    def _is_in(self, number: int) -> None:
        """The disc of that number is in the drive, 0 for none: those before it have gone."""
        gone = [old for old in self._paths if old < number or old == self._in != number]
        self._drop(gone)
        self._in = number
        self.facts["medium"] = self._paths.get(number)

    def _keep(self, number: int, fd: int, path: str) -> None:
        self.fds[f"disc{number}"], self._paths[number] = fd, path

    def _drop(self, numbers: list[int]) -> None:
        """Close discs that cannot be in the drive."""
        for number in numbers:
            if self._paths.pop(number, None) is not None:
                os.close(self.fds.pop(f"disc{number}"))
