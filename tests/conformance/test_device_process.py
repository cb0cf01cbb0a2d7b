"""A device process and what it promises its VM process and its guest (virtio 1.2 §2.1 to §2.4).

The device under test is real where that does, else one made here: the spawner is a fork of this
process, so a device class patched before the fork is what it runs.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from devices.features import F_EVENT_IDX, F_RING_PACKED, F_RING_RESET, F_VERSION_1
from devices.spec import INFLIGHT_STRIDE, Block
from devices.viodev import CONFIG_CHANGE, ImsgType
from devices.virtio import CommonCfg
from devices.words import BURST
from tests.odddevice import open_odd
from tools.viodriver.private import DEADLINE, DeviceHost, facts
from tools.viodriver.registers import NEEDS_RESET, READY

if TYPE_CHECKING:
    from vmm.launch import Spawner

QUIET = 0.2  # seconds in which nothing may happen


# Broken drivers.


def test_a_broken_ring_needs_a_reset_and_ends_nothing(host: DeviceHost) -> None:
    """NEEDS_RESET and a config interrupt (§2.1.2); registers answer; a reset mends it."""
    [queue] = host.start()
    queue.set_avail_index(1000)  # type: ignore[union-attr]
    host.kick(0)
    assert host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert host.status == READY | NEEDS_RESET
    assert host.isr() == 2
    assert "ahead" in host.wait_said("needs a reset")
    host.kick(0)
    assert host.status == READY | NEEDS_RESET
    [queue] = host.start()
    queue.add([], [8])
    host.kick(0)
    assert host.wait_call(0, DEADLINE)
    assert queue.collect()[0].written == 8


def test_a_guest_cannot_flood_the_log(host: DeviceHost) -> None:
    """Warnings are limited, and what was not said is counted."""
    for _ in range(2000):
        host.write(CommonCfg.NUM_QUEUES, 2, 1)
    host.read(CommonCfg.NUM_QUEUES, 2)
    while host.listen():
        pass
    assert BURST <= len(host.said) < BURST + 10
    assert all(line.startswith("2 write of 2 bytes") for line in host.said)


# Kicks.


def test_a_kick_before_driver_ok_is_not_lost(host: DeviceHost) -> None:
    """Doorbell and registers travel on different ways: the queue is looked into at DRIVER_OK."""
    assert host.negotiate(F_VERSION_1)
    [queue] = host.drivers(F_VERSION_1)
    assert host.enable(0, queue)
    queue.add([], [8])
    host.kick(0)
    assert not host.wait_call(0, QUIET)
    host.status = READY
    assert host.wait_call(0, DEADLINE)
    assert len(queue.collect()) == 1


def test_a_legacy_driver_may_kick_before_driver_ok(host: DeviceHost) -> None:
    """Old drivers wait for their first request before they set DRIVER_OK (§3.1.2)."""
    [queue] = host.start_legacy(driver_ok=False)
    queue.add([], [8])
    host.kick(0)
    assert host.wait_call(0, DEADLINE)
    assert queue.collect()[0].written == 8


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_RING_PACKED | F_EVENT_IDX])
def test_no_kick_is_lost_at_depth_1(spawner: Spawner, features: int) -> None:
    """Driver and device go to sleep and wake each other thousands of times."""
    settings = {"packed": bool(features & F_RING_PACKED)}
    with DeviceHost("viornd", settings, spawner=spawner) as host:
        [queue] = host.start(features)
        for _ in range(3000):
            queue.add([], [16])
            if queue.kick_needed():
                host.kick(0)
            while not (done := queue.collect()):
                if not queue.enable_calls():
                    assert host.wait_call(0, DEADLINE)
            assert done[0].written == 16


def test_kicks_can_come_as_register_writes(spawner: Spawner) -> None:
    """Where KVM gives no ioeventfd, the notify register is forwarded."""
    with DeviceHost("viornd", spawner=spawner, kicks=False) as host:
        [queue] = host.start()
        for _ in range(100):
            queue.add([], [8])
            host.kick(0)
            assert host.wait_call(0, DEADLINE)
            assert len(queue.collect()) == 1


def test_a_greedy_queue_starves_neither_registers_nor_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A queue whose work never ends takes turns with the other queue and the sync channel."""
    with open_odd(monkeypatch, greedy=True) as host:
        host.start()
        for _ in range(100):
            before, other, after = (host.read_config(at, 4) for at in (0, 4, 0))
            assert before - 1 <= other <= after + 1
        assert after > 100


# Calls.


def test_calls_can_come_as_messages(spawner: Spawner) -> None:
    """Where KVM gives no irqfd: KICK names the queue or the configuration, and asserts."""
    with DeviceHost("viornd", spawner=spawner, irqfd=False) as host:
        [queue] = host.start()
        queue.add([], [8])
        host.kick(0)
        while not host.kicked:
            assert host.listen(DEADLINE)
        [message] = host.kicked
        assert (message.data, message.data_valid, message.state) == (0, 1, 1)
        assert host.access(Block.ISR, 1) == (1, -1)
        assert len(queue.collect()) == 1
        queue.add([b"wrong"], [])
        host.kick(0)
        assert host.wait_call(CONFIG_CHANGE, DEADLINE)


def test_a_level_interrupt_is_raised_again_while_isr_says_so(host: DeviceHost) -> None:
    """At EOI the VM signals `resample`: only the device knows whether ISR holds something new."""
    [queue] = host.start()
    queue.add([], [8])
    host.kick(0)
    assert host.wait_call(0, DEADLINE)
    os.eventfd_write(host.events["resample"], 1)
    assert host.wait_call(0, DEADLINE)
    assert host.isr() == 1
    os.eventfd_write(host.events["resample"], 1)
    for _ in range(2):  # the second answer comes after whatever the signal led to
        assert host.isr() == 0
    assert not host.wait_call(0, 0)
    assert not host.wait_call(CONFIG_CHANGE, 0)


def test_a_changed_configuration_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """ISR bit 1 and the config interrupt, once the driver is ready."""
    with open_odd(monkeypatch) as host:
        host.ask(ImsgType.SETTING, {"name": "change", "value": 1})
        assert not host.wait_call(CONFIG_CHANGE, 0)
        host.start()
        host.read_config(0, 4)
        generation = host.read(CommonCfg.CONFIG_GENERATION, 1)
        host.ask(ImsgType.SETTING, {"name": "change", "value": 1})
        assert host.wait_call(CONFIG_CHANGE, DEADLINE)
        assert host.isr() == 2
        host.read_config(0, 4)
        assert host.read(CommonCfg.CONFIG_GENERATION, 1) == generation + 1


# Reset under load.


@pytest.mark.parametrize("features", [0, F_RING_PACKED, F_EVENT_IDX | F_RING_RESET])
def test_nothing_is_touched_after_status_reads_0(spawner: Spawner, features: int) -> None:
    """Reset in the middle of traffic: then rings and buffers stay as they are (§2.4.1)."""
    settings = {"packed": bool(features & F_RING_PACKED)}
    with DeviceHost("viornd", settings, spawner=spawner, memory_size=2 << 20) as host:
        for round_ in range(20):
            [queue] = host.start(features)
            for _ in range(50):
                queue.add([], [4096 + round_])
            host.kick(0)
            if features & F_RING_RESET:
                host.write(CommonCfg.QUEUE_SELECT, 2, 0)
                host.write(CommonCfg.QUEUE_RESET, 2, 1)
                assert host.read(CommonCfg.QUEUE_RESET, 2) == 0
                assert host.read(CommonCfg.QUEUE_ENABLE, 2) == 0
            else:
                host.status = 0
                assert host.status == 0
            host.memory.write(0, bytes(2 << 20))
            host.kick(0)
            assert host.status in (0, READY)
            assert not any(host.memory.read(0, 2 << 20))


def test_the_in_flight_area_outlives_the_process(spawner: Spawner) -> None:
    """It is memory of the VM process's: in use while the queue is, void after a reset."""
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, INFLIGHT_STRIDE)
    with DeviceHost("viornd", spawner=spawner, inflight=fd) as host:
        [queue] = host.start()
        queue.add([], [8])
        host.kick(0)
        assert host.wait_call(0, DEADLINE)
        host.process.kill()
        assert host.wait_end() == "killed by signal 9"
        version, size, _, used = struct.unpack("<4H", os.pread(fd, 8, 0))
        assert (version, size, used) == (1, queue.size, 1)
    with DeviceHost("viornd", spawner=spawner, inflight=fd) as host:
        host.status = 0
        assert host.status == 0
        assert os.pread(fd, 2, 0) == bytes(2)
        [queue] = host.start()  # afresh, not where the other ended
        queue.add([], [8])
        host.kick(0)
        assert host.wait_call(0, DEADLINE)
        assert len(queue.collect()) == 1
    os.close(fd)


# Pause.


def test_paused_means_no_access_to_guest_memory(host: DeviceHost) -> None:
    """After the answer to PAUSE nothing of the guest changes; kicks are made up for later."""
    [queue] = host.start()
    assert host.ask(ImsgType.PAUSE) is None
    queue.add([], [8])
    host.kick(0)
    host.write(Block.NOTIFY, 2, 0)
    assert host.status == READY  # registers answer, and after this one the kicks had a chance
    assert not host.wait_call(0, QUIET)
    assert queue.collect() == []
    assert host.ask(ImsgType.PAUSE) is None  # twice is no error
    assert host.ask(ImsgType.UNPAUSE) is None
    assert host.wait_call(0, DEADLINE)
    assert len(queue.collect()) == 1
    assert host.ask(ImsgType.UNPAUSE) is None


def test_a_paused_device_can_be_reset_and_started(host: DeviceHost) -> None:
    """A VM that is reset while paused: the new driver's queue is served after the pause."""
    host.start()
    host.ask(ImsgType.PAUSE)
    [queue] = host.start()
    queue.add([], [8])
    assert not host.wait_call(0, QUIET)
    host.ask(ImsgType.UNPAUSE)
    assert host.wait_call(0, DEADLINE)
    assert len(queue.collect()) == 1


def test_timers_and_descriptors_wait_for_the_end_of_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a device does by itself stops as well, and happens once afterwards."""
    with open_odd(monkeypatch) as host:
        host.ask(ImsgType.PAUSE)
        host.ask(ImsgType.SETTING, {"name": "timer", "value": 0})
        host.ask(ImsgType.SETTING, {"name": "alarm", "value": 0})
        assert not host.wait_call(0, QUIET)
        assert host.read_config(0, 8) == 0
        host.ask(ImsgType.UNPAUSE)
        while host.read_config(0, 8) != 1 << 32 | 1:
            assert host.read_config(0, 4) <= 1 >= host.read_config(4, 4)


# Rest.


def test_an_idle_device_sleeps(host: DeviceHost) -> None:
    """No timers, no polling: it does not run while nothing happens."""
    [queue] = host.start(F_EVENT_IDX)
    queue.add([], [8])
    host.kick(0)
    assert host.wait_call(0, DEADLINE)
    before = switches(host)
    assert not host.wait_call(0, QUIET)
    assert switches(host) == before


def switches(host: DeviceHost) -> int:
    """Wait until a device process sleeps, and return how often it went to sleep until then."""
    while (found := facts(host.process.pid))["State"][0] != "S":
        pass
    return int(found["voluntary_ctxt_switches"][0])
