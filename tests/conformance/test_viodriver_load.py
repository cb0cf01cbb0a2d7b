"""The load generator reads and writes what it says, waits either way, notices what is wrong."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from config.model import DiskConfig
from devices.blkreq import BLK_F_FLUSH
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tools.viodriver import blkload
from tools.viodriver.blkload import BlkLoad, Pattern
from tools.viodriver.errors import DeviceGoneError, DriverError
from tools.viodriver.private import DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Launch = Callable[..., tuple[DeviceHost, BlkLoad]]

SIZE = 1 << 20
CONTENT = b"".join(bytes((sector & 0xFF, sector >> 8)) * 256 for sector in range(SIZE // 512))
FEATURES = F_EVENT_IDX | BLK_F_FLUSH


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Return a function that starts a disk and a load on it."""
    opened: list[DeviceHost] = []

    def launch_(
        pattern: Pattern, *, features: int = F_INDIRECT_DESC, depth: int = 8, size: int = SIZE
    ) -> tuple[DeviceHost, BlkLoad]:
        (tmp_path / "disk.img").write_bytes(CONTENT)
        image = os.open(tmp_path / "disk.img", os.O_RDWR)
        disk = DiskConfig(path="disk.img", format="raw")._asdict()
        settings = {**disk, "packed": bool(features & F_RING_PACKED)}
        host = DeviceHost("vioblk", settings, fds={"image": image}, memory_size=16 << 20)
        os.close(image)
        opened.append(host)
        [ring] = host.start(FEATURES | features, arena_bytes=8 << 20)
        return host, BlkLoad(host, ring, pattern, depth=depth, disk_bytes=size)

    yield launch_
    for host in opened:
        host.close()


@pytest.mark.parametrize("poll", [True, False])
@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC, F_INDIRECT_DESC | F_RING_PACKED], ids=hex)
@pytest.mark.parametrize("length", [512, 4096])
def test_reads(launch: Launch, length: int, features: int, poll: bool) -> None:
    """Every request ends with the data of its sector, run after run."""
    _, load = launch(Pattern(False, length, sequential=False), features=features)
    for _ in range(3):
        ran = load.run(0.05, poll=poll)
        assert ran.nr_done >= 8
        assert ran.nr_turns <= ran.nr_done
        assert 0 <= ran.busy <= 1
        assert not (poll and ran.nr_calls)
        for sector, data in load.last():
            assert data == CONTENT[512 * sector : 512 * sector + length]


@pytest.mark.parametrize("features", [F_INDIRECT_DESC, F_INDIRECT_DESC | F_RING_PACKED], ids=hex)
def test_writes(launch: Launch, features: int, tmp_path: Path) -> None:
    """What was written last is in the image."""
    _, load = launch(Pattern(True, 512, sequential=True), features=features)
    load.run(0.05, poll=False)
    image = (tmp_path / "disk.img").read_bytes()
    for sector, data in load.last():
        assert image[512 * sector : 512 * sector + 512] == data
        assert data != CONTENT[512 * sector : 512 * sector + 512]


def test_sequential_places(launch: Launch) -> None:
    """One after another, and again from the start."""
    _, load = launch(Pattern(False, 128 << 10, sequential=True), depth=4)
    assert list(load._places) == [256 * place for place in (*range(8), *range(4))]
    load.run(0.05, poll=True)


def test_statuses_are_looked_at(launch: Launch) -> None:
    """A device that refuses is no fast device."""
    _, load = launch(Pattern(False, 4096, sequential=True), size=2 * SIZE, depth=1)
    load._at = SIZE // 4096
    load._heads = []
    load._places = load._places[load._at :]
    with pytest.raises(DriverError, match=r"statuses \[1\]"):
        load.run(0.0, poll=True)


@pytest.mark.parametrize("poll", [True, False])
def test_a_device_that_dies(launch: Launch, poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed, however one waits."""
    host, load = launch(Pattern(False, 512, sequential=False))
    load.run(0.01, poll=poll)
    host.process.kill()
    monkeypatch.setattr(blkload, "SPINS", 10)
    with pytest.raises(DeviceGoneError):
        load.run(60, poll=poll)


def test_a_disk_that_is_too_small(launch: Launch) -> None:
    """There must be room for one request."""
    with pytest.raises(DriverError, match="shorter than a request"):
        launch(Pattern(False, 4096, sequential=False), size=2048)
