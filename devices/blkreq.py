"""What a driver asks of a block device: numbers of virtio 1.2 §5.2, and chains taken apart.

    readable   header: type u32, reserved u32, sector u64      then the data of a write
    writable   the data of a read                              last byte: status

How the bytes are spread over descriptors means nothing (§2.7.4): header and status are found by
counting bytes. The header is guest memory, so it is read once, into integers.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.spec import SPECS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devices.chain import Chain

BLK_F_SIZE_MAX: Final = 1 << 1
BLK_F_SEG_MAX: Final = 1 << 2
BLK_F_RO: Final = 1 << 5
BLK_F_BLK_SIZE: Final = 1 << 6
BLK_F_FLUSH: Final = 1 << 9
BLK_F_TOPOLOGY: Final = 1 << 10
BLK_F_CONFIG_WCE: Final = 1 << 11
BLK_F_MQ: Final = 1 << 12
BLK_F_DISCARD: Final = 1 << 13
BLK_F_WRITE_ZEROES: Final = 1 << 14

T_IN: Final = 0  # read
T_OUT: Final = 1  # write
T_FLUSH: Final = 4
T_FLUSH_OUT: Final = 5  # an old name of FLUSH
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
T_WRONG: Final = -1  # not a type: data in the wrong direction

TO_DRIVER: Final = frozenset((T_IN, T_GET_ID))  # their data is the driver's to read

S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2

HEADER: Final = Struct("<IIQ")
SEGMENT: Final = Struct("<QII")  # of DISCARD and WRITE_ZEROES: sector, nr_sectors, flags
SEGMENT_F_UNMAP: Final = 1

SEG_MAX: Final = SPECS["vioblk"].queues[0] - 2  # fits beside header and status
SIZE_MAX: Final = 128 << 10  # bytes in one segment
MAX_BYTES: Final = SEG_MAX * SIZE_MAX  # in one request: it bounds how long others have to wait
MAX_RANGES: Final = 64  # of one DISCARD; WRITE_ZEROES has one
MAX_DISCARD: Final = 256 << 20  # bytes of one range: freeing them takes some milliseconds
MAX_ZEROES: Final = 32 << 20  # bytes: where they must be written it takes as long as MAX_BYTES
ID_BYTES: Final = 20

#: type, offset on the disk, length of data, its views, memory and index of the status byte, bytes
#: the driver can be given (data and status), head of the chain. A tuple: one is made per request.
Request = tuple[int, int, int, list[memoryview], memoryview, int, int, int]

_unpack: Final = HEADER.unpack_from


def parse(chains: Iterable[Chain]) -> tuple[list[Request], GuestError | None]:
    """Take chains apart; stop at one that is no request, and return what is wrong with it.

    Offset and length are the driver's claims, as large as 64 bits of sectors.
    """
    requests: list[Request] = []
    for chain in chains:
        readable, writable = chain.readable, chain.writable
        if chain.readable_bytes < 16 or not writable:
            what = f"{chain.readable_bytes} bytes to read and {chain.writable_bytes} to write"
            return requests, GuestError(f"block request of {what}: no room for header and status")
        header = readable[0]
        if len(header) == 16:
            kind, _, sector = _unpack(header)
            del readable[0]
        else:
            kind, _, sector = _unpack(_cut_header(readable))
        status = writable.pop()
        last = len(status) - 1
        if last:
            writable.append(status[:last])
        capacity = chain.writable_bytes
        if kind in TO_DRIVER:
            views, length = writable, capacity - 1
            if readable:
                kind = T_WRONG
        else:
            views, length = readable, chain.readable_bytes - 16
            if writable and kind == T_OUT:
                kind = T_WRONG
        requests.append((kind, sector << 9, length, views, status, last, capacity, chain.head))
    return requests, None


def _cut_header(readable: list[memoryview]) -> bytes:
    """Take the first 16 bytes off the views, wherever they are, and return a copy."""
    header = b""
    while len(header) < HEADER.size:
        view = readable.pop(0)
        left = HEADER.size - len(header)
        header += bytes(view[:left])
        if len(view) > left:
            readable.insert(0, view[left:])
    return header
