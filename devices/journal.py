"""A journal: what a device process leaves behind of its registers, for one that takes its place.

A piece of shared memory with two halves. Each holds a state, as JSON, behind three words:

    0  u64  number    counts the states; the half with the higher one is the later
    8  u64  length    bytes of the state
   16  u64  handled   how many register writes have been done that are in it
   24  the state

A state goes into the half of the one before the last, its number last. So whenever the process is
killed, one half is whole. The VM process reads `handled`, and nothing else of it.

What a compromised predecessor wrote is read in the jail, by a process of the same rights.
"""

from __future__ import annotations

import json
import mmap
import os
from typing import Any, Final

from config.errors import HostError
from devices.spec import JOURNAL_HALF

_HEAD: Final = 24  # bytes
_MOST: Final = JOURNAL_HALF - _HEAD


class Journal:
    """One process's view of it."""

    def __init__(self, fd: int) -> None:
        """Map it, and close the descriptor. Raises OSError, ValueError."""
        whole = memoryview(mmap.mmap(fd, 2 * JOURNAL_HALF))
        os.close(fd)
        self._halves = whole[:JOURNAL_HALF], whole[JOURNAL_HALF:]
        self._words = tuple(half[:_HEAD].cast("Q") for half in self._halves)
        self._number = max(words[0] for words in self._words)
        self._latest = b""

    def write(self, state: dict[str, Any], handled: int) -> None:
        """Replace the state. Raises HostError if it is too long."""
        text = json.dumps(state).encode()
        if len(text) > _MOST:
            raise HostError(f"a state of {len(text)} bytes")
        if text == self._latest:
            self.count(handled)
            return
        number = self._number + 1
        half, words = self._halves[number & 1], self._words[number & 1]
        half[_HEAD : _HEAD + len(text)] = text
        words[1], words[2] = len(text), handled
        words[0] = self._number = number
        self._latest = text

    def count(self, handled: int) -> None:
        """Say how many register writes are in the latest state."""
        self._words[self._number & 1][2] = handled

    def read(self) -> tuple[dict[str, Any], int] | None:
        """Return the latest state and how many writes are in it; None if there is none.

        Raises HostError if it is no JSON object.
        """
        if not self._number:
            return None
        half, (_, length, handled) = self._halves[self._number & 1], self._words[self._number & 1]
        try:
            state = json.loads(bytes(half[_HEAD : _HEAD + min(length, _MOST)]))
        except (ValueError, RecursionError) as err:
            raise HostError("the journal makes no sense") from err
        if not isinstance(state, dict):
            raise HostError("the journal makes no sense")
        return state, handled
