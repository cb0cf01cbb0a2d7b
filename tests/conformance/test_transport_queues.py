"""Queue registers, notifications, ISR and configuration space: virtio 1.2 §2.3, §2.5, §4.1.4."""

from __future__ import annotations

import pytest

from devices.features import F_EVENT_IDX, F_RING_PACKED, F_RING_RESET, F_VERSION_1
from devices.guestmem import Region
from devices.spec import QUEUE_SIZE_MAX, Block
from devices.virtio import CommonCfg
from tests.registerlab import SIZES, Lab
from tools.viodriver import open_driver
from tools.viodriver.registers import VirtioDriver

MIB = 1 << 20


@pytest.fixture
def lab() -> Lab:
    """A device with its features negotiated."""
    lab = Lab()
    assert lab.negotiate(F_VERSION_1 | F_RING_RESET)
    return lab


def select(lab: VirtioDriver, index: int) -> None:
    """Write queue_select."""
    lab.write(CommonCfg.QUEUE_SELECT, 2, index)


def set_up(lab: Lab, *, size: int, desc: int, avail: int, used: int, index: int = 0) -> bool:
    """Write a queue's registers and enable it; False if it stays disabled."""
    select(lab, index)
    lab.write(CommonCfg.QUEUE_SIZE, 2, size)
    for reg, gpa in (
        (CommonCfg.QUEUE_DESC, desc),
        (CommonCfg.QUEUE_DRIVER, avail),
        (CommonCfg.QUEUE_DEVICE, used),
    ):
        lab.write(reg, 4, gpa & 0xFFFF_FFFF)
        lab.write(reg + 4, 4, gpa >> 32)
    lab.write(CommonCfg.QUEUE_ENABLE, 2, 1)
    return lab.read(CommonCfg.QUEUE_ENABLE, 2) == 1


# Queue registers, §4.1.4.3 and §4.1.5.1.3.


def test_queues_and_their_largest_sizes(lab: Lab) -> None:
    """num_queues counts them, queue_size is the largest size after a reset (§4.1.4.3)."""
    assert lab.read(CommonCfg.NUM_QUEUES, 2) == len(SIZES)
    for index, size in enumerate(SIZES):
        select(lab, index)
        assert lab.read(CommonCfg.QUEUE_SELECT, 2) == index
        assert lab.read(CommonCfg.QUEUE_SIZE, 2) == size
        assert lab.read(CommonCfg.QUEUE_NOTIFY_OFF, 2) == 0
        assert lab.read(CommonCfg.QUEUE_NOTIFY_DATA, 2) == 0


@pytest.mark.parametrize("index", [len(SIZES), 0x7FFF, 0x8000, 0xFFFF])
def test_a_queue_that_is_not_there_has_size_0(lab: Lab, index: int) -> None:
    """The device MUST present 0 in queue_size if the queue is unavailable (§4.1.4.3.1)."""
    assert not set_up(lab, size=8, desc=0x1000, avail=0x2000, used=0x3000, index=index)
    assert lab.read(CommonCfg.QUEUE_SIZE, 2) == 0
    assert lab.read(CommonCfg.QUEUE_DESC, 4) == 0
    lab.write(CommonCfg.QUEUE_RESET, 2, 1)
    select(lab, 0)
    assert lab.read(CommonCfg.QUEUE_SIZE, 2) == SIZES[0]


def test_addresses_are_written_in_halves(lab: Lab) -> None:
    """Both halves of a 64-bit field can be accessed independently (§4.1.3.1)."""
    select(lab, 1)
    lab.write(CommonCfg.QUEUE_DEVICE + 4, 4, 0x12345678)
    lab.write(CommonCfg.QUEUE_DEVICE, 4, 0x9ABCDEF0)
    assert lab.read(CommonCfg.QUEUE_DEVICE, 4) == 0x9ABCDEF0
    assert lab.read(CommonCfg.QUEUE_DEVICE + 4, 4) == 0x12345678
    lab.write(CommonCfg.QUEUE_DEVICE, 4, 0)
    assert lab.read(CommonCfg.QUEUE_DEVICE + 4, 4) == 0x12345678
    assert lab.read(CommonCfg.QUEUE_DESC, 4) == 0
    select(lab, 0)
    assert lab.read(CommonCfg.QUEUE_DEVICE, 4) == 0


def test_a_queue_can_be_enabled_once(lab: Lab) -> None:
    """queue_enable reads 1 from then on; writing 0 does not disable it (§4.1.4.3.2)."""
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 0
    assert set_up(lab, size=8, desc=0x1000, avail=0x2000, used=0x3000)
    lab.write(CommonCfg.QUEUE_ENABLE, 2, 0)
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 1
    select(lab, 1)
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 0


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_only_1_enables(lab: Lab, value: int) -> None:
    """queue_enable takes 1 (§4.1.4.3); nothing else enables a queue that is set up right."""
    select(lab, 0)
    [queue, *_] = lab.drivers(F_VERSION_1)
    lab.place(0, queue)
    lab.write(CommonCfg.QUEUE_ENABLE, 2, value)
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 0


def test_registers_of_an_enabled_queue_are_frozen(lab: Lab) -> None:
    """What changes under an enabled ring would be a hole: writes are dropped (§4.1.4.3.2)."""
    assert set_up(lab, size=8, desc=0x1000, avail=0x2000, used=0x3000)
    for reg, size in (
        (CommonCfg.QUEUE_SIZE, 2),
        (CommonCfg.QUEUE_DESC, 4),
        (CommonCfg.QUEUE_DRIVER, 4),
        (CommonCfg.QUEUE_DEVICE, 4),
        (CommonCfg.QUEUE_DEVICE + 4, 4),
    ):
        before = lab.read(reg, size)
        lab.write(reg, size, 4)
        assert lab.read(reg, size) == before
        assert "enabled" in lab.said[-1]


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256, QUEUE_SIZE_MAX])
def test_split_sizes_that_are_right(lab: Lab, size: int) -> None:
    """A split queue's size is a power of two (§2.7)."""
    assert set_up(lab, size=size, desc=0x10000, avail=0x20000, used=0x30000)


@pytest.mark.parametrize("size", [0, 3, 6, 100, QUEUE_SIZE_MAX * 2, 0x8000, 0xFFFF])
def test_sizes_that_are_wrong(lab: Lab, size: int) -> None:
    """0, no power of two, or above the limit: size 0 (§4.1.4.3.1), and so the queue is none."""
    assert not set_up(lab, size=size, desc=0x10000, avail=0x20000, used=0x30000)
    assert "stays disabled" in lab.said[-1]
    assert lab.read(CommonCfg.QUEUE_SIZE, 2) == 0


def test_a_packed_queue_may_have_any_size() -> None:
    """A packed queue's size need not be a power of two (§2.8.10.1)."""
    for size in (1, 3, 100, QUEUE_SIZE_MAX - 1):
        lab = Lab(packed=True)
        assert lab.negotiate(F_VERSION_1 | F_RING_PACKED)
        assert set_up(lab, size=size, desc=0x10000, avail=0x20000, used=0x30000)
    lab = Lab(packed=True)
    assert lab.negotiate(F_VERSION_1 | F_RING_PACKED)
    assert not set_up(lab, size=QUEUE_SIZE_MAX + 1, desc=0x10000, avail=0x20000, used=0x30000)


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (0, 0x2000, 0x3000),
        (0x1000, 0, 0x3000),
        (0x1000, 0x2000, 0),
        (0x1008, 0x2000, 0x3000),  # not on 16 bytes
        (0x1000, 0x2001, 0x3000),  # not on 2
        (0x1000, 0x2000, 0x3002),  # not on 4
        (4 * MIB, 0x2000, 0x3000),  # the hole
        (0x1000, 8 * MIB, 0x3000),  # past the end
        (0x1000, 0x2000, 2 * MIB - 4),  # its end in the hole
        (0x1000, 0x2000, (1 << 64) - 4),
        ((1 << 64) - 16, 0x2000, 0x3000),
    ],
)
def test_addresses_that_are_wrong(desc: int, avail: int, used: int) -> None:
    """A part that is 0, not aligned or not all in RAM: the queue stays disabled (§2.7)."""
    regions = (Region(0, 2 * MIB, 0), Region(6 * MIB, 2 * MIB, 2 * MIB))
    lab = Lab(regions=regions, memory_size=4 * MIB)
    assert lab.negotiate(F_VERSION_1)
    assert not set_up(lab, size=16, desc=desc, avail=avail, used=used)
    # And the driver can mend it.
    assert set_up(lab, size=16, desc=6 * MIB, avail=0x2000, used=0x3000)


def test_a_queue_is_not_enabled_before_features_are_settled() -> None:
    """Features decide what a ring is: §3.1.1 sets queues up after FEATURES_OK."""
    lab = Lab()
    assert not set_up(lab, size=16, desc=0x1000, avail=0x2000, used=0x3000)


def test_a_queue_enabled_after_driver_ok_is_looked_into_once(lab: Lab) -> None:
    """What the driver made available before it enabled the queue needs no kick of its own."""
    lab.start()
    lab.status = 0
    assert lab.negotiate(F_VERSION_1)
    queues = lab.drivers(F_VERSION_1)
    assert lab.enable(0, queues[0])
    lab.status = 0xF
    lab.serve()
    queues[1].add([b"x"], [])
    assert lab.enable(1, queues[1])
    lab.serve()
    assert len(queues[1].collect()) == 1


# Queue reset, §2.6.1.


def test_queue_reset_lets_go_of_one_queue() -> None:
    """After queue_reset the queue is as after a device reset, the others go on (§2.6.1.1)."""
    lab = Lab()
    queues = lab.start(F_RING_RESET)
    lab.serve()
    select(lab, 1)
    lab.write(CommonCfg.QUEUE_RESET, 2, 1)
    assert lab.read(CommonCfg.QUEUE_RESET, 2) == 0
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 0
    assert lab.read(CommonCfg.QUEUE_SIZE, 2) == SIZES[1]
    assert lab.read(CommonCfg.QUEUE_DESC, 4) == 0
    assert lab.device.events[-1] == "reset queue 1"
    assert lab.device.queues[1] is None

    for queue in queues:
        queue.add([b"x"], [])
    for index in range(3):
        lab.write(Block.NOTIFY, 2, index)
    lab.serve()
    assert [len(queue.collect()) for queue in queues] == [1, 0, 1]


def test_a_reset_queue_can_be_enabled_with_another_size() -> None:
    """The driver MAY set the queue up anew, also with other values (§2.6.1.2)."""
    lab = Lab()
    queues = lab.start(F_RING_RESET)
    select(lab, 2)
    lab.write(CommonCfg.QUEUE_RESET, 2, 1)
    again = open_driver(lab.memory, 4, 5 * MIB, queues[2].features)
    assert lab.enable(2, again)
    again.add([b"x"], [])
    lab.serve()
    assert len(again.collect()) == 1


@pytest.mark.parametrize(("features", "value"), [(0, 1), (F_RING_RESET, 0), (F_RING_RESET, 2)])
def test_queue_reset_needs_the_feature_and_a_1(features: int, value: int) -> None:
    """Without RING_RESET negotiated, or with another value, nothing happens (§4.1.4.3.2)."""
    lab = Lab()
    lab.start(features)
    select(lab, 0)
    lab.write(CommonCfg.QUEUE_RESET, 2, value)
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 1


# Notifications, §2.3 and §4.1.4.4.


@pytest.mark.parametrize("index", [3, 0x7FFF, 0x8000, 0xFFFF])
def test_a_kick_for_a_queue_that_is_not_there_is_dropped(index: int) -> None:
    """The doorbell's value is the guest's: out of range it names no queue, not even from behind."""
    lab = Lab()
    lab.start()
    lab.scheduled.clear()
    lab.write(Block.NOTIFY, 2, index)
    assert lab.scheduled == []


def test_a_queue_calls_when_asked() -> None:
    """A used buffer is followed by its queue's interrupt, ISR bit 0 set before (§4.1.4.5.1)."""
    lab = Lab()
    queues = lab.start(F_EVENT_IDX)
    lab.serve()
    queues[2].add([b"x"], [])
    lab.write(Block.NOTIFY, 2, 2)
    lab.serve()
    assert lab.interrupts == [2]
    assert lab.isr(peek=True) == 1
