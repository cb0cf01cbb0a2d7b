"""virtio 1.2 §2.7.4 and §2.7.5: framing, descriptor chains and indirect tables of split virtqueues.

Names give the clause. A driver's "MUST NOT" is tested as the device's answer to one that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.chain import DESC, MAX_CHAIN
from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import Region
from devices.virtqueue import VirtQueue
from tests.conformance.ring_lab import BASE, BUF, INDIRECT, RAM, N, W, refused
from tools.viodriver import Segment, SplitDriver, make_memory, open_driver

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


# §2.7.4 Message framing.


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("cut", [1, 7, 16, 100])
def test_2_7_4_1_framing_means_nothing(cut: int, indirect: bool) -> None:
    """§2.7.4.1: the device MUST NOT make assumptions about the arrangement of descriptors.

    The same bytes, cut into pieces of any length, are the same request.
    """
    data = bytes(range(100))
    driver = SplitDriver(make_memory(RAM), 256, BASE, F_INDIRECT_DESC)
    queue = driver.open_device()
    parts = [data[i : i + cut] for i in range(0, 100, cut)]
    driver.submit(driver.place(parts, [len(part) for part in parts], indirect=indirect))
    chain = queue.pop()
    assert chain is not None
    assert b"".join(chain.readable) == data
    assert (chain.readable_bytes, chain.writable_bytes) == (100, 100)
    assert sum(map(len, chain.writable)) == 100


def test_2_7_4_2_readable_after_writable_is_refused(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.4.2: a driver MUST place writable elements after readable ones."""
    driver.desc(0, BUF, 16, N | W, 1)
    driver.desc(1, BUF, 16, 0)
    driver.offer(0)
    refused(driver, queue, "readable descriptor after a writable")


@pytest.mark.parametrize(
    "segments", [[(0, False)], [(0, True)], [(0, False), (0, True), (5, True)]]
)
def test_2_7_4_zero_length_elements_are_legal(
    driver: SplitDriver, queue: VirtQueue, segments: list[tuple[int, bool]]
) -> None:
    """Elements without bytes leave no view, and the queue goes on."""
    driver.submit(
        driver.place_at([Segment(BUF, n, writable) for n, writable in segments], indirect=False)
    )
    chain = queue.pop()
    assert chain is not None
    assert all(len(view) for view in chain.readable + chain.writable)
    assert chain.writable_bytes == sum(n for n, writable in segments if writable)
    assert queue.pop() is None


# §2.7.5 The descriptor table.


def test_2_7_5_1_readable_buffers_cannot_be_written(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.1: a device MUST NOT write to a device-readable buffer; here it cannot."""
    driver.add([b"constant"], [4], indirect=False)
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(TypeError):
        chain.readable[0][0] = 0
    chain.writable[0][:] = b"done"


def test_2_7_5_1_descriptor_table_is_never_written(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.1: a device MUST NOT write to any descriptor table entry; nor to the avail ring."""
    for size in range(1, 4):
        driver.submit(driver.place([b"a" * size], [size], indirect=False))
    table = driver.memory.read(driver.desc_gpa, 16 * 8)
    avail = driver.memory.read(driver.avail_gpa, 6 + 2 * 8)
    while (chain := queue.pop()) is not None:
        queue.push(chain.head, 1)
    queue.enable_kicks()
    queue.disable_kicks()
    assert driver.memory.read(driver.desc_gpa, 16 * 8) == table
    assert driver.memory.read(driver.avail_gpa, 6 + 2 * 8) == avail


def test_2_7_5_2_a_loop_is_refused(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.2: loops in the descriptor chain are forbidden; the walk ends after queue size."""
    driver.desc(0, BUF, 16, N, 0)
    driver.offer(0)
    refused(driver, queue, "chain longer than 8")


def test_2_7_5_2_chain_of_4_gib_is_refused() -> None:
    """§2.7.5.2: no chain is longer than 2³² bytes in total; used.len could not say how much."""
    memory = make_memory(2 << 20, [Region(0, 1 << 20, 0), Region(1 << 32, 1 << 20, 1 << 20)])
    driver = SplitDriver(memory, 1024, BASE, 0)
    queue = driver.open_device()
    for i in range(1024):
        driver.desc(i, 1 << 32, 1 << 20, N if i < 1023 else 0, i + 1)
    driver.offer(1)  # 1023 MiB: long, but legal
    chain = queue.pop()
    assert chain is not None
    assert chain.readable_bytes == 1023 << 20
    huge = make_memory(1 << 33)
    driver = SplitDriver(huge, 8, BASE, 0)
    queue = driver.open_device()
    driver.desc(0, 1 << 20, 0xFFFF_FFFF, N, 1)
    driver.desc(1, 1 << 20, 1)
    driver.offer(0)
    refused(driver, queue, "chain of 4294967296 bytes")


@pytest.mark.parametrize("index", [8, 9, 255, 0xFFFF])
def test_2_7_5_indices_outside_the_table_are_refused(
    driver: SplitDriver, queue: VirtQueue, index: int
) -> None:
    """§2.7.5: the table has queue-size entries, for a head and for `next` alike."""
    driver.offer(index)
    refused(driver, queue, f"descriptor {index} in a table of 8")
    driver = SplitDriver(driver.memory, 8, BASE, 0)
    queue = driver.open_device()
    driver.desc(0, BUF, 16, N, index)
    driver.offer(0)
    refused(driver, queue, f"descriptor {index} in a table of 8")


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (RAM, 1),
        (RAM - 1, 2),
        (RAM - 16, 0xFFFF_FFFF),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 0xFFFF_FFFF),
        ((1 << 63) - 1, 2),
    ],
)
def test_2_7_5_buffers_outside_ram_are_refused(
    driver: SplitDriver, queue: VirtQueue, addr: int, length: int
) -> None:
    """§2.7.5: addr is a physical address; what is not RAM, or wraps, is no buffer."""
    driver.desc(0, BUF, 16, N, 1)
    driver.desc(1, addr, length, W)
    driver.offer(0)
    refused(driver, queue, "is not")


def test_2_7_5_unknown_flags_are_ignored(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5: reserved flag bits carry no meaning."""
    driver.desc(0, BUF, 16, 0xFFF8)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.readable_bytes == 16


# §2.7.5.3 Indirect descriptors.


def table(driver: SplitDriver, gpa: int, *descs: tuple[int, int, int, int]) -> int:
    """Write an indirect table at `gpa`; return its length."""
    data = b"".join(DESC.pack(*desc) for desc in descs)
    driver.memory.write(gpa, data)
    return len(data)


def test_2_7_5_3_2_write_flag_of_the_indirect_descriptor_is_ignored(
    driver: SplitDriver, queue: VirtQueue
) -> None:
    """§2.7.5.3.2: the device MUST ignore WRITE in the descriptor that refers to a table."""
    length = table(driver, BUF, (BUF + 64, 3, N, 1), (BUF + 128, 5, W, 0))
    driver.desc(0, BUF, length, INDIRECT | W)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (3, 5)


@pytest.mark.parametrize("direct", [0, 1, 3, 7])
def test_2_7_5_3_2_direct_descriptors_may_come_first(
    driver: SplitDriver, queue: VirtQueue, direct: int
) -> None:
    """§2.7.5.3.2: the device MUST handle direct descriptors followed by a single indirect one."""
    for i in range(direct):
        driver.desc(i, BUF + 16 * i, 1, N, i + 1)
    length = table(driver, BUF, (BUF + 256, 2, N, 2), (0, 0, INDIRECT, 0), (BUF + 512, 4, W, 0))
    driver.desc(direct, BUF, length, INDIRECT)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (direct + 2, 4)


def test_2_7_5_3_table_is_chained_by_next(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.3: the first entry is number 0, the others are chained by next in any order."""
    driver.memory.write(BUF + 256, b"abc")
    parts = [(BUF + 256, 1, N, 2), (BUF + 258, 1, 0, 0), (BUF + 257, 1, N, 1)]
    driver.desc(5, BUF, table(driver, BUF, *parts), INDIRECT)
    driver.offer(5)
    chain = queue.pop()
    assert chain is not None
    assert b"".join(chain.readable) == b"abc"
    assert chain.head == 5


def test_2_7_5_3_1_not_without_the_feature() -> None:
    """§2.7.5.3.1: INDIRECT is not set unless the feature was negotiated."""
    driver = SplitDriver(make_memory(RAM), 8, BASE, 0)
    queue = driver.open_device()
    driver.desc(0, BUF, table(driver, BUF, (BUF + 64, 3, 0, 0)), INDIRECT)
    driver.offer(0)
    refused(driver, queue, "not negotiated")


def test_2_7_5_3_1_no_table_within_a_table(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.3.1: only one table per descriptor."""
    inner = table(driver, BUF + 1024, (BUF, 1, 0, 0))
    driver.desc(0, BUF, table(driver, BUF, (BUF + 1024, inner, INDIRECT, 0)), INDIRECT)
    driver.offer(0)
    refused(driver, queue, "nested")


def test_2_7_5_3_1_no_next_with_indirect(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.3.1: INDIRECT and NEXT are not both set."""
    driver.desc(0, BUF, table(driver, BUF, (BUF + 64, 3, 0, 0)), INDIRECT | N, 1)
    driver.desc(1, BUF, 1)
    driver.offer(0)
    refused(driver, queue, "chained")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * MAX_CHAIN + 16, 0xFFFF_FFF0])
def test_2_7_5_3_table_length_is_bounded(
    driver: SplitDriver, queue: VirtQueue, length: int
) -> None:
    """§2.7.5.3: a table has len / 16 entries: at least one, no part of one, a bounded number."""
    driver.desc(0, BUF, length, INDIRECT)
    driver.offer(0)
    refused(driver, queue, f"indirect table of {length} bytes")


@pytest.mark.parametrize(("in_table", "legal"), [(MAX_CHAIN - 3, True), (MAX_CHAIN - 2, False)])
def test_2_7_5_3_direct_and_indirect_descriptors_count_together(
    driver: SplitDriver, queue: VirtQueue, in_table: int, legal: bool
) -> None:
    """§2.7.4.1: the device MAY limit a chain; all of its descriptors count, wherever they are."""
    for i in range(3):
        driver.desc(i, BUF, 1, N, i + 1)
    rows = [(BUF, 1, N if i < in_table else 0, i) for i in range(1, in_table + 1)]
    driver.desc(3, BUF + 64, table(driver, BUF + 64, *rows), INDIRECT)
    driver.offer(0)
    if not legal:
        refused(driver, queue, "chain longer than")
        return
    chain = queue.pop()
    assert chain is not None
    assert len(chain.readable) == MAX_CHAIN


def test_2_7_5_3_table_outside_ram_is_refused(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.3: a table lies in memory, all of it."""
    driver.desc(0, RAM - 16, 32, INDIRECT)
    driver.offer(0)
    refused(driver, queue, "not")


def test_2_7_5_3_loop_in_a_table_is_refused(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.2 holds in a table: a loop ends the walk with an error."""
    driver.desc(0, BUF, table(driver, BUF, (BUF, 1, N, 1), (BUF, 1, N, 0)), INDIRECT)
    driver.offer(0)
    refused(driver, queue, "chain longer than 2")


def test_2_7_5_3_index_outside_the_table_is_refused(driver: SplitDriver, queue: VirtQueue) -> None:
    """§2.7.5.3: next stays within the table, though the main table may be larger."""
    driver.desc(0, BUF, table(driver, BUF, (BUF, 1, N, 2), (BUF, 1, 0, 0)), INDIRECT)
    driver.offer(0)
    refused(driver, queue, "descriptor 2 in a table of 2")


def test_2_7_5_3_table_may_cross_a_seam_of_ram() -> None:
    """A table is contiguous in guest addresses; two mappings are our affair."""
    memory = make_memory(16 << 12, [Region(0, 8 << 12, 0), Region(8 << 12, 4 << 12, 12 << 12)])
    driver = SplitDriver(memory, 8, 0, F_INDIRECT_DESC)
    queue = driver.open_device()
    seam = 8 << 12
    driver.memory.write(seam + 1024, b"across")
    length = table(driver, seam - 16, (seam + 1024, 3, N, 1), (seam + 1027, 3, 0, 0))
    driver.desc(0, seam - 16, length, INDIRECT)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert b"".join(chain.readable) == b"across"


@pytest.mark.parametrize("layout", [0, F_RING_PACKED])
def test_2_7_5_buffer_may_cross_a_seam_of_ram(layout: int) -> None:
    """A buffer over two mappings becomes two views, in order; readable ones stay read-only."""
    memory = make_memory(16 << 12, [Region(0, 8 << 12, 0), Region(8 << 12, 4 << 12, 12 << 12)])
    driver = open_driver(memory, 8, 0, layout)
    queue = driver.open_device()
    seam = 8 << 12
    memory.write(seam - 4, b"leftright")
    places = [(seam - 4, 9), (seam, 5), (seam - 4, 4)]  # across, behind it, before it again
    driver.submit(
        driver.place_at(
            [Segment(*place, writable) for writable in (False, True) for place in places]
        )
    )
    chain = queue.pop()
    assert chain is not None
    expected = [b"left", b"right", b"right", b"left"]
    assert [bytes(view) for view in chain.readable] == expected
    assert [bytes(view) for view in chain.writable] == expected
    assert all(view.readonly for view in chain.readable)
    assert not any(view.readonly for view in chain.writable)
    assert chain.writable_bytes == 18


def test_seams_cannot_make_a_chain_longer_than_iov_max() -> None:
    """1024 descriptors that each cross a seam would be 2048 pieces, which no preadv takes."""
    memory = make_memory(64 << 12, [Region(0, 32 << 12, 0), Region(32 << 12, 4 << 12, 60 << 12)])
    driver = SplitDriver(memory, 1024, 0, 0)
    queue = driver.open_device()
    for i in range(1024):
        driver.desc(i, (32 << 12) - 1, 2, N if i < 1023 else 0, i + 1)
    driver.offer(0)
    refused(driver, queue, "more than 1024 pieces")
