"""The debug ports: bounded, harmless lines for the log, and an exit status."""

from __future__ import annotations

import pytest

from vmm.debugport import LINE_MAX, DebugConsole, DebugExit


def feed(data: bytes) -> tuple[DebugConsole, list[str]]:
    lines: list[str] = []
    console = DebugConsole(lines.append)
    for byte in data:
        console.write(0, 1, byte)
    return console, lines


def test_presence() -> None:
    """SeaBIOS stays silent unless the port reads as 0xE9."""
    console, _ = feed(b"")
    assert console.read(0, 1) == 0xE9


def test_lines_are_logged_whole() -> None:
    """Each newline ends a line; carriage returns and empty lines vanish."""
    _, lines = feed(b"one\r\n\n\ntwo\nunfinished")
    assert lines == ["one", "two"]


def test_long_lines_come_in_pieces() -> None:
    """A guest that never ends its line cannot make us remember it."""
    _, lines = feed(b"x" * (3 * LINE_MAX) + b"\n")
    assert lines == ["x" * LINE_MAX] * 3


def test_control_bytes_are_escaped() -> None:
    """No byte that could steer the terminal of somebody who reads the log gets through."""
    _, lines = feed(b"\x1b[2J\x9b\tq\x00\n")
    assert lines == ["\\x1b[2J\\x9b\\x09q\\x00"]


def test_reset_logs_what_is_left() -> None:
    """The last words before a reset are not lost, and not glued to the next boot's first."""
    console, lines = feed(b"half a l")
    console.reset()
    console.reset()
    assert lines == ["half a l"]
    console.write(0, 1, ord("i"))
    console.write(0, 1, ord("\n"))
    assert lines[1:] == ["i"]


@pytest.mark.parametrize(
    ("value", "status"), [(0, 1), (1, 3), (0x10, 0x21), (0x7F, 0xFF), (0x80, 1)]
)
def test_exit_status(value: int, status: int) -> None:
    """Status is (value << 1) | 1 within the eight bits of an exit status; never 0."""
    seen: list[int] = []
    port = DebugExit(seen.append)
    port.write(0, 4, value)
    assert seen == [status]
    assert port.read(0, 1) == 0
