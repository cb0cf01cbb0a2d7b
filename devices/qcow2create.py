"""New qcow2 images, empty: a header, refcounts, and an L1 table of nothing.

cluster 0 header │ refcount table │ refcount blocks │ L1 table
"""

from __future__ import annotations

import errno
import os
from array import array
from typing import Final

from config.errors import ConfigError
from devices.qcow2block import Block
from devices.qcow2head import (
    LEAST_CLUSTER_BITS,
    MOST_CLUSTER_BITS,
    MOST_L1_BYTES,
    V2_BYTES,
    V3_BYTES,
    Header,
    build,
    l1_entries_for,
)

CLUSTER_SIZE: Final = 1 << 16
REFCOUNT_BITS: Final = 16


def create(
    fd: int,
    size: int,
    *,
    cluster_size: int = CLUSTER_SIZE,
    version: int = 3,
    refcount_bits: int = REFCOUNT_BITS,
    backing_file: str = "",
    backing_format: str = "",
) -> Header:
    """Make an empty file a qcow2 image of a disk of `size` bytes; return its header.

    `backing_file` is written as it is. Raises ConfigError, OSError; then the file is of no use.
    """
    bits = cluster_size.bit_length() - 1
    if not LEAST_CLUSTER_BITS <= bits <= MOST_CLUSTER_BITS or cluster_size != 1 << bits:
        raise ConfigError(
            f"cluster size {cluster_size}: a power of two from {1 << LEAST_CLUSTER_BITS} to "
            f"{1 << MOST_CLUSTER_BITS} is expected"
        )
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64) or (version == 2 and refcount_bits != 16):
        allowed = "16 with version 2" if version == 2 else "1, 2, 4, 8, 16, 32 or 64"
        raise ConfigError(f"refcounts of {refcount_bits} bits: {allowed} is expected")
    if version not in (2, 3):
        raise ConfigError(f"version {version}: 2 or 3 is expected")
    entries = l1_entries_for(size, bits)
    if not 0 <= size < 1 << 63 or entries * 8 > MOST_L1_BYTES:
        raise ConfigError(
            f"{size} bytes are too many for clusters of {cluster_size}", hint="take larger clusters"
        )
    per_block = (cluster_size << 3) // refcount_bits
    l1_clusters = -(-8 * entries >> bits)
    blocks = tables = 1
    while True:  # blocks and table have to be counted, too
        used = 1 + tables + blocks + l1_clusters
        wanted = max(-(-used // per_block), blocks)
        if (wanted, -(-8 * wanted >> bits)) == (blocks, tables):
            break
        blocks, tables = wanted, -(-8 * wanted >> bits)
    header = Header(
        version=version,
        cluster_bits=bits,
        size=size,
        l1_offset=(1 + tables + blocks) << bits if entries else 0,
        l1_entries=entries,
        refcount_offset=1 << bits,
        refcount_clusters=tables,
        refcount_bits=refcount_bits,
        backing_file=backing_file,
        backing_format=backing_format,
        header_length=V3_BYTES if version == 3 else V2_BYTES,
    )
    data = build(header)
    os.ftruncate(fd, used << bits)
    table = array("Q", [0]) * (tables << bits - 3)
    for number in range(blocks):
        block = Block(bytearray(cluster_size), refcount_bits)
        block.set(0, min(max(used - number * per_block, 0), per_block), 1)
        table[number] = (1 + tables + number) << bits
        _put(fd, block.data, table[number])
    table.byteswap()
    _put(fd, table.tobytes(), header.refcount_offset)
    _put(fd, data, 0)  # last, so that half an image is none
    return header


def _put(fd: int, data: bytes | bytearray, offset: int) -> None:
    done = os.pwrite(fd, data, offset)
    if done != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
