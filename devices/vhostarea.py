"""Areas of shared memory that are not the guest's: the dirty log, and in-flight areas.

Either may come from the front end, so a size, an offset and a file are looked at before they are
mapped. Cut short later, they end this process by SIGBUS, and with it the connection.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from config.errors import HostError
from devices.inflight import inflight_bytes
from devices.ring import MAX_SIZE

AREA_MAX: Final = 1 << 40  # bytes; a log of that size covers more than guests can have

_F_ADD_SEALS: Final = 1033  # fcntl.F_ADD_SEALS is missing where Python was built on old headers
_SEALS: Final = 1 | 2 | 4  # F_SEAL_SEAL, SHRINK, GROW


def map_area(fd: int, offset: int, size: int, what: str) -> memoryview:
    """Map `size` bytes of a file, which may be closed then. Raises HostError."""
    name = f"{what} of {size:#x} bytes at {offset:#x}"
    if not 0 < size <= AREA_MAX:
        raise HostError(name)
    try:
        length = os.fstat(fd).st_size
        if offset + size > length:
            raise HostError(f"{name} leaves its file of {length:#x} bytes")
        before = offset % mmap.PAGESIZE
        mapping = mmap.mmap(fd, before + size, mmap.MAP_SHARED, offset=offset - before)
    except (OSError, ValueError, OverflowError) as err:
        raise HostError(f"cannot map {name}: {err}") from err
    return memoryview(mapping)[before:]


def stride(queue_size: int) -> int:
    """Return the bytes between the in-flight areas of two queues of that size, of any layout."""
    return -(-inflight_bytes(queue_size, packed=True) // mmap.PAGESIZE) * mmap.PAGESIZE


def make_inflight(queues: int, queue_size: int) -> tuple[int, int]:
    """Return a file with empty in-flight areas, which nobody can cut short, and its size.

    Raises HostError.
    """
    if not 0 < queue_size <= MAX_SIZE:
        raise HostError(f"in-flight areas for queues of {queue_size} entries")
    size = queues * stride(queue_size)
    try:
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
    except OSError as err:
        raise HostError(f"cannot make an in-flight area: {err.strerror}") from err
    return fd, size


def split_inflight(area: memoryview, queues: int, queue_size: int) -> list[memoryview]:
    """Return the in-flight area of each queue. Raises HostError if they do not fit."""
    step = stride(queue_size)
    if not 0 < queue_size <= MAX_SIZE or queues * step > len(area):
        what = f"in-flight area of {len(area)} bytes for {queues} queues of {queue_size}"
        raise HostError(f"{what}: they need {queues * step}")
    return [area[step * index : step * (index + 1)] for index in range(queues)]
