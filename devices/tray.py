"""The tray of a CD-ROM drive: what lies on it, who may move it, and what a guest is told.

The disc lies on the tray. A guest that ejects opens the tray, one that loads closes it; whoever
runs the VM also takes the disc away or puts another there. While the guest prevents removal, only
force does that.

A guest hears of it in three ways, as MMC-5 has them: media events, which it polls for or has
subscribed to; a unit attention, once, when there is another disc to read; and NOT READY.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError
from devices.scsi import (
    MEDIUM_CHANGED,
    NO_MEDIUM_TRAY_CLOSED,
    NO_MEDIUM_TRAY_OPEN,
    POWER_ON,
    Sense,
)
from devices.scsidata import EJECT_REQUEST, MEDIA_REMOVAL, NEW_MEDIA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.disc import Disc

EVENTS_KEPT: Final = 4  # media events that nobody has asked for yet


class Tray:
    """One tray. For one thread."""

    def __init__(self, tell: Callable[[int], None], moved: Callable[[], None]) -> None:
        """Make an empty tray, closed.

        `tell(event)` is called with every media event, `moved()` when the tray has moved or
        something else has changed that is told outside.
        """
        self._tell, self._moved = tell, moved
        self.disc: Disc | None = None
        self.tray_open = self.locked = False
        self.attentions: tuple[Sense, ...] = (POWER_ON,)
        self.events: tuple[int, ...] = ()

    @property
    def state(self) -> tuple[object, ...]:
        """All that a guest can change, to be compared."""
        return self.tray_open, self.locked, self.attentions, self.events

    @property
    def loaded(self) -> Disc | None:
        """The disc, if it can be read."""
        return None if self.tray_open else self.disc

    @property
    def blocks(self) -> int:
        """How many blocks can be read."""
        return self.loaded.blocks if self.loaded else 0

    def not_ready(self) -> Sense:
        """Say why there is nothing to read."""
        return NO_MEDIUM_TRAY_OPEN if self.tray_open else NO_MEDIUM_TRAY_CLOSED

    def reset(self, sense: Sense) -> None:
        """A reset of whatever kind: the lock is gone, and `sense` tells the guest why."""
        self.lock(False)
        self.attentions = (sense,)

    def lock(self, on: bool) -> None:
        """Prevent removal, or allow it."""
        if self.locked != on:
            self.locked = on
            self._moved()

    def insert(self, disc: Disc, *, force: bool) -> None:
        """Put a disc in, instead of the one that is there. Raises HostError if it is locked in."""
        self._need_unlocked(force)
        self.remove(force=True)
        self.disc = disc
        self._close_tray()

    def remove(self, *, force: bool) -> None:
        """Open the tray and take the disc away. Raises HostError if it is locked in."""
        self._need_unlocked(force)
        self._open_tray()
        if self.disc is not None:
            self.disc.close()
            self.disc = None

    def load(self) -> None:
        """Close the tray."""
        self._close_tray()

    def save(self) -> dict[str, Any]:
        """Return all but the disc, as plain JSON values."""
        return {
            "tray_open": self.tray_open,
            "locked": self.locked,
            "attentions": self.attentions,
            "events": self.events,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what save() described, around whatever disc there is.

        Raises ValueError, struct.error, ... if it is nothing of the kind.
        """
        self.tray_open, self.locked = bool(state["tray_open"]), bool(state["locked"])
        self.attentions = tuple(Sense(*map(int, sense)) for sense in state["attentions"])
        for sense in self.attentions:
            sense.fixed()  # raises, now rather than when a guest asks
        self.events = tuple(int(event) & 0xF for event in state["events"][-EVENTS_KEPT:])

    def next_attention(self) -> Sense:
        """Take the first unit attention; there is one."""
        sense, *rest = self.attentions
        self.attentions = tuple(rest)
        return sense

    def next_event(self) -> int:
        """Take the first media event; 0 if there is none."""
        event, self.events = self.events[:1], self.events[1:]
        return event[0] if event else 0

    def _need_unlocked(self, force: bool) -> None:
        if self.locked and not self.tray_open and not force:
            self._happened(EJECT_REQUEST)
            raise HostError(
                "the guest has locked the tray; it has been asked to eject",
                hint="try again, or use force",
            )

    def _open_tray(self) -> None:
        if not self.tray_open:
            self.tray_open, self.locked = True, False
            if self.disc is not None:
                self._happened(MEDIA_REMOVAL)
            self._moved()

    def _close_tray(self) -> None:
        if self.tray_open:
            self.tray_open = False
            if self.disc is not None:
                self._happened(NEW_MEDIA)
                if MEDIUM_CHANGED not in self.attentions:
                    self.attentions += (MEDIUM_CHANGED,)
            self._moved()

    def _happened(self, event: int) -> None:
        if self.events[-1:] != (event,):
            self.events = (*self.events[1 - EVENTS_KEPT :], event)
        self._tell(event)
