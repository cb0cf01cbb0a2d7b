"""Refcounts of a qcow2 image made anew, from what its tables refer to.

Needed before an image that was marked dirty (lazy refcounts) is written to, and to mend one whose
refcounts are wrong. The new table and its blocks come behind everything there is, and one write to
the header makes them the image's: until then the image is as it was.
"""

from __future__ import annotations

from array import array
from struct import pack
from typing import TYPE_CHECKING

from config.errors import ConfigError
from devices import qcow2head
from devices.qcow2block import Block
from devices.qcow2usage import Usage

if TYPE_CHECKING:
    from devices.qcow2file import ImageFile


def rebuild(file: ImageFile) -> None:
    """Make refcounts anew and take the dirty mark off. Raises ConfigError, OSError."""
    usage = Usage(file)
    if usage.problems:
        raise ConfigError(
            f"qcow2 image: it was not closed, and cannot be mended: {usage.texts[0]}",
            hint="qemu-img check -r all may mend more",
        )
    write_anew(file, usage)


def write_anew(file: ImageFile, usage: Usage) -> None:
    """Write a refcount table and blocks that count what `usage` does, and themselves."""
    header, bits = file.header, file.bits
    width = header.refcount_bits
    per_block = (file.cluster_size << 3) // width
    numbers = {cluster // per_block for cluster in usage.used()}
    first = file.end >> bits
    clusters = nr_blocks = 0
    while True:  # the new ones have to be counted, too
        end = first + nr_blocks + clusters
        wanted = numbers | set(range(first // per_block, -(-end // per_block)))
        table_clusters = -(-(max(wanted) + 1) * 8 >> bits)
        if (len(wanted), table_clusters) == (nr_blocks, clusters):
            break
        nr_blocks, clusters = len(wanted), table_clusters
    limit = max(qcow2head.MOST_REFCOUNT_TABLE_BYTES, file.cluster_size)
    if clusters << bits > limit:
        raise ConfigError("qcow2 image: its refcount table would be too large")
    usage.add(first, nr_blocks + clusters)
    file.clear(first << bits, (nr_blocks + clusters) << bits)
    table = array("Q", bytes(clusters << bits))
    for place, number in enumerate(sorted(wanted), first):
        block = Block(bytearray(file.cluster_size), width)
        counts = usage.slice(number * per_block, per_block)
        if (most := max(counts)) > block.most:
            what = f"cluster {number * per_block + counts.index(most):#x} has {most} references"
            raise ConfigError(f"qcow2 image: {what}, refcounts of {width} bits hold less")
        block.set_all(counts)
        file.put(place << bits, block.data)
        table[number] = place << bits
    table.byteswap()
    offset = (first + nr_blocks) << bits
    file.put(offset, table.tobytes())
    file.sync()
    incompatible = header.incompatible & ~qcow2head.INCOMPATIBLE_DIRTY
    fields = qcow2head.REFCOUNT_TABLE.pack(offset, clusters)
    fields += pack(">IQ", header.snapshots, header.snapshots_offset)
    if header.version >= 3:  # adjacent, and so in one write
        fields += pack(">Q", incompatible)
    file.change_header(
        qcow2head.AT_REFCOUNT_TABLE,
        fields,
        refcount_offset=offset,
        refcount_clusters=clusters,
        incompatible=incompatible,
    )
    file.sync()
