"""Saving and loading the transport, queues and all; and what no write may do: raise."""

from __future__ import annotations

import gc
import json
import random

import pytest

from config.errors import GuestError
from devices.features import F_EVENT_IDX, F_RING_PACKED, F_VERSION_1
from devices.inflight import inflight_bytes
from devices.spec import INFLIGHT_STRIDE, QUEUE_SIZE_MAX, Block
from devices.viodev import CONFIG_CHANGE
from devices.virtio import CommonCfg
from tests.registerlab import Lab
from tools.viodriver.registers import NEEDS_RESET, READY


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_RING_PACKED])
def test_a_running_device_is_carried_over(features: int) -> None:
    """State is plain JSON; the successor goes on in the middle of the ring."""
    lab = Lab(packed=bool(features & F_RING_PACKED))
    queues = lab.start(features)
    for _ in range(5):
        queues[0].add([b"x"], [1])
        lab.write(Block.NOTIFY, 2, 0)
        lab.serve()
        assert len(queues[0].collect()) == 1
    lab.write_config(0, 4, 0x600DF00D)
    lab.write(CommonCfg.QUEUE_SELECT, 2, 2)
    queues[0].add([b"waits"], [1])  # and its kick is lost with the process

    lab.revive(json.loads(json.dumps(lab.registers.save())))

    assert lab.status == READY
    assert lab.device.active == features | F_VERSION_1
    assert lab.read_config(0, 4) == 0x600DF00D
    assert lab.read(CommonCfg.QUEUE_SELECT, 2) == 2
    lab.serve()
    assert len(queues[0].collect()) == 1
    assert 0 in lab.interrupts


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_RING_PACKED])
def test_a_killed_device_is_carried_over(features: int) -> None:
    """Nobody knows its cursors, but its in-flight areas do: each request completes once."""
    lab = Lab(packed=bool(features & F_RING_PACKED))
    [queue, *_] = lab.start(features)
    lab.serve()
    tokens = [queue.add([b"x"], [1]) for _ in range(4)]
    taken = lab.device.queues[0]
    assert taken is not None
    chains = [taken.pop() for _ in range(3)]
    assert chains[1] is not None
    taken.push(chains[1].head, 1)

    state = lab.registers.save()
    for saved in state["queues"]:
        saved["cursors"] = None
    lab.revive(state)
    lab.serve()

    assert sorted(used.token for used in queue.collect()) == tokens
    assert 0 in lab.interrupts


def test_a_device_before_driver_ok_is_carried_over() -> None:
    """Half an initialization is continued, and nothing is served before its end."""
    lab = Lab()
    assert lab.negotiate(F_VERSION_1)
    queues = lab.drivers(F_VERSION_1)
    assert lab.enable(1, queues[1])
    lab.revive(lab.registers.save())
    assert lab.device.events == []
    assert lab.enable(0, queues[0])
    lab.status = READY
    lab.serve()
    assert [queue is not None for queue in lab.device.queues] == [True, True, False]


def test_a_legacy_device_is_carried_over() -> None:
    """It stays one: the next kick works, and so does its page register."""
    lab = Lab()
    queues = lab.start_legacy(F_EVENT_IDX)
    lab.revive(lab.registers.save())
    queues[0].add([b"x"], [1])
    lab.serve()
    assert len(queues[0].collect()) == 1
    assert lab.read(Block.LEGACY + 8, 4) == queues[2].desc_gpa // 4096


def test_what_isr_says_is_said_again() -> None:
    """An interrupt may have been lost with the old process; one too many harms nobody."""
    lab = Lab()
    lab.start()
    lab.config_changed()
    lab.revive(lab.registers.save())
    assert lab.isr() == 2
    assert CONFIG_CHANGE in lab.interrupts


def test_a_broken_device_stays_broken() -> None:
    """NEEDS_RESET is carried over; a reset still cures it."""
    lab = Lab()
    lab.start()
    lab.registers.transport.fail(GuestError("broken"))
    lab.revive(lab.registers.save())
    assert lab.status & NEEDS_RESET
    assert lab.scheduled == []
    lab.start()
    assert lab.status == READY


def test_state_that_fits_no_ring_is_refused() -> None:
    """Cursors are checked against the ring."""
    lab = Lab()
    lab.start()
    state = lab.registers.save()
    state["queues"][0]["cursors"] = [99, 0]
    with pytest.raises(GuestError):
        lab.revive(state)


def test_no_access_raises() -> None:
    """Any register, any width, any value: at worst a line in the log."""
    rng = random.Random(1)  # noqa: S311 - the same accesses each time
    lab = Lab(packed=True)
    registers = [*CommonCfg, *range(0x100, 0x110), 0x200, 0x201, *range(0x300, 0x320)]
    registers += range(Block.LEGACY, Block.LEGACY + 48)
    values = [0, 1, 2, 3, 4, 7, 8, 0xB, 0xF, 0x10, 0x1000, 0x7FFF, 0xFFFF, 0xFFFF_FFFF]
    activated = 0
    for _ in range(40_000):
        reg, size = rng.choice(registers), rng.choice((1, 2, 4))
        if rng.random() < 0.7:
            lab.write(reg, size, rng.choice(values))
        else:
            assert 0 <= lab.read(reg, size) < 1 << 8 * size
        if rng.random() < 0.1:
            try:
                lab.serve()
            except GuestError as err:  # a ring in the middle of nowhere
                lab.registers.transport.fail(err)
        activated += lab.device.events.count("activate")
        lab.device.events.clear()
        lab.said.clear()
    assert activated > 10


def test_nothing_leaves_a_cycle() -> None:
    """Device processes all but stop collecting garbage: requests, mistakes and resets make none."""
    lab = Lab()
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            [queue, *_] = lab.start(F_EVENT_IDX)
            for _ in range(20):
                queue.add([b"x"], [1])
                lab.write(Block.NOTIFY, 2, 0)
                lab.serve()
                assert len(queue.collect()) == 1
            lab.write(CommonCfg.NUM_QUEUES, 2, 0)
            queue.set_avail_index(1000)  # type: ignore[union-attr]
            lab.write(Block.NOTIFY, 2, 0)
            try:
                lab.serve()
            except GuestError as err:
                lab.registers.transport.fail(err)
            assert lab.status & NEEDS_RESET
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_in_flight_stride_fits_the_largest_queue() -> None:
    """The VM process sizes the memfd by the stride alone."""
    assert inflight_bytes(QUEUE_SIZE_MAX, packed=True) <= INFLIGHT_STRIDE
    assert INFLIGHT_STRIDE % 4096 == 0
