"""The processes of a network device with several queue pairs, killed at any instant."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Final

import pytest

from devices import nethdr as hdr
from devices.features import F_RING_PACKED
from tests.conformance.test_net_send import tcp_frame
from tests.netdriver import HEADER
from tests.pairlab import MQ, PairLab, kill, send_flows, settled, shared_out
from tests.pluglab import DEADLINE, wait_until
from tests.vionetlab import OWN, frame_of
from tools.viodriver.private import facts
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from collections.abc import Callable


WHO: Final = [pytest.param((0,), id="first"), pytest.param((1,), id="other"), (0, 1)]


@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
@pytest.mark.parametrize("who", WHO)
def test_processes_that_are_killed_over_and_over(
    launch_pairs: Callable[..., PairLab], who: tuple[int, ...], ring: int
) -> None:
    """The driver sees every frame come back once, and nothing else, on both pairs."""
    lab = launch_pairs(2, features=MQ | ring)
    lab.tap.stop_listening()
    floods = {
        index: [lab.queues[index].place([HEADER + frame_of(60)]) for _ in range(64)]
        for index in (1, 3)
    }
    done = dict.fromkeys(floods, 0)
    for index, requests in floods.items():
        lab.queues[index].submit(*requests)
    for _ in range(8):
        kill(lab, who)
        end = time.monotonic() + DEADLINE
        until = {index: count + 200 for index, count in done.items()}
        while any(done[index] < until[index] for index in floods):
            for index in floods:
                lab.kick(index)
                used = lab.queues[index].collect()
                done[index] += len(used)
                if used:
                    lab.queues[index].submit(*[one.request for one in used])
            assert time.monotonic() < end, (done, lab.told(), lab.lost)
    for index in floods:
        while lab.queues[index].outstanding:
            lab.kick(index)
            done[index] += len(lab.queues[index].collect())
            assert time.monotonic() < end + DEADLINE
    settled(lab)
    sent = lab.page.read()["tx_frames"]
    # What was sent and not yet given back is given back by the successor, and counted by nobody.
    assert sum(done.values()) - 8 * 128 <= sent <= sum(done.values()) + 8 * 128
    assert lab.status == READY


def test_buffers_of_a_killed_process_are_filled_by_the_next(
    launch_pairs: Callable[..., PairLab],
) -> None:
    """Those it had taken are not lost: as many frames fit as buffers were given."""
    lab = launch_pairs(2)
    lab.give(100, 512, queue=0)
    lab.give(100, 512, queue=2)
    assert shared_out(lab, 40)[1]
    lab.wait_life(1, lab.kill(1))
    assert shared_out(lab, 60)[1]
    receivers = lab.queues[0], lab.queues[2]
    assert [one.outstanding for one in receivers] == [100, 100]
    send_flows(lab, 400)  # more than there is room for, by either pair
    wait_until(lambda: not any(one.collect() or one.outstanding for one in receivers))


@pytest.mark.parametrize("who", WHO)
def test_killed_amid_commands(launch_pairs: Callable[..., PairLab], who: tuple[int, ...]) -> None:
    """Commands are acknowledged all the same, and what they said holds in the next processes."""
    lab = launch_pairs(2)
    for turn in range(8):
        kill(lab, who)
        assert lab.command(4, 0, b"\1\0") == 0
        assert lab.command(0, 0, bytes([turn % 2])) == 0  # promiscuous or not
        kill(lab, who)
        assert lab.command(4, 0, b"\2\0") == 0
    assert lab.command(0, 0, b"\0") == 0
    kill(lab, who)
    settled(lab)
    assert lab.network()["pairs"] == 2
    assert lab.command(0, 1, b"\0") == 0  # acknowledged when a new process follows, too
    lab.give(100, 512, queue=0)
    lab.give(100, 512, queue=2)
    assert all(shared_out(lab, 100))
    drops = lab.network()["rx"]["drops"].get("filtered", 0)
    for number in range(50):
        lab.tap.send(tcp_frame(100)[:34] + number.to_bytes(2) + tcp_frame(100)[36:])
    wait_until(lambda: lab.network()["rx"]["drops"].get("filtered", 0) == drops + 50)


@pytest.mark.parametrize("who", WHO)
def test_registers_are_there_while_processes_are_killed(
    launch_pairs: Callable[..., PairLab], who: tuple[int, ...]
) -> None:
    """A driver that reads, writes, resets and starts meets nothing but a device that is slow."""
    lab = launch_pairs(2)
    mac = int.from_bytes(OWN, "little")
    for _ in range(6):
        kill(lab, who)
        assert lab.status == READY
        assert lab.read_config(0, 4) | lab.read_config(4, 2) << 32 == mac
        kill(lab, who)
        lab.begin()
        kill(lab, who)
        lab.status = 0
        assert lab.status == 0
        lab.begin()
        lab.send(frame_of(60), queue=1)
        lab.send(frame_of(60), queue=3)
    assert len(lab.tap.receive(12)) == 12
    assert not lab.lost


def test_registers_half_written_survive(launch_pairs: Callable[..., PairLab]) -> None:
    """A queue that is set up in steps, each of them in another process, is set up."""
    lab = launch_pairs(2)
    lab.status = 0
    for status in (1, 3):
        kill(lab, (0,))
        lab.status = status
    kill(lab, (0,))
    lab.accept(lab.features | 1 << 32)
    kill(lab, (0,))
    lab.status = 11
    assert lab.status == 11
    lab.queues = lab.drivers(lab.features, arena_bytes=4 << 20)
    for index, queue in enumerate(lab.queues):
        kill(lab, (0, 1))
        assert lab.enable(index, queue)
    kill(lab, (0,))
    lab.status = 15
    assert lab.network()["offloads"] == lab.features & hdr.GUEST_OFFLOADS
    assert lab.command(4, 0, b"\2\0") == 0
    lab.send(frame_of(60), queue=3)
    lab.send(frame_of(60), queue=1)
    assert len(lab.tap.receive(2)) == 2


def test_settings_outlive_the_process(launch_pairs: Callable[..., PairLab]) -> None:
    """Link and limits are as they were set at run time."""
    lab = launch_pairs(2)
    assert lab.setting("tx_pps", 50) == 50
    assert lab.setting("link", False) is False
    kill(lab, (0, 1))
    assert lab.network()["link"] is False
    assert not lab.tap.running
    lab.send(frame_of(60), queue=3)
    wait_until(lambda: lab.network()["tx"]["drops"] == {"link down": 1})
    assert lab.setting("link", True) is True
    lab.wait_life(0, lab.kill(0))  # else the pair could begin to send, and lose what waits
    begun = time.monotonic()
    lab.send(*[frame_of(60)] * 30, queue=3)
    assert time.monotonic() - begun > (30 - 2 * 5 - 2) / 50 * 0.9
    assert len(lab.tap.receive(30)) == 30


def test_a_journal_that_makes_no_sense(launch_pairs: Callable[..., PairLab]) -> None:
    """What a process left that was taken over ends the device, not the VM."""
    lab = launch_pairs(2)
    assert lab.device.lasting is not None
    pid = lab.told()[0]["pid"]
    os.kill(pid, signal.SIGSTOP)  # or it would write once more
    wait_until(lambda: facts(pid)["State"][0] == "T")
    os.pwrite(lab.device.lasting.fds["journal"], b"\xff" * (1 << 20), 0)
    os.kill(pid, signal.SIGKILL)
    assert lab.read(0x14, 1) == 0xFF
    wait_until(lambda: "in a row died at once" in lab.lost)
    assert [facts["pid"] for facts in lab.told().values()] == [0, 0]


def test_a_process_that_hangs_is_replaced(launch_pairs: Callable[..., PairLab]) -> None:
    """A command waits for it for a while, not for ever, and the next one finds another."""
    lab = launch_pairs(2)
    life = lab.kill(1, signal.SIGSTOP)
    assert lab.command(4, 0, b"\1\0") == 0
    lab.wait_life(1, life)
    assert lab.command(4, 0, b"\2\0") == 0
    lab.send(frame_of(60), queue=3)
    assert len(lab.tap.receive(1)) == 1
