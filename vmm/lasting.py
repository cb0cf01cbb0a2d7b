"""A device that outlives its process: what is there for each that has its place, and how it comes.

A device process writes down what it is (`devices/lasting.py`) in a journal, and where its queues
are in in-flight areas. Both are here, so when it is killed another one goes on. A vCPU that
accesses a register waits meanwhile (`vmm/channel.py`).
"""

from __future__ import annotations

import os
import time
from struct import unpack
from typing import TYPE_CHECKING, Final

from config.errors import PyvmError
from devices.spec import INFLIGHT_STRIDE, JOURNAL_HALF

if TYPE_CHECKING:
    from collections.abc import Callable

END_DEADLINE: Final = 2.0  # seconds until a process that was killed has ended
_YOUNG: Final = 0.05  # seconds: one that dies earlier, and has done nothing, is of no use
_YOUNG_MAX: Final = 20  # of them in a row


class Lasting:
    """What the processes of one device have in common."""

    def __init__(self, name: str, nr_queues: int) -> None:
        """Make it for the process of so many queues. Raises OSError."""
        self._name = name
        sizes = {"journal": 2 * JOURNAL_HALF}
        if nr_queues:
            sizes["inflight"] = INFLIGHT_STRIDE * nr_queues
        #: For every process of the device.
        self.fds = {word: os.memfd_create(f"pyvmd-{word}", os.MFD_CLOEXEC) for word in sizes}
        for word, size in sizes.items():
            os.ftruncate(self.fds[word], size)
        self.lives = 1  # how many processes there have been
        self.cause = ""  # why there is none
        self.lingers = False  # whether that is because an old one has not ended yet
        self._since, self._young = time.monotonic(), 0
        self._done: object = None  # what they had done, when the last one died

    def handled(self) -> int:
        """Return how many register writes are in the journal, which may say anything."""
        halves = [unpack("<QQQ", os.pread(self.fds["journal"], 24, at)) for at in (0, JOURNAL_HALF)]
        handled: int = max(halves)[2]
        return handled

    def revive(
        self, stop: Callable[[float], bool], launch: Callable[[], None], done: object = None
    ) -> bool:
        """Have `launch` begin new processes; False if one `lingers`, or all are of no use: `cause`.

        `stop` ends the old ones, and tells whether they have ended by a deadline on the monotonic
        clock: none of them may run beside a new one. `done` changes when they have done something.
        """
        before, self._done = self._done, (self.handled(), done)
        useless = self._done == before and time.monotonic() - self._since < _YOUNG
        self._young = self._young + 1 if useless else 0
        while self._young < _YOUNG_MAX:
            patience = 0.0 if self.lingers else END_DEADLINE
            self.lingers = not stop(time.monotonic() + patience)
            if self.lingers:
                return False
            self.lives += 1
            try:
                launch()
            except (PyvmError, OSError) as err:  # it may have been killed just then
                self.cause = str(err)
                self._young += 1
            else:
                self._since = time.monotonic()
                return True
        self.cause = f"{_YOUNG_MAX} processes in a row died at once ({self.cause})"
        return False

    def close(self) -> None:
        """Free it."""
        for fd in self.fds.values():
            os.close(fd)
