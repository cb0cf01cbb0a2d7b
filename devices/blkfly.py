"""Requests of the usual shape, started by io_uring: from ring to ring in one pass.

What `blkquick` is for the page cache this is for O_DIRECT: requests as drivers nearly always make
them become entries of io_uring without a request object, a view or a call of their own. Their data
and status are known by where they are in guest memory, and the flight keeps that memory. Every
doubt ends in leaving the chain where it is, for `blkring` to judge; so do requests that go on where
the one before ended, for those become one there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from devices.blkquick import ODD, SHAPES, TABLE_BYTES, type_and_sector
from devices.blkreq import HEADER, MAX_BYTES, T_IN, T_OUT
from devices.uringmake import OP_READ, OP_WRITE

if TYPE_CHECKING:
    from devices.blkreq import Request
    from devices.raw import Locate
    from devices.uring import Transfer
    from devices.virtqueue import VirtQueue

#: Token → what flies: queue, type, offset, length, bytes the driver can be given, head, memory, and
#: where in it data and status are. A tuple: one is made per request.
Flights = dict[int, tuple[int, int, int, int, int, int, memoryview, int, int]]
#: No token of a flight is as large: it is the queue's number and 16 bits of head.
TOKENS: Final = 1 << 32


class Takeoff(NamedTuple):
    """What was found."""

    tables: list[tuple[int, int]]  # for queue.take
    transfers: list[Transfer]  # for Ring.start
    bytes_read: int
    nr_writes: int
    bytes_written: int


def prepare(
    index: int,
    queue: VirtQueue,
    limit: int,
    *,
    ram_hva: int,
    flights: Flights,
    locate: Locate | None,
    disk_bytes: int,
    writable: bool,
) -> Takeoff:
    """Put up to `limit` requests of queue number `index` into `flights`; they are to be started.

    That there were none says nothing about the queue, which must be of a class in SHAPES. `ram_hva`
    is where the memory that is looked into first is in this process; `locate` finds bytes of the
    disk in the file; `disk_bytes` is what requests may reach; without `writable` writes are left.
    """
    transfers: list[Transfer] = []
    bytes_read = nr_writes = bytes_written = 0
    three_descs, usual_header, read, write, statuses = SHAPES[type(queue)]
    start, end, ram, rom = queue._memory.hot
    last_table, last_header = end - TABLE_BYTES, end - HEADER.size
    tables, in_flight = queue.peek(limit, TABLE_BYTES), queue._in_flight
    follows = -1
    for head, table_gpa in tables:
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
        offset, token = sector << 9, index << 16 | head
        if (
            offset + length > disk_bytes
            or not 0 < length <= MAX_BYTES
            or length & ODD
            or token in flights
            or head in in_flight
        ):
            break
        if offset == follows and transfers:
            _, before, _, length, *_ = flights.pop(transfers.pop()[0])
            if before == T_IN:
                bytes_read -= length
            else:
                nr_writes -= 1
                bytes_written -= length
            break
        follows = offset + length
        place = offset if locate is None else locate(offset, length, kind)
        if place < 0:
            break
        data_at = data_gpa - start
        if kind == T_IN and way == read:
            operation, capacity = OP_READ, length + 1
            bytes_read += length
        elif kind == T_OUT and way == write and writable:
            operation, capacity = OP_WRITE, 1
            nr_writes += 1
            bytes_written += length
        else:
            break
        status_at = status_gpa - start
        flights[token] = index, kind, offset, length, capacity, head, ram, data_at, status_at
        transfers.append((token, operation, ram_hva + data_at, length, place))
    return Takeoff(tables[: len(transfers)], transfers, bytes_read, nr_writes, bytes_written)


def request_of(flight: tuple[int, int, int, int, int, int, memoryview, int, int]) -> Request:
    """Return the request that a flight is, for those who do it in another way."""
    _, kind, offset, length, capacity, head, ram, data_at, status_at = flight
    view = ram[data_at : data_at + length]
    views = [view if kind == T_IN else view.toreadonly()]
    return kind, offset, length, views, ram, status_at, capacity, head
