"""virtio 1.2 §2.8, packed virtqueues: what a device must do, and what a driver must not.

Names give the clause. A driver's "MUST NOT" is tested as the device's answer to one that does.
"""

from __future__ import annotations

import pytest

from config.errors import GuestError
from devices.chain import DESC, DESC_F_WRITE, MAX_CHAIN
from devices.features import F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import GuestMemory
from devices.packed import DESC_F_AVAIL, DESC_F_USED, MARKS, PLACE, WRAP
from devices.virtqueue import VirtQueue, open_queue
from tests.conformance.ring_lab import BASE, BUF, RAM, N, W, echo
from tests.stores import Watch
from tools.viodriver import PackedDriver, make_memory


def make_driver(size: int = 8, features: int = 0) -> PackedDriver:
    return PackedDriver(make_memory(RAM), size, BASE, F_RING_PACKED | features)


@pytest.fixture
def memory() -> GuestMemory:
    return make_memory(RAM)


@pytest.fixture
def driver() -> PackedDriver:
    return make_driver(8, F_INDIRECT_DESC)


@pytest.fixture
def queue(driver: PackedDriver) -> VirtQueue:
    return driver.open_device()


# §2.8.10.1 Layout and addresses.


@pytest.mark.parametrize("size", [0, -1, 32769, 65536])
def test_2_8_queue_size_is_at_most_32768(memory: GuestMemory, size: int) -> None:
    """§2.8: packed virtqueues have up to 2¹⁵ entries; none is not a queue."""
    with pytest.raises(GuestError, match=f"queue size {size}"):
        open_queue(memory, size, 0x1000, 0x2000, 0x3000, features=F_RING_PACKED)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 32768])
def test_2_8_10_1_size_need_not_be_a_power_of_two(size: int) -> None:
    """§2.8.10.1: any size works, through several wraps."""
    driver = PackedDriver(make_memory(2 << 20), size, 0, F_RING_PACKED)
    queue = driver.open_device()
    longest = min(size, MAX_CHAIN)
    echo(driver, queue, *[longest] * (3 * size // longest), 1, longest)


@pytest.mark.parametrize(
    ("desc", "driver_area", "device_area", "part"),
    [
        (0x1008, 0x2000, 0x3000, "descriptor ring"),
        (0x1000, 0x2002, 0x3000, "driver event area"),
        (0x1000, 0x2000, 0x3001, "device event area"),
    ],
)
def test_2_8_11_misaligned_parts_are_refused(
    memory: GuestMemory, desc: int, driver_area: int, device_area: int, part: str
) -> None:
    """§2.8.11: the parts are aligned to 16, 4 and 4 bytes."""
    with pytest.raises(GuestError, match=f"{part} at .* not aligned"):
        open_queue(memory, 8, desc, driver_area, device_area, features=F_RING_PACKED)


def test_2_8_parts_outside_ram_are_refused(memory: GuestMemory) -> None:
    """§2.8.10.1: each part is contiguous guest memory, up to its last byte."""
    for parts in (
        (RAM - 16, 0x2000, 0x3000),
        (0x1000, RAM, 0x3000),
        (0x1000, 0x2000, (1 << 64) - 4),
    ):
        with pytest.raises(GuestError):
            open_queue(memory, 8, *parts, features=F_RING_PACKED)


# §2.8.1 Wrap counters, §2.8.15 whose a descriptor is.


def test_2_8_1_both_wrap_counters_begin_at_1(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.1: wrap counters are initialized to 1: a zeroed ring holds nothing."""
    assert queue.save() == (WRAP, WRAP)
    assert queue.pop() is None
    assert not queue.has_work()


@pytest.mark.parametrize("marks", [0, DESC_F_USED, MARKS])
def test_2_8_15_only_a_changed_avail_bit_makes_a_descriptor_ours(
    driver: PackedDriver, queue: VirtQueue, marks: int
) -> None:
    """§2.8.15: MUST NOT use a descriptor unless it observes AVAIL being changed.

    With a wrap counter of 1 only AVAIL set and USED clear is available.
    """
    driver.desc(0, BUF, 16, 0, marks)
    assert queue.pop() is None
    driver.desc(0, BUF, 16, 0, DESC_F_AVAIL)
    assert queue.pop() is not None


def test_2_8_1_the_counter_flips_at_the_end_of_the_ring() -> None:
    """§2.8.1: the meaning of the bits flips each lap; last lap's descriptors are not available."""
    driver = make_driver(3)
    queue = driver.open_device()
    for lap in range(1, 6):
        for place in range(3):
            assert queue.pop() is None
            assert driver.next_place == place
            echo(driver, queue, 1)
            flags = DESC.unpack_from(driver.ring_bytes(), 16 * place)[3]
            assert flags & MARKS == (MARKS if lap % 2 else 0)


def test_2_8_1_chains_wrap_around_the_end() -> None:
    """§2.8.1, §2.8.6: a chain may lie across the end; its descriptors carry both laps' marks."""
    driver = make_driver(5)
    queue = driver.open_device()
    echo(driver, queue, *[3] * 20)
    echo(driver, queue, 5, 4, 5, 1, 5)


# §2.8.4 - 2.8.6 Used entries.


def test_2_8_3_write_flag_says_whether_anything_was_written(
    driver: PackedDriver, queue: VirtQueue
) -> None:
    """§2.8.3: WRITE in a used descriptor says whether the device wrote any data."""
    for batch in ([0], [5], [0, 5]):
        for _ in batch:
            driver.add([b"x"], [8], indirect=False)
        start = queue.save().used & PLACE
        chains = queue.pop_batch(len(batch))
        if len(batch) == 1:
            queue.push(chains[0].head, batch[0])
        else:
            queue.push_batch([(c.head, n) for c, n in zip(chains, batch, strict=True)])
        for i, written in enumerate(batch):
            entry = DESC.unpack_from(driver.ring_bytes(), 16 * (start + 2 * i))
            assert bool(entry[3] & DESC_F_WRITE) is (written > 0)
            assert entry[1] == written  # §2.8.4: Element Length is what was written
        driver.collect()


def test_2_8_6_one_used_descriptor_per_chain(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.6: the device writes one used descriptor for a chain, then skips its length.

    The other places keep what the driver wrote.
    """
    driver.offer_chains([(5, [(BUF, 1, N), (BUF, 2, N), (BUF, 3, W)]), (2, [(BUF, 4, 0)])])
    before = driver.ring_bytes()
    chains = queue.pop_batch(2)
    assert [chain.head for chain in chains] == [5, 2]  # §2.8.6: the id in the last descriptor
    queue.push(5, 3)
    queue.push(2, 0)
    after = driver.ring_bytes()
    assert after[16:48] == before[16:48]
    assert list(driver.used()) == [(5, 3), (2, 0)]


def test_2_8_12_completion_out_of_order(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.12: taken in ring order, given back in the order of completion.

    A used entry may overwrite a descriptor of a chain still in flight: it was copied.
    """
    sizes = {driver.add([bytes([i])] * i, indirect=False): i for i in (3, 1, 4)}
    first, second, third = queue.pop_batch(9)
    queue.push(second.head, 0)  # at place 0, where the first chain began
    assert [view[0] for view in first.readable] == [3, 3, 3]
    queue.push(third.head, 0)
    queue.push(first.head, 0)
    assert [sizes[used.token] for used in driver.collect()] == [1, 4, 3]
    echo(driver, queue, 8, 7)


def test_2_8_15_nothing_changes_after_the_used_bit() -> None:
    """§2.8.15: MUST NOT change a descriptor after changing its USED bit: flags are stored last."""
    watch = Watch()
    driver = make_driver()
    queue = driver.open_device()
    queue._ring16 = watch.view("ring", queue._ring16)  # type: ignore[attr-defined]
    queue._ring32 = watch.view("ring", queue._ring32)  # type: ignore[attr-defined]
    for _ in range(3):
        driver.add([b"x"], [1], indirect=False)
    one, *rest = queue.pop_batch(3)
    queue.push(one.head, 1)
    queue.push_batch([(chain.head, 1) for chain in rest])
    finished: set[int] = set()
    for store in watch.log:
        place, field = divmod(store.offset, 16)
        assert place not in finished
        assert field >= 8  # the address is not ours to touch
        if field == 14:
            finished.add(place)
    assert finished == {0, 2, 4}


def test_2_8_9_first_buffer_of_a_batch_becomes_used_last() -> None:
    """§2.8.9: the first buffer of a request is marked used after the rest of them.

    So the driver sees a batch as a whole: it waits at the first.
    """
    watch = Watch()
    driver = make_driver()
    queue = driver.open_device()
    for _ in range(3):
        driver.add([b"x"], indirect=False)
    chains = queue.pop_batch(3)
    queue._ring16 = watch.view("ring", queue._ring16)  # type: ignore[attr-defined]
    queue.push_batch([(chain.head, 0) for chain in chains])
    flags = [store.offset // 16 for store in watch.log if store.offset % 16 == 14]
    assert flags == [1, 2, 0]


# §2.8.8 In-order use.


def test_2_8_8_completions_wait_for_older_ones() -> None:
    """§2.8.8, §6.2: with IN_ORDER, buffers are used in the order they were made available."""
    driver = make_driver(8, F_IN_ORDER)
    queue = driver.open_device()
    tokens = [driver.add([b"x"] * n, indirect=False) for n in (1, 2, 3)]
    one, two, three = queue.pop_batch(3)
    queue.push(three.head, 0)
    queue.push(two.head, 0)
    assert driver.collect() == []
    assert not queue.should_call()
    queue.push(one.head, 0)
    assert [used.token for used in driver.collect()] == tokens
    echo(driver, queue, 3, 3, 3)
