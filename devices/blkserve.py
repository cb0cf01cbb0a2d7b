"""Doing what a driver asks of a block device: requests in, statuses and used lengths out.

Requests that follow each other on the disk become one preadv or pwritev: sixteen reads of 4 KiB
cost a third of what they cost one by one. Only neighbours in the queue are looked at, so requests
are done, and reported, in the order they came.

Whatever a driver writes into a request ends in a status byte. IOERR is for what it may not ask
and for what the host could not do, and only the latter is logged.
"""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from devices.blkreq import (
    ID_BYTES,
    MAX_BYTES,
    MAX_DISCARD,
    MAX_RANGES,
    MAX_ZEROES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_FLUSH_OUT,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    T_WRONG,
    Request,
)
from devices.bucket import TokenBucket
from devices.device import ERROR
from devices.raw import IOV_MAX, SECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.device import Host
    from devices.raw import Attempt, Disk

BATCH: Final = 32
ERRORS_RATE: Final = 1.0  # lines per second about errors of the host
ERRORS_BURST: Final = 10
NO_BOUND: Final = 1 << 16  # more requests than there are in flight

_END: Final[Request] = (T_WRONG, -1, 0, [], memoryview(b""), 0, 0, 0)  # nothing goes on with it

Done = list[tuple[int, int]]  # head and used length of each chain to give back

_NAMES: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_FLUSH_OUT: "flush",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write zeroes",
}


class Server:
    """Does requests on a disk, each to its end before the next."""

    #: Whether requests are done in the order they came.
    in_order = True
    #: Requests that are best given to `serve`, and given back, together.
    batch = BATCH

    def __init__(self, disk: Disk, host: Host, serial: str) -> None:
        """Serve `disk`; GET_ID returns `serial`."""
        self.disk = disk
        disk.attempts()  # what they need that no jail allows
        #: Bytes of the disk that requests may reach.
        self.limit = disk.size
        #: False: every write is on the medium before it is reported (§5.2.6.2).
        self.writeback = True
        self._host = host
        self.nr_reads = self.nr_writes = self.nr_others = 0  # requests that were asked for
        self.bytes_read = self.bytes_written = 0
        self._id = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._limiter, self._untold = TokenBucket(ERRORS_RATE, ERRORS_BURST), 0

    @property
    def room(self) -> int:
        """How many requests `serve` may be given."""
        return NO_BOUND

    def serve(self, queue: int, requests: list[Request], done: Done) -> int:
        """Do requests of a queue and add them to `done`; return how many bytes they ask for."""
        limit, readonly = self.limit, self.disk.readonly
        read, write = self._attempts()
        asked = nr_views = wrote = nr_writes = nr_others = 0
        run: list[Request] = []  # reads, or writes, that follow each other on the disk
        for request, after in pairwise((*requests, _END)):
            kind, offset, length, views, status, last, capacity, head = request
            end = offset + length
            if (
                kind >> 1  # neither T_IN nor T_OUT
                or (kind and readonly)
                or length % SECTOR
                or length > MAX_BYTES
                or end > limit
            ):
                if run:
                    self._transfer(queue, run, done)
                    run, nr_views = [], 0
                self._special(queue, request, done)
                nr_others += 1
                continue
            asked += length
            if kind:
                wrote += length
                nr_writes += 1
            goes_on = after[1] == end and after[0] == kind
            if goes_on or run:
                run.append(request)
                nr_views += len(views)
                if not goes_on or nr_views + len(after[3]) > IOV_MAX:
                    self._transfer(queue, run, done)
                    run, nr_views = [], 0
                continue
            attempt = write if kind else read
            try:  # the hottest line there is
                well = attempt is not None and attempt(views, offset) == length
            except OSError:
                well = False
            if well:
                status[last] = S_OK
                done.append((head, capacity))
            else:
                self._transfer(queue, [request], done)
        if self.disk.pending:
            self._commit(requests)
        self.nr_reads += len(requests) - nr_writes - nr_others
        self.nr_writes += nr_writes
        self.nr_others += nr_others
        self.bytes_read += asked - wrote
        self.bytes_written += wrote
        return asked

    def _attempts(self) -> tuple[Attempt | None, Attempt | None]:
        """Return what may be called to read and write before taking more trouble."""
        read, write = self.disk.attempts()
        return read, write if self.writeback else None

    def _commit(self, requests: Sequence[Request]) -> None:
        """Before it is reported, make what these requests changed outlive this process.

        If that fails, nobody knows which of them are lost: then all have failed.
        """
        try:
            self.disk.commit()
        except OSError as err:
            self._complain(f"writing the image's tables: {err.strerror}")
            for kind, _, _, _, status, last, _, _ in requests:
                if kind in (T_OUT, T_DISCARD, T_WRITE_ZEROES):
                    status[last] = S_IOERR

    def drain(self) -> None:
        """Be done with every request that was ever served."""

    def abandon(self) -> None:
        """Be done with every request, without giving it back."""

    def _transfer(self, queue: int, run: list[Request], done: Done) -> None:
        """Do a run, in one call if all goes well."""
        kind, offset, length, views, status, last, capacity, head = run[0]
        if len(run) > 1:
            views, length = joined(run)
        try:
            if kind:
                got = self.disk.write(views, offset, length, stable=not self.writeback)
            else:
                got = self.disk.read(views, offset, length)
        except OSError as err:
            if len(run) == 1:
                self._failed(run[0], err, done)
                return
            got = -1
        if got == length:
            for _, _, _, _, status, last, capacity, head in run:
                status[last] = S_OK
                done.append((head, capacity))
        elif len(run) == 1:
            self._cut_short(run[0], got, done)
        else:  # which of them it was shows when each is done alone
            for request in run:
                self._transfer(queue, [request], done)

    def _special(self, queue: int, request: Request, done: Done) -> None:
        """Do a request that is neither read nor write, or refuse one that may not be."""
        kind, _, length, views, *_ = request
        result, written = S_OK, 0
        try:
            if kind in (T_FLUSH, T_FLUSH_OUT):
                self.disk.flush()
            elif kind == T_GET_ID:
                written = _fill(views, self._id)
            elif kind in (T_DISCARD, T_WRITE_ZEROES):
                result = self._clear(kind, views, length)
            else:
                result = S_IOERR if kind in (T_IN, T_OUT, T_WRONG) else S_UNSUPP
        except OSError as err:
            self._failed(request, err, done)
        else:
            finish(request, result, written, done)

    def _clear(self, kind: int, views: Sequence[memoryview], length: int) -> int:
        """Discard or zero ranges; return the status. Raises OSError."""
        if self.disk.readonly:
            return S_IOERR
        nr_ranges, most = (MAX_RANGES, MAX_DISCARD) if kind == T_DISCARD else (1, MAX_ZEROES)
        if length % SEGMENT.size or not 0 < length <= nr_ranges * SEGMENT.size:
            return S_IOERR
        known = 0 if kind == T_DISCARD else SEGMENT_F_UNMAP
        # All are copied, then checked, before the first is done.
        ranges = list(SEGMENT.iter_unpack(b"".join(views)))
        if any(flags & ~known for _, _, flags in ranges):
            return S_UNSUPP
        spans = [(sector * SECTOR, count * SECTOR, flags) for sector, count, flags in ranges]
        if any(size > most or start + size > self.limit for start, size, _ in spans):
            return S_IOERR
        for start, size, flags in spans:
            if kind == T_DISCARD:
                self.disk.discard(start, size)
            else:
                self.disk.write_zeroes(start, size, unmap=bool(flags & SEGMENT_F_UNMAP))
        if kind == T_WRITE_ZEROES and not self.writeback:
            self.disk.flush()
        return S_OK

    def _failed(self, request: Request, err: OSError, done: Done) -> None:
        """The host could not do it: the driver sees IOERR, the log why."""
        text = f"{_describe(request)}: {err.strerror}"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            text += " (the host's file system is full; the guest can go on when it is not)"
        self._complain(text)
        finish(request, S_IOERR, 0, done)

    def _cut_short(self, request: Request, got: int, done: Done) -> None:
        """The image ended before the disk does."""
        kind, offset, *_ = request
        self._complain(f"{_describe(request)}: the image has shrunk to {offset + got} bytes")
        finish(request, S_IOERR, got if kind == T_IN else 0, done)

    def _complain(self, text: str) -> None:
        """Log an error of the host's, so many and no more."""
        self._host.checkpoint()  # it may hold for whoever comes after us
        if self._limiter.wait() > 0:
            self._untold += 1
            return
        self._limiter.take(1)
        untold, self._untold = self._untold, 0
        self._host.log(ERROR, f"{text} (and {untold} errors before it)" if untold else text)


def joined(run: Sequence[Request]) -> tuple[list[memoryview], int]:
    """Return the views of a run, and how many bytes they hold."""
    return [view for request in run for view in request[3]], sum(request[2] for request in run)


def finish(request: Request, result: int, written: int, done: Done) -> None:
    """Set the status of a request; `written` bytes of data are there, from the first without a gap.

    The used length counts bytes from the start of the buffer, so the status byte at its end is
    in it only if all the data is (§2.7.8.2).
    """
    _, _, _, _, status, last, capacity, head = request
    status[last] = result
    done.append((head, capacity if written == capacity - 1 else written))


def _describe(request: Request) -> str:
    kind, offset, length, *_ = request
    name = _NAMES.get(kind, "request")
    return f"{name} of {length} bytes at {offset:#x}" if kind in (T_IN, T_OUT) else name


def _fill(views: Sequence[memoryview], data: bytes) -> int:
    """Copy `data` into views as far as they go; return how many bytes that is."""
    done = 0
    for view in views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
    return done
