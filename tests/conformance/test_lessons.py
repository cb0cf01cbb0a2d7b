"""Defects other monitors had in their virtqueues, one test for each, named after it.

A test here fails on an implementation that has the defect. Those of transports and devices have
their tests beside these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import GuestError
from devices.chain import DESC, MAX_CHAIN, Desc, build, walk
from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.inflight import Inflight, inflight_bytes
from devices.virtqueue import Chain, QueueState, VirtQueue, open_queue
from tests.conformance.ring_lab import BASE, BUF, INDIRECT, RAM, N, W
from tools.viodriver import PackedDriver, Segment, SplitDriver, make_memory, open_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Element = tuple[int, int, int]  # addr, len, flags
both_layouts = pytest.mark.parametrize(
    "layout", [pytest.param(0, id="split"), pytest.param(F_RING_PACKED, id="packed")]
)


def start(layout: int, size: int = 8, memory: GuestMemory | None = None) -> Any:
    driver = open_driver(memory or make_memory(RAM), size, BASE, layout | F_INDIRECT_DESC)
    return driver, driver.open_device()


def offer(driver: SplitDriver | PackedDriver, head: int, *elements: Element) -> None:
    """Offer a chain named `head`; its descriptors are written as they are."""
    if isinstance(driver, PackedDriver):
        driver.offer_chains([(head, list(elements))])
        return
    for i, (addr, length, flags) in enumerate(elements):
        driver.desc(head + i, addr, length, flags, head + i + 1)
    driver.offer(head)


def table(driver: SplitDriver | PackedDriver, gpa: int, elements: Sequence[Element]) -> int:
    """Write an indirect table of the driver's layout; return its length."""
    packed = isinstance(driver, PackedDriver)
    rows = [
        DESC.pack(addr, length, 0, flags) if packed else DESC.pack(addr, length, flags, i + 1)
        for i, (addr, length, flags) in enumerate(elements)
    ]
    driver.memory.write(gpa, b"".join(rows))
    return DESC.size * len(rows)


def refused(queue: VirtQueue) -> None:
    """Check that pop refuses, and that nothing is in flight that was not before."""
    before = (queue.save(), queue.nr_in_flight)
    with pytest.raises(GuestError):
        queue.pop()
    assert (queue.save(), queue.nr_in_flight) == before


def pop(queue: VirtQueue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


@both_layouts
@pytest.mark.parametrize("length", [0, 8, 0xFFFF_FFF0, 16 * MAX_CHAIN + 16])
def test_cve_2011_2212_indirect_table_is_guest_data(layout: int, length: int) -> None:
    """An indirect table's byte length is bounded before anything is read by it."""
    driver, queue = start(layout)
    offer(driver, 0, (BUF, length, INDIRECT))
    refused(queue)


def test_cve_2011_2212_no_nesting() -> None:
    """A table that names a table, or itself, ends in an error at once."""
    driver, queue = start(0)
    length = table(driver, BUF, [(BUF, 16, INDIRECT)])
    offer(driver, 0, (BUF, length, INDIRECT))
    refused(queue)


@both_layouts
def test_cve_2011_2212_segments_are_capped(layout: int) -> None:
    """The longest table there may be gives a chain that one preadv takes."""
    driver, queue = start(layout)
    flags = W if layout else W | N
    elements = [(BUF + 0x8000, 1, flags)] * (MAX_CHAIN - 1) + [(BUF + 0x8000, 1, W)]
    offer(driver, 0, (BUF, table(driver, BUF, elements), INDIRECT))
    assert len(pop(queue).writable) == MAX_CHAIN


@both_layouts
def test_cve_2016_5403_in_flight_never_exceeds_the_ring(layout: int) -> None:
    """A driver that offers the same places over and over runs into the ring's size."""
    driver, queue = start(layout, size=4)
    for lap in range(3):
        for head in range(4):
            ident = 4 * lap + head if layout else head
            offer(driver, ident, (BUF, 1, 0))
            if lap == 0:
                pop(queue)
            else:
                refused(queue)
                break
        assert queue.nr_in_flight == 4


@both_layouts
def test_cve_2026_45782_same_head_twice_in_flight(layout: int) -> None:
    """The second offer of a head in flight is a broken driver, not a second request."""
    driver, queue = start(layout)
    offer(driver, 3, (BUF, 1, 0))
    chain = pop(queue)
    offer(driver, 3, (BUF, 1, 0))
    refused(queue)
    queue.push(chain.head, 0)
    assert pop(queue).head == 3  # once it is back it may be offered again


@both_layouts
def test_cve_2016_6490_zero_length_buffers_make_progress(layout: int) -> None:
    """Progress is by descriptor: chains without a byte are counted like others."""
    driver, queue = start(layout)
    for head in range(0, 8, 2):
        offer(driver, head, (0, 0, N), (1 << 63, 0, W))
    chains = queue.pop_batch(100)
    assert [(chain.readable, chain.writable) for chain in chains] == [([], [])] * 4
    loop_driver, loop = start(0)
    loop_driver.desc(0, 0, 0, N, 0)
    loop_driver.offer(0)
    refused(loop)


POISON = DESC.pack(1 << 50, 0xFFFF_FFFF, 0xFFFF, 0xFFFF)
SINGLE_FETCH = pytest.mark.parametrize(
    "elements",
    [
        pytest.param([(BUF, 5, N), (BUF + 16, 7, W)], id="direct"),
        pytest.param([(BUF + 64, 32, INDIRECT)], id="indirect"),
    ],
)


@SINGLE_FETCH
def test_xsa_155_cve_2015_8550_cve_2020_14375_single_fetch(
    elements: list[Element], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is used: the guest spoils each descriptor as soon as it is read."""
    driver, queue = start(0)
    driver.memory.write(BUF, b"first")
    table(driver, BUF + 64, [(BUF, 5, N), (BUF + 16, 7, W)])

    def read_and_spoil(rows: memoryview, at: int) -> tuple[int, ...]:
        row = DESC.unpack_from(rows, at)
        driver.memory.write((BASE if len(rows) == 16 * 8 else BUF + 64) + at, POISON)
        return row

    monkeypatch.setattr("devices.chain._unpack", read_and_spoil)
    offer(driver, 2, *elements)
    chain = pop(queue)
    assert (chain.head, b"".join(chain.readable), chain.writable_bytes) == (2, b"first", 7)


@SINGLE_FETCH
def test_xsa_155_cve_2020_14375_single_fetch_packed(
    elements: list[Element], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a packed ring: all of it is spoiled between copying and checking."""
    driver, queue = start(F_RING_PACKED)
    driver.memory.write(BUF, b"first")
    table(driver, BUF + 64, [(BUF, 5, 0), (BUF + 16, 7, W)])

    def spoil_and_build(memory: GuestMemory, head: int, copies: list[Desc]) -> Chain:
        memory.write(BASE, POISON * 8)
        memory.write(BUF + 64, POISON * 2)
        return build(memory, head, copies)

    monkeypatch.setattr("devices.packed.build", spoil_and_build)
    offer(driver, 2, *elements)
    chain = pop(queue)
    assert (chain.head, b"".join(chain.readable), chain.writable_bytes) == (2, b"first", 7)


def test_xsa_155_flags_are_read_once() -> None:
    """A packed descriptor's flags, which say that it is available, are not read a second time."""
    driver, queue = start(F_RING_PACKED)
    offer(driver, 0, (BUF, 16, 0))

    class Shifty:
        """Shows the flags, and changes them at once."""

        def __getitem__(self, index: int) -> int:
            flags = int(driver.available_flags)
            driver.set_flags(0, flags | INDIRECT | N)
            return flags

    queue._ring16 = Shifty()
    chain = pop(queue)
    assert (chain.readable_bytes, chain.writable_bytes) == (16, 0)


@both_layouts
@pytest.mark.parametrize("size", [0, -1, 1 << 16])
def test_cve_2017_17381_senseless_queue_is_not_enabled(layout: int, size: int) -> None:
    """A size that is no size is refused, not divided by."""
    with pytest.raises(GuestError):
        open_queue(make_memory(RAM), size, BASE, 0x4000, 0x5000, features=layout)


def test_cve_2017_17381_senseless_alignment_is_not_enabled() -> None:
    """A used ring put where its words are not aligned would tear them; refused."""
    for parts in ((BASE + 1, 0x4000, 0x5000), (BASE, 0x4001, 0x5000), (BASE, 0x4000, 0x5001)):
        for layout in (0, F_RING_PACKED):
            with pytest.raises(GuestError):
                open_queue(make_memory(RAM), 8, *parts, features=layout)


@both_layouts
def test_cve_2018_1059_guest_contiguous_is_not_host_contiguous(layout: int) -> None:
    """A buffer over two regions is split; nothing between them in the host is ever touched."""
    half = RAM // 2
    memory = make_memory(2 * RAM, [Region(0, half, 0), Region(half, half, RAM)])
    driver, queue = start(layout, memory=memory)
    offer(driver, 0, (half - 8, 16, W))
    pieces = pop(queue).writable
    assert [len(piece) for piece in pieces] == [8, 8]
    for piece in pieces:
        piece[:] = b"\xaa" * 8
    assert memory.read(half - 8, 16) == b"\xaa" * 16


@both_layouts
def test_cve_2019_3900_one_wakeup_has_a_budget(layout: int) -> None:
    """However fast the driver adds, a wake-up ends; the rest is still there for the next one."""
    driver, queue = start(layout)
    for _ in range(4):
        driver.add([b"x"], indirect=False)
    batch = queue.pop_batch(3)
    assert len(batch) == 3
    for chain in batch:
        queue.push(chain.head, 0)
        driver.collect()
        driver.add([b"x"], indirect=False)
    assert len(queue.pop_batch(3)) == 3
    assert queue.has_work()


@both_layouts
def test_cve_2019_9547_circular_chain(layout: int) -> None:
    """A chain that leads back into itself ends after as many steps as there are descriptors."""
    driver, queue = start(layout)
    if layout:
        for place in range(8):
            driver.desc(place, BUF, 1, 0, driver.available_flags | N)
    else:
        driver.desc(0, BUF, 1, N, 1)
        driver.desc(1, BUF, 1, N, 0)
        driver.offer(0)
    refused(queue)


def test_cve_2019_9547_circular_table() -> None:
    """The same within an indirect table; that of a packed ring has no links."""
    driver, queue = start(0)
    driver.memory.write(BUF, DESC.pack(BUF, 1, N, 1) + DESC.pack(BUF, 1, N, 0))
    offer(driver, 0, (BUF, 32, INDIRECT))
    refused(queue)


NEAR_SEAMS = st.sampled_from([0, 0x8000, 0x10000, 1 << 32, (1 << 32) + 0x8000, 1 << 64])


@given(
    rows=st.lists(
        st.tuples(
            st.builds(
                lambda at, by: max(0, min(at + by, (1 << 64) - 1)), NEAR_SEAMS, st.integers(-9, 9)
            ),
            st.sampled_from([0, 1, 2, 8, 17, 0x8000, 0xFFFF_FFFF]),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_cve_2020_10725_fast_path_checks_like_the_slow_one(
    rows: list[tuple[int, int, bool]],
) -> None:
    """Chains at the seams of RAM: views equal those of the plain accessor, or both refuse."""
    memory = SEAMED
    rows.sort(key=lambda row: row[2])
    copies = [(addr, length, W if write else 0) for addr, length, write in rows]
    last = len(rows) - 1
    linked = b"".join(
        DESC.pack(addr, length, flags | (N if i < last else 0), i + 1)
        for i, (addr, length, flags) in enumerate(copies)
    )
    ways: tuple[Callable[[], Chain], ...] = (
        lambda: build(memory, 0, copies),
        lambda: walk(memory, linked, len(rows), 0, indirect=False),
    )
    try:
        expected = [[memory.views(a, n) for a, n, w in rows if w is kind] for kind in (False, True)]
    except GuestError:
        for way in ways:
            with pytest.raises(GuestError):
                way()
        return
    for way in ways:
        chain = way()
        for got, lists in zip((chain.readable, chain.writable), expected, strict=True):
            want = [view for views in lists for view in views]
            assert [(len(view), view.obj) for view in got] == [
                (len(view), view.obj) for view in want
            ]
            assert [bytes(view[:9]) for view in got] == [bytes(view[:9]) for view in want]
        assert all(view.readonly for view in chain.readable)
        assert not any(view.readonly for view in chain.writable)


def _seamed() -> GuestMemory:
    """Return four regions: two that meet only in guest addresses, a hole, two that are one."""
    memory = make_memory(
        0x30000,
        [
            Region(0, 0x8000, 0x10000),
            Region(0x8000, 0x8000, 0),
            Region(1 << 32, 0x8000, 0x18000),
            Region((1 << 32) + 0x8000, 0x8000, 0x20000),
        ],
    )
    for region in memory.regions:
        memory.write(region.gpa, bytes(i * 7 + i // 256 & 0xFF for i in range(region.size)))
    return memory


SEAMED = _seamed()


@both_layouts
def test_cve_2021_3839_inflight_area_is_checked_against_the_queue(layout: int) -> None:
    """An area made for fewer entries is not indexed with more."""
    packed = bool(layout)
    area = memoryview(bytearray(inflight_bytes(64, packed=packed)))
    Inflight(area, 4, packed=packed).format(0)
    driver, _ = start(layout)
    with pytest.raises(GuestError, match="size 4"):
        driver.open_device(area)


@both_layouts
def test_cve_2021_3748_cve_2022_26353_every_error_keeps_the_balance(layout: int) -> None:
    """No error exit of pop leaks: nothing is in flight, nothing was given back.

    And a queue enabled on the same memory again serves on.
    """
    breaks: list[Callable[[Any], None]] = [
        lambda d: offer(d, 0, (1 << 50, 1, 0)),
        lambda d: offer(d, 0, (BUF, 1, W | N), (BUF, 1, 0)),
        lambda d: offer(d, 0, (BUF, 24, INDIRECT)),
        lambda d: offer(d, 0, (1 << 50, 16, INDIRECT)),
        lambda d: offer(d, 0, (BUF, 1, N), (BUF, 16, INDIRECT | N), (BUF, 1, 0)),
    ]
    for break_it in breaks:
        driver, queue = start(layout)
        break_it(driver)
        refused(queue)
        assert queue.nr_in_flight == 0
        assert driver.collect() == []
        assert not queue.should_call()
        queue.reset()
        driver, queue = start(layout, memory=driver.memory)
        driver.add([b"fine"])
        assert bytes(pop(queue).readable[0]) == b"fine"


def test_cve_2022_2132_header_in_any_number_of_descriptors() -> None:
    """A header is so many bytes of the chain, whatever descriptors they come in."""
    for cuts in ([12], [1] * 12, [5, 7], [0, 12, 0]):
        driver, queue = start(0, size=16)
        header = bytes(range(12))
        at = 0
        segments = []
        driver.memory.write(BUF, header)
        for cut in cuts:
            segments.append(Segment(BUF + at, cut, writable=False))
            at += cut
        driver.submit(driver.place_at(segments, indirect=False))
        assert b"".join(pop(queue).readable) == header


@both_layouts
def test_cve_2022_26354_detached_chain_leaves_no_trace(layout: int) -> None:
    """A device that gives up on a chain detaches it: its state does not outlive it."""
    driver, queue = start(layout)
    driver.add([b"x"])
    chain = pop(queue)
    queue.detach(chain.head)
    assert queue.nr_in_flight == 0
    with pytest.raises(KeyError):
        queue.push(chain.head, 0)


def test_cve_2023_41051_a_view_is_as_long_as_was_asked() -> None:
    """No accessor returns fewer bytes than asked for: it returns them all, or refuses."""
    memory = SEAMED
    for gpa in (0, 0x7FF8, 0xFFF8, 1 << 32, (1 << 32) + 0xFFF0):
        for length in (1, 8, 9, 16, 0x8000):
            try:
                got = sum(len(view) for view in memory.views(gpa, length))
            except GuestError:
                continue
            assert got == length


@both_layouts
def test_cve_2026_5747_size_is_that_of_enable(layout: int) -> None:
    """The queue keeps the size it was enabled with: what lies behind it in memory is not ring."""
    driver, queue = start(layout, size=4)
    if layout:
        flags = driver.available_flags | N
        driver.memory.write(BASE, DESC.pack(BUF, 1, 0, flags) * 4 + DESC.pack(BUF, 1, 0, flags ^ N))
    else:
        driver.memory.write(BASE + 16 * 4, DESC.pack(BUF, 1, 0, 0))
        driver.offer(4)
    refused(queue)


@both_layouts
def test_fc_5958_after_a_restore_nobody_waits(layout: int) -> None:
    """A kick or a call lost while a VM was saved is made up for: look once, call once."""
    driver, queue = start(layout)
    driver.add([b"before"])
    driver.kick_needed()  # the kick that nobody received
    state: QueueState = queue.save()
    restored = driver.open_device()
    restored.load(state)
    assert restored.should_call()
    assert restored.enable_kicks()


@both_layouts
def test_vhost_343_chains_offered_before_enable_are_found(layout: int) -> None:
    """After enabling a ring the device polls once: enable_kicks says that something is there."""
    driver, _ = start(layout)
    driver.add([b"early"])
    queue = driver.open_device()
    assert queue.enable_kicks()
    assert bytes(pop(queue).readable[0]) == b"early"


@both_layouts
def test_spdk_3766_entry_zero_is_not_a_default(layout: int) -> None:
    """A predecessor that died before its first completion leaves no batch, not one of head 0."""
    driver, _ = start(layout)
    area = memoryview(bytearray(inflight_bytes(8, packed=bool(layout))))
    token = driver.add([b"x"])
    pop(driver.open_device(area))
    [chain] = driver.open_device(area).resubmit()
    successor = driver.open_device(area)
    assert [again.head for again in successor.resubmit()] == [chain.head]
    successor.push(chain.head, 0)
    assert [used.token for used in driver.collect()] == [token]


@both_layouts
@pytest.mark.parametrize("length", [0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_vmd_69_003_descriptor_lengths_never_overflow(layout: int, length: int) -> None:
    """Lengths around each sign bit are compared as what they are."""
    for addr in (BUF, RAM - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1):
        driver, queue = start(layout)
        offer(driver, 0, (addr, length, W))
        refused(queue)
