"""Device processes under load are really killed, over and over.

The driver must see every request completed exactly once, with the data and length of a completed
one, however the kill fell. Work may be done twice, a completion may not.
"""

from __future__ import annotations

import mmap
import os
import select
import signal

import pytest

from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from devices.inflight import inflight_bytes
from tests.conformance.process_lab import work
from tests.conformance.ring_lab import BASE, RAM
from tests.rng import seeded
from tools.viodriver import NoRoomError, make_memory, open_driver


class Load:
    """A driver that keeps a device process busy, and counts what comes back."""

    def __init__(self, features: int) -> None:
        self.driver = open_driver(make_memory(RAM), 32, BASE, features)
        self.area = memoryview(mmap.mmap(-1, inflight_bytes(32, packed=True)))
        self.kick, self.call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        self.calls = select.poll()
        self.calls.register(self.call, select.POLLIN)
        self.done: dict[int, int] = {}  # token → times it came back
        self.offered: set[int] = set()

    def run(self, nr_wanted: int) -> None:
        """Offer and collect until `nr_wanted` more are done; more are then with the device."""
        goal = len(self.done) + nr_wanted
        while len(self.done) < goal:
            self._turn()

    def drain(self) -> None:
        """Collect until the device has nothing left."""
        while self.driver.outstanding:
            self._turn(offering=False)

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)

    def _turn(self, *, offering: bool = True) -> None:
        driver = self.driver
        while offering:
            try:
                self.offered.add(driver.add([b"x"], [1 + len(self.offered) % 3]))
            except NoRoomError:
                offering = False
        if driver.kick_needed():
            os.eventfd_write(self.kick, 1)
        driver.disable_calls()
        if not driver.enable_calls():
            assert self.calls.poll(20_000), "the device went silent"
            os.eventfd_read(self.call)
        for used in driver.collect():
            assert used.written == used.request.writable_bytes
            assert driver.data(used.request) == b"x" * used.written
            self.done[used.token] = self.done.get(used.token, 0) + 1


@pytest.mark.parametrize("features", [0, F_RING_PACKED | F_INDIRECT_DESC | F_EVENT_IDX])
def test_a_process_killed_over_and_over(features: int) -> None:
    """SIGKILL at arbitrary moments, twelve times, under load: each request completes once."""
    rng = seeded(1)
    load = Load(features)
    for life in range(12):
        device = os.fork()
        if device == 0:
            _serve(load, life)
        try:
            load.run(rng.randint(1, 400))
            if life == 11:
                load.drain()
        finally:
            os.kill(device, signal.SIGKILL)
            os.waitpid(device, 0)
    assert load.done == dict.fromkeys(load.offered, 1)
    load.close()


def _serve(load: Load, life: int) -> None:
    """Be a device that completes out of order, until killed."""
    rng = seeded(life)
    queue = load.driver.open_device(load.area)
    flying = queue.resubmit()
    while True:
        flying += queue.pop_batch(8)
        rng.shuffle(flying)
        keep = rng.randrange(3) if queue.has_work() else 0
        batch, flying = flying[keep:], flying[:keep]
        queue.push_batch([(chain.head, work(chain)) for chain in batch])
        if queue.should_call():
            os.eventfd_write(load.call, 1)
        if not flying and not queue.enable_kicks():
            os.eventfd_read(load.kick)
