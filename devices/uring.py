"""io_uring(7) by hand, as much of it as a disk needs: reads, writes and syncs that overlap.

Two rings in memory shared with the kernel. We put entries into one and say so in one system call
per batch; the kernel puts results into the other, and the ring's descriptor is readable while
there are any. Each entry carries a token, and so does its result; results come in any order.

    ring.read(token, fd, views, offset) … ring.submit() … for token, result in ring.reap()

The memory of the views is the kernel's until their result is there; the ring keeps it alive, and
whoever has other uses for it waits. So it is for what a killed process has left in flight
(`uringmake`): nothing may be begun before the results of that have come. x86-64 keeps stores in
order and the system call is a barrier, so plain loads and stores are enough.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from struct import Struct, unpack_from
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices.uringmake import OP_FSYNC, OP_READ, OP_READV, OP_WRITE, OP_WRITEV, system_call

if TYPE_CHECKING:
    from collections.abc import Sequence

_ENTER: Final = 426  # system call, the same on every architecture
_GETEVENTS: Final = 1
_OFF_SQES: Final = 0x1000_0000

_FSYNC_DATASYNC: Final = 1

# struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, buf_index,
# personality, splice_fd_in, two words of padding.
_SQE: Final = Struct("=BBHiQQIIQHHiQQ")
# As much of it as we need, flags in the upper half of len; all else is zero, and stays so.
_FIELDS: Final = Struct("=QQQQQ").pack_into
_CQE: Final = Struct("=QiI")  # struct io_uring_cqe: user_data, res, flags

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_libc.syscall.argtypes = (ctypes.c_long,) * 7  # the number, and six as every call can have

#: Token, OP_READ or OP_WRITE, address in this process, length, offset in the file.
Transfer = tuple[int, int, int, int, int]

# Python's stable C interface: Py_buffer says where the bytes of an object are, in its first word.
_get_buffer: Final = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int
)(("PyObject_GetBuffer", ctypes.pythonapi))
_release_buffer: Final = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(
    ("PyBuffer_Release", ctypes.pythonapi)
)
_py_buffer: Final = (ctypes.c_uint64 * 10)()
_py_buffer_at: Final = ctypes.addressof(_py_buffer)
_py_buffer_words: Final = memoryview(_py_buffer).cast("B").cast("Q")


def address(view: memoryview) -> int:
    """Return where the bytes of a view are; ctypes has no way to ask that of a read-only one."""
    _get_buffer(view, _py_buffer_at, 0)
    found = _py_buffer_words[0]
    _release_buffer(_py_buffer_at)
    return found


class Ring:
    """One io_uring. For one thread; `entries`, a power of two, bounds what may be in flight."""

    def __init__(self, fd: int, params: bytes) -> None:
        """Take over what `uringmake.make` has returned, also from a process that was killed.

        Raises OSError, HostError.
        """
        self.fd = fd
        nr_sqes, nr_cqes = unpack_from("=2I", params)
        sq_head, sq_tail, _, _, _, _, sq_array = unpack_from("=7I", params, 40)
        cq_head, cq_tail, _, _, _, cqes = unpack_from("=6I", params, 80)
        size = max(sq_array + 4 * nr_sqes, cqes + _CQE.size * nr_cqes)
        rings = memoryview(mmap.mmap(self.fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE))
        words = rings[: size & ~3].cast("I")
        for i in range(nr_sqes):
            words[sq_array // 4 + i] = i  # entry i is always described by slot i
        self._words, self._rings = words, rings
        self._sq_tail, self._cq_head, self._cq_tail = sq_tail // 4, cq_head // 4, cq_tail // 4
        results = rings[cqes : cqes + _CQE.size * nr_cqes]
        self._tokens, self._results = results.cast("Q"), results.cast("i")
        self._cq_mask = nr_cqes - 1
        self._sqes = mmap.mmap(
            self.fd, _SQE.size * nr_sqes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQES
        )
        self.entries = nr_sqes
        # There is a result for whatever the kernel has taken; what it has not is forgotten.
        taken, come = words[sq_head // 4], words[self._cq_tail]
        #: Requests of a predecessor whose results have not come.
        self.nr_old = (taken - come) & 0xFFFF_FFFF
        if self.nr_old > nr_sqes:
            raise HostError("the ring that a predecessor has left makes no sense")
        words[self._sq_tail] = self._tail = taken
        words[self._cq_head] = come
        self._unsubmitted = 0
        # Token → views and iovecs that the kernel works on.
        self._held: dict[int, tuple[Sequence[memoryview], array[int] | None]] = {}
        #: Entries whose result has not been reaped.
        self.nr_in_flight = self.nr_old

    def read(self, token: int, fd: int, views: Sequence[memoryview], offset: int) -> None:
        """Queue preadv(2). Raises BlockingIOError, nothing queued, if the ring is full."""
        self._transfer((OP_READ, OP_READV), token, views, offset, fd=fd, flags=0)

    def write(
        self, token: int, fd: int, views: Sequence[memoryview], offset: int, *, stable: bool
    ) -> None:
        """Queue pwritev(2); `stable` as with RWF_DSYNC. Raises BlockingIOError."""
        flags = os.RWF_DSYNC if stable else 0
        self._transfer((OP_WRITE, OP_WRITEV), token, views, offset, fd=fd, flags=flags)

    def sync(self, token: int, fd: int) -> None:
        """Queue fdatasync(2), which covers the writes that are complete. Raises BlockingIOError."""
        self._put(OP_FSYNC, token, (0, 0), 0, fd=fd, flags=_FSYNC_DATASYNC)

    def start(self, fd: int, transfers: Sequence[Transfer]) -> None:
        """Queue transfers and hand them to the kernel. Raises BlockingIOError, OSError.

        Their memory is the caller's to keep until the results are there.
        """
        if self.nr_in_flight + len(transfers) > self.entries:
            raise BlockingIOError(errno.EAGAIN, "the ring is full")
        sqes, tail, mask, fields = self._sqes, self._tail, self.entries - 1, _FIELDS
        fd <<= 32
        for token, operation, hva, length, offset in transfers:
            fields(sqes, (tail & mask) << 6, operation | fd, offset, hva, length, token)
            tail += 1
        self._tail = tail & 0xFFFF_FFFF
        self._words[self._sq_tail] = self._tail
        self._unsubmitted += len(transfers)
        self.nr_in_flight += len(transfers)
        # As submit() would, nearly always.
        if _libc.syscall(_ENTER, self.fd, self._unsubmitted, 0, 0, 0, 0) == self._unsubmitted:
            self._unsubmitted = 0
        else:
            self.submit()

    @property
    def has_results(self) -> bool:
        """Whether reap would return something."""
        words = self._words
        return bool(words[self._cq_head] != words[self._cq_tail])

    def submit(self) -> None:
        """Hand what was queued to the kernel. Raises OSError."""
        while self._unsubmitted:
            self._enter(0, 0)

    def wait(self) -> None:
        """Submit, and wait until there is a result. Raises OSError."""
        if self.nr_in_flight:
            self._enter(1, _GETEVENTS)

    def reap(self, most: int = 1 << 16) -> list[tuple[int, int]]:
        """Return up to `most` results: token, and bytes transferred or a negative errno.

        Those of a predecessor are left out.
        """
        head, tail = self._words[self._cq_head], self._words[self._cq_tail]
        if self.nr_old:
            nr_old = min(self.nr_old, (tail - head) & 0xFFFF_FFFF)
            self.nr_old -= nr_old
            self.nr_in_flight -= nr_old
            head = (head + nr_old) & 0xFFFF_FFFF
        if (tail - head) & 0xFFFF_FFFF > most:
            tail = (head + most) & 0xFFFF_FFFF
        found: list[tuple[int, int]] = []
        tokens, results, mask, held = self._tokens, self._results, self._cq_mask, self._held
        while head != tail:
            at = 2 * (head & mask)
            found.append((tokens[at], results[2 * at + 2]))
            if held:
                held.pop(tokens[at], None)
            head = (head + 1) & 0xFFFF_FFFF
        self._words[self._cq_head] = head
        self.nr_in_flight -= len(found)
        return found

    def close(self) -> None:
        """Free the ring; nothing may be in flight."""
        for view in (self._words, self._tokens, self._results, self._rings):
            view.release()
        self._sqes.close()
        os.close(self.fd)

    def _transfer(
        self,
        ops: tuple[int, int],
        token: int,
        views: Sequence[memoryview],
        offset: int,
        *,
        fd: int,
        flags: int,
    ) -> None:
        """Queue one of `ops`: the first for one view, the second for a vector of them."""
        if len(views) == 1:
            span = address(views[0]), len(views[0])
            self._put(ops[0], token, span, offset, fd=fd, flags=flags)
            self._held[token] = views, None
            return
        iovecs = array("Q")
        for view in views:
            iovecs.append(address(view))
            iovecs.append(len(view))
        span = iovecs.buffer_info()[0], len(views)
        self._put(ops[1], token, span, offset, fd=fd, flags=flags)
        self._held[token] = views, iovecs

    def _put(
        self, op: int, token: int, span: tuple[int, int], offset: int, *, fd: int, flags: int
    ) -> None:
        if self.nr_in_flight >= self.entries:
            raise BlockingIOError(errno.EAGAIN, "the ring is full")
        at = _SQE.size * (self._tail & (self.entries - 1))
        where, length = span
        _FIELDS(self._sqes, at, op | fd << 32, offset, where, length | flags << 32, token)
        self._tail = (self._tail + 1) & 0xFFFF_FFFF
        self._words[self._sq_tail] = self._tail
        self._unsubmitted += 1
        self.nr_in_flight += 1

    def _enter(self, wanted: int, flags: int) -> None:
        """io_uring_enter(2). A signal, or a kernel short of memory for the moment: again."""
        try:
            self._unsubmitted -= system_call(_ENTER, self.fd, self._unsubmitted, wanted, flags)
        except OSError as err:
            if err.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise
