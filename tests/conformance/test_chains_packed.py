"""virtio 1.2 §2.8.5 to §2.8.7, §2.8.17 to §2.8.19: descriptor lists of packed virtqueues.

Names give the clause. A driver's "MUST NOT" is tested as the device's answer to one that does.
"""

from __future__ import annotations

import pytest

from devices.chain import DESC, MAX_CHAIN
from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.packed import DESC_F_AVAIL
from devices.virtqueue import VirtQueue
from tests.conformance.ring_lab import BASE, BUF, INDIRECT, RAM, N, W, echo, refused
from tools.viodriver import PackedDriver, Segment, make_memory


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


# §2.8.6, §2.8.17, §2.8.18 Chains.


def test_2_8_18_descriptors_are_used_in_list_order(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.18: descriptors chained by NEXT are used in the order they were made available."""
    driver.memory.write(BUF, b"abcdef")
    driver.offer_chains([(0, [(BUF + i, 1, N if i < 5 else 0) for i in (4, 2, 0, 1, 3, 5)])])
    chain = queue.pop()
    assert chain is not None
    assert b"".join(chain.readable) == b"ecabdf"


def test_2_8_17_readable_after_writable_is_refused(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.17: a driver MUST place writable elements after readable ones."""
    driver.offer_chains([(0, [(BUF, 1, N | W), (BUF, 1, 0)])])
    refused(driver, queue, "readable descriptor after a writable")


def test_2_8_17_a_list_longer_than_the_queue_is_refused(
    driver: PackedDriver, queue: VirtQueue
) -> None:
    """§2.8.17: no list is longer than the queue; one that never ends is found out."""
    for place in range(8):
        driver.desc(place, BUF, 1, 0, N | DESC_F_AVAIL)
    refused(driver, queue, "chain longer than 8")


def test_2_8_17_a_partial_list_is_refused(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.17: the first descriptor is made available only after all others of its list."""
    driver.desc(0, BUF, 1, 0, N | DESC_F_AVAIL)
    refused(driver, queue, "runs into descriptor 1")


def test_2_8_17_a_list_may_not_run_into_places_of_the_device() -> None:
    """A list that continues over descriptors still in flight has stale marks there: refused."""
    driver = make_driver(4)
    queue = driver.open_device()
    driver.offer_chains([(0, [(BUF, 1, 0)]), (1, [(BUF, 1, 0)])])
    assert len(queue.pop_batch(2)) == 2
    driver.offer_chains([(2, [(BUF, 1, N), (BUF, 1, N)])])  # on to place 0, next lap, not written
    refused(driver, queue, "runs into descriptor 0")


def test_2_8_more_in_flight_than_the_ring_holds_is_refused() -> None:
    """A driver reuses places only once they are used: what is in flight never exceeds the ring."""
    driver = make_driver(4)
    queue = driver.open_device()
    driver.offer_chains([(i, [(BUF, 1, 0)]) for i in range(3)])
    assert len(queue.pop_batch(3)) == 3
    driver.offer_chains([(7, [(BUF, 1, N), (BUF, 1, 0)])])  # places 3 and 0; 0 is in flight
    refused(driver, queue, r"3 \+ 2 descriptors in a ring of 4")


@pytest.mark.parametrize("ident", [0, 7, 8, 1000, 0xFFFF])
def test_2_8_buffer_ids_are_the_drivers_choice(
    driver: PackedDriver, queue: VirtQueue, ident: int
) -> None:
    """§2.8.13: id names the buffer, nothing bounds it but its 16 bits."""
    driver.offer_chains([(ident, [(BUF, 1, 0)])])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain.head, 0)
    assert list(driver.used()) == [(ident, 0)]


@pytest.mark.parametrize(
    ("addr", "length"), [(RAM, 1), (RAM - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 1, 0xFFFF_FFFF)]
)
def test_2_8_5_buffers_outside_ram_are_refused(
    driver: PackedDriver, queue: VirtQueue, addr: int, length: int
) -> None:
    """§2.8.4: Element Address is physical; what is not RAM, or wraps, is no element."""
    driver.offer_chains([(0, [(BUF, 1, N), (addr, length, W)])])
    refused(driver, queue, "is not")


def test_2_8_zero_length_elements_are_legal(driver: PackedDriver, queue: VirtQueue) -> None:
    """Elements without bytes leave no view, and still take their place in the ring."""
    driver.submit(
        driver.place_at(
            [Segment(BUF, 0, False), Segment(BUF, 3, False), Segment(BUF, 0, True)], indirect=False
        )
    )
    chain = queue.pop()
    assert chain is not None
    assert (len(chain.readable), len(chain.writable)) == (1, 0)
    queue.push(chain.head, 0)
    assert len(driver.collect()) == 1
    echo(driver, queue, 8, 3)


def test_2_8_15_readable_buffers_cannot_be_written(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.15: a device MUST NOT write to a device-readable buffer; here it cannot."""
    driver.add([b"constant"], [4])
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(TypeError):
        chain.readable[0][0] = 0
    chain.writable[0][:] = b"done"


# §2.8.7 Indirect descriptors.


def table(driver: PackedDriver, *descs: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Write an indirect table (addr, len, id, flags); return the element that names it."""
    data = b"".join(DESC.pack(*desc) for desc in descs)
    driver.memory.write(BUF, data)
    return BUF, len(data), INDIRECT


def test_2_8_7_entries_follow_one_another(driver: PackedDriver, queue: VirtQueue) -> None:
    """§2.8.7: additional descriptors come immediately afterwards, to the end of the table."""
    element = table(driver, (BUF + 64, 1, 9, 0), (BUF + 65, 2, 0, 0), (BUF + 67, 4, 0, W))
    driver.offer_chains([(3, [element])])
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (3, 3, 4)


def test_2_8_7_flags_but_write_and_ids_in_a_table_are_ignored(
    driver: PackedDriver, queue: VirtQueue
) -> None:
    """§2.8.7: WRITE is the only valid flag in a table; others, and the id, are ignored."""
    element = table(driver, (BUF + 64, 1, 77, 0xFFFD), (BUF + 65, 2, 78, 0xFFFF))
    driver.offer_chains([(3, [element])])
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (3, 1, 2)


def test_2_8_7_write_flag_of_the_indirect_descriptor_is_ignored(
    driver: PackedDriver, queue: VirtQueue
) -> None:
    """§2.8.7: in a descriptor with INDIRECT set, WRITE is ignored."""
    addr, length, flags = table(driver, (BUF + 64, 1, 0, 0))
    driver.offer_chains([(3, [(addr, length, flags | W)])])
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (1, 0)


def test_2_8_19_not_without_the_feature() -> None:
    """§2.8.19: INDIRECT is not set unless the feature was negotiated."""
    driver = make_driver()
    queue = driver.open_device()
    driver.offer_chains([(0, [table(driver, (BUF + 64, 1, 0, 0))])])
    refused(driver, queue, "not negotiated")


@pytest.mark.parametrize("at", [0, 1])
def test_2_8_19_no_indirect_descriptor_in_a_list(
    driver: PackedDriver, queue: VirtQueue, at: int
) -> None:
    """§2.8.19: no descriptor with INDIRECT is part of a list linked by NEXT."""
    addr, length, flags = table(driver, (BUF + 64, 1, 0, 0))
    elements = [(addr, length, flags if i == at else 0) for i in range(2)]
    driver.offer_chains(
        [(0, [(a, n, f | (N if i == 0 else 0)) for i, (a, n, f) in enumerate(elements)])]
    )
    refused(driver, queue, "chained")


@pytest.mark.parametrize("length", [0, 8, 24, 16 * MAX_CHAIN + 16, 0xFFFF_FFF0])
def test_2_8_7_table_length_is_bounded(driver: PackedDriver, queue: VirtQueue, length: int) -> None:
    """§2.8.7: a table has len / 16 entries: at least one, no part of one, a bounded number."""
    driver.offer_chains([(0, [(BUF, length, INDIRECT)])])
    refused(driver, queue, f"indirect table of {length} bytes")


def test_2_8_7_table_may_cross_a_seam_of_ram() -> None:
    """A table contiguous in guest addresses is read whole, whatever the host's mappings."""
    memory = make_memory(16 << 12, [Region(0, 8 << 12, 0), Region(8 << 12, 4 << 12, 12 << 12)])
    driver = PackedDriver(memory, 8, 0, F_RING_PACKED | F_INDIRECT_DESC)
    queue = driver.open_device()
    seam = 8 << 12
    memory.write(seam - 24, b"".join(DESC.pack(seam + 64, n, 0, 0) for n in (1, 2, 3)))
    driver.offer_chains([(0, [(seam - 24, 48, INDIRECT)])])
    chain = queue.pop()
    assert chain is not None
    assert chain.readable_bytes == 6
