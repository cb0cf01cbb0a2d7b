"""The queue's operations beside pop and push: batches, undoing, order, reset, save and load.

Each holds for both layouts. The words are those of QEMU's VirtQueue.
"""

from __future__ import annotations

import pytest

from config.errors import GuestError
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.packed import WRAP
from devices.virtqueue import Chain, QueueState, VirtQueue
from tools.viodriver import PackedDriver, SplitDriver, make_memory, open_driver

BASE = 0x1000
LAYOUTS = [pytest.param(0, id="split"), pytest.param(F_RING_PACKED, id="packed")]
Driver = SplitDriver | PackedDriver

pytestmark = pytest.mark.parametrize("layout", LAYOUTS)


def start(layout: int, features: int = 0, size: int = 8) -> tuple[Driver, VirtQueue]:
    driver = open_driver(make_memory(), size, BASE, layout | features)
    return driver, driver.open_device()


def offer(driver: Driver, *texts: bytes) -> list[int]:
    """Offer requests: one readable byte string, and as many writable bytes."""
    return [driver.add([text], [len(text)]) for text in texts]


def pop(queue: VirtQueue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


def text(chain: Chain) -> bytes:
    return b"".join(chain.readable)


# Batches.


def test_pop_batch_stops_at_its_budget(layout: int) -> None:
    """A device takes at most its budget per wake-up, so no queue starves another."""
    driver, queue = start(layout, size=16)
    offer(driver, b"a", b"b", b"c", b"d", b"e")
    assert [text(chain) for chain in queue.pop_batch(2)] == [b"a", b"b"]
    assert queue.has_work()
    assert [text(chain) for chain in queue.pop_batch(9)] == [b"c", b"d", b"e"]
    assert queue.pop_batch(9) == []
    assert queue.nr_in_flight == 5


def test_pop_batch_keeps_what_came_before_a_broken_chain(layout: int) -> None:
    """Good chains before a bad one are served; the bad one is reported by the next call."""
    driver, queue = start(layout)
    offer(driver, b"a", b"b")
    bad = driver.place_at([])
    bad.segments = (driver.place([b"x"]).segments[0]._replace(gpa=1 << 40),)
    driver.submit(bad)
    assert [text(chain) for chain in queue.pop_batch(9)] == [b"a", b"b"]
    with pytest.raises(GuestError):
        queue.pop_batch(9)


def test_filled_chains_show_only_at_flush(layout: int) -> None:
    """fill() stages, flush() gives back all staged at once, in the order of filling."""
    driver, queue = start(layout)
    tokens = offer(driver, b"a", b"bb", b"ccc")
    one, two, three = queue.pop_batch(3)
    queue.fill(three.head, 3)
    queue.fill(one.head, 1)
    assert driver.collect() == []
    assert not queue.should_call()
    queue.flush()
    assert [(used.token, used.written) for used in driver.collect()] == [
        (tokens[2], 3),
        (tokens[0], 1),
    ]
    assert queue.should_call()
    queue.flush()  # nothing staged: nothing happens
    assert driver.collect() == []
    queue.push(two.head, 2)
    assert [used.token for used in driver.collect()] == [tokens[1]]


def test_filling_a_chain_twice_is_our_bug(layout: int) -> None:
    """A chain is staged once, and only while it is in flight."""
    driver, queue = start(layout)
    offer(driver, b"a")
    chain = pop(queue)
    queue.fill(chain.head, 0)
    with pytest.raises(KeyError):
        queue.fill(chain.head, 0)
    queue.flush()
    with pytest.raises(KeyError):
        queue.fill(chain.head, 0)


def test_push_batch_calls_once(layout: int) -> None:
    """A batch is one publication and one question about a call."""
    driver, queue = start(layout, F_EVENT_IDX)
    tokens = offer(driver, b"a", b"b", b"c")
    driver.enable_calls()
    chains = queue.pop_batch(3)
    queue.push_batch([(chain.head, 1) for chain in chains])
    assert queue.should_call()
    assert not queue.should_call()
    assert [used.token for used in driver.collect()] == tokens
    queue.push_batch([])
    assert driver.collect() == []


def test_drop_all_gives_everything_back_unread(layout: int) -> None:
    """drop_all returns all available chains with length 0; those in flight stay."""
    driver, queue = start(layout)
    tokens = offer(driver, b"a", b"b", b"c")
    kept = pop(queue)
    assert queue.drop_all() == 2
    assert [(used.token, used.written) for used in driver.collect()] == [
        (tokens[1], 0),
        (tokens[2], 0),
    ]
    assert queue.drop_all() == 0
    queue.push(kept.head, 1)
    assert [used.token for used in driver.collect()] == tokens[:1]


# Undoing.


def test_unpop_undoes_the_latest_pop(layout: int) -> None:
    """The chain is found again by the next pop; it is as if nothing had happened."""
    driver, queue = start(layout)
    tokens = offer(driver, b"a", b"b")
    first = pop(queue)
    second = pop(queue)
    before = queue.save()
    queue.unpop(second.head)
    assert queue.has_work()
    assert text(pop(queue)) == b"b"
    assert queue.save() == before
    queue.unpop(second.head)
    queue.unpop(first.head)
    assert queue.nr_in_flight == 0
    assert [text(chain) for chain in queue.pop_batch(9)] == [b"a", b"b"]
    queue.push_batch([(second.head, 0), (first.head, 0)])
    assert [used.token for used in driver.collect()] == tokens[::-1]


def test_unpop_of_another_chain_is_our_bug(layout: int) -> None:
    """Only the latest pop can be undone, and only until its chain is given back."""
    driver, queue = start(layout)
    offer(driver, b"a", b"b")
    first, second = queue.pop_batch(2)
    with pytest.raises(KeyError):
        queue.unpop(first.head)
    queue.push(second.head, 0)
    with pytest.raises(KeyError):
        queue.unpop(second.head)
    with pytest.raises(KeyError):
        queue.unpop(first.head)  # not the latest either, though the youngest in flight


def test_rewind_undoes_several_pops_or_none(layout: int) -> None:
    """rewind(n) goes back n chains; if one of them is back already, nothing changes."""
    driver, queue = start(layout, size=16)
    offer(driver, b"a", b"bb", b"ccc", b"dddd")
    chains = queue.pop_batch(4)
    queue.push(chains[1].head, 0)
    assert not queue.rewind(3)
    assert not queue.rewind(5)
    assert queue.rewind(2)
    assert queue.nr_in_flight == 1
    assert [text(chain) for chain in queue.pop_batch(9)] == [b"ccc", b"dddd"]
    assert queue.rewind(0)


def test_undoing_unstages_too(layout: int) -> None:
    """A chain that was staged and then rewound is not given back, and can be staged again."""
    driver, queue = start(layout)
    tokens = offer(driver, b"a")
    queue.fill(pop(queue).head, 1)
    assert queue.rewind(1)
    queue.flush()
    assert driver.collect() == []
    queue.fill(pop(queue).head, 1)
    queue.flush()
    assert [used.token for used in driver.collect()] == tokens


def test_undoing_works_across_the_end_of_the_ring(layout: int) -> None:
    """Cursors go back over the wrap as they came."""
    driver, queue = start(layout, size=4)
    for i in range(20):
        offer(driver, *[bytes([i]), bytes([i + 100])][: 1 + i % 2])
        before = queue.save()
        chains = queue.pop_batch(4)
        assert queue.rewind(len(chains))
        assert queue.save() == before
        for chain in queue.pop_batch(4):
            queue.push(chain.head, 0)
        driver.collect()


def test_detach_forgets_a_chain(layout: int) -> None:
    """A detached chain is not given back; the others are, and their number is right."""
    driver, queue = start(layout)
    tokens = offer(driver, b"a", b"b")
    one, two = queue.pop_batch(2)
    queue.fill(one.head, 0)
    queue.detach(one.head)
    queue.flush()
    assert queue.nr_in_flight == 1
    with pytest.raises(KeyError):
        queue.push(one.head, 0)
    queue.push(two.head, 0)
    assert [used.token for used in driver.collect()] == tokens[1:]


# Order.


def test_in_order_holds_completions_back(layout: int) -> None:
    """§6.2: with IN_ORDER chains become used in the order they were made available."""
    driver, queue = start(layout, F_IN_ORDER)
    tokens = offer(driver, b"a", b"b", b"c", b"d")
    one, two, three, four = queue.pop_batch(4)
    seen: list[int] = []
    for chain in (two, four, one, three):
        queue.push(chain.head, 1)
        seen.append(len(driver.collect()))
    assert seen == [0, 0, 2, 2]
    assert queue.nr_in_flight == 0
    more = offer(driver, b"e", b"f")
    chains = queue.pop_batch(2)
    queue.push_batch([(chain.head, 1) for chain in reversed(chains)])
    assert [used.token for used in driver.collect()] == more
    assert tokens[-1] < more[0]


# Reset.


def test_2_6_1_reset_queue_does_nothing_more(layout: int) -> None:
    """§2.6.1.1.1, §2.4.1: after a reset, no requests are executed and no notifications sent.

    Nor is the ring touched by a completion that comes late.
    """
    driver, queue = start(layout, F_EVENT_IDX | F_INDIRECT_DESC)
    offer(driver, b"a", b"b", b"c")
    one, two = queue.pop_batch(2)
    queue.fill(two.head, 1)
    driver.enable_calls()
    queue.reset()
    before = driver.memory.read(0, 1 << 20)
    assert not queue.live
    assert queue.pop() is None
    assert queue.pop_batch(8) == []
    assert queue.drop_all() == 0
    queue.push(one.head, 1)
    queue.flush()
    assert not queue.should_call()
    assert not queue.enable_kicks()
    queue.disable_kicks()
    assert driver.memory.read(0, 1 << 20) == before


def test_2_6_1_re_enabled_queue_starts_afresh(layout: int) -> None:
    """§2.6.1.1.1, §2.6.1.2.1: state is the default again, with what the driver configured anew."""
    driver, queue = start(layout)
    offer(driver, b"a", b"b")
    queue.pop()
    queue.reset()
    again = open_driver(driver.memory, 4, 0x9000, layout)
    queue = again.open_device()
    assert queue.size == 4
    assert queue.save() == ((WRAP, WRAP) if layout else (0, 0))
    tokens = offer(again, b"c")
    chain = pop(queue)
    assert text(chain) == b"c"
    queue.push(chain.head, 0)
    assert [used.token for used in again.collect()] == tokens


# Saving and loading.


def test_load_continues_where_save_was(layout: int) -> None:
    """A queue restored elsewhere goes on at the same places, and owes the driver a call."""
    driver, queue = start(layout, size=4)
    for _ in range(3):
        offer(driver, b"x")
        queue.push(pop(queue).head, 0)
        driver.collect()
    tokens = offer(driver, b"a", b"b")
    first = pop(queue)
    queue.unpop(first.head)
    state = queue.save()
    driver.disable_calls()
    restored = driver.open_device()
    restored.load(state)
    assert restored.should_call()
    assert restored.enable_kicks()  # chains were waiting: poll once after a restore
    for chain in restored.pop_batch(4):
        restored.push(chain.head, 0)
    assert [used.token for used in driver.collect()] == tokens


BAD_CURSORS = {
    0: [(-1, 0), (9, 0), (0x8000, 0), (0xFFFF, 0), (0, 1), (0, 0x10000), (0x10000, 0), (0, -1)],
    F_RING_PACKED: [(-1, WRAP), (8, 0), (WRAP | 8, WRAP), (0x7FFF, 0), (WRAP, 0x10000), (0, -1)],
}


def test_load_refuses_cursors_that_do_not_fit(layout: int) -> None:
    """Cursors come from a file or a peer: wrong ones are a GuestError, and nothing changes."""
    _, queue = start(layout)
    before = queue.save()
    for cursors in BAD_CURSORS[layout]:
        with pytest.raises(GuestError):
            queue.load(QueueState(*cursors))
    assert queue.save() == before


def test_load_with_chains_in_flight_is_our_bug(layout: int) -> None:
    """Loading would lose them."""
    driver, queue = start(layout)
    offer(driver, b"a")
    pop(queue)
    with pytest.raises(RuntimeError):
        queue.load(queue.save())


def test_a_queue_without_a_predecessor_has_nothing_to_resubmit(layout: int) -> None:
    """resubmit() is empty for a fresh queue, with or without an in-flight area."""
    _, queue = start(layout)
    assert queue.resubmit() == []
