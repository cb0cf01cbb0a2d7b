"""qcow2 clusters that are in a window: requests that take one look, beside all that moves clusters.

A spot is a cluster of the disk in the map of the file. It must be where the tables say, at any
time, or be forgotten.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, cast

import pytest

from devices import window
from devices.blkreq import (
    BLK_F_FLUSH,
    S_IOERR,
    S_OK,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.qcow2 import Qcow2
from devices.qcow2check import check
from devices.qcow2create import create
from tests.blklab import BlkLab, record_calls
from tests.qcow2lab import pattern
from tests.rng import seeded

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from devices.raw import Disk

SIZE = 1 << 20
SECTOR = 512


class SpotLab(BlkLab):
    """A disk on a qcow2 image of our own, whose window opens soon."""

    def __init__(
        self, directory: Path, cluster_bits: int, monkeypatch: pytest.MonkeyPatch, packed: bool
    ) -> None:
        monkeypatch.setattr(window, "WORTHWHILE", 2)
        path = directory / "new"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        create(fd, SIZE, cluster_size=1 << cluster_bits)
        os.close(fd)
        content = path.read_bytes()
        super().__init__(
            directory, len(content), content=content, packed=packed, make_disk=self._open
        )
        self.start(F_INDIRECT_DESC | BLK_F_FLUSH | F_RING_PACKED * packed, arena_bytes=4 << 20)
        if self.disk.window is None:
            pytest.skip("no window on files below the directory of temporary files")

    @staticmethod
    def _open(fd: int) -> Disk:
        return Qcow2(fd)

    def check_spots(self) -> int:
        """Each spot is what is where the tables say; return how many there are."""
        disk = cast("Qcow2", self.disk)
        assert disk.window is not None
        for cluster, spot in disk.window.spots.items():
            state, _ = disk.run(cluster * disk.granularity, SECTOR)
            assert state >= 0
            assert bytes(spot) == os.pread(disk.fd, len(spot), state)
        return len(disk.window.spots)

    def check_what_a_kill_leaves(self, model: bytearray) -> None:
        """A successor finds all that was reported, in an image without a flaw."""
        copy = self.image.with_suffix(".copy")
        shutil.copyfile(self.image, copy)
        fd = os.open(copy, os.O_RDWR)
        try:
            assert check(fd).corruptions == 0
            disk = Qcow2(fd)
            found = bytearray(len(model))
            assert disk.read([memoryview(found)], 0, len(found)) == len(found)
            assert found == model
            disk.finish()
        finally:
            os.close(fd)


def spans(rng: Random) -> tuple[int, int]:
    """Return offset and length of some sectors, few or very many."""
    length = SECTOR * rng.choice((1, 1, 2, 8, 8, 8, 64, 100, 256))
    return rng.randrange(0, SIZE - length + 1, SECTOR), length


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_random_requests(
    tmp_path: Path, cluster_bits: int, packed: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads give what was written, whatever became of clusters; so do they after a kill."""
    rng = seeded(seed)
    model, most = bytearray(SIZE), 0
    with SpotLab(tmp_path, cluster_bits, monkeypatch, packed) as lab:
        for number in range(150):
            offset, length = spans(rng)
            part = slice(offset, offset + length)
            kind = rng.choice((T_IN, T_IN, T_OUT, T_OUT, T_OUT, T_DISCARD, T_WRITE_ZEROES, T_FLUSH))
            if kind == T_IN:
                assert lab.ask(T_IN, offset // SECTOR, room=length).data == model[part]
            elif kind == T_OUT:
                model[part] = pattern(rng, length)
                assert lab.ask(T_OUT, offset // SECTOR, bytes(model[part])).status == S_OK
            elif kind == T_FLUSH:
                assert lab.ask(T_FLUSH).status == S_OK
            else:
                flags = rng.choice((0, SEGMENT_F_UNMAP)) if kind == T_WRITE_ZEROES else 0
                segment = SEGMENT.pack(offset // SECTOR, length // SECTOR, flags)
                assert lab.ask(kind, data=segment).status == S_OK
                if kind == T_DISCARD:  # whole clusters read as zeroes, the rest as it was
                    model[part] = lab.ask(T_IN, offset // SECTOR, room=length).data
                else:
                    model[part] = bytes(length)
            most = max(most, lab.check_spots())
            if number % 10 == 0:
                lab.check_what_a_kill_leaves(model)
        assert most > 5
        if rng.random() < 0.5:  # the window closes, as it does when a page cannot be had
            lab.disk.window.clear()
        for offset in range(0, SIZE, 1 << 17):
            read = lab.ask(T_IN, offset // SECTOR, room=1 << 17).data
            assert read == model[offset : offset + (1 << 17)]
        lab.check_what_a_kill_leaves(model)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpotLab:
    """A disk whose first clusters are written and in the window."""
    lab = SpotLab(tmp_path, 12, monkeypatch, packed=False)
    for _ in range(3):
        for sector in range(0, 64, 8):
            assert lab.ask(T_OUT, sector, bytes((sector + 1,)) * 4096).status == S_OK
    assert lab.check_spots() == 8
    return lab


def test_no_system_call(lab: SpotLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests within a cluster that is there."""
    calls = record_calls(monkeypatch, "preadv", "pwritev", "fdatasync")
    for sector in (8, 9, 17, 63):
        assert lab.ask(T_OUT, sector, b"n" * 512).status == S_OK
        assert lab.ask(T_IN, sector, room=512).data == b"n" * 512
    assert not calls
    assert lab.ask(T_IN, 15, room=1024).data == bytes((9,)) * 512 + bytes((17,)) * 512
    assert calls


def test_a_cluster_that_is_given_up(lab: SpotLab) -> None:
    """It is forgotten at once, before it can become another's."""
    segment = SEGMENT.pack(8, 8, 0)
    assert lab.ask(T_DISCARD, data=segment).status == S_OK
    assert 1 not in lab.disk.window.spots
    assert lab.ask(T_IN, 8, room=4096).data == bytes(4096)
    lab.ask(T_FLUSH)
    for sector in range(512, 1536, 8):  # they take the space of the one that is free
        assert lab.ask(T_OUT, sector, b"o" * 4096).status == S_OK
    assert lab.ask(T_IN, 8, room=4096).data == bytes(4096)
    assert lab.ask(T_OUT, 8, b"a" * 512).status == S_OK
    for sector in range(512, 1536, 8):
        assert lab.ask(T_IN, sector, room=4096).data == b"o" * 4096
    lab.check_spots()


def test_an_image_marked_corrupt(lab: SpotLab) -> None:
    """It is not written to any more, by no way; what is there can be read."""
    before = lab.image.read_bytes()
    lab.disk.file.corrupt("a test says so")
    marked = lab.image.read_bytes()
    assert marked != before
    for _ in range(5):
        assert lab.ask(T_OUT, 8, b"c" * 512).status == S_IOERR
        assert lab.ask(T_IN, 8, room=4096).data == bytes((9,)) * 4096
    assert lab.image.read_bytes() == marked


def test_an_image_opened_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has spots, and none is written to."""
    with SpotLab(tmp_path, 12, monkeypatch, packed=False) as lab:
        assert lab.ask(T_OUT, 8, b"r" * 4096).status == S_OK
    content = lab.image.read_bytes()
    (tmp_path / "again").mkdir()
    with BlkLab(
        tmp_path / "again", len(content), content=content, readonly=True, make_disk=Qcow2
    ) as again:
        again.start(F_INDIRECT_DESC)
        for _ in range(5):
            assert again.ask(T_IN, 8, room=4096).data == b"r" * 4096
            assert again.ask(T_OUT, 8, b"x" * 512).status == S_IOERR
        assert again.disk.window.spots
        assert again.image.read_bytes() == content
