"""Fuzz target of qcow2 images: any bytes as header and tables, used as a disk all the same.

    python -m tests.fuzz.fuzz_qcow2 --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_qcow2 --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up. tests/unit/test_qcow2_fuzz.py runs the same target
from hypothesis.

An input is a byte that chooses a small image, of which there are several shapes, with data, zeroes,
a compressed cluster, spare room, and in some an internal snapshot; then a list of changes to it: 2
bytes of place in words of 8 bytes, 1 byte of kind, 8 bytes of value. Opening it may raise
ConfigError; reading, writing, zeroing, discarding, growing, flushing and mending may raise OSError
or ConfigError; nothing else may come out. However it ends, header, L1 table and refcount table are
never written over with the guest's data, and the check neither fails nor takes for ever.
"""

from __future__ import annotations

import os
import sys
import zlib
from contextlib import suppress
from struct import pack
from typing import TYPE_CHECKING, Final

from config.errors import ConfigError
from devices.qcow2 import Qcow2
from devices.qcow2check import check, mend
from devices.qcow2create import create
from tests.fuzz.run import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

CLUSTER: Final = 512
SIZE: Final = 64 * CLUSTER
STEP: Final = 11  # bytes of one change
GUEST: Final = b"\xa5GUEST\xa5!" * 64  # one cluster of what the guest writes
MOST_BYTES: Final = 1 << 20  # the image may grow to


class FoundError(Exception):
    """The target did what no input may make it do."""


def _make(*, snapshot: bool = False, version: int = 3, refcount_bits: int = 16) -> bytes:
    """Return an image that inputs change."""
    fd = os.memfd_create("seed")
    try:
        create(fd, SIZE, cluster_size=CLUSTER, version=version, refcount_bits=refcount_bits)
        disk = Qcow2(fd)
        disk.write([memoryview(b"data" * CLUSTER)], 0, 4 * CLUSTER)
        disk.write_zeroes(8 * CLUSTER, 2 * CLUSTER, unmap=True)
        disk.finish()
        host = os.fstat(fd).st_size
        packer = zlib.compressobj(wbits=-12)
        packed = packer.compress(b"p" * CLUSTER) + packer.flush()
        os.pwrite(fd, packed.ljust(CLUSTER, b"\0"), host)
        entry = 1 << 62 | host
        table = int.from_bytes(os.pread(fd, 8, disk.file.header.l1_offset), "big") & (1 << 56) - 1
        os.pwrite(fd, entry.to_bytes(8, "big"), table + 8 * 12)
        if snapshot:  # the same L2 table once more, and then each of both has it shared
            header, end = disk.file.header, host + CLUSTER
            os.pwrite(fd, os.pread(fd, CLUSTER, header.l1_offset), end)
            row = pack(">QIHHIIQII2s", end, header.l1_entries, 1, 1, 0, 0, 0, 0, 0, b"1s")
            os.pwrite(fd, row.ljust(CLUSTER, b"\0"), end + CLUSTER)
            os.pwrite(fd, pack(">IQ", 1, end + CLUSTER), 60)
        report = mend(fd, leaks_only=False)
        if report.corruptions or report.leaks:
            raise FoundError(f"a seed that is not clean: {report}")
        return os.pread(fd, MOST_BYTES, 0)
    finally:
        os.close(fd)


SEEDS: Final = (
    _make(),
    _make(snapshot=True),
    _make(snapshot=True, refcount_bits=2),
    _make(refcount_bits=1),
    _make(refcount_bits=32),
    _make(version=2),
)


def one_input(data: bytes) -> int:
    """Run one input; return how many operations succeeded, a measure of how far it went."""
    image = bytearray(SEEDS[data[0] % len(SEEDS) if data else 0])
    for at in range(1, len(data) - STEP + 1, STEP):
        change = data[at : at + STEP]
        place = int.from_bytes(change[:2], "big") % (len(image) // 8) * 8
        value = int.from_bytes(change[3:], "big")
        old = int.from_bytes(image[place : place + 8], "big")
        new = (value, old ^ 1 << value % 64, old + value % 1024 * CLUSTER, old | value)[
            change[2] & 3
        ]
        image[place : place + 8] = (new & (1 << 64) - 1).to_bytes(8, "big")
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, image, 0)
        return _use(fd)
    finally:
        os.close(fd)


def _use(fd: int) -> int:
    with suppress(ConfigError, OSError):
        check(fd)
    try:
        disk = Qcow2(fd)
    except (ConfigError, OSError):
        return 0
    cluster, view = disk.file.cluster_size, memoryview(bytearray(4 * CLUSTER))
    last = max(disk.size // CLUSTER - 4, 0) * CLUSTER
    steps: list[Callable[[], object]] = [
        lambda: disk.read([view], 0, len(view)),
        lambda: disk.read([view], 12 * CLUSTER, len(view)),
        lambda: disk.read([view], last, len(view)),
        lambda: _write(disk, 0, 2),
        lambda: _write(disk, 12, 1),
        lambda: _write(disk, last // CLUSTER, 3),
        lambda: disk.write_zeroes(CLUSTER, 5 * cluster, unmap=True),
        lambda: disk.discard(0, 3 * cluster),
        disk.flush,
        lambda: _write(disk, 20, 4),
        lambda: disk.resize(disk.size + CLUSTER) if disk.size < 1 << 40 else None,
        disk.finish,
    ]
    nr_good = 0
    for step in steps:
        with suppress(OSError, ConfigError):
            step()
            nr_good += 1
    if os.pread(fd, 4, 0) != SEEDS[0][:4]:
        raise FoundError("the header is gone")
    header = disk.file.header
    for name, offset in (("L1", header.l1_offset), ("refcount", header.refcount_offset)):
        if GUEST[:16] in os.pread(fd, CLUSTER, offset):
            raise FoundError(f"the guest's data is in the {name} table")
    with suppress(ConfigError, OSError):
        mend(fd, leaks_only=False)
    return nr_good


def _write(disk: Qcow2, cluster: int, count: int) -> None:
    view = memoryview(GUEST * count)
    if disk.attempts()[1]([view], cluster * CLUSTER) != len(view):
        disk.write([view], cluster * CLUSTER, len(view))
    disk.commit()


def make_up(rng: Random) -> bytes:
    """Return an input of a few changes, most of them to places that matter."""
    seed = rng.randrange(len(SEEDS))
    nr_words, parts = len(SEEDS[seed]) // 8, [bytes([seed])]
    for _ in range(rng.randint(1, 4)):
        place = rng.choice((rng.randrange(16), 64 * rng.randrange(6), rng.randrange(nr_words)))
        value = rng.choice(
            (
                rng.randrange(16) * CLUSTER | rng.randrange(2) << 63,
                rng.randrange(64),
                rng.getrandbits(64),
                1 << 62 | rng.randrange(16) * CLUSTER | rng.randrange(2) << 61,
            )
        )
        parts.append(
            place.to_bytes(2, "big") + bytes([rng.randrange(4)]) + value.to_bytes(8, "big")
        )
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(run("qcow2 images", one_input, make_up, lambda data, _: data, "operations succeeded"))
