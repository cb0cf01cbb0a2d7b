"""Disks whose processes are killed at any instant, and the next ones go on.

What was reported is there, every request is answered once and with the right data, and images
have leaks at most.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from devices import uringmake
from devices.blkreq import (
    BLK_F_FLUSH,
    BLK_F_RO,
    S_OK,
    T_FLUSH,
    T_IN,
    T_OUT,
)
from devices.features import F_IN_ORDER
from devices.virtio import CommonCfg
from tests.diskplug import DEPTH, SIZE, Answer, DiskPlug, Guest, empty_image
from tests.heldfile import held_file
from tests.loopdev import loop_device
from tests.pluglab import wait_until
from tests.qcow2lab import content as shown
from tests.qcow2lab import needs_qemu, qemu_check, qemu_img
from tests.rng import seeded
from tools.viodriver.registers import READY

KILLS: Final = 10  # fewer than 20, of which each might be young


class Case(NamedTuple):
    """A disk, and how its driver is attached."""

    format: str = "raw"
    cache: str = "writeback"  # or "writethrough", which is up to the driver, or "none"
    queues: int = 1
    packed: bool = False
    direct: bool = True
    features: int = 0

    @property
    def id(self) -> str:
        words = [self.format, self.cache, f"{self.queues}q", "packed" if self.packed else "split"]
        words += ["messages"] * (not self.direct) + ["inorder"] * bool(self.features)
        return "-".join(words)

    def plug(self, path: Path, **more: Any) -> DiskPlug:
        cache = "none" if self.cache == "none" else "writeback"
        lab = DiskPlug(
            path,
            format=self.format,
            cache=cache,
            queues=self.queues,
            packed=self.packed,
            direct=self.direct,
            **more,
        )
        lab.layout |= self.features
        return lab


CASES: Final = [
    Case(),
    Case(packed=True, queues=3, direct=False),
    Case(features=F_IN_ORDER, queues=2),
    Case(cache="writethrough"),
    Case(cache="none", queues=2),
    Case(cache="none", packed=True, direct=False),
    Case("qcow2", queues=2),
    Case("qcow2", packed=True, cache="writethrough", direct=False),
    Case("qcow2", cache="none"),
]


def make_image(path: Path, format: str, rng_seed: int) -> bytes:
    """Make an image with something in it, small clusters, and a base with compressed clusters."""
    content = seeded(rng_seed).randbytes(1 << 12) * (SIZE >> 13) + bytes(SIZE // 2)
    if format == "raw":
        path.write_bytes(content)
        return content
    flat, base = path.with_name("flat.raw"), path.with_name("base.qcow2")
    flat.write_bytes(content)
    small = ("-o", "cluster_size=4k")
    qemu_img("convert", "-c", "-O", "qcow2", *small, flat, base)
    qemu_img("create", "-q", "-f", "qcow2", *small, "-b", base, "-F", "qcow2", path)
    return content


def check_image(case: Case, path: Path, guest: Guest) -> None:
    """Have others look at what is left."""
    if case.format == "raw":
        guest.check(path.read_bytes())
        return
    corruptions, _leaks = qemu_check(path)
    assert not corruptions
    guest.check(shown(path))
    assert qemu_check(path.with_name("base.qcow2")) == (0, 0)


@needs_qemu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_random_requests(tmp_path: Path, case: Case) -> None:
    """Reads, writes, flushes, discards, many in flight, and kills at random among them."""
    path = tmp_path / "disk.img"
    content = make_image(path, case.format, 1)
    with case.plug(path) as lab:
        through = case.cache == "writethrough"
        guest = Guest(lab, content, CASES.index(case), features=0 if through else BLK_F_FLUSH)
        for _ in range(KILLS):
            guest.run(30 if case.cache == "none" else 60)
        guest.finish()
        assert lab.status == READY
        guest.check(guest.read_all())
        counted = lab.page.read()
        nr_counted = sum(counted[f"{kind}_requests"] for kind in ("read", "write", "other"))
        # What was begun in one life may be counted in the next, too; what ended it, in none.
        assert nr_counted >= guest.answered - KILLS * case.queues * DEPTH
    check_image(case, path, guest)


def test_a_disk_that_is_only_read(tmp_path: Path) -> None:
    """It stays so: writes are refused by whoever serves."""
    path = tmp_path / "disk.img"
    content = make_image(path, "raw", 2)
    with DiskPlug(path, readonly=True) as lab:
        guest = Guest(lab, content, 1, readonly=True)
        for _ in range(3):
            guest.run(60)
        guest.finish()
        assert lab.offered() & BLK_F_RO
        assert guest.read_all() == content
    assert path.read_bytes() == content


def test_a_host_without_io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, cache: none works all the same, and so for every process."""

    def refuse(_entries: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(uringmake, "make", refuse)
    path = tmp_path / "disk.img"
    with DiskPlug(empty_image(path), cache="none") as lab:
        guest = Guest(lab, bytes(SIZE), 1)
        for _ in range(3):
            guest.run(60)
        guest.finish()
    guest.check(path.read_bytes())


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device(tmp_path: Path, cache: str) -> None:
    """There it is the same, and the device is free for others afterwards."""
    image = empty_image(tmp_path / "disk.img")
    with loop_device(str(image)) as path:
        with DiskPlug(Path(path), cache=cache) as lab:
            guest = Guest(lab, bytes(SIZE), 5)
            for _ in range(3):
                guest.run(60)
            guest.finish()
            guest.check(guest.read_all())
            assert lab.ask(T_FLUSH).status == S_OK
        guest.check(Path(path).read_bytes())


# A slow disk, which goes on when the process that asked it is gone.


@pytest.mark.parametrize("kind", [T_OUT, T_IN])
def test_what_the_disk_still_does_comes_first(tmp_path: Path, kind: int) -> None:
    """The next process answers registers, and does nothing again before that is done."""
    path = tmp_path / "held.img"
    with held_file(path, SIZE) as file, DiskPlug(path, cache="none") as lab:
        lab.begin()
        file.hold = True
        if kind == T_OUT:
            lab.offer(T_OUT, 8, b"old." * 1024)
        else:
            lab.offer(T_IN, 8, room=4096)
        wait_until(lambda: file.nr_writes + file.nr_reads == 1)
        lab.wait_life(0, lab.kill())
        for _ in range(20):
            lab.kick(0)
            assert lab.status == READY
        assert file.nr_writes + file.nr_reads == 1

        file.hold = False
        assert [answer.status for answer in lab.answers(1)] == [S_OK]
        assert file.nr_writes + file.nr_reads == 2
        assert lab.ask(T_OUT, 8, b"new." * 1024).status == S_OK
        assert bytes(file.content[4096:8192]) == b"new." * 1024
        assert lab.ask(T_IN, 8, room=4096) == Answer(S_OK, b"new." * 1024)


def test_a_reset_waits_for_what_the_disk_still_does(tmp_path: Path) -> None:
    """When the driver reads that the device is reset, no old read comes into its memory."""
    path = tmp_path / "held.img"
    with held_file(path, SIZE) as file, DiskPlug(path, cache="none") as lab:
        lab.begin()
        file.hold = True
        for sector in (0, 16, 32):
            lab.offer(T_IN, sector, room=4096)
        wait_until(lambda: file.nr_reads == 3)
        lab.kill()
        lab.write(CommonCfg.DEVICE_STATUS, 1, 0)
        wait_until(lab.page.busy)
        file.hold = False
        assert lab.status == 0
        assert file.nr_reads == 3
        lab.begin()
        assert lab.ask(T_IN, room=512) == Answer(S_OK, bytes(512))
