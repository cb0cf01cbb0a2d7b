"""A device process is killed, between any two stores, and its successor carries on.

The driver must see every request completed exactly once, with the data and length of a completed
one, however the kill fell. Work may be done twice, a completion may not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError, HostError
from devices.features import F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.inflight import Inflight, inflight_bytes
from devices.virtqueue import Chain, VirtQueue
from tests.conformance.process_lab import Lab, script, work
from tests.rng import seeded
from tests.stores import Killed
from tools.viodriver import NoRoomError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

FEATURES = [
    pytest.param(0, id="split"),
    pytest.param(F_INDIRECT_DESC, id="split-indirect"),
    pytest.param(F_IN_ORDER, id="split-in-order"),
    pytest.param(F_RING_PACKED, id="packed"),
    pytest.param(F_RING_PACKED | F_INDIRECT_DESC, id="packed-indirect"),
    pytest.param(F_RING_PACKED | F_IN_ORDER, id="packed-in-order"),
]


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Callable[[], Lab]]:
    labs: list[Lab] = []

    def make() -> Lab:
        labs.append(Lab(request.param))
        return labs[-1]

    yield make
    for each in labs:
        each.close()


def nr_stores(make: Callable[[], Lab]) -> int:
    """Count the stores of a device that runs the whole script."""
    one = make()
    one.offer(1, 1, 2, 1, 1)
    script(one.start())
    return len(one.watch.log)


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
@pytest.mark.parametrize("eager", [False, True], ids=["", "driver-goes-on"])
def test_killed_before_each_store(lab: Callable[[], Lab], eager: bool) -> None:
    """Whatever store the kill prevents: no request is lost, none completes twice.

    An eager driver takes what it sees and offers more before the successor starts; in a packed
    ring that overwrites the very descriptors the successor has to look at.
    """
    total = nr_stores(lab)
    assert total > 30
    for kill_at in range(total + 1):
        one = lab()
        one.offer(1, 1, 2, 1, 1)
        try:
            script(one.start(kill_at))
        except Killed:
            pass
        else:
            assert kill_at == total
        if eager:
            one.collect()
            one.offer(*[1] * len(one.done))
        one.finish(one.start())


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_killed_again_while_recovering(lab: Callable[[], Lab]) -> None:
    """The successor may die too, at any store of its recovery or its first work."""
    for kill_at in range(0, nr_stores(lab), 3):
        for second_kill in range(0, 40, 2):
            one = lab()
            one.offer(1, 1, 2, 1, 1)
            with pytest.raises(Killed):
                script(one.start(kill_at))
            try:
                queue = one.start(second_kill)
                for chain in queue.resubmit()[::-1]:
                    queue.push(chain.head, work(chain))
            except Killed:
                pass
            one.finish(one.start())


def restart(one: Lab, rng: Random, flying: list[Chain]) -> VirtQueue:
    """Start processes until one survives taking over; it has `flying` and some stores to live."""
    while True:
        try:
            queue = one.start(rng.randrange(200))
        except Killed:
            continue
        flying[:] = queue.resubmit()
        return queue


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_with_random_kills(lab: Callable[[], Lab], seed: int) -> None:
    """Long runs, over many wraps, with a kill every few dozen stores."""
    rng = seeded(seed)
    one = lab()
    flying: list[Chain] = []
    queue = restart(one, rng, flying)
    for _ in range(1500):
        try:
            match rng.randrange(6):
                case 0 | 1:
                    one.offer(rng.randint(1, 2))
                case 2 if (chain := queue.pop()) is not None:
                    flying.append(chain)
                case 3 if flying:
                    chain = flying.pop(rng.randrange(len(flying)))
                    queue.push(chain.head, work(chain))
                case 4 if flying:
                    rng.shuffle(flying)
                    batch, flying = flying[:3], flying[3:]
                    queue.push_batch([(chain.head, work(chain)) for chain in batch])
                case 5:
                    one.collect()
        except NoRoomError:
            pass
        except Killed:
            queue = restart(one, rng, flying)
    one.watch.kill_at = None
    for chain in flying:
        queue.push(chain.head, work(chain))
    one.finish(one.start())


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_resubmit_is_in_the_order_of_popping(lab: Callable[[], Lab]) -> None:
    """Requests are done again oldest first, whatever their heads and whoever popped them."""
    one = lab()
    one.offer(1, 1, 1)
    queue = one.start()
    first, second, third = queue.pop_batch(3)
    if not queue.features & F_IN_ORDER:
        queue.push(first.head, work(first))
        one.collect()
        one.offer(1)
        fourth = queue.pop()
        assert fourth is not None
        expected = [second.head, third.head, fourth.head]
    else:
        expected = [first.head, second.head, third.head]
    again = one.start()
    assert [chain.head for chain in again.resubmit()] == expected
    assert again.resubmit() == []
    one.offer(1)
    youngest = again.pop()
    assert youngest is not None
    once_more = one.start()
    assert [chain.head for chain in once_more.resubmit()] == [*expected, youngest.head]
    one.finish(one.start())


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_a_chain_taken_over_cannot_be_unpopped(lab: Callable[[], Lab]) -> None:
    """Its place in the ring is gone; asking for it is our own bug, and harmless."""
    one = lab()
    one.offer(1)
    one.start().pop()
    queue = one.start()
    [chain] = queue.resubmit()
    assert not queue.rewind(1)
    with pytest.raises(KeyError):
        queue.unpop(chain.head)
    queue.push(chain.head, work(chain))
    one.finish(one.start())


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_reset_leaves_nothing_to_take_over(lab: Callable[[], Lab]) -> None:
    """After a reset the area is void: the next queue starts afresh."""
    one = lab()
    one.offer(1, 1)
    queue = one.start()
    queue.pop()
    queue.reset()
    assert not Inflight(one.area, one.size, packed=one.packed).holds_queue()


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_load_starts_the_area_anew(lab: Callable[[], Lab]) -> None:
    """A restored queue tracks from its restored cursors."""
    one = lab()
    one.offer(1, 1, 1)
    queue = one.start()
    for _ in range(2):
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, work(chain))
    state = queue.save()
    queue.reset()
    restored = one.start()
    restored.load(state)
    restored.pop()
    one.finish(one.start())


# What a compromised predecessor may have left, or a guest that touches its used ring.


@pytest.mark.parametrize("lab", FEATURES, indirect=True)
def test_garbage_in_the_area_is_contained(lab: Callable[[], Lab]) -> None:
    """Any bytes in the area: recovery ends, with chains that pass all checks, or GuestError."""
    for seed in range(100):
        garble(lab(), seeded(seed))


def garble(one: Lab, rng: Random) -> None:
    one.offer(1, 1, 1, 1)
    queue = one.start()
    one_chain, *_ = queue.pop_batch(3)
    queue.push(one_chain.head, work(one_chain))
    for _ in range(rng.randint(1, 30)):
        at = rng.randrange(6, len(one.area))
        one.area[at] = rng.choice((0, 1, 7, 8, 0xFF, rng.randrange(256)))
    try:
        queue = one.start()
        for chain in queue.resubmit():
            assert len(chain.readable) + len(chain.writable) <= 2 * one.size
            queue.push(chain.head, 0)
        queue.pop()
    except GuestError:
        pass


def test_an_area_of_another_queue_is_refused() -> None:
    """Wrong version, size or layout is an error, not a guess; too small a one as well."""
    area = memoryview(bytearray(inflight_bytes(16, packed=True)))
    Inflight(area, 8, packed=False).format(0)
    for size, packed in ((16, False), (8, True)):
        with pytest.raises(GuestError, match="in-flight area is version 1, size 8, layout 0"):
            Inflight(area, size, packed=packed).holds_queue()
    area[0] = 9
    with pytest.raises(GuestError, match="version 9"):
        Inflight(area, 8, packed=False).holds_queue()
    with pytest.raises(HostError, match="the queue needs"):
        Inflight(area, 32, packed=True)


def test_a_guest_that_moves_the_used_index_breaks_only_itself() -> None:
    """The used index is the device's; one that is neither before nor after the batch is refused."""
    one = Lab(0)
    one.offer(1)
    one.start().pop()
    queue = one.start(kill_at=5)  # after three stores of intent and two of the used entry
    [chain] = queue.resubmit()
    with pytest.raises(Killed):
        queue.push(chain.head, work(chain))
    one.driver.memory.write(one.driver.used_gpa + 2, b"\x55\x55")
    with pytest.raises(GuestError, match="used index is 21845"):
        one.start()
    one.close()
