"""A capture of a network device's frames, begun and ended at run time; without one, no cost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices.pcap import INBOUND, OUTBOUND, SNAPLEN, Capture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.device import Host

RETRY: Final = 0.1  # seconds until a descriptor that took nothing is tried again
_MIN_SNAPLEN: Final = 14


class Captures:
    """At most one capture, which begins and ends at run time."""

    def __init__(self, host: Host, name: str) -> None:
        self._name, self._fd, self._snaplen = name, -1, 0
        self._capture: Capture | None = None
        self._timer, self._armed = host.timer(self._flush), False

    @property
    def active(self) -> bool:
        """Whether there is one."""
        return self._capture is not None

    @property
    def snaplen(self) -> int:
        """How many bytes of each frame are captured; 0 without a capture."""
        return self._snaplen if self.active else 0

    def begin(self, value: Any, fd: int) -> dict[str, Any]:
        """Capture to `fd`, which is taken over. `value` is {"snaplen": bytes}. Raises ConfigError.

        What was being captured ends.
        """
        snaplen = value.get("snaplen", SNAPLEN) if isinstance(value, dict) else None
        if type(snaplen) is not int or not _MIN_SNAPLEN <= snaplen <= SNAPLEN:
            raise ConfigError(f"capture: snaplen is not {_MIN_SNAPLEN} to {SNAPLEN} bytes")
        self.end()
        self._fd, self._snaplen = fd, snaplen
        self._capture = Capture(fd, self._name, header=0, snaplen=snaplen)
        self._flush()
        return self.facts()

    def end(self) -> dict[str, Any]:
        """Write what the descriptor takes at once, and be done with it; return the totals."""
        facts = self.facts()
        if self._capture is not None:
            self._capture.close()
            self._capture = None
            self._timer.disarm()
            os.close(self._fd)
        return facts

    def facts(self) -> dict[str, Any]:
        """Return what there is to tell, as plain JSON."""
        capture = self._capture
        if capture is None:
            return {"active": False}
        facts = {"captured": capture.captured, "lost": capture.lost, "error": capture.error}
        return {"active": True, **facts}

    def shower(self, *, sent: bool) -> Callable[[Sequence[bytes | memoryview], int], None]:
        """Return what takes each frame of one direction: its views, and how many bytes count."""
        direction = OUTBOUND if sent else INBOUND

        def show(views: Sequence[bytes | memoryview], length: int) -> None:
            if self._capture is not None:
                self._capture.add(direction, views, length)
                if not self._armed:
                    self._armed = True
                    self._timer.arm(0)

        return show

    def left_out(self, count: int) -> None:
        """Take note of frames that were lost on their way here."""
        if self._capture is not None and count:
            self._capture.lose(count)

    def _flush(self) -> None:
        self._armed = self._capture is not None and not self._capture.flush()
        if self._armed:
            self._timer.arm(RETRY)
