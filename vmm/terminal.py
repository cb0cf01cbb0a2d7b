"""The console client: the user's terminal on one side, a VM's console socket on the other.

On a terminal the keys go to the guest one by one (raw mode), except the escapes below; from a
file or pipe the bytes go as they are.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from enum import Enum
from typing import TYPE_CHECKING, Final

from config.errors import PyvmError
from vmm.rawmode import RawTerminal
from vmm.table import tell

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_CHUNK: Final = 64 * 1024  # bytes moved at a time, and kept for a console that does not read
_TILDE: Final = ord("~")
_LEAVE: Final = 0x1D  # ^]
_LINE_ENDS: Final = b"\r\n"

HELP: Final = """\
At the start of a line:
  ~.   leave the console; the VM goes on
  ~#   send a BREAK
  ~^Z  suspend this client
  ~~   send one ~
  ~^]  send one ^]
  ~?   show this
Anywhere:
  ^]   leave the console
"""


class End(Enum):
    """Why the client came back."""

    DETACHED = "detached"  # the user left, or the input ended and waiting was not wanted
    CLOSED = "closed"  # the console closed: the VM has ended, or threw this client out


class Action(Enum):
    """What an escape asks for."""

    DETACH = ord(".")
    HELP = ord("?")
    BREAK = ord("#")
    SUSPEND = 0x1A  # ^Z


_ACTIONS: Final = {action.value: action for action in Action}


class Escapes:
    """Finds the escapes in what is typed. A `~` at the start of a line is held back for one key."""

    def __init__(self) -> None:
        self._line_start = True
        self._held = False

    def feed(self, typed: bytes) -> list[bytes | Action]:
        """Return bytes for the guest and actions for the client, in the order typed."""
        found: list[bytes | Action] = []
        plain = bytearray()

        def act(action: Action) -> None:
            if plain:
                found.append(bytes(plain))
                plain.clear()
            found.append(action)

        for key in typed:
            held, self._held = self._held, False
            if held and key in _ACTIONS:
                act(_ACTIONS[key])
                continue
            if held and key not in (_TILDE, _LEAVE):
                plain.append(_TILDE)  # not an escape after all
            if not held and key == _LEAVE:
                act(Action.DETACH)
            elif not held and key == _TILDE and self._line_start:
                self._held = True
            else:
                plain.append(key)
                self._line_start = key in _LINE_ENDS
        if plain:
            found.append(bytes(plain))
        return found


class ConsoleClient:
    """Copies between a console and the user until one of them ends it."""

    def __init__(
        self,
        console: socket.socket,
        name: str,
        send_break: Callable[[], None],
        *,
        wait: bool = True,
        stdin: int = 0,
        stdout: int = 1,
    ) -> None:
        """`wait`: stay when the input ends (no terminal), until the console closes."""
        self._console, self._name, self._send_break = console, name, send_break
        self._wait, self._stdin, self._stdout = wait, stdin, stdout
        self._pending = b""  # for the console, at most _CHUNK and one read
        self._escapes: Escapes | None = None
        console.setblocking(False)

    def run(self) -> End:
        """Serve until the user leaves or the console closes. Raises OSError of standard output."""
        if not os.isatty(self._stdin):
            return self._copy()
        self._escapes = Escapes()
        tell(f"connected to {self._name}; ^] leaves, ~? at the start of a line explains")
        with RawTerminal(self._stdin):
            end = self._copy()
        sys.stderr.write("\n")  # the guest may have left the cursor anywhere
        if end is End.DETACHED:
            tell(f"left {self._name}")
        return end

    def _copy(self) -> End:
        console, more_input = self._console.fileno(), True
        while more_input or self._pending or self._wait:
            # A pipe waits while the console is full. A terminal does not, or nobody could leave.
            reads_input = more_input and (self._escapes or len(self._pending) < _CHUNK)
            readable, writable, _ = select.select(
                [console, self._stdin] if reads_input else [console],
                [console] if self._pending else [],
                [],
            )
            if console in readable and not self._console_to_user():
                return End.CLOSED
            if self._stdin in readable and (typed := _read(self._stdin)) is not None:
                if self._escapes is None:
                    self._pending += typed
                    more_input = bool(typed)
                elif not typed or not self._keys(self._escapes.feed(typed)):
                    return End.DETACHED  # asked for, or the terminal hung up
            if writable and not self._pending_to_console():
                return End.CLOSED
        return End.DETACHED

    def _console_to_user(self) -> bool:
        """Pass one read on; false when the console is closed."""
        try:
            data = self._console.recv(_CHUNK)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        _write_all(self._stdout, data)
        return bool(data)

    def _pending_to_console(self) -> bool:
        try:
            self._pending = self._pending[self._console.send(self._pending) :]
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        return True

    def _keys(self, items: list[bytes | Action]) -> bool:
        """Do what was typed, in order; false to leave."""
        for item in items:
            if isinstance(item, bytes):
                if len(self._pending) < _CHUNK:
                    self._pending += item
                else:
                    _write_all(2, b"\a")  # the guest does not read: these keys are lost
            elif item is Action.DETACH:
                return False
            elif item is Action.HELP:
                self._tell(HELP)
            elif item is Action.BREAK:
                try:
                    self._send_break()
                except PyvmError as err:
                    self._tell(str(err))
            else:
                os.kill(0, signal.SIGTSTP)  # the whole job, as ^Z would; RawTerminal handles ours
        return True

    def _tell(self, text: str) -> None:
        """Say something in raw mode, where a line feed does not return the carriage."""
        sys.stderr.write("\r\n" + text.rstrip("\n").replace("\n", "\r\n") + "\r\n")
        sys.stderr.flush()


def _read(fd: int) -> bytes | None:
    """Read what is there: b"" at the end or when the terminal is gone, None if nothing came."""
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # a shared terminal that another program made non-blocking
            select.select([], [fd], [])
