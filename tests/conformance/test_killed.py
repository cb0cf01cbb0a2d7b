"""Devices whose processes are killed at any instant, and the next ones go on.

What is the network's is in `test_net_pairs_killed.py`.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Final

import pytest

from config.model import VmmciConfig
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from devices.viodev import CONFIG_CHANGE
from tests.pluglab import DEADLINE, PlugLab, wait_until
from tests.vmmcilab import (
    ALL,
    COMMAND,
    DRIVER_FEATURES,
    MICROSECONDS,
    NONE,
    SECONDS,
    SECONDS_HIGH,
    SHUTDOWN,
    STATUS,
    SYNCRTC,
)
from tools.viodriver.registers import ACKNOWLEDGE, DRIVER, DRIVER_OK, READY

if TYPE_CHECKING:
    from collections.abc import Iterator

RING: Final = F_INDIRECT_DESC | F_EVENT_IDX
RINGS: Final = [RING, RING | F_RING_PACKED]
VMMCI_READY: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK


# The entropy device: any device with a queue.


@pytest.mark.parametrize("direct", [True, False], ids=["fds", "messages"])
@pytest.mark.parametrize("ring", RINGS)
def test_requests_under_constant_killing(ring: int, direct: bool) -> None:
    """Each is answered once, in full, and its buffer filled."""
    with PlugLab("viornd", packed=bool(ring & F_RING_PACKED), irqfd=direct, kicks=direct) as lab:
        [queue] = lab.start(ring)
        queue.submit(*[queue.place([], [64 + n]) for n in range(16)])
        answered = 0
        for life in range(1, 16):  # 20 that die young would be given up
            until, killed = answered + 40, False
            end = time.monotonic() + DEADLINE
            while answered < until:
                lab.kick(0)
                if answered >= until - 20 and not killed:
                    killed = bool(lab.kill())
                for used in queue.collect():
                    data = queue.data(used.request)
                    assert used.written == len(data)
                    assert any(data)
                    answered += 1
                    queue.memory.write(used.request.segments[0].gpa, bytes(len(data)))
                    queue.submit(used.request)
                assert time.monotonic() < end, (lab.facts(), lab.lost)
            lab.wait_life(0, life)
        while queue.outstanding:
            lab.kick(0)
            answered += len(queue.collect())
            assert time.monotonic() < end + DEADLINE, (lab.facts(), lab.lost)
        assert lab.status == READY
        # What was given back by one process may have been counted by the next, too, or by none.
        assert abs(lab.page.read()["read_requests"] - answered) <= 15 * 16


def test_interrupts_are_not_lost() -> None:
    """A driver that sleeps until it is called wakes up, whenever the process was killed."""
    with PlugLab("viornd") as lab:
        [queue] = lab.start(RING)
        for turn in range(20):
            queue.add([], [64])
            if turn % 2:
                lab.kick(0)
                lab.kill()
            else:
                lab.kill()
                lab.kick(0)
            while not queue.collect():
                assert lab.wait_call(0, DEADLINE)
        assert not lab.lost


def test_a_driver_hears_of_no_change_that_is_none() -> None:
    """A kill is not a change of the configuration; one of before is not forgotten over it."""
    with PlugLab("viornd") as lab:
        lab.start(RING)
        lab.wait_life(0, lab.kill())
        assert lab.status == READY
        assert not lab.wait_call(CONFIG_CHANGE, 0)
        assert lab.isr() == 1
        [queue] = lab.start(RING)
        queue.add([b"readable"], [64])
        lab.kick(0)
        assert lab.wait_call(CONFIG_CHANGE, DEADLINE)
        lab.wait_life(0, lab.kill())
        assert lab.isr() & 2
        assert lab.wait_call(CONFIG_CHANGE, DEADLINE)


def test_a_broken_driver_stays_broken() -> None:
    """NEEDS_RESET outlives the process that found the fault; a reset mends all."""
    with PlugLab("viornd") as lab:
        [queue] = lab.start(RING)
        queue.add([b"readable"], [64])
        lab.kick(0)
        wait_until(lambda: bool(lab.status & 0x40))
        lab.wait_life(0, lab.kill())
        assert lab.status == READY | 0x40
        [queue] = lab.start(RING)
        queue.add([], [64])
        lab.kick(0)
        wait_until(lambda: bool(queue.collect()))


def test_a_rate_outlives_the_process() -> None:
    """What was set at run time holds in the next one: bytes trickle."""
    with PlugLab("viornd") as lab:
        assert lab.setting("rate", 16) == 16
        lab.wait_life(0, lab.kill())
        [queue] = lab.start(RING)
        queue.add([], [64])
        lab.kick(0)
        wait_until(lambda: bool(queue.collect()))
        wait_until(lambda: lab.page.read()["read_bytes"] > 0)  # counted a moment later
        assert lab.page.read()["read_bytes"] == 16


def test_killed_while_paused() -> None:
    """The next process leaves guest memory alone until the VM goes on."""
    with PlugLab("viornd") as lab:
        [queue] = lab.start(RING)
        lab.pause()
        queue.add([], [64])
        lab.kick(0)
        lab.wait_life(0, lab.kill())
        assert lab.status == READY
        assert lab.page.read()["read_requests"] == 0
        lab.unpause()
        wait_until(lambda: bool(queue.collect()))


def test_a_process_that_hangs_is_replaced() -> None:
    """A register that nobody answers for has another process come, and answers."""
    with PlugLab("viornd") as lab:
        [queue] = lab.start(RING)
        life = lab.facts()["lives"]
        os.kill(lab.facts()["pid"], signal.SIGSTOP)
        assert lab.status == READY
        lab.wait_life(0, life)
        assert "viornd" in lab.replaced[-1]
        queue.add([], [64])
        lab.kick(0)
        wait_until(lambda: bool(queue.collect()))


# vmmci: a device of registers alone.


class VmmciPlug(PlugLab):
    """vmmci, and a driver as Linux guests have it."""

    def __init__(self) -> None:
        super().__init__("vmmci", 0, vmmci=VmmciConfig())

    def begin(self, features: int = ALL) -> None:
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.write(STATUS, 1, status)
        self.write(DRIVER_FEATURES, 4, features)
        self.write(STATUS, 1, VMMCI_READY)
        assert self.read(STATUS, 1) == VMMCI_READY

    def wait_said(self, word: str) -> None:
        wait_until(lambda: word in self.said)
        self.said.clear()


@pytest.fixture
def vmmci() -> Iterator[VmmciPlug]:
    with VmmciPlug() as lab:
        lab.begin()
        yield lab


def test_a_command_outlives_the_process(vmmci: VmmciPlug) -> None:
    """It is there for the driver to read, is acknowledged once it was, and not asked again."""
    assert vmmci.setting("command", "shutdown") == "asked"
    vmmci.kill()
    assert vmmci.read(COMMAND, 4) == SHUTDOWN
    vmmci.kill()
    vmmci.write(COMMAND, 4, SHUTDOWN)
    vmmci.kill()
    vmmci.wait_said("acknowledged")
    assert vmmci.setting("command", "none") == "asked"
    vmmci.wait_life(0, vmmci.kill())
    assert vmmci.read(COMMAND, 4) == NONE
    assert vmmci.read(STATUS, 1) == VMMCI_READY


def test_the_driver_is_live_for_the_next_process(vmmci: VmmciPlug) -> None:
    """What it supports is known still; nobody asks it to look at the clock, which is right."""
    for _ in range(5):
        vmmci.wait_life(0, vmmci.kill())
        assert vmmci.read(COMMAND, 4) == NONE
    assert vmmci.setting("command", "syncrtc") == "asked"
    vmmci.kill()
    assert vmmci.read(COMMAND, 4) == SYNCRTC
    vmmci.write(COMMAND, 4, SYNCRTC)
    vmmci.kill()
    assert vmmci.read(COMMAND, 4) == NONE
    vmmci.write(STATUS, 1, 0)
    vmmci.kill()
    assert vmmci.setting("command", "shutdown") == "no driver"


def test_one_time_in_all_its_words(vmmci: VmmciPlug) -> None:
    """Microseconds belong to the seconds that were read before the process was killed."""
    vmmci.read(SECONDS, 4)
    before = time.time_ns()
    low = vmmci.read(SECONDS, 4)
    high = vmmci.read(SECONDS_HIGH, 4)
    after = time.time_ns()
    vmmci.kill()
    micros = vmmci.read(MICROSECONDS, 4)
    assert before // 1000 <= (high << 32 | low) * 10**6 + micros <= after // 1000
