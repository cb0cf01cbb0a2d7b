"""Telling the VM process of a state that a guest can change as often as it likes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host

PAUSE: Final = 0.1  # seconds between two words


class Notice:
    """Tells the latest word, some time after it has changed."""

    def __init__(self, host: Host, word: Callable[[], str]) -> None:
        """`word()` says what is so now."""
        self._host, self._word = host, word
        self._timer = host.timer(self._fired)
        self._armed = False
        self._told = ""

    def changed(self) -> None:
        """Tell what is so once it is written down, or when nothing was told for a while."""
        if not self._armed:
            self._arm(0.0)

    def repeat(self) -> None:
        """Tell what is so, as after a change, even if it was told last."""
        self._told = ""
        self.changed()

    def _arm(self, seconds: float) -> None:
        self._armed = True
        self._timer.arm(seconds)

    def _fired(self) -> None:
        self._armed = False
        word = self._word()
        if word != self._told:
            self._told = word
            self._host.tell(word)
            self._arm(PAUSE)
