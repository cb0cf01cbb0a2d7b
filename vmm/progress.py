"""Long work: a line that tells how far it is, and an end at the next good moment when asked.

The line is on standard error, on a terminal only, and rewrites itself. Signals that would end
the process are noted and obeyed between two pieces of the work, where what it works on is valid.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

from config.errors import PyvmError
from devices.lines import printable
from vmm.table import scaled

if TYPE_CHECKING:
    from typing import TextIO

FIRST: Final = 0.5  # seconds: shorter work shows nothing
EVERY: Final = 0.1  # seconds between two lines
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BAR: Final = 24  # columns


class StoppedError(PyvmError):
    """A signal has ended the work early. The exit status is a shell's: 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Work:
    """Counts bytes towards a total. Use it in a `with`, on the main thread."""

    def __init__(self, what: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._what, self._stream = what, stream or sys.stderr
        self._shown = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._total = self._done = self._signal = 0
        self._next = time.monotonic() + FIRST
        self._drawn = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._drawn:
            self._write("\r\x1b[K")

    def start(self, total: int) -> None:
        """Begin a piece of work of `total` bytes, 0 or more."""
        self._total, self._done = total, 0

    def add(self, count: int) -> None:
        """Tell that `count` more bytes are done. Raises KeyboardInterrupt, StoppedError."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            raise StoppedError(self._signal)
        self._done += count
        if self._shown and (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            self._drawn = True
            self._write(f"\r{self.line()}\x1b[K")

    def line(self) -> str:
        """Return what stands on the line now."""
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        bar = "#" * int(share * _BAR)
        sizes = f"{scaled(self._done)} of {scaled(self._total)}"
        return f"{printable(self._what)} [{bar:<{_BAR}}] {share:4.0%}  {sizes}"

    def _signalled(self, number: int, _frame: object) -> None:
        self._signal = number

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._shown = self._drawn = False  # the terminal has gone; the work goes on
