"""Guest RAM as the host sees it: guest-physical ranges → bounds-checked memoryviews.

The only module that turns a guest address into memory. Its unit is a list of regions, never
"all of RAM", so that a device can be given a window: what is not in the list cannot be reached.

Regions may be of several files, and come and go: `replace`. A file can be cut short by whoever
else has it, where no seal forbids that; then an access ends this process (SIGBUS).

Three things can be true of two regions whose guest addresses meet:
- they also meet in the memfd: they are mapped as one, and a range across the seam is one view;
- they do not meet in the memfd: a range across the seam is two views, which `views` returns;
- there is a hole between them: a range across it is not RAM, and GuestError.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from itertools import pairwise
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import GuestError, HostError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_ADDRESS_END: Final = 1 << 64  # guest-physical addresses are 64 bits wide
_lock: Final = Lock()


def fence() -> None:
    """Order our stores to shared memory before our later loads, as the other side sees them.

    x86-64 keeps every other order by itself. An uncontended lock is a locked read-modify-write,
    which is the cheapest full barrier Python has.
    """
    with _lock:
        pass


class Region(NamedTuple):
    """One stretch of guest RAM; all in bytes, page aligned."""

    gpa: int
    size: int
    offset: int  # where it starts in the memfd


class Span(NamedTuple):
    """One mapping: the guest addresses start ≤ gpa < end, and their bytes."""

    start: int
    end: int
    ram: memoryview
    rom: memoryview  # the same, read-only


_NOTHING: Final = Span(1, 0, memoryview(b""), memoryview(b""))  # no range is inside


def map_region(fd: int, region: Region) -> Span:
    """Map one region of the file `fd`, which may be closed then. Raises HostError, OSError.

    Whole pages of the file are mapped, however large it has them (hugetlbfs).
    """
    gpa, size, offset = region
    status = os.fstat(fd)
    _check((region,), status.st_size)
    page = max(status.st_blksize, mmap.PAGESIZE)
    before = offset % page if page % mmap.PAGESIZE == 0 else 0
    behind = -(before + size) % page if before or page > mmap.PAGESIZE else 0
    length = min(before + size + behind, status.st_size - offset + before)
    mapping = mmap.mmap(fd, length, mmap.MAP_SHARED, offset=offset - before)
    ram = memoryview(mapping)[before : before + size]
    return Span(gpa, gpa + size, ram, ram.toreadonly())


class GuestMemory:
    """Maps regions of shared memory and hands out views of them.

    `hot` is the span of the latest look-up. Loops over many addresses may test it themselves
    before they call `view` or `views`; it is one tuple, so threads see it whole or not at all.
    """

    def __init__(self, fd: int = -1, regions: Sequence[Region] = ()) -> None:
        """Map `regions` of `fd`, or none. Raises HostError if they overlap, or leave the file."""
        self.regions = tuple(sorted(regions))
        if self.regions:
            _check(self.regions, os.fstat(fd).st_size)
        self.replace([map_region(fd, region) for region in _join(self.regions)])

    def replace(self, spans: Sequence[Span]) -> None:
        """Make `spans` all that there is. Raises HostError, nothing changed, if they overlap.

        What was there before stays mapped as long as somebody holds a view of it.
        """
        ordered = sorted(spans, key=lambda span: span.start)
        for one, other in pairwise(ordered):
            if other.start < one.end:
                raise HostError(f"memory regions overlap at guest address {other.start:#x}")
        self.spans = ordered
        self._starts = [span.start for span in ordered]
        self.hot = ordered[0] if ordered else _NOTHING

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def view(self, gpa: int, length: int) -> memoryview:
        """Return guest bytes gpa..gpa+length as one view; writes go to the guest.

        Raises GuestError unless the range lies wholly inside one mapping.
        """
        start, end, ram, _ = self.hot
        if start <= gpa and length >= 0 and gpa + length <= end:
            return ram[gpa - start : gpa + length - start]
        start, end, ram, _ = self._find(gpa, length)
        if gpa + length > end:
            raise GuestError(f"guest address {gpa:#x}+{length:#x} is not in one piece of RAM")
        return ram[gpa - start : gpa + length - start]

    def views(self, gpa: int, length: int) -> list[memoryview]:
        """Return guest bytes gpa..gpa+length as views in address order, one per mapping touched.

        An empty range is an empty list wherever it points. Raises GuestError if any byte of the
        range is not RAM.
        """
        found: list[memoryview] = []
        at, left = gpa, length
        while left:
            start, end, ram, _ = self._find(at, left)
            piece = ram[at - start : min(at + left, end) - start]
            if not piece:
                raise GuestError(f"guest address {gpa:#x}+{length:#x} is not all RAM")
            found.append(piece)
            at += len(piece)
            left -= len(piece)
        return found

    def read(self, gpa: int, length: int) -> bytes:
        """Return a private copy of guest bytes. Raises GuestError unless all of them are RAM."""
        return b"".join(self.views(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into guest RAM at `gpa`. Raises GuestError, nothing written, if it is not."""
        at = 0
        for view in self.views(gpa, len(data)):
            view[:] = data[at : at + len(view)]
            at += len(view)

    def close(self) -> None:
        """Unmap everything. Raises BufferError while views handed out are still alive."""
        for span in self.spans:
            mapping = span.ram.obj
            span.ram.release()
            span.rom.release()
            if isinstance(mapping, mmap.mmap):
                mapping.close()

    def _find(self, gpa: int, length: int) -> Span:
        """Return the span that holds `gpa`, or ends there, and make it the hot one."""
        slot = bisect_right(self._starts, gpa) - 1
        if slot < 0 or length < 0 or gpa > self.spans[slot].end:
            raise GuestError(f"guest address {gpa:#x}+{length:#x} is not RAM")
        self.hot = self.spans[slot]
        return self.hot


def _check(regions: tuple[Region, ...], file_size: int) -> None:
    """Refuse a region list that mmap would refuse late, or that names a guest byte twice."""
    free_from = 0
    for gpa, size, offset in regions:
        what = f"memory region {gpa:#x}+{size:#x} at file offset {offset:#x}"
        if size <= 0 or offset < 0 or (gpa | size | offset) % mmap.PAGESIZE:
            raise HostError(f"{what} is empty or not page aligned")
        if gpa < free_from or gpa + size > _ADDRESS_END:
            raise HostError(f"{what} overlaps the one below it, or leaves the address space")
        if offset + size > file_size:
            raise HostError(f"{what} leaves its file of {file_size:#x} bytes")
        free_from = gpa + size


def _join(regions: tuple[Region, ...]) -> list[Region]:
    """Merge neighbours that meet both in guest addresses and in the file."""
    joined = list(regions[:1])
    for region in regions[1:]:
        last = joined[-1]
        if (region.gpa, region.offset) == (last.gpa + last.size, last.offset + last.size):
            joined[-1] = last._replace(size=last.size + region.size)
        else:
            joined.append(region)
    return joined
