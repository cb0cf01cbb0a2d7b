"""What whoever runs the VM does to a CD-ROM drive: discs that go in and out, and what is told.

The VM process numbers what it does. A disc has the number of its insert, and is a descriptor
`discN`; 1 is the disc that was there at the start. While an insert is under way a new process
gets the old disc and the new one, and its journal says which of them is in.
"""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError, HostError, PyvmError
from devices.disc import Disc
from devices.notice import Notice
from devices.scsicd import Drive
from devices.spec import FIRST_DISC, TRAY_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.device import Host

ACTS: Final = ("eject", "load")
INSERT: Final = "insert"
_MOST: Final = 1 << 63  # bytes


class Changer:
    """A drive, and its discs."""

    def __init__(
        self,
        tell: Callable[[int], None],
        host: Host,
        disc: Disc | None,
        others: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Make a drive, with `disc` in it; or one of `others`, as `load` will say.

        `tell(event)` hears of media events. `others` are descriptors by number.
        """
        self._host, self._others = host, dict(others)
        self._notice = Notice(host, self._word)
        self.drive = Drive(tell, self._notice.changed)
        self.drive.disc = disc
        self._number = FIRST_DISC if disc else 0  # of the disc that is in
        self._acted = 0  # number of what was tried last
        self._refusal = ""  # why it was not done

    def facts(self) -> dict[str, Any]:
        """Return what is told outside."""
        drive = self.drive
        return {
            "tray_open": drive.tray_open,
            "locked": drive.locked,
            "blocks": drive.disc.blocks if drive.disc else 0,
            "disc": self._number,
        }

    def act(self, name: str, value: Any, fd: int = -1) -> dict[str, Any]:
        """Do one of INSERT, which takes over `fd`, and ACTS; return facts(). Raises PyvmError.

        `value` is [whether by force, the number of this], or 0 for none. What is done already, or
        refused, by a process that was killed before it could say so, is not tried again.
        """
        force, number = value
        if not 0 < number == self._acted:
            self._acted, self._refusal = number, ""
            try:
                self._do(name, fd, force=force is True, number=number)
            except PyvmError as err:
                self._refusal = str(err)
                raise
            self.announce()
        elif self._refusal:
            raise HostError(self._refusal)
        elif fd >= 0:
            os.close(fd)
        return self.facts()

    def _do(self, name: str, fd: int, *, force: bool, number: int) -> None:
        if name == INSERT:
            self.drive.insert(Disc(fd, self._host), force=force)
            self._number = number
        elif name == "eject":
            self.drive.remove(force=force)
            self._number = 0
        else:
            self.drive.load()

    def save(self) -> dict[str, Any]:
        """Return all that a process with the same discs needs, as plain JSON values."""
        disc = self.drive.disc
        return {
            "disc": self._number,
            "size": disc.size if disc else 0,
            "acted": self._acted,
            "refusal": self._refusal,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `save` described. Raises ConfigError, ValueError, ... if it cannot be."""
        number, size, self._acted = (int(state[name]) for name in ("disc", "size", "acted"))
        self._refusal = str(state["refusal"])
        fd = self._others.pop(number, -1)
        if fd >= 0:
            if not 0 < size < _MOST:
                raise ConfigError(f"a disc of {size} bytes cannot be")
            self.drive.disc, self._number = Disc(fd, self._host, size), number
        while self._others:
            os.close(self._others.popitem()[1])

    def announce(self) -> None:
        """Tell the VM process what is so, which it may not know, or know otherwise."""
        self._notice.repeat()

    def _word(self) -> str:
        return f"{TRAY_WORDS[self.drive.tray_open, self.drive.locked]} {self._number}"
