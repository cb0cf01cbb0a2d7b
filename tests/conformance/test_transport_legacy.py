"""The legacy interface: virtio 1.2 §2.7.2, §3.1.2, §4.1.4.10 and the legacy parts elsewhere."""

from __future__ import annotations

import pytest

from devices.features import (
    F_ANY_LAYOUT,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_NOTIFY_ON_EMPTY,
    F_VERSION_1,
)
from devices.spec import Block, Legacy
from devices.virtio import CommonCfg
from tests.registerlab import F_BASE, F_NEEDS_BASE, F_PLAIN, SIZES, Lab
from tools.viodriver.registers import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, READY

FEATURES = Block.LEGACY + 0
DRIVER_FEATURES = Block.LEGACY + 4
PFN = Block.LEGACY + 8
SIZE = Block.LEGACY + 12
SELECT = Block.LEGACY + Legacy.QUEUE_SELECT
NOTIFY = Block.LEGACY + Legacy.QUEUE_NOTIFY
STATUS = Block.LEGACY + Legacy.DEVICE_STATUS
ISR = Block.LEGACY + Legacy.ISR
CONFIG = Block.LEGACY + Legacy.DEVICE


@pytest.fixture
def lab() -> Lab:
    """A device whose driver speaks legacy and has come to DRIVER."""
    lab = Lab()
    lab.write(STATUS, 1, ACKNOWLEDGE)
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER)
    return lab


def test_features_are_the_low_32_bits_and_legacys_own(lab: Lab) -> None:
    """A transitional device offers NOTIFY_ON_EMPTY and ANY_LAYOUT here, and no VERSION_1."""
    ring = F_NOTIFY_ON_EMPTY | F_ANY_LAYOUT | F_INDIRECT_DESC | F_EVENT_IDX
    assert lab.read(FEATURES, 4) == F_PLAIN | F_BASE | F_NEEDS_BASE | ring


def test_features_need_no_features_ok(lab: Lab) -> None:
    """Legacy devices have no FEATURES_OK: DRIVER_OK follows DRIVER (§3.1.2)."""
    lab.write(DRIVER_FEATURES, 4, F_PLAIN | F_EVENT_IDX)
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert lab.read(STATUS, 1) == ACKNOWLEDGE | DRIVER
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert lab.read(STATUS, 1) == ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert lab.device.active == F_PLAIN | F_EVENT_IDX


def test_features_not_offered_are_masked(lab: Lab) -> None:
    """A legacy driver cannot be refused, so what was not offered does not count."""
    lab.write(DRIVER_FEATURES, 4, 0xFFFF_FFFF)
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert lab.device.active == lab.read(FEATURES, 4)
    assert lab.device.active & F_VERSION_1 == 0


def test_a_status_bit_out_of_turn_is_dropped(lab: Lab) -> None:
    """DRIVER_OK without DRIVER starts nothing here either."""
    lab.write(STATUS, 1, 0)
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER_OK)
    assert lab.read(STATUS, 1) == ACKNOWLEDGE
    assert "activate" not in lab.device.events


def test_a_queue_is_placed_by_page(lab: Lab) -> None:
    """The parts lie as §2.7.2 says: table, avail ring, and the used ring on the next page."""
    for index, size in enumerate(SIZES):
        lab.write(SELECT, 2, index)
        assert lab.read(SELECT, 2) == index
        assert lab.read(SIZE, 2) == size
        assert lab.read(PFN, 4) == 0
        lab.write(PFN, 4, 0x20 + 4 * index)
        assert lab.read(PFN, 4) == 0x20 + 4 * index
        queue = lab.registers.transport.registers[index]
        assert queue.desc_gpa == (0x20 + 4 * index) * 4096
        assert queue.avail_gpa == queue.desc_gpa + 16 * size
        assert queue.used_gpa == queue.desc_gpa + 4096


def test_page_0_lets_go_of_a_queue(lab: Lab) -> None:
    """Writing 0 is the only way to take one queue back (§4.1.5.1.3.1)."""
    lab.write(SELECT, 2, 1)
    lab.write(PFN, 4, 0x20)
    lab.write(PFN, 4, 0x30)  # enabled: frozen
    assert lab.read(PFN, 4) == 0x20
    lab.write(PFN, 4, 0)
    assert lab.read(PFN, 4) == 0
    lab.write(PFN, 4, 0x30)
    assert lab.read(PFN, 4) == 0x30


@pytest.mark.parametrize("page", [0x800, 0x7FF, 0xFFFF_FFFF])
def test_a_page_outside_ram_is_refused(lab: Lab, page: int) -> None:
    """The driver reads back 0: the queue is not there."""
    lab.write(PFN, 4, page)
    assert lab.read(PFN, 4) == 0
    assert "stays disabled" in lab.said[-1]


def test_a_queue_that_is_not_there(lab: Lab) -> None:
    """Size 0 tells a legacy driver that there is no such queue."""
    for index in (3, 0x8000, 0xFFFF):
        lab.write(SELECT, 2, index)
        lab.write(PFN, 4, 0x20)
        assert lab.read(SIZE, 2) == 0
        assert lab.read(PFN, 4) == 0


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_INDIRECT_DESC | F_ANY_LAYOUT])
def test_requests_flow(features: int) -> None:
    """A legacy driver's queue works like any other."""
    lab = Lab()
    queues = lab.start_legacy(features)
    queues[2].add([b"x"], [1])
    lab.write(NOTIFY, 2, 2)
    lab.serve()
    assert len(queues[2].collect()) == 1
    assert lab.registers.read(ISR, 1) == (1, -1)
    assert lab.registers.read(ISR, 1) == (0, -1)


def test_a_queue_may_be_used_before_driver_ok(lab: Lab) -> None:
    """Old drivers use the device before DRIVER_OK, some before they wrote features (§3.1.2)."""
    [queue, *_] = lab.drivers(0, align=4096)
    lab.write(PFN, 4, queue.desc_gpa // 4096)
    queue.add([b"x"], [1])
    lab.write(NOTIFY, 2, 0)
    lab.serve()
    assert len(queue.collect()) == 1
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert lab.device.events.count("activate") == 1


def test_a_modern_driver_gets_nothing_before_driver_ok() -> None:
    """The exception is for legacy drivers only (§2.1.2)."""
    lab = Lab()
    assert lab.negotiate(F_VERSION_1)
    [queue, *_] = lab.drivers(F_VERSION_1)
    assert lab.enable(0, queue)
    queue.add([b"x"], [1])
    lab.write(NOTIFY, 2, 0)
    lab.serve()
    assert queue.collect() == []


def test_features_may_come_after_the_queues(lab: Lab) -> None:
    """Then the queues work as the features say all the same (§3.1.2)."""
    [queue, *_] = lab.drivers(F_EVENT_IDX, align=4096)
    lab.write(PFN, 4, queue.desc_gpa // 4096)
    lab.write(DRIVER_FEATURES, 4, F_EVENT_IDX)
    lab.write(STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    lab.serve()
    for wanted in (True, False):
        (queue.enable_calls if wanted else queue.disable_calls)()
        queue.add([b"x"], [1])
        lab.write(NOTIFY, 2, 0)
        lab.interrupts.clear()
        lab.serve()
        assert bool(lab.interrupts) == wanted


def test_both_faces_show_one_device(lab: Lab) -> None:
    """A transitional device has one status, one ISR and one set of queues behind both blocks."""
    assert lab.status == ACKNOWLEDGE | DRIVER
    lab.write(PFN, 4, 0x20)
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 1
    lab.status = 0
    assert lab.read(STATUS, 1) == 0
    assert lab.read(PFN, 4) == 0
    lab.start()
    assert lab.read(STATUS, 1) == READY


def test_a_modern_driver_cannot_place_queues_by_page(lab: Lab) -> None:
    """Features decide what a ring is; a legacy address under modern ones is a mistake."""
    assert lab.negotiate(F_VERSION_1)
    lab.write(PFN, 4, 0x20)
    assert lab.read(PFN, 4) == 0
    assert lab.read(CommonCfg.QUEUE_ENABLE, 2) == 0


def test_configuration_follows_at_20(lab: Lab) -> None:
    """Device configuration comes after the registers, in the same bytes (§4.1.4.10)."""
    assert lab.read(CONFIG, 4) == 0x04030201
    lab.write(CONFIG + 4, 2, 0xBEEF)
    assert lab.read_config(4, 2) == 0xBEEF
    assert lab.read(CONFIG + 16, 4) == 0


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 2), (1, 1), (4, 1), (8, 2), (12, 4), (16, 4), (18, 2), (19, 2)]
)
def test_other_widths_are_no_access(lab: Lab, offset: int, size: int) -> None:
    """Neither read nor write; both are logged."""
    lab.said.clear()
    assert lab.read(Block.LEGACY + offset, size) == 0
    lab.write(Block.LEGACY + offset, size, 0)
    assert len(lab.said) == 2
    assert lab.read(STATUS, 1) == ACKNOWLEDGE | DRIVER


@pytest.mark.parametrize("offset", [0, 12, 19])
def test_read_only_registers(lab: Lab, offset: int) -> None:
    """Features, size and ISR are the device's."""
    size = {0: 4, 12: 2, 19: 1}[offset]
    before = lab.read(Block.LEGACY + offset, size)
    lab.write(Block.LEGACY + offset, size, 0)
    assert lab.read(Block.LEGACY + offset, size) == before
    assert "no such access" in lab.said[-1]
