"""Requests done exactly once, though the process may be killed between doing and giving back.

What a request changes is written down together with a note that says which one it was. The note
goes when the driver has the request back. So a successor that finds the request in flight knows
whether it has to do it, or only to give it back. What changes nothing is done again, and costs
nothing here.

    pop ── do it ── changed? ── note, checkpoint ── push ── no note, checkpoint
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.chain import Chain
    from devices.virtqueue import VirtQueue


class Once:
    """The notes of one device, at most one a queue: whose requests are done one by one."""

    def __init__(self, state: Callable[[], object], checkpoint: Callable[[], None]) -> None:
        """`state()` returns what requests may change, in a form that can be compared.

        `checkpoint` writes down that and `save()`.
        """
        self._state, self._checkpoint = state, checkpoint
        self._notes: dict[int, tuple[int, int]] = {}  # queue → head and used length

    def do(self, index: int, queue: VirtQueue, chain: Chain, serve: Callable[[Chain], int]) -> int:
        """Have `serve` do a request, unless it is done, and give it back; return its used length.

        Raises what `serve` does.
        """
        note = self._notes.get(index)
        if note is None:
            before = self._state()
            written = serve(chain)
            if self._state() == before:
                queue.push(chain.head, written)
                return written
            self._notes[index] = chain.head, written
            self._checkpoint()
        else:
            written = note[1]
        queue.push(chain.head, written)
        self._settle(index)
        return written

    def owes(self, index: int) -> bool:
        """Whether a request of this queue is done and has to be given back."""
        return index in self._notes

    def found(self, index: int, chains: Sequence[Chain]) -> None:
        """Take note of what a predecessor left in flight in a queue, before anything is popped."""
        note = self._notes.get(index)
        if note is not None and note[0] not in {chain.head for chain in chains[:1]}:
            self._settle(index)  # it was given back

    def drop(self, index: int) -> None:
        """Forget a queue's note, for the queue is reset."""
        self._notes.pop(index, None)

    def clear(self) -> None:
        """Forget all, for the device is reset."""
        self._notes.clear()

    def _settle(self, index: int) -> None:
        """The driver has the request back: it may use the head again."""
        del self._notes[index]
        self._checkpoint()

    def save(self) -> list[list[int]]:
        """Return the notes as plain JSON values."""
        return [[index, *note] for index, note in self._notes.items()]

    def load(self, notes: Any) -> None:
        """Take those over. Raises ConfigError, TypeError, ValueError if they are none."""
        self._notes = {}
        for index, head, written in notes:
            if not 0 <= int(written) <= 0xFFFFFFFF:
                raise ConfigError(f"a used length of {written}")
            self._notes[int(index)] = int(head), int(written)
