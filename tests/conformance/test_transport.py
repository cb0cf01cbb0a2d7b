"""Status, features and reset: virtio 1.2 §2.1, §2.2, §2.4, §3.1, §4.1.4.3."""

from __future__ import annotations

import pytest

from config.errors import GuestError
from devices.features import (
    F_ACCESS_PLATFORM,
    F_ANY_LAYOUT,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_NOTIFY_ON_EMPTY,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
)
from devices.spec import Block
from devices.viodev import CONFIG_CHANGE
from devices.virtio import CommonCfg
from tests.registerlab import F_BASE, F_HIGH, F_NEEDS_BASE, F_PLAIN, SIZES, Lab
from tools.viodriver.registers import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    READY,
)


@pytest.fixture
def lab() -> Lab:
    """A device at power-on."""
    return Lab()


# Status, §2.1 and §3.1.


def test_status_is_0_at_power_on_and_after_a_reset(lab: Lab) -> None:
    """The device MUST initialize device_status to 0 upon reset (§2.1.2)."""
    assert lab.status == 0
    lab.start()
    assert lab.status == READY
    lab.status = 0
    assert lab.status == 0


def test_each_status_bit_is_taken_in_its_turn(lab: Lab) -> None:
    """ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK: the sequence of §3.1.1 is accepted."""
    lab.status = ACKNOWLEDGE
    assert lab.status == ACKNOWLEDGE
    lab.status = ACKNOWLEDGE | DRIVER
    assert lab.status == ACKNOWLEDGE | DRIVER
    lab.accept(F_VERSION_1)
    lab.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert lab.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    lab.status = READY
    assert lab.status == READY
    assert lab.device.events[-1] == "activate"


@pytest.mark.parametrize(
    ("before", "value"),
    [
        (0, DRIVER),
        (0, FEATURES_OK),
        (0, DRIVER_OK),
        (ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK),
        (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER_OK),
        (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK),
    ],
)
def test_a_status_bit_out_of_turn_is_dropped(lab: Lab, before: int, value: int) -> None:
    """The driver MUST follow the sequence of §3.1.1; the device does not run on half of it."""
    lab.accept(F_VERSION_1)
    lab.status = before or 0
    lab.status = value
    assert lab.status == before
    assert "activate" not in lab.device.events
    assert "out of turn" in lab.said[-1]


def test_a_driver_may_set_several_bits_at_once(lab: Lab) -> None:
    """Nothing in §2.1.1 asks for one write per bit, as long as their order can be kept."""
    lab.accept(F_VERSION_1)
    lab.status = READY
    assert lab.status == READY


def test_a_status_bit_cannot_be_cleared(lab: Lab) -> None:
    """The driver MUST NOT clear a status bit (§2.1.1); trying to changes nothing."""
    lab.start()
    lab.status = ACKNOWLEDGE
    assert lab.status == READY
    assert lab.device.active
    assert "clear" in lab.said[-1]


def test_failed_can_be_set_at_any_time(lab: Lab) -> None:
    """FAILED is the driver's word that it has given up (§2.1), whatever the status is."""
    lab.status = FAILED
    assert lab.status == FAILED
    lab.status = 0
    lab.start()
    lab.status = READY | FAILED
    assert lab.status == READY | FAILED


def test_the_driver_cannot_set_needs_reset(lab: Lab) -> None:
    """DEVICE_NEEDS_RESET is the device's to set (§2.1)."""
    lab.start()
    lab.status = READY | NEEDS_RESET
    assert lab.status == READY


def test_a_broken_driver_is_told_to_reset(lab: Lab) -> None:
    """In an error state the device sets NEEDS_RESET and sends a config change (§2.1.2)."""
    lab.start()
    lab.registers.transport.fail(GuestError("broken ring"))
    assert lab.status == READY | NEEDS_RESET
    assert lab.interrupts == [CONFIG_CHANGE]
    assert lab.isr() == 2
    assert list(lab.device.queues) == [None] * len(SIZES)


def test_no_interrupt_with_needs_reset_before_driver_ok(lab: Lab) -> None:
    """The notification is only due once DRIVER_OK is set (§2.1.2)."""
    assert lab.negotiate(F_VERSION_1)
    lab.registers.transport.fail(GuestError("broken"))
    assert lab.status & NEEDS_RESET
    assert lab.interrupts == []


def test_a_reset_makes_a_broken_device_usable_again(lab: Lab) -> None:
    """The driver can recover by a reset and a new initialization (§2.1.1)."""
    lab.start()
    lab.registers.transport.fail(GuestError("broken ring"))
    [queue, *_] = lab.start()
    queue.add([b"x"], [])
    lab.serve()
    assert len(queue.collect()) == 1


def test_nothing_is_consumed_before_driver_ok(lab: Lab) -> None:
    """The device MUST NOT consume buffers or notify before DRIVER_OK (§2.1.2)."""
    assert lab.negotiate(F_VERSION_1)
    [queue, *_] = lab.drivers(F_VERSION_1)
    assert lab.enable(0, queue)
    queue.add([b"x"], [])
    lab.write(Block.NOTIFY, 2, 0)
    lab.serve()
    assert queue.collect() == []
    assert lab.interrupts == []

    lab.status = READY
    lab.serve()
    assert len(queue.collect()) == 1
    assert lab.interrupts == [0]


# Features, §2.2 and §6.


def test_what_is_offered(lab: Lab) -> None:
    """The device's own bits, and of the ring bits those that are always served."""
    ring = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_RESET
    own = F_PLAIN | F_BASE | F_NEEDS_BASE | F_HIGH
    assert lab.offered() == own | ring
    assert Lab(packed=True).offered() == own | ring | F_RING_PACKED
    lab.device.in_order = True
    assert Lab().offered() & F_IN_ORDER == 0
    never = F_ACCESS_PLATFORM | F_NOTIFICATION_DATA | F_NOTIFY_ON_EMPTY | F_ANY_LAYOUT
    assert Lab(packed=True).offered() & never == 0


@pytest.mark.parametrize("window", [2, 3, 4, 31, 1 << 16, 0xFFFF_FFFF])
def test_feature_windows_beyond_the_bits_read_0(lab: Lab, window: int) -> None:
    """The device MUST present any valid feature bits for any select, 0 where there are none."""
    lab.write(CommonCfg.DEVICE_FEATURE_SELECT, 4, window)
    assert lab.read(CommonCfg.DEVICE_FEATURE_SELECT, 4) == window
    assert lab.read(CommonCfg.DEVICE_FEATURE, 4) == 0


def test_accepted_features_read_back(lab: Lab) -> None:
    """driver_feature shows what the driver wrote for the selected window (§4.1.4.3)."""
    lab.accept(F_VERSION_1 | F_PLAIN)
    lab.write(CommonCfg.DRIVER_FEATURE_SELECT, 4, 1)
    assert lab.read(CommonCfg.DRIVER_FEATURE, 4) == F_VERSION_1 >> 32
    lab.write(CommonCfg.DRIVER_FEATURE_SELECT, 4, 0)
    assert lab.read(CommonCfg.DRIVER_FEATURE, 4) == F_PLAIN


def test_a_subset_is_accepted_and_reaches_the_device(lab: Lab) -> None:
    """The device SHOULD accept any valid subset of what it offers (§2.2.2)."""
    features = F_VERSION_1 | F_BASE | F_NEEDS_BASE | F_HIGH
    lab.start(features)
    assert lab.device.active == features


@pytest.mark.parametrize("bit", [1 << 1, F_RING_PACKED, F_ACCESS_PLATFORM, 1 << 60, 1 << 100])
def test_features_ok_is_refused_for_a_bit_not_offered(lab: Lab, bit: int) -> None:
    """The driver MUST NOT accept what was not offered; then FEATURES_OK stays clear (§2.2.2)."""
    assert not lab.negotiate(F_VERSION_1 | bit)
    assert lab.status == ACKNOWLEDGE | DRIVER
    assert "not offered" in lab.said[-1]


def test_features_ok_is_refused_for_a_bit_in_a_far_window(lab: Lab) -> None:
    """A bit no window of ours has is one that was not offered, too."""
    lab.status = ACKNOWLEDGE | DRIVER
    lab.accept(F_VERSION_1)
    lab.write(CommonCfg.DRIVER_FEATURE_SELECT, 4, 1 << 31)
    lab.write(CommonCfg.DRIVER_FEATURE, 4, 1)
    lab.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert not lab.status & FEATURES_OK


def test_features_ok_is_refused_without_version_1(lab: Lab) -> None:
    """A device MAY fail to operate further if VERSION_1 is not accepted (§6.2); this one does."""
    assert not lab.negotiate(F_PLAIN)
    assert "VERSION_1" in lab.said[-1]


def test_features_ok_is_refused_without_a_bits_base(lab: Lab) -> None:
    """The driver MUST NOT accept a feature that requires one it does not accept (§2.2.1)."""
    assert not lab.negotiate(F_VERSION_1 | F_NEEDS_BASE)
    assert lab.negotiate(F_VERSION_1 | F_NEEDS_BASE | F_BASE)


def test_a_refused_driver_may_try_again(lab: Lab) -> None:
    """It can write other features and set FEATURES_OK, without a reset."""
    assert not lab.negotiate(F_VERSION_1 | 1 << 60)
    lab.accept(F_VERSION_1)
    lab.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert lab.status & FEATURES_OK


def test_features_cannot_change_after_features_ok(lab: Lab) -> None:
    """The driver MUST NOT accept new bits after FEATURES_OK (§3.1.1); they are dropped."""
    assert lab.negotiate(F_VERSION_1)
    lab.accept(F_VERSION_1 | F_PLAIN)
    lab.status = READY
    assert lab.device.active == F_VERSION_1
    assert "settled" in lab.said[0]


# Reset, §2.4.


def test_a_reset_returns_every_register_to_its_first_value(lab: Lab) -> None:
    """After a reset the device is as it was at power-on (§2.4)."""
    before = [lab.read(reg, 1) for reg in range(CommonCfg.QUEUE_RESET + 2)]
    lab.start(F_EVENT_IDX, size=4)
    lab.config_changed()
    lab.status = 0
    lab.write(CommonCfg.DEVICE_FEATURE_SELECT, 4, 0)
    lab.write(CommonCfg.DRIVER_FEATURE_SELECT, 4, 0)
    after = [lab.read(reg, 1) for reg in range(CommonCfg.QUEUE_RESET + 2)]
    before[CommonCfg.CONFIG_GENERATION] = after[CommonCfg.CONFIG_GENERATION]  # it only grows
    assert after == before
    assert lab.isr() == 0


def test_a_reset_device_leaves_the_queues_alone(lab: Lab) -> None:
    """No interaction with queues and no notifications after a reset (§2.4.1)."""
    [queue, *_] = lab.start()
    lab.serve()
    popped = lab.device.queues[0]
    assert popped is not None
    queue.add([b"x"], [])
    chain = popped.pop()
    assert chain is not None
    lab.status = 0
    assert lab.device.events[-1] == "reset"
    # A completion that comes late: the ring is not there any more.
    popped.push(chain.head, 0)
    assert not popped.should_call()
    lab.write(Block.NOTIFY, 2, 0)
    lab.serve()
    assert queue.collect() == []
    assert lab.interrupts == []


def test_no_configuration_interrupt_before_driver_ok(lab: Lab) -> None:
    """A device must not notify before DRIVER_OK (§2.1.2), but the generation counts."""
    generation = lab.read(CommonCfg.CONFIG_GENERATION, 1)
    lab.config_changed()
    assert lab.interrupts == []
    lab.read_config(0, 4)
    assert lab.read(CommonCfg.CONFIG_GENERATION, 1) != generation


def test_a_device_that_fails_to_start_needs_a_reset(lab: Lab) -> None:
    """GuestError while DRIVER_OK is acted upon reaches the process, DRIVER_OK being set."""
    lab.device.error = GuestError("no such luck")
    with pytest.raises(GuestError):
        lab.start()
    assert lab.status & DRIVER_OK
