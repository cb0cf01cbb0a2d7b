"""Devices that other programs serve: their front ends killed, and the programs beside them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from config.model import DiskConfig, NicConfig
from devices.blkreq import BLK_F_FLUSH, HEADER, T_FLUSH
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.nethdr import NET_F_MQ
from devices.spec import Block
from tests.backends import Programs
from tests.netdriver import FEATURES as NET_FEATURES
from tests.netdriver import NetDriver
from tests.pluglab import DEADLINE, PlugLab, wait_until
from tests.sectors import SIZE, Sectors
from tests.taplab import TapLab
from tests.vionetlab import frame_of
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.viodriver import PackedDriver, SplitDriver

REQUESTS = 3000
KILLS = 8
FEATURES = BLK_F_FLUSH | F_EVENT_IDX | F_INDIRECT_DESC


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Return a place for programs."""
    programs = Programs(str(tmp_path))
    yield programs
    programs.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image of zeroes."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    return image


def start(programs: Programs, which: str, image: Path) -> str:
    """Start a program that serves an image; return its socket."""
    if which == "disk":
        programs.disk(str(image))
    else:
        programs.ours("ours", str(image))
    return programs.socket(which)


def finish(lab: PlugLab, queue: SplitDriver | PackedDriver, sectors: Sectors) -> None:
    """Make all requests that are to be made, and wait for them."""
    while not sectors.over:
        sectors.ask()
        lab.kick(0)
        if not queue.enable_calls():
            assert lab.wait_call(0, 60), (lab.said, lab.lost, lab.facts())
        sectors.take()


def flush(lab: PlugLab, queue: SplitDriver | PackedDriver) -> None:
    """Have all that was written be in the image."""
    queue.enable_calls()
    queue.add([HEADER.pack(T_FLUSH, 0, 0)], [1])
    lab.kick(0)
    while not queue.collect():
        assert lab.wait_call(0, DEADLINE)


@pytest.mark.parametrize("msix", [False, True])
@pytest.mark.parametrize("which", ["disk", "ours"])
@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nothing_done_twice(
    programs: Programs, image: Path, which: str, msix: bool
) -> None:
    """The front end, the back end, or both are killed: sectors hold what was written last."""
    path = start(programs, which, image)
    with PlugLab("vioblk0", peers=True, disks=(DiskConfig(vhost_user=path),)) as lab:
        if msix:
            lab.write(Block.MSIX, 1, 1)
        [queue] = lab.start(FEATURES)
        sectors = Sectors(queue, REQUESTS)
        kills = 0
        while not sectors.over:
            sectors.ask()
            lab.kick(0)
            if sectors.done > kills * REQUESTS // (KILLS + 1):
                kills += 1
                if kills % 3:
                    lab.kill()
                if not kills % 2:
                    programs.kill(which)
                    start(programs, which, image)
            if not queue.enable_calls():
                assert lab.wait_call(0, 60), (lab.said, lab.lost, lab.facts())
            sectors.take()
        flush(lab, queue)
        assert lab.status == READY
        assert lab.facts()["lives"] > 1
    sectors.compare(image)


def test_registers_and_configuration_outlive_the_process(programs: Programs, image: Path) -> None:
    """A driver is set up, each step by another process, while nobody serves the device."""
    path = start(programs, "ours", image)
    with PlugLab("vioblk0", peers=True, disks=(DiskConfig(vhost_user=path),)) as lab:
        offered = lab.offered()
        programs.kill("ours")
        for _ in range(2):
            lab.kill()
            assert lab.offered() == offered
            lab.kill()
            assert lab.read_config(0, 8) == SIZE // 512
            lab.kill()
            [queue] = lab.start(FEATURES)
            sectors = Sectors(queue, 40)
            sectors.ask()
            lab.kick(0)
            lab.kill()
            assert lab.status == READY
            lab.wait_life(0, lab.kill())
        start(programs, "ours", image)
        finish(lab, queue, sectors)
        flush(lab, queue)
        assert lab.said.count("peer-lost") >= 1
    sectors.compare(image)


def test_killed_while_paused(programs: Programs, image: Path) -> None:
    """The next process hands nothing over before the VM goes on."""
    path = start(programs, "ours", image)
    with PlugLab("vioblk0", peers=True, disks=(DiskConfig(vhost_user=path),)) as lab:
        [queue] = lab.start(FEATURES)
        lab.pause()
        sectors = Sectors(queue, 20)
        sectors.ask()
        lab.kick(0)
        lab.wait_life(0, lab.kill())
        wait_until(lambda: "peer-lost" in lab.said)
        assert not queue.collect()
        lab.unpause()
        finish(lab, queue, sectors)


class PairsPlug(PlugLab, NetDriver):
    """A network device of two pairs, on a tap that another program has."""

    def __init__(self, tap: TapLab, path: str) -> None:
        nic = NicConfig(vhost_user=path, queues=2)
        super().__init__("vionet0", 5, peers=True, interfaces=(nic,))
        self.host, self.tap = self, tap
        self.queues = self.start(self.offered() & (NET_FEATURES | NET_F_MQ))


def test_chosen_pairs_outlive_the_process(programs: Programs) -> None:
    """The second pair is used as long as the driver has said so, whoever tells the back end."""
    with TapLab(2) as tap:
        taps = [word for fd in tap.fds for word in ("--tap-fd", str(fd))]
        path = programs.socket("net")
        program = (sys.executable, "-m", "devices", "vionet", f"--socket-path={path}")
        programs.start("net", *program, *taps, "--queues=2", fds=tap.fds)
        with PairsPlug(tap, path) as lab:
            assert lab.command(4, 0, b"\2\0") == 0
            for _ in range(3):
                lab.kill()
                lab.send(frame_of(60), queue=3)
                assert len(tap.receive(1)) == 1
            lab.kill()
            assert lab.command(4, 0, b"\1\0") == 0
            lab.kill()
            lab.send(frame_of(60), queue=3)  # thrown away
            lab.send(frame_of(60), queue=1)
            assert len(tap.receive(1)) == 1
            assert not lab.lost
