"""The CD-ROM drive as the VM process knows it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from devices.viodev import ChannelError
from tests.descriptors import count_before
from vmm.cdrom import KEPT_MAX, Drive

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """A disc of one block."""
    path = tmp_path / "disc.iso"
    path.write_bytes(bytes(2048))
    return path


def test_without_a_free_descriptor_the_old_disc_stays(
    disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is put in that could not be kept for the next process of this drive."""
    drive, sent = Drive(str(disc)), []
    drive.send = lambda *request: sent.append(request)

    def full(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", full)
    with pytest.raises(OSError, match="Too many open files"):
        drive.insert(0, "other.iso", force=False)
    assert (sent, drive.facts["medium"]) == ([], str(disc))
    drive.close()


def test_a_disc_that_the_device_refuses_is_let_go(disc: Path) -> None:
    """However often that happens."""
    drive = Drive(str(disc))

    def locked(*_request: Any) -> None:
        raise HostError("the guest has locked the tray")

    drive.send = locked
    before = count_before()
    with pytest.raises(HostError, match="locked"):
        drive.insert(drive.fds["disc1"], "other.iso", force=False)
    assert len(os.listdir("/proc/self/fd")) == before
    assert drive.facts["medium"] == str(disc)
    drive.close()


def busy(*_request: Any) -> None:
    """Answer as a channel whose device does not."""
    raise ChannelError("vioscsi: is busy")


def test_what_became_of_an_insert_is_told_later(disc: Path) -> None:
    """Until then both discs are there for the next process; an old word is about the old one."""
    drive = Drive(str(disc))
    drive.send = busy
    with pytest.raises(ChannelError):
        drive.insert(drive.fds["disc1"], "other.iso", force=False)
    drive.said("locked 1")
    assert (list(drive.fds), drive.facts["medium"]) == (["disc1", "disc2"], str(disc))
    drive.said("closed 2")
    assert (list(drive.fds), drive.facts["medium"]) == (["disc2"], "other.iso")
    with pytest.raises(ChannelError):
        drive.eject(force=False)
    assert (list(drive.fds), drive.facts["medium"]) == (["disc2"], "other.iso")
    drive.said("open 0")
    assert (list(drive.fds), drive.facts["medium"]) == ([], None)


def test_discs_that_were_replaced_have_gone(disc: Path) -> None:
    """Of two that were put in, the later one is in."""
    drive = Drive(str(disc))
    drive.send = busy
    for _ in range(2):
        with pytest.raises(ChannelError):
            drive.insert(drive.fds["disc1"], "other.iso", force=False)
    drive.said("closed 3")
    assert list(drive.fds) == ["disc3"]
    drive.close()


def test_an_answer_settles_what_was_open(disc: Path) -> None:
    """It is about all that was done before, too; and there is an end to what is kept."""
    drive = Drive(str(disc))
    drive.send = busy
    for _ in range(KEPT_MAX):
        with pytest.raises(ChannelError):
            drive.insert(drive.fds["disc1"], "other.iso", force=False)
    with pytest.raises(HostError, match="what became of the discs"):
        drive.insert(drive.fds["disc1"], "other.iso", force=False)
    assert len(drive.fds) == 1 + KEPT_MAX
    drive.send = lambda *_: {"tray_open": False, "locked": False, "disc": 3}
    drive.load()
    assert (list(drive.fds), drive.facts["medium"]) == (["disc3"], "other.iso")
    drive.close()
    assert drive.fds == {}


@pytest.mark.parametrize(
    "word", ["", "closed", "closed x", "ajar 1", "1", "closed -1", "closed 1 1"]
)
def test_a_word_that_means_nothing(disc: Path, word: str) -> None:
    """It changes nothing."""
    drive = Drive(str(disc))
    before = dict(drive.facts)
    drive.said(word)
    assert (drive.facts, list(drive.fds)) == (before, ["disc1"])
    drive.said("closed " + "9" * 20)
    assert (drive.facts["medium"], drive.fds) == (None, {})
