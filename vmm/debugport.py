"""Two ports for firmware and test guests; both exist only when vm.yaml asks for them.

0x402: what a firmware prints, read as 0xE9 so that the firmware knows somebody listens.
0xF4: the guest ends its VM with an exit status of its choice.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LINE_MAX: Final = 256  # bytes; a longer line is logged in pieces
_PRESENT: Final = 0xE9
_NEWLINE: Final = 0x0A
_PRINTABLE: Final = frozenset(range(0x20, 0x7F))


class DebugConsole:
    """Collects bytes into lines for the log. The guest is hostile: no control byte passes."""

    def __init__(self, log_line: Callable[[str], None]) -> None:
        self._log_line = log_line
        self._lock = Lock()
        self._line = bytearray()

    def reset(self) -> None:
        """Log what was left of the last line."""
        with self._lock:
            text = self._take()
        if text:
            self._log_line(text)

    def read(self, offset: int, size: int) -> int:
        """Say that somebody listens."""
        return _PRESENT

    def write(self, offset: int, size: int, value: int) -> None:
        """Take one byte; a newline or a full line logs it. Empty lines are dropped."""
        byte = value & 0xFF
        with self._lock:
            if byte != _NEWLINE:
                self._line.append(byte)
            if byte != _NEWLINE and len(self._line) < LINE_MAX:
                return
            text = self._take()
        if text:
            self._log_line(text)

    def _take(self) -> str:
        line = self._line.rstrip(b"\r")
        self._line.clear()
        return "".join(chr(byte) if byte in _PRINTABLE else f"\\x{byte:02x}" for byte in line)


class DebugExit:
    """isa-debug-exit: writing v ends the VM with status (v << 1) | 1, so 0 cannot be asked for."""

    def __init__(self, exit_vm: Callable[[int], None]) -> None:
        self._exit_vm = exit_vm

    def reset(self) -> None:
        """Nothing to do: the port holds no state."""

    def read(self, offset: int, size: int) -> int:
        """Read as 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the VM; the status is cut to the eight bits a process can return."""
        self._exit_vm((value << 1 | 1) & 0xFF)
