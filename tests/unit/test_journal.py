"""The journal: a state is there whole, or the one before it, whenever the process is killed."""

from __future__ import annotations

import os
import time
from struct import pack

import pytest

from config.errors import HostError
from devices.journal import Journal
from devices.spec import JOURNAL_HALF
from vmm.lasting import Lasting


@pytest.fixture
def fd() -> int:
    """A journal's memory, nothing in it; Journal closes it."""
    made = os.memfd_create("journal")
    os.ftruncate(made, 2 * JOURNAL_HALF)
    return made


def test_the_latest_state_is_found(fd: int) -> None:
    """By another process, with the count of what was done; nothing where nothing was written."""
    again = os.dup(fd)
    journal = Journal(fd)
    assert journal.read() is None
    for number in range(5):
        state = {"n": number, "pad": "x" * (5 - number)}
        journal.write(state, 10 + number)
        assert Journal(os.dup(again)).read() == (state, 10 + number)
    journal.write(state, 99)
    assert Journal(os.dup(again)).read() == (state, 99)
    with pytest.raises(HostError, match="a state of"):
        journal.write({"n": "x" * JOURNAL_HALF}, 0)
    os.close(again)


def test_a_state_half_written_is_not_there(fd: int) -> None:
    """The half that is being written has an old number until it is whole."""
    again = os.dup(fd)
    journal = Journal(fd)
    for number in (1, 2, 3):
        journal.write({"n": number}, number)
    os.pwrite(again, b"?" * 100, 24)  # the fourth, in the half of the second
    os.pwrite(again, pack("<QQ", 100, 4), 8)
    assert Journal(again).read() == ({"n": 3}, 3)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xff", b"[" * 100_000])
def test_nonsense_is_no_state(fd: int, text: bytes) -> None:
    """Whatever a process has left that was taken over."""
    os.pwrite(fd, pack("<QQQ", 7, len(text), 0) + text, JOURNAL_HALF)
    with pytest.raises(HostError, match="no sense"):
        Journal(fd).read()


def test_lengths_are_bounded(fd: int) -> None:
    """One that is longer than a half is none."""
    os.pwrite(fd, pack("<QQQ", 7, 1 << 63, 0) + b"{}", JOURNAL_HALF)
    with pytest.raises(HostError, match="no sense"):
        Journal(fd).read()


def test_processes_that_die_at_once_come_to_an_end() -> None:
    """Each is waited for before the next; one that does not end is the end."""
    lasting, other = Lasting("vionet0", 3), Lasting("vionet0", 3)
    begun: list[str] = []

    def launch() -> None:
        begun.append("process")
        raise HostError("did not start")

    assert not lasting.revive(lambda deadline: True, launch)
    assert "20 processes in a row died at once (did not start)" in lasting.cause
    assert 1 < len(begun) <= 20
    assert other.handled() == 0
    for one in (lasting, other):
        one.close()


def test_a_process_that_does_not_end_is_waited_for() -> None:
    """For a while at first, and then it is the end of that process that has another begin."""
    lasting = Lasting("vioblk0", 1)
    begun: list[str] = []
    patience: list[float] = []

    def stop(deadline: float) -> bool:
        patience.append(deadline - time.monotonic())
        return len(patience) > 2

    for ready in (False, False, True):
        assert lasting.revive(stop, lambda: begun.append("process")) is ready
        assert lasting.lingers is not ready
    assert begun == ["process"]
    assert [left > 0 for left in patience] == [True, False, False]
    lasting.close()
