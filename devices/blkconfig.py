"""The configuration space of a block device (virtio 1.2 §5.2.4). What is not offered is 0.

 0 u64 capacity in sectors     20 u32 blk_size                36 u32 max_discard_sectors
 8 u32 size_max                24 u8  physical_block_exp      40 u32 max_discard_seg
12 u32 seg_max                 25 u8  alignment_offset        44 u32 discard_sector_alignment
16 u32 geometry, 0             26 u16 min_io_size in blocks   48 u32 max_write_zeroes_sectors
32 u8  writeback, writable     28 u32 opt_io_size in blocks   52 u32 max_write_zeroes_seg
34 u16 num_queues                                             56 u8  write_zeroes_may_unmap
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from devices.blkreq import MAX_DISCARD, MAX_RANGES, MAX_ZEROES, SEG_MAX, SIZE_MAX
from devices.raw import SECTOR

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.blkserve import Server

WRITEBACK_AT: Final = 32

_CONFIG: Final = Struct("<QIIIIBxHIBxHIIIIIB3x")


def pack(server: Server, settings: Mapping[str, Any], nr_queues: int) -> bytes:
    """Return it as it is now; `nr_queues` is 0 if there is no MQ."""
    block, disk = settings["block_size"], server.disk
    physical = max(settings["physical_block_size"], block)
    may_write = not disk.readonly
    return _CONFIG.pack(
        server.limit // SECTOR,
        SIZE_MAX,
        SEG_MAX,
        0,
        block,
        (physical // block).bit_length() - 1,
        settings["min_io_size"] // block,
        settings["opt_io_size"] // block,
        may_write and server.writeback,
        nr_queues,
        MAX_DISCARD // SECTOR * may_write,
        MAX_RANGES * may_write,
        max(disk.granularity, block) // SECTOR * may_write,
        MAX_ZEROES // SECTOR * may_write,
        may_write,
        may_write,
    )
