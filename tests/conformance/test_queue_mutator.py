"""A second process rewrites the ring while the device reads it.

Whatever it writes and whenever: pop returns a chain whose views lie in RAM and agree with its
byte counts, or raises GuestError. Nothing else.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import GuestError
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, MAX_CHAIN, Chain
from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.packed import DESC_F_AVAIL, DESC_F_USED
from devices.virtqueue import QueueState
from tests.rng import seeded
from tools.viodriver import make_memory, open_driver

if TYPE_CHECKING:
    from random import Random

BASE: Final = 0x1000
TABLE: Final = 0x8000  # indirect tables
SIZE: Final = 16
RAM: Final = 1 << 20
SEAM: Final = 1 << 19  # of two regions that meet in guest addresses only

# Mostly good, so that chains come through; the bad ones a few bits away from them.
ADDRESSES: Final = (
    *[0x40000] * 8,
    *[TABLE] * 4,
    SEAM - 8,
    RAM - 8,
    RAM,
    (1 << 64) - 8,
    1 << 63,
    0,
)
LENGTHS: Final = (0, 1, 16, 16, 16, 32, 48, 64, 0xFFFF_FFFF, 1 << 31, RAM)
FLAGS: Final = (
    0,
    0,
    DESC_F_WRITE,
    DESC_F_WRITE,
    DESC_F_NEXT,
    DESC_F_NEXT | DESC_F_WRITE,
    DESC_F_INDIRECT,
)


def descriptor(rng: Random, packed: bool) -> bytes:
    """Return a random descriptor, available in either lap if the ring is packed."""
    addr, length, flags = rng.choice(ADDRESSES), rng.choice(LENGTHS), rng.choice(FLAGS)
    if not packed:
        return DESC.pack(addr, length, flags, rng.randrange(SIZE + 1))
    marks = rng.choice((DESC_F_AVAIL, DESC_F_AVAIL, DESC_F_USED))
    return DESC.pack(addr, length, rng.randrange(SIZE), flags | marks)


def mutate(memory: GuestMemory, avail_gpa: int, packed: bool) -> None:
    """Rewrite descriptors, tables, heads and indices, for ever."""
    rng = seeded(os.getpid())
    rows = [descriptor(rng, packed) for _ in range(4000)]
    ring, table = memory.view(BASE, 16 * SIZE), memory.view(TABLE, 16 * SIZE)
    avail = memory.view(avail_gpa, 6 + 2 * SIZE if not packed else 4).cast("H")
    while True:
        for i, row in enumerate(rows):
            at = 16 * (i * 7 % SIZE)
            ring[at : at + 16] = row
            table[at : at + 16] = row
            if not packed:
                avail[2 + i % SIZE] = i * 5 % (SIZE + 1)
                avail[1] = avail[1] + 1 & 0xFFFF


def check(memory: GuestMemory, chain: Chain) -> None:
    """Check that a chain is what pop promises."""
    for views, total in (
        (chain.readable, chain.readable_bytes),
        (chain.writable, chain.writable_bytes),
    ):
        assert sum(map(len, views)) == total
        assert len(views) <= MAX_CHAIN
        for view in views:
            assert len(view) > 0
            assert any(view.obj is mapping for mapping in [span.ram.obj for span in memory.spans])
    assert all(view.readonly for view in chain.readable)


@pytest.mark.parametrize(
    "layout", [pytest.param(0, id="split"), pytest.param(F_RING_PACKED, id="packed")]
)
def test_descriptors_that_change_under_the_reader(layout: int) -> None:
    """XSA-155, CVE-2020-14375: a check of one reading never vouches for another."""
    memory = make_memory(2 * RAM, [Region(0, SEAM, 0), Region(SEAM, RAM - SEAM, RAM)])
    driver = open_driver(memory, SIZE, BASE, layout | F_INDIRECT_DESC)
    mutator = os.fork()
    if mutator == 0:
        mutate(memory, driver.avail_gpa, bool(layout))
    nr_chains = nr_refused = rounds = 0
    try:
        while min(nr_chains, nr_refused) < 5000:
            rounds += 1
            assert rounds < 2_000_000, f"{nr_chains} chains, {nr_refused} refused"
            queue = driver.open_device()
            if not layout:
                index = int.from_bytes(memory.read(driver.avail_gpa + 2, 2), "little")
                behind = (index - 4) & 0xFFFF
                queue.load(QueueState(behind, behind))
            try:
                for chain in queue.pop_batch(SIZE):
                    check(memory, chain)
                    nr_chains += 1
                    queue.push(chain.head, chain.writable_bytes)
                queue.pop()
            except GuestError:
                nr_refused += 1
    finally:
        os.kill(mutator, signal.SIGKILL)
        os.waitpid(mutator, 0)
