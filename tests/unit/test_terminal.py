"""The console client against a fake console socket, on a pseudo-terminal and on pipes.

Whether a terminal is given back can only be seen from outside, so the client runs as a shell
would run it: a session leader owns the terminal and has the client as its foreground job.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import sys
import termios
import time
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import PyvmError
from vmm.terminal import Action, ConsoleClient, End, Escapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE: Final = 10.0  # seconds; every wait here ends in milliseconds when all is well
LFLAG: Final = 3


def await_fd(fd: int, what: str) -> None:
    """Wait until `fd` is readable, or fail saying what did not come."""
    assert select.select([fd], [], [], DEADLINE)[0], f"{what} did not come in {DEADLINE} s"


class Shell:
    """A terminal whose foreground job is a console client, and the VM's end of that console."""

    def __init__(self, run: Callable[[socket.socket], None]) -> None:
        self.console, client_end = socket.socketpair()
        # A death is reported as the wait status, a stop likewise: four bytes each.
        self._reports, report = os.pipe()
        pids, tell_pid = os.pipe()
        shell_pid, self.master = pty.fork()
        if shell_pid == 0:
            try:
                self._lead(run, client_end, report, tell_pid)
            finally:
                os._exit(0)
        self.shell_pid = shell_pid
        client_end.close()
        os.close(report)
        os.close(tell_pid)
        self.client_pid = int.from_bytes(os.read(pids, 4), "little")
        os.close(pids)
        self.output = b""

    def _lead(
        self,
        run: Callable[[socket.socket], None],
        client_end: socket.socket,
        report: int,
        pids: int,
    ) -> None:
        self.console.close()
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        client = os.fork()
        if client == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            # A job that a shell has put into the background has those of ^C and ^\\ ignored.
            for number in (signal.SIGTTOU, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            os.close(report)
            os.write(pids, os.getpid().to_bytes(4, "little"))
            os.close(pids)
            run(client_end)
            os._exit(0)
        client_end.close()
        while True:
            _, status = os.waitpid(client, os.WUNTRACED)
            os.tcsetpgrp(0, os.getpid())
            os.write(report, status.to_bytes(4, "little"))
            os.read(0, 16)  # keep the terminal until the test has looked at it, or says "fg"
            if not os.WIFSTOPPED(status):
                return
            os.tcsetpgrp(0, client)
            os.kill(client, signal.SIGCONT)

    def modes(self) -> list[object]:
        """The terminal's present modes, without the bits the kernel keeps for itself."""
        return termios.tcgetattr(self.master)[:4]

    def await_modes(self, wanted: Callable[[], bool]) -> None:
        """Wait for a mode change, which gives no event: looks again every millisecond."""
        end = time.monotonic() + DEADLINE
        while not wanted():
            assert time.monotonic() < end, f"terminal modes stay {self.modes()}"
            select.select([], [], [], 0.001)

    def raw(self) -> bool:
        """Whether keys reach the client one by one, ^C included."""
        flags = termios.tcgetattr(self.master)[LFLAG]
        return not flags & (termios.ICANON | termios.ECHO | termios.ISIG)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    def shows(self, text: bytes) -> None:
        """Wait until the terminal has shown `text`."""
        while text not in self.output:
            await_fd(self.master, f"{text!r} on the terminal")
            self.output += os.read(self.master, 4096)

    def guest_gets(self, wanted: bytes) -> None:
        """Wait until exactly `wanted` has arrived at the console."""
        got = b""
        while len(got) < len(wanted):
            await_fd(self.console.fileno(), f"{wanted!r} at the console")
            got += self.console.recv(4096)
        assert got == wanted

    def report(self) -> int:
        """Wait until the client stops or ends; its wait status."""
        await_fd(self._reports, "a report about the client")
        return int.from_bytes(os.read(self._reports, 4), "little")

    def close(self) -> None:
        """End what is left."""
        for pid in (self.client_pid, self.shell_pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.waitpid(self.shell_pid, 0)
        self.console.close()
        os.close(self.master)
        os.close(self._reports)


def no_break() -> None:
    """BREAK handler for tests that send none."""
    raise AssertionError("BREAK was not asked for")


def attach(console: socket.socket) -> None:
    """What the client process does: exit status 0 detached, 5 closed."""
    os.environ["TERM"] = "dumb"
    end = ConsoleClient(console, "web", no_break).run()
    os._exit(0 if end is End.DETACHED else 5)


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A client attached to a console, terminal already raw."""
    session = Shell(attach)
    session.shows(b"connected to web")
    session.await_modes(session.raw)
    yield session
    session.close()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Action.DETACH]),
        (b"ls\r~.", [b"ls\r", Action.DETACH]),
        (b"ls\n~#ps\r", [b"ls\n", Action.BREAK, b"ps\r"]),
        (b"~?~.", [Action.HELP, Action.DETACH]),  # still at the start of the line
        (b"~\x1a", [Action.SUSPEND]),
        (b"a~.", [b"a~."]),  # not at the start of a line
        (b"~~.", [b"~."]),
        (b"~~~.", [b"~~."]),
        (b"~x", [b"~x"]),
        (b"~\r~.", [b"~\r", Action.DETACH]),
        (b"ab\x1dcd", [b"ab", Action.DETACH, b"cd"]),
        (b"~\x1dx", [b"\x1dx"]),
        (b"~", []),  # held for the next key
    ],
)
def test_escapes(typed: bytes, expected: list[bytes | Action]) -> None:
    """`~` commands only at the start of a line, ^] anywhere, `~~` and `~^]` for the keys."""
    assert Escapes().feed(typed) == expected


def test_escapes_do_not_depend_on_how_keys_arrive() -> None:
    """One key per read or a whole paste: the guest gets the same bytes, the client the same."""
    typed = b"a~b\r~~x\r~#~q\r~?"
    whole = Escapes().feed(typed)

    slow = Escapes()
    one_by_one = [item for key in typed for item in slow.feed(bytes([key]))]
    actions = [item for item in one_by_one if isinstance(item, Action)]
    plain = b"".join(item for item in one_by_one if isinstance(item, bytes))

    assert actions == [item for item in whole if isinstance(item, Action)]
    assert plain == b"".join(item for item in whole if isinstance(item, bytes)) == b"a~b\r~x\r~q\r"


def test_keys_reach_the_guest_and_output_the_user(shell: Shell) -> None:
    """In raw mode each key goes to the guest as typed, ^C and ^D too; output is shown as is."""
    shell.type(b"ls\r\x03\x04")
    shell.guest_gets(b"ls\r\x03\x04")

    shell.console.send(b"\x1b[1mfile\x1b[0m\r\n$ ")
    shell.shows(b"\x1b[1mfile\x1b[0m\r\n$ ")


@pytest.mark.parametrize("keys", [b"~.", b"\x1d", b"ls\r~."])
def test_leaving_restores_the_terminal(keys: bytes, shell: Shell) -> None:
    """`~.` and ^] leave with status 0, say so, and the terminal is cooked again."""
    shell.type(keys)

    assert shell.report() == 0
    assert not shell.raw()
    shell.shows(b"left web")


def test_modes_come_back_exactly() -> None:
    """What the user had set before (here: no echo, no IXON) is what comes back."""
    session = Shell(attach_when_told)
    modes = termios.tcgetattr(session.master)
    modes[0] &= ~termios.IXON
    modes[LFLAG] &= ~termios.ECHO
    termios.tcsetattr(session.master, termios.TCSANOW, modes)
    before = session.modes()
    session.type(b"\n")
    session.await_modes(session.raw)

    session.type(b"\x1d")

    assert session.report() == 0
    assert session.modes() == before
    session.close()


def attach_when_told(console: socket.socket) -> None:
    """Attach after one line from the terminal, so that its modes can be set first."""
    os.read(0, 1)
    attach(console)


def test_the_end_of_the_vm_ends_the_client(shell: Shell) -> None:
    """When the console closes, what came before is shown and the terminal is given back."""
    shell.console.send(b"Power down.\r\n")
    shell.console.close()

    assert shell.report() == 5 << 8
    assert not shell.raw()
    shell.shows(b"Power down.\r\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_deadly_signal_restores_the_terminal(number: signal.Signals, shell: Shell) -> None:
    """A client ended by a signal dies of that signal, with the terminal restored before."""
    os.kill(shell.client_pid, number)

    status = shell.report()
    assert os.WTERMSIG(status) == number
    assert not shell.raw()


def test_sigkill_in_raw_mode_restores_the_terminal(shell: Shell) -> None:
    """SIGKILL runs no code of the client, and still the terminal comes back."""
    os.kill(shell.client_pid, signal.SIGKILL)

    assert os.WTERMSIG(shell.report()) == signal.SIGKILL
    shell.await_modes(lambda: not shell.raw())


def test_sigkill_of_the_whole_job_restores_the_terminal(shell: Shell) -> None:
    """The guard is not in the job: `kill -9 %1` does not take it along."""
    os.killpg(shell.client_pid, signal.SIGKILL)

    assert os.WTERMSIG(shell.report()) == signal.SIGKILL
    shell.await_modes(lambda: not shell.raw())


def test_the_guard_leaves_modes_alone_that_are_not_ours(shell: Shell) -> None:
    """If the shell has set modes of its own by the time the guard looks, they stay."""
    modes = termios.tcgetattr(shell.master)
    modes[LFLAG] |= termios.ISIG  # as a line editor has it: no echo, no lines, but ^C
    termios.tcsetattr(shell.master, termios.TCSANOW, modes)
    guard = guard_of(shell.client_pid)
    guard_end = os.pidfd_open(guard)

    os.kill(shell.client_pid, signal.SIGKILL)

    await_fd(guard_end, "the end of the guard")
    os.close(guard_end)
    assert not termios.tcgetattr(shell.master)[LFLAG] & termios.ICANON


def guard_of(pid: int) -> int:
    """The only child of the client."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read())


def test_the_client_leaves_no_guard_behind(shell: Shell) -> None:
    """After leaving, the guard is gone and reaped."""
    guard_end = os.pidfd_open(guard_of(shell.client_pid))
    shell.type(b"\x1d")

    assert shell.report() == 0
    await_fd(guard_end, "the end of the guard")
    os.close(guard_end)


def test_suspend_gives_the_terminal_back_until_resumed(shell: Shell) -> None:
    """`~^Z` stops the client with the terminal cooked; SIGCONT makes it raw and goes on."""
    shell.type(b"~\x1a")
    assert os.WIFSTOPPED(shell.report())
    assert not shell.raw()

    shell.type(b"fg\n")

    shell.await_modes(shell.raw)
    shell.type(b"x")
    shell.guest_gets(b"x")


def test_a_console_that_does_not_read_cannot_hold_the_user(shell: Shell) -> None:
    """A guest that takes no input fills a bounded buffer; the bell rings and ^] still leaves."""
    while b"\a" not in shell.output:
        shell.type(b"x" * 2000)
        if select.select([shell.master], [], [], 0)[0]:
            shell.output += os.read(shell.master, 4096)

    shell.type(b"\x1d")

    assert shell.report() == 0


def test_break_and_help() -> None:
    """`~#` asks for a BREAK, whose failure is shown and ends nothing; `~?` explains the keys."""

    def refuse() -> None:
        raise PyvmError("web: no BREAK today")

    def run(console: socket.socket) -> None:
        ConsoleClient(console, "web", refuse).run()

    session = Shell(run)
    session.shows(b"connected to web")
    session.await_modes(session.raw)
    session.type(b"~#")
    session.shows(b"web: no BREAK today\r\n")
    session.type(b"~?")
    session.shows(b"leave the console")
    session.type(b"~.")

    assert session.report() == 0
    session.close()


class Piped:
    """A client on pipes, run in this process: both ends of its input, output and console."""

    def __init__(self, wait: bool) -> None:
        self.console, client_end = socket.socketpair()
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.client = ConsoleClient(
            client_end, "web", no_break, wait=wait, stdin=stdin, stdout=stdout
        )
        self._fds = [stdin, stdout, self.stdout]
        self._sockets = [self.console, client_end]

    def close(self) -> None:
        """Close what is left."""
        for fd in self._fds:
            os.close(fd)
        for end in self._sockets:
            end.close()


def test_without_a_terminal_bytes_pass_as_they_are() -> None:
    """From a pipe there are no escapes, and the end of input waits for the console to close."""
    piped = Piped(wait=True)
    os.write(piped.stdin, b"\x1d~.\r~.")
    os.close(piped.stdin)
    piped.console.send(b"out\r\n")
    piped.console.shutdown(socket.SHUT_WR)

    assert piped.client.run() is End.CLOSED
    assert os.read(piped.stdout, 100) == b"out\r\n"
    piped.close()


def test_without_waiting_the_end_of_input_leaves() -> None:
    """With --no-wait the client leaves once all input is with the console."""
    piped = Piped(wait=False)
    os.write(piped.stdin, b"poweroff\r")
    os.close(piped.stdin)

    assert piped.client.run() is End.DETACHED
    assert piped.console.recv(100) == b"poweroff\r"
    piped.close()


def test_a_reset_console_is_a_closed_one() -> None:
    """A VM process killed with unread input in its socket resets the connection."""
    piped = Piped(wait=True)
    os.write(piped.stdin, b"x" * 100)
    piped.client._pending = b"y"
    piped.client._pending_to_console()
    piped.console.close()

    assert piped.client.run() is End.CLOSED
    os.close(piped.stdin)
    piped.close()
