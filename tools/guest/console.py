"""Talks to a guest's shell over a console socket, with a deadline for everything."""

from __future__ import annotations

import re
import socket
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PROMPT: Final = r"/ # $"  # of the shell that tools/guest/init starts
KEPT: Final = 1 << 20  # bytes of console output held while waiting for a match
SHOWN: Final = 2000  # characters of it in an error
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ConsoleError(Exception):
    """The guest did not say what was waited for; the text ends with what it said instead."""


class Console:
    """One viewer of a console: raw bytes over a stream socket, which it owns and closes.

    Output is matched as text without terminal escapes; what a match has passed is gone.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._text = ""
        self._commands = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach."""
        self._socket.close()

    def send(self, text: str) -> None:
        """Type `text`; a line feed is the Enter key."""
        self._socket.sendall(text.encode())

    def expect(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        """Wait until the output matches, at most `timeout` seconds. Raises ConsoleError."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self._text)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._error(f"no {pattern!r} within {timeout:g} s")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise self._error(f"the console was closed before {pattern!r}")
            text = (self._text + data.decode(errors="replace")).replace("\r", "")
            self._text = _ESCAPE.sub("", text)[-KEPT:]
        self._text = self._text[found.end() :]
        return found

    def shell(self, timeout: float = 180) -> None:
        """Wait for the shell's prompt."""
        self.expect(PROMPT, timeout)

    def run(self, command: str, timeout: float = 120, *, status: int | None = 0) -> str:
        """Run a command in the guest's shell and return its output, without the last newline.

        Raises ConsoleError if it ends with another `status`; None allows any.
        """
        # The quotes keep the echo of what is typed from looking like the marks themselves.
        self._commands += 1
        mark = f"{self._commands}:"
        self.send(f"echo 'beg''in {mark}'; {command}; echo 'en''d {mark}' $?\n")
        self.expect(rf"begin {mark}\n", timeout)
        found = self.expect(rf"(?s)^(.*?)\n?end {mark} (\d+)\n", timeout)
        self.expect(PROMPT, timeout)  # or the next wait for a prompt would find this one
        if status is not None and int(found[2]) != status:
            raise ConsoleError(f"{command!r} ended with status {found[2]}: {found[1][-SHOWN:]}")
        return found[1]

    def _error(self, what: str) -> ConsoleError:
        return ConsoleError(f"{what}; the console ends with:\n{self._text[-SHOWN:]}")
