"""Makes an io_uring(7), for the device processes that will use it one after another.

A process that is killed has ended before its requests have: a disk may still write, or write into
guest memory, what the process asked for last. Its successor must not do these again before that,
or an old write could come after a newer one. A ring made by who outlives both tells when it has
happened: it has a result for every request, whoever waits for it. So it is for block devices and
all file systems, for reads and writes. Linux passes no ring through a socket, it can only be
inherited: so the spawner makes it. That neither maps nor uses it, and tells it first to carry out
nothing but reads, writes and syncs, whoever asks.
"""

from __future__ import annotations

import ctypes
import errno
import os
from struct import pack, unpack_from
from typing import Final

DEPTH: Final = 256  # requests in flight, of all queues: more than any device works on at once

OP_READV, OP_WRITEV, OP_FSYNC, OP_READ, OP_WRITE = 1, 2, 3, 22, 23  # linux/io_uring.h

_SETUP, _REGISTER = 425, 427  # system calls, the same on every architecture
# Features: both rings are one mapping (Linux 5.4); requests are done in the memory of who hands
# them over, not of who made the ring (5.6).
_NEEDED: Final = 1 | 16
# struct io_uring_params: sizes of both rings first, features at 20, and where the fields of the
# rings lie from 40 and 80: head, tail, mask, entries, ..., array or cqes.
_PARAMS: Final = "=8x I 108x"  # flags at 8
_R_DISABLED: Final = 1 << 6  # flag: nothing is done yet (Linux 5.10)
_RESTRICTIONS, _ENABLE = 11, 12  # what to register
# struct io_uring_restriction: IORING_RESTRICTION_SQE_OP, the operation.
_RESTRICTION: Final = "=HB13x"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 7  # the number, and six as every call can have

#: The descriptor, and what the kernel says of the ring: struct io_uring_params.
Made = tuple[int, bytes]


def make(entries: int) -> Made:
    """Make a ring. Raises OSError: ENOSYS or EPERM where there is no io_uring, ENOMEM."""
    try:
        fd, params = _set_up(entries, _R_DISABLED)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        return _set_up(entries, 0)
    try:
        operations = (OP_READV, OP_WRITEV, OP_FSYNC, OP_READ, OP_WRITE)
        allowed = b"".join(pack(_RESTRICTION, 1, operation) for operation in operations)
        rows = ctypes.create_string_buffer(allowed)
        system_call(_REGISTER, fd, _RESTRICTIONS, ctypes.addressof(rows), len(operations))
        system_call(_REGISTER, fd, _ENABLE)
    except BaseException:
        os.close(fd)
        raise
    return fd, params


def _set_up(entries: int, flags: int) -> Made:
    params = ctypes.create_string_buffer(pack(_PARAMS, flags), 120)
    fd = system_call(_SETUP, entries, ctypes.addressof(params))
    if ~unpack_from("=I", params, 20)[0] & _NEEDED:
        os.close(fd)
        raise OSError(errno.ENOSYS, "io_uring older than Linux 5.6")
    return fd, params.raw


def system_call(number: int, *arguments: int) -> int:
    """Make a system call. Raises OSError."""
    result: int = _libc.syscall(number, *arguments, *(0,) * (6 - len(arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
