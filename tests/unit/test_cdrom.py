"""The CD-ROM drive as the VM process knows it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from tests.descriptors import count_before
from vmm.cdrom import Drive

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
