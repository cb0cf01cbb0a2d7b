"""The CD-ROM drive as the VM process sees it: which disc is in it, and where its tray is.

The drive itself is a device process. What lies here is what that cannot know: the disc's name, and
the descriptor that the next process for this drive would get. Discs are opened by whoever has the
right to: at start with the starter's, later by pyvmctl, which hands the descriptor over.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError
from devices.images import open_disc
from devices.spec import TRAY_WORDS
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable

NAME: Final = "vioscsi"  # of the device
EMPTY: Final = "empty"  # vm.yaml's word for a drive without a disc
_FD: Final = "medium"  # what the device calls the descriptor


class Drive:
    """One drive. For the loop's thread."""

    name = NAME

    def __init__(self, path: str) -> None:
        """Put in the disc at `path`, or none if that is EMPTY. Raises ConfigError, HostError."""
        #: What its device process needs, and what `status --json` tells; up to date.
        self.fds: dict[str, int] = {} if path == EMPTY else {_FD: open_disc(path)}
        self.facts: dict[str, Any] = {
            "medium": None if path == EMPTY else path,
            "tray_open": False,
            "locked": False,
        }
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
        self._note(self.send("eject", force, -1))
        self._replace(-1, None)

    def insert(self, fd: int, path: str, *, force: bool) -> None:
        """Put a disc in, a copy of `fd`, instead of the one there is. Raises HostError."""
        kept = os.dup(fd)  # before there is another disc in the drive than we know of
        try:
            self._note(self.send("insert", force, fd))
        except BaseException:
            os.close(kept)
            raise
        self._replace(kept, path)

    def load(self) -> None:
        """Close the tray with the disc that lies on it. Raises HostError if there is none."""
        if not self.fds:
            raise HostError("no disc lies in the drive", device=NAME)
        self._note(self.send("load", None, -1))

    def said(self, word: str) -> None:
        """Hear from the device process, which may say anything, what its guest has done."""
        for (tray_open, locked), meant in TRAY_WORDS.items():
            if word == meant:
                self._note({"tray_open": tray_open, "locked": locked})
                return
        log.limited("cdrom tray", f"says {word!r} of its tray, which means nothing", NAME)

    def close(self) -> None:
        """Take the disc out of this process."""
        self._replace(-1, None)

    def _note(self, said: Any) -> None:
        """Take what the device says of itself, if it makes sense."""
        was_open = self.facts["tray_open"]
        for key in ("tray_open", "locked"):
            value = said.get(key) if isinstance(said, dict) else None
            if isinstance(value, bool):
                self.facts[key] = value
        if self.facts["tray_open"] != was_open:
            self.moved(self.facts["tray_open"])

    def _replace(self, fd: int, path: str | None) -> None:
        old = self.fds.pop(_FD, -1)
        if old >= 0:
            os.close(old)
        if fd >= 0:
            self.fds[_FD] = fd
        self.facts["medium"] = path
