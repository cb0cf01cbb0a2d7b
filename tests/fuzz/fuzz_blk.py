"""Fuzz target of block requests: any header, any framing, any ranges, on a disk of 64 sectors.

    python -m tests.fuzz.fuzz_blk --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_blk --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up. tests/unit/test_blk_fuzz.py runs the same target
from hypothesis.

An input is a byte of settings, then requests, each of them

    0  type, 1 byte: known ones first      3  how many readable views, how long each is: see _cut
    1  sector, 1 byte, scaled              4  the same for writable ones
    2  length of the data, 1 byte          5  bytes of data, as many as byte 2 says

The only exception the target may see is GuestError; and the image keeps its size, no sector
changes but those that a request names, and every used length is true.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError
from config.model import DiskConfig
from devices.blkreq import BLK_F_FLUSH, HEADER, S_UNSUPP, SEGMENT, T_DISCARD, T_OUT, T_WRITE_ZEROES
from devices.features import F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1
from devices.raw import Raw
from devices.vioblk import Vioblk
from tests.fuzz.run import change, run
from tools.viodriver import NoRoomError, make_memory, open_driver

if TYPE_CHECKING:
    from random import Random

    from tools.viodriver import PackedDriver, SplitDriver

NR_SECTORS: Final = 64
TYPES: Final = (0, 1, 4, 5, 8, 11, 13, 2, 3, 14, 0x8000_0000, 0xFFFF_FFFF)
SECTORS: Final = (0, 0, 0, NR_SECTORS - 1, NR_SECTORS, 1 << 32, 1 << 55, (1 << 64) - 1)
LENGTHS: Final = (0, 1, 15, 16, 17, 20, 32, 511, 512, 513, 1024, 4096, 8192, 48)
CUTS: Final = (0, 1, 4, 8, 16, 17, 512, 100000)
_DATA: Final = bytes(range(256)) * 32


class FoundError(Exception):
    """The target did what no input may make it do."""


class Host:
    """Hears what the device says, and nothing else."""

    def __init__(self) -> None:
        self.nr_lines = 0

    def log(self, _level: int, _text: str) -> None:
        self.nr_lines += 1

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Bench:
    """One device, made once; every input starts with a reset and a fresh image."""

    def __init__(self) -> None:
        self.memory = make_memory(1 << 20)
        self.fd = os.memfd_create("disk")
        self.content = os.urandom(512 * NR_SECTORS)
        self.host = Host()
        os.pwrite(self.fd, self.content, 0)
        settings = DiskConfig(path="", format="raw", serial="fuzz")._asdict()
        self.device = Vioblk(self.memory, self.host, Raw(self.fd), settings)

    def run(self, data: bytes) -> int:
        """Serve the requests of one input; return how many were answered OK."""
        if not data:
            return 0
        features = F_INDIRECT_DESC * (data[0] & 1) | F_RING_PACKED * (data[0] >> 1 & 1)
        features |= F_VERSION_1 | BLK_F_FLUSH * (data[0] >> 2 & 1)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, self.content, 0)
        driver = open_driver(self.memory, 64, 0x1000, features)
        queue = driver.open_device()
        self.device.reset()
        self.device.activate(features, [queue])
        touched: set[int] = set()
        at, nr_offered = 1, 0
        while len(data) - at >= 5 and nr_offered < 16:
            at += self._offer(driver, data[at:], touched)
            nr_offered += 1
        try:
            while self.device.kick(0, queue):
                pass
        except GuestError:
            queue.reset()
        return self._check(driver, touched)

    def _offer(self, driver: SplitDriver | PackedDriver, data: bytes, touched: set[int]) -> int:
        """Offer one request; note the sectors it may change; return the bytes of input it took."""
        kind = TYPES[data[0] % len(TYPES)]
        sector = SECTORS[data[1] & 7] + (data[1] >> 3) & (1 << 64) - 1
        length = LENGTHS[data[2] % len(LENGTHS)]
        given = data[5 : 5 + min(length, 64)]
        content = (given + _DATA)[:length]
        header = HEADER.pack(kind, data[0], sector)
        readable = header + content if data[3] & 8 or kind in (T_OUT, T_DISCARD) else header
        writable = length + 1 if data[4] & 8 or not data[4] & 16 else 1
        if kind == T_OUT:
            touched.update(range(sector, sector + length // 512))
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            readable = header + content
            whole = content[: len(content) // SEGMENT.size * SEGMENT.size]
            for start, count, _ in SEGMENT.iter_unpack(whole):
                touched.update(range(start, min(start + count, NR_SECTORS)))
        request = driver.place(
            _cut(readable[: len(readable) - (data[3] >> 6)], data[3]),
            [len(piece) for piece in _cut(bytes(writable - (data[4] >> 7)), data[4])],
        )
        for segment in request.segments:
            if segment.writable:
                self.memory.write(segment.gpa, b"\xee" * segment.length)
        if request.segments:
            with contextlib.suppress(NoRoomError):
                driver.submit(request)
        return 5 + len(given)

    def _check(self, driver: SplitDriver | PackedDriver, touched: set[int]) -> int:
        nr_good = 0
        for used in driver.collect():
            data = driver.data(used.request)
            if used.written > len(data) or not data or data[-1] > S_UNSUPP:
                raise FoundError(f"{used.written} of {len(data)} bytes, status {data[-1:]!r}")
            nr_good += not data[-1]
        now = os.pread(self.fd, 1 << 20, 0)
        if len(now) != len(self.content):
            raise FoundError(f"the image has {len(now)} bytes")
        for sector in set(range(NR_SECTORS)) - touched:
            part = slice(512 * sector, 512 * (sector + 1))
            if now[part] != self.content[part]:
                raise FoundError(f"sector {sector} changed")
        if self.host.nr_lines:
            raise FoundError("the log of a healthy disk has lines")
        return nr_good


def _cut(data: bytes, how: int) -> list[bytes]:
    """Cut data into pieces, all of one length but the last; with bit 5 some are empty."""
    step = CUTS[how & 7] or len(data) or 1
    step = max(step, -(-len(data) // 16))
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    return [b"", *pieces, b""] if how & 32 else pieces


_bench: Final = Bench()


def one_input(data: bytes) -> int:
    """Run one input; return how many requests succeeded, a measure of how far it went."""
    return _bench.run(data)


def make_up(rng: Random) -> bytes:
    """Return an input of requests most of which are nearly right."""
    parts = [bytes([rng.randrange(8)])]
    for _ in range(rng.randint(1, 8)):
        kind = rng.choice((0, 0, 1, 1, 2, 4, 5, 6, rng.randrange(256)))
        sector = rng.choice((0, 8, 16, 0, rng.randrange(256)))
        length = rng.choice((8, 10, 11, 3, rng.randrange(256)))
        cuts = [rng.choice((0, 7, 6, 16, rng.randrange(256))) for _ in range(2)]
        parts.append(bytes([kind, sector, length, *cuts]))
        given = SEGMENT.pack(rng.randrange(80), rng.choice((0, 1, 8, 1 << 31)), rng.randrange(3))
        parts.append(given.ljust(64, b"\0")[: min(LENGTHS[length % len(LENGTHS)], 64)])
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(run("block requests", one_input, make_up, change, "requests succeeded"))
