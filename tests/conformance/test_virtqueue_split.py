"""virtio 1.2 §2.7, split virtqueues: what a device must do, and what a driver must not.

Names give the clause. A driver's "MUST NOT" is tested as the device's answer to one that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.guestmem import Region
from devices.virtqueue import QueueState, VirtQueue, open_queue
from tests.conformance.ring_lab import BASE, BUF, RAM, W, refused
from tests.stores import Watch
from tools.viodriver import SplitDriver, make_memory

if TYPE_CHECKING:
    from devices.guestmem import GuestMemory


@pytest.fixture
def memory() -> GuestMemory:
    return make_memory(RAM)


@pytest.fixture
def driver(memory: GuestMemory) -> SplitDriver:
    return SplitDriver(memory, 8, BASE, F_INDIRECT_DESC)


@pytest.fixture
def queue(driver: SplitDriver) -> VirtQueue:
    return driver.open_device()


# §2.7 Layout and addresses.


@pytest.mark.parametrize("size", [0, -8, 3, 6, 65536])
def test_2_7_queue_size_is_a_power_of_two_up_to_32768(memory: GuestMemory, size: int) -> None:
    """§2.7: Queue Size is always a power of 2, at most 32768; another one is not enabled."""
    with pytest.raises(GuestError, match=f"queue size {size}"):
        open_queue(memory, size, 0x1000, 0x2000, 0x3000, features=0)


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
def test_2_7_every_legal_size_works(memory: GuestMemory, size: int) -> None:
    """§2.7: a queue of any legal size passes a full ring of buffers, twice."""
    driver = SplitDriver(make_memory(2 << 20), size, 0, 0)
    queue = driver.open_device()
    request = driver.place([b"x"])
    for _ in range(2 * min(size, 300) + 1):
        driver.submit(request)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, 0)
        assert len(driver.collect()) == 1


@pytest.mark.parametrize(
    ("desc", "avail", "used", "part"),
    [
        (0x1008, 0x2000, 0x3000, "descriptor table"),
        (0x1000, 0x2001, 0x3000, "avail ring"),
        (0x1000, 0x2000, 0x3002, "used ring"),
    ],
)
def test_2_7_1_misaligned_parts_are_refused(
    memory: GuestMemory, desc: int, avail: int, used: int, part: str
) -> None:
    """§2.7.1: the parts are aligned to 16, 2 and 4 bytes; a queue that is not is not enabled."""
    with pytest.raises(GuestError, match=f"{part} at .* not aligned"):
        open_queue(memory, 8, desc, avail, used, features=0)


@pytest.mark.parametrize("at", [RAM, RAM - 16, 1 << 40, (1 << 64) - 16])
def test_2_7_parts_outside_ram_are_refused(memory: GuestMemory, at: int) -> None:
    """§2.7: each part is physically contiguous guest memory; all of it, up to the last byte."""
    for parts in ((at, 0x2000, 0x3000), (0x1000, at, 0x3000), (0x1000, 0x2000, at)):
        with pytest.raises(GuestError):
            open_queue(memory, 8, *parts, features=0)


def test_2_7_a_part_may_not_straddle_regions() -> None:
    """A ring part that lies in two mappings has no single address: refused, not half mapped."""
    memory = make_memory(8 << 12, [Region(0, 4096, 0), Region(4096, 4096, 3 << 12)])
    with pytest.raises(GuestError, match=r"descriptor table.*one piece"):
        open_queue(memory, 8, 4096 - 64, 0x1100, 0x1200, features=0)


# §2.7.6 The available ring.


@pytest.mark.parametrize("ahead", [9, 100, 0x8000, 0xFFFF])
def test_2_7_6_avail_index_ahead_of_the_ring_is_refused(
    driver: SplitDriver, queue: VirtQueue, ahead: int
) -> None:
    """§2.7.6.1, §2.7.13: the index never runs ahead by more than the ring, nor back."""
    driver.set_avail_index(ahead)
    refused(driver, queue, f"avail index is {ahead} ahead in a ring of 8")


def test_2_7_6_a_full_ring_is_legal(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.13: all of the ring may be available at once."""
    tokens = [driver.add([bytes([i])], indirect=False) for i in range(8)]
    chains = queue.pop_batch(100)
    assert [bytes(chain.readable[0]) for chain in chains] == [bytes([i]) for i in range(8)]
    queue.push_batch([(chain.head, 0) for chain in chains])
    assert [used.token for used in driver.collect()] == tokens


def test_2_7_6_index_wraps_at_65536(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.13.3: idx always increments, and wraps naturally at 65536."""
    request = driver.place([b"x"], indirect=False)
    for _ in range(65536 + 10):
        driver.submit(request)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, 0)
    assert queue.save() == (10, 10)
    assert driver.used_index == 10


# §2.7.8 The used ring.


def test_2_7_8_2_len_is_stored_before_the_index() -> None:
    """§2.7.8.2: the device MUST set len prior to updating the used idx; the index is one store."""
    watch = Watch()
    driver = SplitDriver(make_memory(RAM), 8, BASE, 0)
    queue = driver.open_device()
    queue._used16 = watch.view("used", queue._used16)  # type: ignore[attr-defined]
    queue._used32 = watch.view("used", queue._used32)  # type: ignore[attr-defined]
    for _ in range(4):
        driver.add([b"x"], [4])
    first, *rest = queue.pop_batch(4)
    queue.push(first.head, 4)
    assert [(s.offset, s.width, s.value) for s in watch.log] == [(4, 4, 0), (8, 4, 4), (2, 2, 1)]
    watch.log.clear()
    queue.push_batch([(chain.head, 1) for chain in rest])
    assert [store.offset for store in watch.log].count(2) == 1
    assert (watch.log[-1].offset, watch.log[-1].value) == (2, 4)


def test_2_7_8_2_many_entries_are_stored_before_the_index() -> None:
    """§2.7.8.2: of a long batch, too, all entries come before the index."""
    watch = Watch()
    driver = SplitDriver(make_memory(RAM), 16, BASE, 0)
    queue = driver.open_device()
    for name in ("_used16", "_used32"):
        setattr(queue, name, watch.view("used", getattr(queue, name)))
    for _ in range(12):
        driver.add([], [4])
    queue.push_batch([(chain.head, 4) for chain in queue.pop_batch(12)])
    assert {store.offset for store in watch.log[:-1]} == set(range(4, 4 + 8 * 12, 4))
    assert (watch.log[-1].offset, watch.log[-1].width, watch.log[-1].value) == (2, 2, 12)


@pytest.mark.parametrize("start", [0, 3, 16, 24, 65530])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16])
def test_2_7_8_batches_of_all_lengths_at_all_places(start: int, count: int) -> None:
    """§2.7.8: entries are where the index says, over the ring's end too, and nowhere else."""
    memory = make_memory(RAM)
    driver = SplitDriver(memory, 16, BASE, 0)
    queue = driver.open_device()
    driver.start_at(start)
    queue.load(QueueState(start, start))
    memory.write(driver.used_gpa + 4, b"\xee" * 8 * 16)
    heads = [5 * n % 16 for n in range(count)]
    for head in heads:
        driver.desc(head, BUF, 100, W)
        driver.offer(head)
    queue.push_batch([(chain.head, 0xFFFF_FF00 + n) for n, chain in enumerate(queue.pop_batch(16))])
    assert list(driver.used()) == [(head, 0xFFFF_FF00 + n) for n, head in enumerate(heads)]
    untouched = memory.read(driver.used_gpa + 4, 8 * 16).count(b"\xee" * 8)
    assert untouched == 16 - count
    assert queue.nr_in_flight == 0


def test_2_7_8_used_entry_names_head_and_length(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.8: id is the head as offered, len what the device wrote; chains in any order."""
    driver.desc(6, BUF, 100, W)
    driver.desc(3, BUF + 100, 100, W)
    driver.offer(6)
    driver.offer(3)
    assert [chain.head for chain in queue.pop_batch(2)] == [6, 3]
    queue.push(3, 17)
    queue.push(6, 0)
    assert list(driver.used()) == [(3, 17), (6, 0)]


def test_2_7_8_2_nothing_is_used_twice(driver: SplitDriver, queue: VirtQueue) -> None:
    """A chain goes back once: a second push is our own bug, and never reaches the driver."""
    driver.add([b"x"])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain.head, 0)
    with pytest.raises(KeyError):
        queue.push(chain.head, 0)
    with pytest.raises(KeyError):
        queue.push(7, 0)
    assert len(driver.collect()) == 1


def test_2_7_2_legacy_layout(memory: GuestMemory) -> None:
    """§2.7.2: descriptor table, avail ring, padding to 4096, used ring: found where it says."""
    driver = SplitDriver(memory, 256, 0x2000, F_EVENT_IDX, align=4096)
    assert (driver.avail_gpa, driver.used_gpa) == (0x3000, 0x4000)
    queue = driver.open_device()
    token = driver.add([b"ping"], [4])
    chain = queue.pop()
    assert chain is not None
    chain.writable[0][:] = b"pong"
    queue.push(chain.head, 4)
    [used] = driver.collect()
    assert (used.token, used.written, driver.data(used.request)) == (token, 4, b"pong")
