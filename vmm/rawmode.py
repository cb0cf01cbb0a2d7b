"""Raw mode for the user's terminal, given back as it was found whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import termios
import tty
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

_DEADLY: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class RawTerminal:
    """Holds a terminal in raw mode inside a `with`, and gives it back however the client ends.

    Leaving the `with` restores the modes, and so do the signals that end a process. Nothing of
    ours runs on SIGKILL, so a child waits for our death and restores them then: `_guard`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd)
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> RawTerminal:
        self._guard_pid, self._guard = _guard(self._fd, self._saved)
        for number in _DEADLY:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                self._handlers[number] = signal.signal(number, self._die)
        self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal() returned it
        self._guard.close()
        os.waitpid(self._guard_pid, 0)

    def restore(self) -> None:
        """Give the terminal its own modes back. A terminal that is gone is no error."""
        # TCSANOW: draining could wait for ever on a terminal that takes no output.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)

    def _enter(self) -> None:
        tty.setraw(self._fd, termios.TCSANOW)

    def _die(self, number: int, _frame: FrameType | None) -> None:
        # To die of the signal itself tells the shell the truth about our end.
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _suspend(self, number: int, _frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here until SIGCONT
        signal.signal(number, self._suspend)
        self._enter()


def _guard(fd: int, saved: list[object]) -> tuple[int, socket.socket]:
    """Fork the child that restores `fd` when this process dies. Returns its pid and our end.

    The child waits on a socket whose other end only we hold: end of file means that we closed
    it or are dead. Either way it restores only a terminal that is still raw; if we did it
    ourselves, or the shell has set modes of its own by now, there is nothing to mend.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        ours.recv(1)  # the guard stands, or is dead already: then no harm in trying without it
        return pid, ours
    try:
        # A session of its own: spared by a kill of our process group, and free to set the
        # modes of a terminal that by then belongs to the shell (no SIGTTOU).
        os.setsid()
        os.dup2(fd, 0)
        os.dup2(theirs.fileno(), 1)
        os.closerange(2, os.sysconf("SC_OPEN_MAX"))  # above all our copy of the parent's end
        os.write(1, b"!")
        os.read(1, 1)
        # A shell that edits a line keeps ISIG on; raw mode as we set it has it off.
        if not termios.tcgetattr(0)[3] & termios.ISIG:
            termios.tcsetattr(0, termios.TCSANOW, saved)  # type: ignore[arg-type]  # from tcgetattr
    finally:
        os._exit(0)
