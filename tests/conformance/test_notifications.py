"""virtio 1.2 §2.7.7, §2.7.10, §2.8.10, §6.3: when the device calls, and when it wants kicks."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from devices.features import F_EVENT_IDX, F_NOTIFY_ON_EMPTY, F_RING_PACKED
from devices.packed import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, WRAP
from devices.virtqueue import QueueState
from tools.viodriver import PackedDriver, SplitDriver, make_memory, open_driver

if TYPE_CHECKING:
    from devices.virtqueue import VirtQueue

BASE = 0x1000
LAYOUTS = [
    pytest.param(0, id="split"),
    pytest.param(F_EVENT_IDX, id="split-event"),
    pytest.param(F_RING_PACKED, id="packed"),
    pytest.param(F_RING_PACKED | F_EVENT_IDX, id="packed-event"),
]


def split(features: int, size: int = 8) -> tuple[SplitDriver, VirtQueue]:
    driver = SplitDriver(make_memory(), size, BASE, features)
    return driver, driver.open_device()


def packed(features: int, size: int = 8) -> tuple[PackedDriver, VirtQueue]:
    driver = PackedDriver(make_memory(), size, BASE, F_RING_PACKED | features)
    return driver, driver.open_device()


def use(driver: SplitDriver | PackedDriver, queue: VirtQueue, count: int = 1) -> None:
    """Pass `count` requests of one descriptor through the queue, without asking about calls."""
    for _ in range(count):
        driver.add([b"x"], indirect=False)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, 0)
        driver.collect()


# §2.7.7 Used buffer notifications, split.


def test_2_7_7_2_without_event_idx_the_flag_decides() -> None:
    """§2.7.7.2: if flags is 0 the device MUST call, if it is 1 it SHOULD NOT."""
    driver, queue = split(0)
    use(driver, queue)
    assert queue.should_call()
    driver.set_avail_flags(1)
    use(driver, queue)
    assert not queue.should_call()
    driver.set_avail_flags(0)
    use(driver, queue)
    assert queue.should_call()


def test_2_7_7_2_without_event_idx_used_event_is_ignored() -> None:
    """§2.7.7.2: the device MUST ignore used_event when EVENT_IDX was not negotiated."""
    driver, queue = split(0)
    for event in (0, 1, 5, 0x8000, 0xFFFF):
        driver.set_used_event(event)
        use(driver, queue)
        assert queue.should_call()


def test_2_7_7_2_with_event_idx_the_flag_is_ignored() -> None:
    """§2.7.7.2: with EVENT_IDX the device MUST ignore the lower bit of flags."""
    driver, queue = split(F_EVENT_IDX)
    for flags in (0, 1):
        driver.set_avail_flags(flags)
        driver.enable_calls()
        use(driver, queue)
        assert queue.should_call()
        driver.disable_calls()
        use(driver, queue)
        assert not queue.should_call()


@pytest.mark.parametrize("start", [0, 1, 7, 0xFFF0, 0xFFFF])
def test_2_7_7_2_call_exactly_at_used_event(start: int) -> None:
    """§2.7.7.2: MUST call after writing the entry numbered used_event, SHOULD NOT otherwise.

    For each distance of the event from where we are, with batches of each size, over the wrap.
    """
    for batch in (1, 2, 5):
        for distance in range(-3, 9):
            driver, queue = split(F_EVENT_IDX)
            driver.start_at(start)
            queue.load(QueueState(start, start))
            assert queue.should_call()  # always once after load
            driver.set_used_event((start + distance) & 0xFFFF)
            use(driver, queue, batch)
            assert queue.should_call() is (0 <= distance < batch)


def test_2_7_7_2_no_call_without_a_used_buffer() -> None:
    """§2.7.7.2: a call follows a used entry; asked twice, the queue says yes once."""
    driver, queue = split(0)
    assert not queue.should_call()
    use(driver, queue)
    assert queue.should_call()
    assert not queue.should_call()


def test_2_7_7_2_an_event_is_not_lost_over_65536_entries() -> None:
    """A device that asks rarely still calls: the distance is counted, not taken modulo 2¹⁶."""
    driver, queue = split(F_EVENT_IDX)
    driver.set_used_event(3)
    request = driver.place([b"x"])
    for _ in range(65536):
        driver.submit(request)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, 0)
        driver.collect()
    assert queue.should_call()


def test_6_3_notify_on_empty_overrides_suppression() -> None:
    """§6.3: with NOTIFY_ON_EMPTY the device MUST call when it runs out of available descriptors.

    Even though calls are suppressed. While some are left or in flight it need not.
    """
    for features in (0, F_EVENT_IDX):
        driver, queue = split(F_NOTIFY_ON_EMPTY | features)
        driver.set_avail_flags(1)
        driver.set_used_event(100)
        for _ in range(3):
            driver.add([b"x"], indirect=False)
        one = queue.pop()
        assert one is not None
        queue.push(one.head, 0)
        assert not queue.should_call()  # two more are available
        two = queue.pop()
        assert two is not None
        three = queue.pop()
        assert three is not None
        queue.push(two.head, 0)
        assert not queue.should_call()  # three is in flight
        queue.push(three.head, 0)
        assert queue.should_call()
        assert not queue.should_call()


# §2.7.10 Available buffer notifications, split.


def test_2_7_10_2_without_event_idx_flags_are_0_or_1() -> None:
    """§2.7.10.2: without EVENT_IDX the device MUST set flags to 0 or 1."""
    driver, queue = split(0)
    assert driver.used_flags == 0
    queue.disable_kicks()
    assert driver.used_flags == 1
    assert not queue.enable_kicks()
    assert driver.used_flags == 0


def test_2_7_10_2_with_event_idx_flags_are_0() -> None:
    """§2.7.10.2: with EVENT_IDX the device MUST set flags to 0; avail_event says it all."""
    driver, queue = split(F_EVENT_IDX)
    for count in (0, 1, 3):
        use(driver, queue, count)
        queue.disable_kicks()
        assert driver.used_flags == 0
        queue.enable_kicks()
        assert driver.used_flags == 0
    assert driver.avail_event == 4  # the entry that the next chain will get


@pytest.mark.parametrize("features", LAYOUTS)
def test_2_7_10_2_spurious_kicks_are_harmless(features: int) -> None:
    """§2.7.10.2: the device MUST handle spurious notifications: a pop finds nothing."""
    driver = open_driver(make_memory(), 8, BASE, features)
    queue = driver.open_device()
    for _ in range(3):
        assert queue.pop() is None
        assert queue.pop_batch(8) == []
    use(driver, queue)
    assert queue.pop() is None


@pytest.mark.parametrize("features", LAYOUTS)
def test_kicks_are_wanted_when_asked_for(features: int) -> None:
    """After enable_kicks the next chain is kicked for; while polling, none is; at first, one is."""
    driver = open_driver(make_memory(), 8, BASE, features)
    queue = driver.open_device()
    driver.add([b"x"])
    assert driver.kick_needed()  # a fresh queue: nobody has said otherwise
    queue.disable_kicks()
    chain = queue.pop()
    assert chain is not None
    driver.add([b"x"])
    assert not driver.kick_needed()
    assert queue.enable_kicks()  # the one that came silently
    assert queue.pop() is not None
    assert not queue.enable_kicks()
    for expected in (True, False):  # one kick, then we are awake
        driver.add([b"x"])
        needed = driver.kick_needed()
        assert needed or not expected
        if not expected and features & F_EVENT_IDX:
            assert not needed


@pytest.mark.parametrize("features", LAYOUTS)
def test_enable_kicks_reports_what_came_meanwhile(features: int) -> None:
    """A chain offered before the wish was visible brings no kick: enable_kicks must tell."""
    driver = open_driver(make_memory(), 8, BASE, features)
    queue = driver.open_device()
    queue.disable_kicks()
    driver.add([b"x"])
    driver.kick_needed()
    assert queue.enable_kicks()
    assert queue.pop() is not None
    assert not queue.enable_kicks()


# §2.8.10 Event suppression, packed.


def test_2_8_10_driver_flags_decide() -> None:
    """§2.8.10: DISABLE means no calls, ENABLE means calls."""
    for features in (0, F_EVENT_IDX):
        driver, queue = packed(features)
        for how, expected in ((EVENT_ENABLE, True), (EVENT_DISABLE, False), (EVENT_ENABLE, True)):
            driver.set_driver_event(0, how)
            use(driver, queue)
            assert queue.should_call() is expected


def test_2_8_10_reserved_values_never_silence_the_device() -> None:
    """§2.8.10: DESC without EVENT_IDX is not valid, 3 is reserved: rather one call too many."""
    driver, queue = packed(0)
    for how in (EVENT_DESC, 3):
        driver.set_driver_event(7, how)
        use(driver, queue)
        assert queue.should_call()
    driver.set_driver_event(7, EVENT_DISABLE | 0xFFFC)  # reserved bits carry no meaning
    use(driver, queue)
    assert not queue.should_call()


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("start", [0, 1, 3, 6, 13])
def test_2_8_10_call_exactly_at_the_descriptor(size: int, start: int) -> None:
    """§2.8.10: with DESC, the event triggers when that place is used in that lap, and only then."""
    for batch in range(1, size + 1):
        for distance in range(-size + 1, size + 1):
            driver, queue = packed(F_EVENT_IDX, size)
            use(driver, queue, start)
            queue.should_call()
            lap, place = divmod(start + distance, size)
            driver.set_driver_event(place | (WRAP if lap % 2 == 0 else 0), EVENT_DESC)
            use(driver, queue, batch)
            assert queue.should_call() is (0 <= distance < batch)


def test_2_8_10_chains_count_all_their_places() -> None:
    """§2.8.10: an event at any place of a chain triggers when the chain is used."""
    for place in range(8):
        driver, queue = packed(F_EVENT_IDX)
        driver.set_driver_event(place | WRAP, EVENT_DESC)
        called = []
        for length in (3, 1, 4):
            driver.add([b"x"] * length, indirect=False)
            chain = queue.pop()
            assert chain is not None
            queue.push(chain.head, 0)
            called.append(queue.should_call())
        assert called == [place < 3, place == 3, place > 3]


def test_2_8_10_device_area_is_what_the_driver_reads() -> None:
    """§2.8.10: ENABLE and DISABLE without EVENT_IDX; place, lap and DESC with it."""
    driver, queue = packed(0, 4)
    queue.disable_kicks()
    assert driver.device_event[1] == EVENT_DISABLE
    queue.enable_kicks()
    assert driver.device_event[1] == EVENT_ENABLE
    driver, queue = packed(F_EVENT_IDX, 4)
    for used, event in ((0, WRAP), (3, 3 | WRAP), (1, 0), (3, 3), (1, WRAP)):
        use(driver, queue, used)
        queue.enable_kicks()
        assert driver.device_event == (event, EVENT_DESC)


# The lost kick.


@pytest.mark.parametrize("features", LAYOUTS)
def test_enable_kicks_looks_again_behind_a_fence(
    features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish for kicks is stored, then the fence, then the last look at the driver's news.

    At the fence the driver already sees the wish; what it offers there, enable_kicks must see.
    """
    driver = open_driver(make_memory(), 8, BASE, features)
    queue = driver.open_device()
    use(driver, queue)
    queue.disable_kicks()
    driver.kick_needed()
    kicked: list[bool] = []

    def other_side_moves() -> None:
        driver.add([b"x"])
        kicked.append(driver.kick_needed())

    monkeypatch.setattr("devices.ring.fence", other_side_moves)
    assert queue.enable_kicks()
    assert kicked == [True]


@pytest.mark.parametrize("features", LAYOUTS)
def test_should_call_looks_behind_a_fence(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The used entry is stored, then the fence, then the look at what calls the driver wants.

    At the fence the driver enables calls, as it goes to sleep: it sees the entry, or gets a call.
    """
    driver = open_driver(make_memory(), 8, BASE, features)
    queue = driver.open_device()
    driver.disable_calls()
    driver.add([b"x"])
    chain = queue.pop()
    assert chain is not None
    seen: list[bool] = []
    monkeypatch.setattr("devices.ring.fence", lambda: seen.append(driver.enable_calls()))
    queue.push(chain.head, 0)
    assert queue.should_call()
    assert seen == [True]


@pytest.mark.parametrize("features", LAYOUTS)
def test_no_kick_and_no_call_is_lost_at_depth_1(features: int) -> None:
    """Device and driver sleep on eventfds, one request at a time: neither ever misses the other."""
    driver = open_driver(make_memory(), 4, BASE, features)
    kick, call = os.eventfd(0), os.eventfd(0)
    device = os.fork()
    if device == 0:
        _serve(driver.open_device(), kick, call)
        os._exit(0)
    try:
        request = driver.place([b"x"])
        calls = select.poll()
        calls.register(call, select.POLLIN)
        for round_trip in range(3000):
            driver.submit(request)
            if driver.kick_needed():
                os.eventfd_write(kick, 1)
            while not driver.collect():
                driver.disable_calls()
                if driver.enable_calls():
                    continue
                assert calls.poll(10_000), f"no call in round trip {round_trip}"
                os.eventfd_read(call)
    finally:
        os.kill(device, signal.SIGKILL)
        os.waitpid(device, 0)
        os.close(kick)
        os.close(call)


def _serve(queue: VirtQueue, kick: int, call: int) -> None:
    """Be a device: sleep, drain, call; for ever."""
    while True:
        queue.disable_kicks()
        while (chain := queue.pop()) is not None:
            queue.push(chain.head, 0)
            if queue.should_call():
                os.eventfd_write(call, 1)
        if not queue.enable_kicks():
            os.eventfd_read(kick)
