"""Device processes that come and go on one queue, and the books on what the driver saw.

The driver must see every request completed exactly once, with the data and length of a completed
one, however the kill fell. Work may be done twice, a completion may not.
"""

from __future__ import annotations

import os

from devices.features import F_IN_ORDER, F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.inflight import Inflight, inflight_bytes
from devices.inflightrow import RowInflight
from devices.virtqueue import Chain, VirtQueue, open_queue
from tests.conformance.ring_lab import BASE, RAM
from tests.stores import Watch, WatchedMemory
from tools.viodriver import make_memfd, open_driver

REGIONS = (Region(0, RAM, 0),)
SIZES = {0: 16, F_RING_PACKED: 11}  # just room for what the script needs


class Lab:
    """One guest with one queue, and device processes that come and go."""

    def __init__(self, features: int) -> None:
        self.fd = make_memfd(RAM)
        self.watch = Watch()
        self.packed = bool(features & F_RING_PACKED)
        self.size = SIZES[features & F_RING_PACKED]
        self.memory = WatchedMemory(self.fd, REGIONS, self.watch)
        self.driver = open_driver(GuestMemory(self.fd, REGIONS), self.size, BASE, features)
        self.area = memoryview(bytearray(inflight_bytes(self.size, packed=self.packed)))
        self.done: dict[int, int] = {}  # token → times the driver saw it complete
        self.offered: list[int] = []

    def close(self) -> None:
        os.close(self.fd)

    def offer(self, *lengths: int) -> None:
        """Offer requests of `lengths` bytes, in that many readable descriptors, to be answered."""
        for length in lengths:
            token = self.driver.add([bytes([length])] * length, [length])
            self.offered.append(token)

    def start(self, kill_at: int | None = None) -> VirtQueue:
        """Start a device process; it will be killed before its store number `kill_at`."""
        self.watch.log.clear()
        self.watch.kill_at = kill_at
        driver = self.driver
        return open_queue(
            self.memory,
            self.size,
            driver.desc_gpa,
            driver.avail_gpa,
            driver.used_gpa,
            features=driver.features,
            inflight=self.watch.view("area", self.area),
        )

    def collect(self) -> None:
        """Let the driver take what is used, and check it."""
        for used in self.driver.collect():
            length = used.request.writable_bytes
            assert used.written == length
            assert self.driver.data(used.request) == bytes([length]) * length
            self.done[used.token] = self.done.get(used.token, 0) + 1

    def finish(self, queue: VirtQueue) -> None:
        """Let a device that lives do all that is left; then check the books."""
        for chain in queue.resubmit():
            queue.push(chain.head, work(chain))
        while (popped := queue.pop()) is not None:
            queue.push(popped.head, work(popped))
        assert queue.should_call()  # the call may have died with the predecessor
        self.collect()
        assert self.done == dict.fromkeys(self.offered, 1)
        assert queue.nr_in_flight == 0
        assert self.driver.outstanding == 0
        area = Inflight(self.area, self.size, packed=self.packed)
        if self.driver.features & F_IN_ORDER and not self.packed:
            area = RowInflight(self.area, self.size)
        assert area.taken() == []
        assert area.unsettled()[0] == []


def work(chain: Chain) -> int:
    """Answer a request: its first byte, repeated over the writable part."""
    fill = chain.readable[0][0]
    for view in chain.writable:
        view[:] = bytes([fill]) * len(view)
    return chain.writable_bytes


def script(queue: VirtQueue) -> None:
    """Do everything a device does with chains: single, batched, out of order, undone."""
    one, two, three = queue.pop_batch(3)
    queue.push(two.head, work(two))
    four = queue.pop()
    assert four is not None
    queue.unpop(four.head)
    four = queue.pop()
    assert four is not None
    queue.push_batch([(chain.head, work(chain)) for chain in (four, one)])
    five = queue.pop()
    assert five is not None
    queue.fill(five.head, work(five))
    queue.fill(three.head, work(three))
    queue.flush()
