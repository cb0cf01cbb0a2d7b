"""The shortest way from a split ring to a request, for the shape that nearly all of them have.

    header, 16 bytes, readable ── data, one element ── status, 1 byte, writable

That is a read or write of up to a page, or of one buffer, as every driver makes it: in three
direct descriptors, or in an indirect table of three in order. `pop_usual` takes such chains as
long as there are any and leaves the first one of another shape to `queue.pop`. It does what that
and `blkreq.parse` do, in half the time: no chain object, no view of header and status, one call.

The rules are theirs, and here every doubt ends in leaving the chain where it is; then nothing
read here is used. This file knows the insides of `SplitQueue`, and test_blk_pop.py runs both
ways side by side.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from devices.blkreq import HEADER, T_IN, T_OUT
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

if TYPE_CHECKING:
    from devices.blkreq import Request
    from devices.virtqueue import SplitQueue

_NEXT_WRITE: Final = DESC_F_NEXT | DESC_F_WRITE

_desc: Final = DESC.unpack_from
_three_descs: Final = Struct("<QIHHQIHHQIHH").unpack_from
_header: Final = HEADER.unpack_from


def pop_usual(queue: SplitQueue, limit: int) -> list[Request]:
    """Take up to `limit` requests of the usual shape; [] is no sign that the queue is empty."""
    requests: list[Request] = []
    cursor, size, mask = queue._next_avail, queue.size, queue._mask
    avail, table, in_flight, area = queue._avail, queue._table, queue._in_flight, queue._area
    pending = (avail[1] - cursor) & 0xFFFF
    if pending > size:
        return requests
    start, end, ram, rom = queue._memory.hot
    for _ in range(pending if pending < limit else limit):
        head = avail[2 + (cursor & mask)]
        if head >= size or head in in_flight:
            break
        header_gpa, length, flags, index = _desc(table, 16 * head)
        if flags == DESC_F_INDIRECT:
            if length != 48 or header_gpa < start or header_gpa + 48 > end or not queue._indirect:
                break
            # fmt: off
            (
                header_gpa, length, flags, index,
                data_gpa, data_length, data_flags, data_next,
                status_gpa, status_length, status_flags, _,
            ) = _three_descs(rom, header_gpa - start)
            # fmt: on
            if index != 1 or data_next != 2:
                break
        else:
            if index >= size:
                break
            data_gpa, data_length, data_flags, index = _desc(table, 16 * index)
            if index >= size:
                break
            status_gpa, status_length, status_flags, _ = _desc(table, 16 * index)
        data_at, status_at = data_gpa - start, status_gpa - start
        if (
            flags != DESC_F_NEXT
            or length != HEADER.size
            or status_flags != DESC_F_WRITE
            or status_length != 1
            or header_gpa < start
            or header_gpa + length > end
            or data_at < 0
            or data_gpa + data_length > end
            or status_at < 0
            or status_gpa >= end
            or not data_length
        ):
            break
        kind, _, sector = _header(rom, header_gpa - start)
        if kind == T_IN and data_flags == _NEXT_WRITE:
            view, capacity = ram[data_at : data_at + data_length], data_length + 1
        elif kind == T_OUT and data_flags == DESC_F_NEXT:
            view, capacity = rom[data_at : data_at + data_length], 1
        else:
            break
        if area is not None:
            area.take(head, head)
        in_flight[head] = cursor
        queue._next_avail = cursor = (cursor + 1) & 0xFFFF
        requests.append((kind, sector << 9, data_length, [view], ram, status_at, capacity, head))
    return requests
