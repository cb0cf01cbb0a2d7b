"""Requests of the usual shape, served out of the image's window: from ring to ring in one pass.

    header, 16 bytes, readable ── data, one element ── status, 1 byte, writable

What `blkpop.pop_usual`, `blkserve.Server` and `window` do one after another is done here per
request, without anything in between: no request object, no list of views, no system call. It is
for what nearly all requests are where images are in the page cache: aligned, small, in an indirect
table of three, inside of the disk and of one spot of its window. Every doubt ends in leaving the
chain where it is, for the others to judge; then nothing read here is used.

Requests past the page cache are started in the same way: `blkfly`.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from devices import buserror
from devices.blkreq import HEADER, S_OK, T_IN, T_OUT
from devices.chain import DESC, DESC_F_NEXT, DESC_F_WRITE
from devices.packed import PackedQueue
from devices.raw import SECTOR
from devices.virtqueue import SplitQueue
from devices.window import MOST

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.blkserve import Done
    from devices.virtqueue import VirtQueue
    from devices.window import Window

TABLE_BYTES: Final = 3 * DESC.size
AT_ONCE: Final = 256 << 10  # bytes of large requests, before the driver gets something back
MANY: Final = 16 << 10  # bytes: a request that is larger is large
ODD: Final = SECTOR - 1

type_and_sector: Final = Struct("<I4xQ").unpack_from


class Shape(NamedTuple):
    """What the usual table looks like in one layout of rings."""

    #: Reads header, data and status: address, and the rest as one word, but for the data: length
    #: and the rest above it.
    three_descs: Callable[[memoryview, int], tuple[int, ...]]
    header: int
    read: int  # of data to read
    write: int
    statuses: frozenset[int]


_SPLIT: Final = Shape(
    Struct("<QQQIIQQ").unpack_from,
    1 << 48 | DESC_F_NEXT << 32 | HEADER.size,
    2 << 16 | DESC_F_NEXT | DESC_F_WRITE,
    2 << 16 | DESC_F_NEXT,
    # Next of the last one means nothing: drivers leave 0 there, or count on.
    frozenset(next_ << 48 | DESC_F_WRITE << 32 | 1 for next_ in (0, 3)),
)

_without_ids: Final = Struct("<QI2xHQI2xHQI2xH").unpack_from


def _packed_descs(table: memoryview, at: int) -> tuple[int, ...]:
    """Of an entry's id and flags only WRITE means anything (§2.8.7): leave out the ids."""
    header_gpa, header, flags, data_gpa, length, way, status_gpa, status, writable = _without_ids(
        table, at
    )
    header |= flags << 32
    return header_gpa, header, data_gpa, length, way, status_gpa, status | writable << 32


_PACKED: Final = Shape(
    _packed_descs, HEADER.size, DESC_F_WRITE, 0, frozenset((DESC_F_WRITE << 32 | 1,))
)
#: By class: one derived of these may have more to do, such as to log.
SHAPES: Final[dict[type[VirtQueue], Shape]] = {SplitQueue: _SPLIT, PackedQueue: _PACKED}


class Served(NamedTuple):
    """What was done."""

    done: Done  # to be pushed
    bytes_read: int
    nr_writes: int
    bytes_written: int


def serve_quick(
    queue: VirtQueue, limit: int, window: Window, disk_bytes: int, *, writable: bool
) -> Served:
    """Serve up to `limit` requests; they are still in the ring, for `queue.pass_back`.

    That there were none says nothing about the queue, which must be of a class in SHAPES.
    `disk_bytes` is what requests may reach; without `writable` writes are left.
    """
    done: Done = []
    bytes_read = nr_writes = bytes_written = 0
    if queue.nr_in_flight:
        return Served(done, 0, 0, 0)
    three_descs, usual_header, read, write, statuses = SHAPES[type(queue)]
    start, end, ram, rom = queue._memory.hot
    last_table, last_header = end - TABLE_BYTES, end - HEADER.size
    spots, most_written = window.spots, window.most_written if writable and window.writable else 0
    bits, within = spots.bits, (1 << spots.bits) - 1
    left = AT_ONCE
    for head, table_gpa in queue.peek(limit, TABLE_BYTES):
        if not start <= table_gpa <= last_table:
            break
        header_gpa, header, data_gpa, length, way, status_gpa, status = three_descs(
            rom, table_gpa - start
        )
        if (
            header != usual_header
            or status not in statuses
            or not start <= header_gpa <= last_header
            or not start <= data_gpa <= end - length
            or not start <= status_gpa < end
        ):
            break
        kind, sector = type_and_sector(rom, header_gpa - start)
        offset = sector << 9
        if offset + length > disk_bytes:
            break
        spot, at = spots[offset >> bits], offset & within
        at_end = at + length
        if length & ODD or at_end > len(spot) or not length:
            break
        data_at = data_gpa - start
        if kind == T_IN and way == read and length <= MOST:
            bytes_read += length
            done.append((head, length + 1))
            ram[data_at : data_at + length] = spot[at:at_end]
        elif kind == T_OUT and way == write and length <= most_written:
            nr_writes += 1
            bytes_written += length
            done.append((head, 1))
            spot[at:at_end] = ram[data_at : data_at + length]
        else:
            break
        ram[status_gpa - start] = S_OK
        if length > MANY:
            left -= length
            if left <= 0:
                break
    if buserror.failures:  # some copy was none, and all are done again in another way
        window.clear()
        return Served([], 0, 0, 0)
    return Served(done, bytes_read, nr_writes, bytes_written)
