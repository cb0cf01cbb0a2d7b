"""vmm.progress: the line of long work, and signals that wait for a good moment."""

from __future__ import annotations

import io
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.unit.image_lab import signals_count
from vmm import progress
from vmm.progress import SIGNALS, StoppedError, Work

if TYPE_CHECKING:
    from collections.abc import Iterator


class Terminal(io.StringIO):
    """Takes text, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal that has hung up."""

    def flush(self) -> None:
        raise OSError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting before and between lines."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Check that every handler is what it was."""
    with signals_count():
        yield


def test_a_terminal_sees_how_far_it_is() -> None:
    """One line, written over and over, and gone at the end."""
    terminal = Terminal()
    with Work("convert a.img", stream=terminal) as work:
        work.start(4 << 20)
        work.add(1 << 20)
        work.add(3 << 20)

    lines = terminal.getvalue().split("\r")
    assert lines[1] == "convert a.img [######                  ]  25%  1.0M of 4.0M\x1b[K"
    assert lines[2] == f"convert a.img [{'#' * 24}] 100%  4.0M of 4.0M\x1b[K"
    assert lines[3] == "\x1b[K"
    assert "\n" not in terminal.getvalue()


def test_nothing_to_do_is_all_done() -> None:
    """An empty image is no division by zero; more than was promised is 100 %, too."""
    work = Work("copy")
    assert "100%" in work.line()
    work.start(10)
    work.add(20)
    assert "100%" in work.line()


def test_a_name_cannot_steer_the_terminal() -> None:
    """File names may hold anything."""
    assert "\\x1b[2J" in Work("copy \x1b[2J").line()


@pytest.mark.parametrize("case", ["pipe", "quiet", "dumb"])
def test_who_sees_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal, a dumb one, or --quiet: no byte."""
    stream = io.StringIO() if case == "pipe" else Terminal()
    if case == "dumb":
        monkeypatch.setenv("TERM", "dumb")

    with Work("copy", quiet=case == "quiet", stream=stream) as work:
        work.start(2)
        work.add(1)

    assert stream.getvalue() == ""


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is gone before it can be read is not drawn."""
    monkeypatch.setattr(progress, "FIRST", 3600.0)
    terminal = Terminal()
    with Work("copy", stream=terminal) as work:
        work.start(2)
        work.add(1)

    assert terminal.getvalue() == ""


def test_work_outlives_its_terminal() -> None:
    """A hung-up terminal is no reason to stop."""
    with Work("copy", stream=Gone()) as work:
        work.start(2)
        work.add(1)
        work.add(1)
        assert "100%" in work.line()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_a_good_moment(number: signal.Signals) -> None:
    """It stops the work at the next add(), with the exit status of a shell."""
    reached = []

    def work() -> None:
        with Work("copy", quiet=True) as work:
            os.kill(os.getpid(), number)
            reached.append("after the signal")
            work.add(0)
            reached.append("after add()")

    with pytest.raises((KeyboardInterrupt, StoppedError)) as error:
        work()

    assert reached == ["after the signal"]
    if number == signal.SIGINT:
        assert error.type is KeyboardInterrupt
    else:
        assert isinstance(error.value, StoppedError)
        assert error.value.exit_status == 128 + number
        assert str(error.value) == f"stopped by {number.name}"


def test_an_ignored_signal_stays_ignored() -> None:
    """That is what nohup(1) is for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Work("copy", quiet=True) as work:
            os.kill(os.getpid(), signal.SIGHUP)
            work.add(0)
    finally:
        signal.signal(signal.SIGHUP, before)
