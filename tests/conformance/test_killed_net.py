"""A network device of one process, killed at any instant.

Several are in `test_net_pairs_killed.py`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from devices import nethdr as hdr
from devices.features import F_RING_PACKED
from tests.netdriver import FEATURES, HEADER
from tests.pluglab import DEADLINE, wait_until
from tests.vionetlab import OWN, frame_of
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pairlab import PairLab

KILLS = 10


@pytest.mark.parametrize("direct", [True, False], ids=["fds", "messages"])
@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
def test_sending_under_constant_killing(
    launch_pairs: Callable[..., PairLab], ring: int, direct: bool
) -> None:
    """Every frame comes back once; each has been sent, or was in flight when a process died."""
    lab = launch_pairs(1, features=FEATURES | ring, irqfd=direct, kicks=direct)
    lab.tap.stop_listening()
    queue = lab.queues[1]
    queue.submit(*[queue.place([HEADER + frame_of(60)]) for _ in range(64)])
    done = 0
    for _ in range(KILLS):
        lab.kill()
        end, until = time.monotonic() + DEADLINE, done + 200
        while done < until:
            lab.kick(1)
            used = queue.collect()
            done += len(used)
            queue.submit(*[one.request for one in used])
            assert time.monotonic() < end, (lab.facts(), lab.lost)
    end = time.monotonic() + DEADLINE
    while queue.outstanding:
        lab.kick(1)
        done += len(queue.collect())
        assert time.monotonic() < end
    assert abs(lab.page.read()["tx_frames"] - done) <= KILLS * 64
    assert lab.status == READY


def test_receiving_goes_on_with_the_same_buffers(launch_pairs: Callable[..., PairLab]) -> None:
    """As many frames fit as buffers were given, however many processes there were meanwhile."""
    lab = launch_pairs(1, features=FEATURES)
    lab.give(100, 512)
    received = 0
    for _ in range(5):
        for _frame in range(10):
            lab.tap.send(OWN + frame_of(60)[6:])
        received += 10
        wait_until(lambda n=received: lab.page.read()["rx_frames"] >= n)  # type: ignore[misc]
        lab.wait_life(0, lab.kill())
    assert len(lab.queues[0].collect()) == 50
    assert lab.queues[0].outstanding == 50


def test_what_was_set_holds(launch_pairs: Callable[..., PairLab]) -> None:
    """By the driver's commands, and from outside; nor is the driver asked to announce itself."""
    lab = launch_pairs(1, features=FEATURES | hdr.NET_F_GUEST_ANNOUNCE)
    assert lab.command(0, 0, b"\1") == 0  # promiscuous
    assert lab.setting("tx_pps", 50) == 50
    other = b"\x52\0\0\0\0\1"
    lab.give(10, 512)
    lab.wait_life(0, lab.kill())
    assert lab.network()["rx"]["frames"] == 0
    lab.tap.send(other + frame_of(60)[6:])
    wait_until(lambda: lab.page.read()["rx_frames"] == 1)
    assert lab.command(0, 0, b"\0") == 0
    lab.wait_life(0, lab.kill())
    lab.tap.send(other + frame_of(60)[6:])
    wait_until(lambda: lab.page.read()["rx_filtered"] == 1)
    assert lab.read_config(6, 2) == 1  # up, and nothing to announce
    begun = time.monotonic()
    lab.send(*[frame_of(60)] * 30, queue=1)
    assert time.monotonic() - begun > (30 - 2 * 5 - 2) / 50 * 0.9
    assert lab.setting("link", False) is False
    lab.wait_life(0, lab.kill())
    assert lab.read_config(6, 2) == 0


def test_killed_in_every_step_of_a_driver(launch_pairs: Callable[..., PairLab]) -> None:
    """Features, queues, DRIVER_OK, a command, a reset: each in another process."""
    lab = launch_pairs(1, features=FEATURES)
    for _ in range(3):
        lab.status = 0
        for status in (1, 3):
            lab.kill()
            lab.status = status
        lab.accept(FEATURES | 1 << 32)
        lab.kill()
        lab.status = 11
        assert lab.status == 11
        lab.queues = lab.drivers(FEATURES | 1 << 32, arena_bytes=4 << 20)
        for index, queue in enumerate(lab.queues):
            lab.kill()
            assert lab.enable(index, queue)
        lab.kill()
        lab.status = 15
        assert lab.command(0, 0, b"\1") == 0
        lab.send(frame_of(60), queue=1)
        assert len(lab.tap.receive(1)) == 1
