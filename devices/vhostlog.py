"""The dirty log: a bit for every page of guest memory that this process has written to.

A monitor that migrates its guest copies memory while it is still written to, and asks with this
log for what to copy again: bit n of the file it shares stands for the 4 KiB at n × 4096. It clears
bits and reads pages in that order, we write and set bits in that order, with a fence in between.

**Setting a bit** has to be atomic: other devices of the guest set theirs in the same words. Python
has no such store, but the kernel has: FUTEX_WAKE_OP ors one bit into a word and wakes nobody. A
bit that is set already is left alone, so a page costs a system call only once per round.

**What is logged.** All of a chain's writable buffers when it goes back to the driver, used or
taken back: what may have been written, not only what counts. And every word of the rings that is
ours. The queues below do that; the others, and the short ways past them in `blkpop` and `netpop`,
know nothing of it, so a guest that is not being migrated pays nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.features import F_RING_PACKED
from devices.guestmem import fence
from devices.packed import PLACE, PackedQueue
from devices.ring import VirtQueue
from devices.virtqueue import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.chain import Chain
    from devices.guestmem import GuestMemory, Span
    from devices.inflight import Inflight

PAGE: Final = 4096

_SYS_FUTEX: Final = 202
_WAKE_OP_PRIVATE: Final = 5 | 128
_OP_OR_BIT: Final = (8 | 2) << 28  # FUTEX_OP_OPARG_SHIFT | FUTEX_OP_OR: or with 1 << argument

_syscall: Final = ctypes.CDLL(None, use_errno=True).syscall


class DirtyLog:
    """One log, and the memory it is about."""

    def __init__(self, area: memoryview) -> None:
        """Take a view of the log, as it is shared."""
        self._area = area
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self.nr_pages = 8 * len(area)
        #: Whether a bit has been set since somebody has asked.
        self.news = False
        self._spans: list[tuple[int, int, int]] = []  # first and end of our addresses, GPA
        self._quiet = ctypes.c_uint32(0)  # what FUTEX_WAKE_OP wakes nobody on

    def cover(self, spans: Sequence[Span]) -> None:
        """Take note of where guest memory is mapped."""
        self._spans = []
        for start, end, ram, _ in spans:
            first = ctypes.addressof(ctypes.c_char.from_buffer(ram))
            self._spans.append((first, first + end - start, start))

    def mark(self, gpa: int, length: int) -> None:
        """Note that these bytes have been written to. Raises GuestError behind the log's end."""
        if not length:
            return
        last = (gpa + length - 1) // PAGE
        if last >= self.nr_pages:
            raise GuestError(f"guest address {gpa:#x}+{length:#x} is behind the end of the log")
        area = self._area
        for page in range(gpa // PAGE, last + 1):
            if not area[page >> 3] >> (page & 7) & 1:
                self._set(page)

    def mark_views(self, views: Sequence[memoryview]) -> None:
        """Note that all of these views of guest memory may have been written to."""
        for view in views:
            at = ctypes.addressof(ctypes.c_char.from_buffer(view))
            for first, end, gpa in self._spans:
                if first <= at < end:
                    self.mark(gpa + at - first, len(view))
                    break

    def _set(self, page: int) -> None:
        """Set one bit, whatever others do to its word at the moment."""
        at = self._first + (page >> 3)
        word = at & ~3  # in the same page, so mapped
        bit = 8 * (at - word) + (page & 7)
        done = _syscall(
            _SYS_FUTEX,
            ctypes.byref(self._quiet),
            _WAKE_OP_PRIVATE,
            0,
            ctypes.c_void_p(0),
            ctypes.c_void_p(word),
            ctypes.c_uint32(_OP_OR_BIT | bit << 12),
        )
        if done < 0:
            number = ctypes.get_errno() or errno.EIO
            raise OSError(number, f"dirty log: {os.strerror(number)}")
        self.news = True


class Logged(VirtQueue):
    """What both layouts do to log: chains when they go back, and what is written to the ring."""

    __slots__ = ()

    log: DirtyLog
    touched: dict[int, tuple[memoryview, ...]]  # head → what the device may write to
    used_gpa: int  # of the used ring, or the device's event area; -1: it is not logged

    def pop(self) -> Chain | None:
        """See VirtQueue."""
        chain = super().pop()
        if chain is not None:
            self.touched[chain.head] = tuple(chain.writable)
        return chain

    def push(self, head: int, written: int) -> None:
        """See VirtQueue."""
        VirtQueue.push(self, head, written)

    def detach(self, head: int) -> None:
        """See VirtQueue."""
        super().detach(head)
        self._mark_chain(head)

    def _rebuild(self, area: Inflight, entry: int) -> Chain:
        chain = super()._rebuild(area, entry)
        self.touched[chain.head] = tuple(chain.writable)
        return chain

    def _publish(self, batch: Sequence[tuple[int, int]]) -> None:
        fence()
        for head, _ in batch:
            self._mark_chain(head)
        super()._publish(batch)

    def _release(self, head: int) -> int:
        entry = super()._release(head)
        fence()
        self._mark_chain(head)
        return entry

    def mark_all(self) -> None:
        """Log what was in flight: the device has given it up, and is done with it."""
        fence()
        while self.touched:
            self.log.mark_views(self.touched.popitem()[1])

    def _mark_chain(self, head: int) -> None:
        self.log.mark_views(self.touched.pop(head, ()))

    def _mark_ours(self, at: int, length: int) -> None:
        """Log a write to the used ring or the device's event area."""
        if self.used_gpa >= 0:
            self.log.mark(self.used_gpa + at, length)


class LoggedSplitQueue(Logged, SplitQueue):
    """A split queue whose writes are logged."""

    __slots__ = ("log", "touched", "used_gpa")

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        *,
        features: int,
        inflight: memoryview | None,
        in_order: bool,
        log: DirtyLog,
        log_gpa: int,
    ) -> None:
        """See open_queue(); `log_gpa` is where in the log the used ring is, -1 if nowhere."""
        self.log, self.touched, self.used_gpa = log, {}, log_gpa
        super().__init__(
            memory,
            size,
            desc_gpa,
            avail_gpa,
            used_gpa,
            features=features,
            inflight=inflight,
            in_order=in_order,
        )

    def _write_used(self, batch: Sequence[tuple[int, int]]) -> None:
        super()._write_used(batch)
        fence()
        slot = self._next_used & self._mask
        until_end = min(len(batch), self.size - slot)
        self._mark_ours(4 + 8 * slot, 8 * until_end)
        self._mark_ours(4, 8 * (len(batch) - until_end))
        self._mark_ours(2, 2)

    def _want_kicks(self) -> None:
        super()._want_kicks()
        self._mark_hint()

    def disable_kicks(self) -> None:
        """See VirtQueue."""
        super().disable_kicks()
        self._mark_hint()

    def _mark_hint(self) -> None:
        fence()
        self._mark_ours(2 * self._avail_event if self._event_idx else 0, 2)


class LoggedPackedQueue(Logged, PackedQueue):
    """A packed queue whose writes are logged."""

    __slots__ = ("log", "ring_gpa", "touched", "used_gpa")

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        *,
        features: int,
        inflight: memoryview | None,
        in_order: bool,
        log: DirtyLog,
        log_gpa: int,
    ) -> None:
        """See open_queue(); `log_gpa` is where in the log the device's event area is, or -1."""
        self.log, self.touched, self.used_gpa, self.ring_gpa = log, {}, log_gpa, desc_gpa
        super().__init__(
            memory,
            size,
            desc_gpa,
            avail_gpa,
            used_gpa,
            features=features,
            inflight=inflight,
            in_order=in_order,
        )

    def _write_used(self, batch: Sequence[tuple[int, int]]) -> None:
        super()._write_used(batch)
        fence()
        cursor = self._next_used
        for head, _ in batch:
            self.log.mark(self.ring_gpa + 16 * (cursor & PLACE), 16)
            cursor = self._step(cursor, self._counts[head])

    def _want_kicks(self) -> None:
        super()._want_kicks()
        fence()
        self._mark_ours(0, 4)

    def disable_kicks(self) -> None:
        """See VirtQueue."""
        super().disable_kicks()
        fence()
        self._mark_ours(0, 4)


def open_logged(
    memory: GuestMemory,
    size: int,
    desc_gpa: int,
    avail_gpa: int,
    used_gpa: int,
    *,
    features: int,
    inflight: memoryview | None,
    in_order: bool,
    log: DirtyLog,
    log_gpa: int,
) -> VirtQueue:
    """Return a queue as open_queue() does, whose writes are logged. Raises GuestError."""
    layout = LoggedPackedQueue if features & F_RING_PACKED else LoggedSplitQueue
    return layout(
        memory,
        size,
        desc_gpa,
        avail_gpa,
        used_gpa,
        features=features,
        inflight=inflight,
        in_order=in_order,
        log=log,
        log_gpa=log_gpa,
    )
