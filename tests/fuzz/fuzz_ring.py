"""Fuzz target of the virtqueues: any guest memory, any in-flight area, any device operations.

    python -m tests.fuzz.fuzz_ring --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_ring --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up, from pieces of rings and mutations of inputs
that went far. tests/unit/test_ring_fuzz.py runs the same target from hypothesis.

An input is: a byte of layout and features, a byte of size, the ring, the in-flight area, and then
one byte per operation. The only exception the target may see is GuestError.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.chain import DESC, MAX_CHAIN, Chain
from devices.features import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFY_ON_EMPTY,
    F_RING_PACKED,
)
from devices.guestmem import Region
from devices.inflight import inflight_bytes
from devices.virtqueue import QueueState, VirtQueue, open_queue
from tests.fuzz.run import run
from tools.viodriver import make_memory

if TYPE_CHECKING:
    from random import Random

PAGE: Final = 4096
# The ring, then RAM that meets it only in guest addresses, a hole, RAM at 4 GiB.
REGIONS: Final = (
    Region(0, 2 * PAGE, 0),
    Region(2 * PAGE, PAGE, 4 * PAGE),
    Region(1 << 32, PAGE, 6 * PAGE),
)
RING_BYTES: Final = 2048  # of the input that go to guest address 0
AREA_BYTES: Final = 512  # of the input that go to the in-flight area
SIZES: Final = (1, 2, 4, 8, 16, 3, 11, 0)
FEATURES: Final = (F_RING_PACKED, F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER, F_NOTIFY_ON_EMPTY)
_MEMORY: Final = make_memory(8 * PAGE, REGIONS)


class FoundError(Exception):
    """The target did what no input may make it do."""


def one_input(data: bytes) -> int:
    """Run one input; return how many chains it got, a measure of how far it went."""
    if len(data) < 2:
        return 0
    features = sum(bit for i, bit in enumerate(FEATURES) if data[0] >> i & 1)
    size = SIZES[data[1] & 7]
    rest = data[2:]
    _MEMORY.write(0, rest[:RING_BYTES].ljust(RING_BYTES, b"\0"))
    tracked = data[1] & 8
    area = bytearray(rest[RING_BYTES : RING_BYTES + AREA_BYTES].ljust(AREA_BYTES, b"\0"))
    area += bytes(inflight_bytes(16, packed=True))
    nr_chains = 0
    for part in rest[RING_BYTES + AREA_BYTES :].split(b"\xff") or [b""]:
        with contextlib.suppress(GuestError):
            queue = open_queue(
                _MEMORY,
                size,
                0,
                512,
                1024,
                features=features,
                inflight=memoryview(area) if tracked else None,
            )
            nr_chains += _operate(queue, part)
    return nr_chains


def _operate(queue: VirtQueue, operations: bytes) -> int:
    """Be a device whose actions the input chooses."""
    flying = queue.resubmit()
    nr_chains = len(flying)
    for operation in operations:
        argument = operation >> 4
        with contextlib.suppress(GuestError):
            match operation & 15:
                case 0 | 1 | 2:
                    popped = queue.pop_batch(argument)
                    flying += popped
                    nr_chains += len(popped)
                case 3 | 4 if flying:
                    queue.push(flying.pop(argument % len(flying)).head, argument)
                case 5:
                    batch, flying = flying[:argument], flying[argument:]
                    queue.push_batch([(chain.head, 0) for chain in batch])
                case 6:
                    queue.should_call()
                case 7:
                    queue.enable_kicks()
                case 8:
                    queue.disable_kicks()
                case 9 if queue.rewind(argument):
                    return nr_chains  # which of ours are still in flight is not known here
                case 10:
                    queue.drop_all()
                case 11 if not queue.nr_in_flight:
                    queue.load(QueueState(argument << 12 | argument, argument << 12))
                case 12:  # the guest writes, in the middle of everything
                    _MEMORY.write(
                        64 * argument, DESC.pack(1 << 32, 16 * argument, argument, argument)
                    )
                case 13:
                    _MEMORY.write(514, argument.to_bytes(2, "little"))
                case 15 if argument == 15:
                    queue.reset()
        for chain in flying:
            _check(chain)
    return nr_chains


def _check(chain: Chain) -> None:
    """Raise unless a chain is what pop promises."""
    for views, total in (
        (chain.readable, chain.readable_bytes),
        (chain.writable, chain.writable_bytes),
    ):
        if sum(map(len, views)) != total or len(views) > MAX_CHAIN or not all(map(len, views)):
            raise FoundError(f"{chain}: {[len(view) for view in views]}")
    if not all(view.readonly for view in chain.readable):
        raise FoundError(f"{chain}: readable part can be written")


# Inputs without atheris.


def make_up(rng: Random) -> bytes:
    """Return an input that looks like a ring in most places."""
    packed = rng.random() < 0.5
    rows = bytearray()
    for i in range(32):
        addr = rng.choice((0, 0, PAGE, PAGE, 2 * PAGE - 8, 3 * PAGE - 4, 1 << 32, 1 << 63))
        length = rng.choice((0, 1, 4, 16, 16, 16, 32, 64, 100, 0xFFFF_FFFF))
        flags = rng.choice((0, 0, 0, 1, 2, 2, 2, 3, 4, 5))
        if packed:
            marks = rng.choice((0x80, 0x80, 0x80, 0x8000, 0x8080))
            rows += DESC.pack(addr, length, rng.randrange(16), flags | marks)
        else:
            rows += DESC.pack(
                addr, length, flags, rng.choice((i + 1, i + 1, rng.randrange(18))) % 65536
            )
    avail = [rng.choice((0, 1)), rng.randint(1, 9), *(rng.randrange(17) for _ in range(17))]
    ring = bytes(rows) + b"".join(word.to_bytes(2, "little") for word in avail)
    size = rng.randrange(16)
    area = rng.choice(
        (b"", rng.randbytes(AREA_BYTES), b"\x01\0" + bytes([SIZES[size & 7], 0, packed, 0]))
    )
    head = bytes([rng.randrange(32) & ~1 | packed, size])
    return (
        head
        + ring.ljust(RING_BYTES, b"\0")
        + area.ljust(AREA_BYTES, b"\0")
        + b"\x20"  # pop two, before anything else
        + rng.randbytes(rng.randrange(60))
    )


def mutate(data: bytes, rng: Random) -> bytes:
    """Return `data` with a few bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


if __name__ == "__main__":
    sys.exit(run("the virtqueues", one_input, make_up, mutate, "chains", keep_from=4))
