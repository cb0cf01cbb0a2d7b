"""What holds of a disk, whichever process serves it: what drivers and files know and have chosen.

Requests under killing are in `test_killed_disk.py`.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import HostError
from config.model import DiskConfig
from devices import images
from devices.blkreq import BLK_F_CONFIG_WCE, BLK_F_FLUSH, S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
from devices.journal import Journal
from tests.diskplug import SIZE, Answer, DiskPlug, empty_image
from tests.pluglab import wait_until
from tests.qcow2lab import content as shown
from tests.qcow2lab import needs_qemu, qemu_check, qemu_img, qemu_io
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from pathlib import Path

WRITEBACK: Final = 32  # in configuration space


def test_the_drivers_choices_hold(tmp_path: Path) -> None:
    """Cache mode and size are those it has seen, whatever has become of the image."""
    path = empty_image(tmp_path / "disk.img")
    with DiskPlug(path) as lab:
        lab.begin(BLK_F_FLUSH | BLK_F_CONFIG_WCE)
        assert lab.read_config(WRITEBACK, 1) == 1
        lab.write_config(WRITEBACK, 1, 0)
        os.truncate(path, 2 * SIZE)
        for _ in range(3):
            lab.wait_life(0, lab.kill())
            assert (lab.read_config(WRITEBACK, 1), lab.sectors) == (0, SIZE // 512)
            assert lab.ask(T_IN, SIZE // 512, room=512).status == S_IOERR
            assert lab.ask(T_FLUSH).status == S_OK
        lab.write_config(WRITEBACK, 1, 1)
        assert lab.setting("resize", 0) == 2 * SIZE
        lab.kill()
        assert (lab.read_config(WRITEBACK, 1), lab.sectors) == (1, 2 * SIZE // 512)
        assert lab.ask(T_IN, SIZE // 512, room=512) == Answer(S_OK, bytes(512))


@needs_qemu
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_disk_grows_while_it_is_killed(tmp_path: Path, format: str) -> None:
    """Killed before, in or after a resize: the disk has its new size once that was told."""
    path = tmp_path / "disk.img"
    qemu_img("create", "-q", "-f", format, path, str(SIZE))
    with DiskPlug(path, format=format) as lab:
        lab.begin()
        for turn in range(2, 14):
            killer = threading.Timer(0.0004 * turn, lab.kill_now)
            killer.start()
            assert lab.setting("resize", turn * SIZE) == turn * SIZE
            killer.join()
            assert lab.sectors == turn * SIZE // 512
            assert lab.ask(T_OUT, turn * SIZE // 512 - 1, b"x" * 512).status == S_OK
        assert lab.ask(T_FLUSH).status == S_OK
    if format == "qcow2":
        assert not qemu_check(path)[0]
    ends = {shown(path, format)[turn * SIZE - 512 : turn * SIZE] for turn in range(2, 14)}
    assert ends == {b"x" * 512}


def test_killed_while_paused(tmp_path: Path) -> None:
    """The next process does nothing before the VM goes on."""
    path = empty_image(tmp_path / "disk.img")
    with DiskPlug(path, cache="none") as lab:
        lab.begin()
        lab.pause()
        lab.offer(T_OUT, 0, b"x" * 4096)
        for _ in range(3):
            lab.wait_life(0, lab.kill())
            assert lab.status == READY
        assert path.read_bytes() == bytes(SIZE)
        lab.unpause()
        assert [answer.status for answer in lab.answers(1)] == [S_OK]
        assert path.read_bytes().startswith(b"x" * 4096 + b"\0")


class Restless(DiskPlug):
    """Is killed at every so many register writes."""

    left = every = 1 << 30

    def write(self, reg: int, size: int, value: int) -> None:
        super().write(reg, size, value)
        self.left -= 1
        if not self.left:
            self.left = self.every
            self.wait_life(0, self.kill())


@pytest.mark.parametrize("first", range(1, 6))
def test_killed_while_a_driver_sets_up(tmp_path: Path, first: int) -> None:
    """A driver gets to where it wants to be."""
    path = empty_image(tmp_path / "disk.img")
    with Restless(path, queues=2) as lab:
        lab.left, lab.every = first, 5
        lab.begin(BLK_F_FLUSH | BLK_F_CONFIG_WCE)
        assert len(lab.replaced) >= 4
        assert lab.ask(T_OUT, 7, b"y" * 512).status == S_OK
    assert path.read_bytes()[7 * 512 : 8 * 512] == b"y" * 512


def test_flushes_in_flight(tmp_path: Path) -> None:
    """Each is answered once, whichever process does it."""
    path = empty_image(tmp_path / "disk.img")
    with DiskPlug(path) as lab:
        lab.begin()
        for turn in range(8):
            lab.offer(T_OUT, 8 * turn, b"z" * 4096)
            for _ in range(6):
                lab.offer(T_FLUSH)
            lab.wait_life(0, lab.kill())
            assert {answer.status for answer in lab.answers(7)} == {S_OK}
    assert path.read_bytes().startswith(b"z" * 8 * 4096 + b"\0")


def test_the_image_stays_locked(tmp_path: Path) -> None:
    """Nobody else gets the image between two lives."""
    path = empty_image(tmp_path / "disk.img")
    with DiskPlug(path) as lab:
        for _ in range(5):
            life = lab.kill()
            with pytest.raises(HostError, match="in use"):
                images.open_disk(DiskConfig(str(path), "raw"), "vioblk0")
            lab.wait_life(0, life)
    os.close(images.open_disk(DiskConfig(str(path), "raw"), "vioblk0"))


# What a process that was taken over leaves behind.


def leave(lab: DiskPlug, device: object) -> None:
    """Have the journal say this of the disk, and kill the process."""
    assert lab.device.lasting is not None
    journal = Journal(os.dup(lab.device.lasting.fds["journal"]))
    found = journal.read()
    assert found is not None
    state, handled = found
    if isinstance(device, dict):
        device = {**state["device"], **device}
    journal.write({**state, "device": device}, handled)
    lab.kill()


def test_a_limit_behind_the_image(tmp_path: Path) -> None:
    """Nothing is reached that is not in the image."""
    path = empty_image(tmp_path / "disk.img")
    with DiskPlug(path) as lab:
        lab.begin()
        leave(lab, {"limit": 1 << 62})
        assert lab.sectors == SIZE // 512
        assert lab.ask(T_OUT, SIZE // 512, b"x" * 512).status == S_IOERR
    assert path.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    "device",
    [
        {"limit": -512},
        {"limit": "512"},
        {"limit": 1e300},
        {"limit": True},
        {"writeback": 7},
        {"disk": 5},
        {"disk": {"lost": "EIO"}},
        [],
        None,
    ],
    ids=str,
)
def test_a_state_that_makes_no_sense(tmp_path: Path, device: object) -> None:
    """The device is given up in the end, and the VM process lives on."""
    with DiskPlug(empty_image(tmp_path / "disk.img")) as lab:
        lab.begin()
        leave(lab, device)
        wait_until(lambda: bool(lab.lost))
        assert lab.facts()["state"] == "lost"
        assert lab.status == 0xFF


def test_a_flush_that_has_failed_is_never_well_again(tmp_path: Path) -> None:
    """The kernel has told one process of the loss, and tells no other."""
    with DiskPlug(empty_image(tmp_path / "disk.img")) as lab:
        lab.begin()
        leave(lab, {"disk": {"lost": errno.EIO}})
        for _ in range(2):
            assert lab.ask(T_FLUSH).status == S_IOERR
            assert lab.ask(T_IN, room=512).status == S_OK
            lab.wait_life(0, lab.kill())


@needs_qemu
@pytest.mark.parametrize("compat", ["v3", "v2"])
def test_an_image_that_is_corrupt(tmp_path: Path, compat: str) -> None:
    """It can still be read, and is not written to, by whoever comes next."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, str(SIZE))
    qemu_io(path, "write -P 97 0 64k", "write -P 98 64k 64k")
    with open(path, "r+b") as file:  # the second cluster lies on the header
        header = file.read(48)
        file.seek(int.from_bytes(header[40:48], "big"))
        table = int.from_bytes(file.read(8), "big") & (1 << 56) - 1
        file.seek(table + 8)
        file.write((1 << 63).to_bytes(8, "big"))
    with DiskPlug(path, format="qcow2") as lab:
        lab.begin()
        offered = lab.offered()
        assert lab.ask(T_IN, 128, room=512).status == S_IOERR
        for _ in range(2):
            lab.wait_life(0, lab.kill())
            assert lab.ask(T_IN, room=512) == Answer(S_OK, b"a" * 512)
            assert lab.ask(T_OUT, data=b"x" * 512).status == S_IOERR
            assert lab.ask(T_OUT, 1024, b"x" * 512).status == S_IOERR
            assert lab.offered() == offered
