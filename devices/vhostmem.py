"""Guest memory as a vhost-user front end shares it: regions of files, known by two addresses.

    GPA  what drivers write into descriptors            → guestmem, as anywhere
    HVA  where the front end has the region mapped      → GPA: rings are named by these

Regions come in a table or one by one, and go, while queues run. QEMU before 8.2 adds and removes
each as often as a network device has pairs of queues, so one may be added again, and stays until
it has been removed as often. Every number in them is the front end's: what overlaps, wraps around
or is longer than its file is refused before it is mapped. What a front end can do all the same is
to cut its file short later: then this process dies of SIGBUS at the next access, and with it
nothing but the connection.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import GuestError, HostError
from devices.guestmem import Region, map_region
from devices.vhostwire import MEM_REGION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import Span

SLOTS_MAX: Final = 128  # regions at a time; each is a mapping, and a descriptor of its file
_ADDRESS_END: Final = 1 << 64


class Shared(NamedTuple):
    """One region that is mapped."""

    hva: int
    span: Span
    file: tuple[int, int, int]  # device and inode of the file, offset in it
    times: int = 1  # how often it has been added

    @property
    def size(self) -> int:
        """Bytes."""
        return self.span.end - self.span.start


class Regions:
    """All regions of one front end. Every change makes a new one: nobody is surprised."""

    def __init__(self, shared: Sequence[Shared] = ()) -> None:
        self.shared = tuple(shared)

    @property
    def spans(self) -> list[Span]:
        """What guest memory is made of."""
        return [one.span for one in self.shared]

    @property
    def end(self) -> int:
        """The first guest address behind all regions."""
        return max((one.span.end for one in self.shared), default=0)

    def is_same_memory(self, other: Regions) -> bool:
        """Whether both are made of the same mappings."""
        pairs = zip(self.shared, other.shared, strict=False)
        return len(self.shared) == len(other.shared) and all(a.span is b.span for a, b in pairs)

    def added(self, row: bytes, fd: int) -> Regions:
        """Return these after ADD_MEM_REG: as with_region(), but the same one may come again."""
        gpa, size, hva, offset = MEM_REGION.unpack(row)
        old = self._find(gpa, size, hva)
        if old is None or old.file != _file(fd, offset):
            return self.with_region(row, fd)
        return self._with_times(old, old.times + 1)

    def with_region(self, row: bytes, fd: int) -> Regions:
        """Return these and one more, of the bytes of a MEM_REGION; `fd` can be closed then.

        Raises HostError.
        """
        gpa, size, hva, offset = MEM_REGION.unpack(row)
        what = f"memory region {gpa:#x}+{size:#x} at {hva:#x}"
        if len(self.shared) >= SLOTS_MAX:
            raise HostError(f"{what} is one more than {SLOTS_MAX}")
        if hva + size > _ADDRESS_END:
            raise HostError(f"{what} leaves the address space")
        for one in self.shared:
            if gpa < one.span.end and one.span.start < gpa + size:
                raise HostError(f"{what} overlaps guest address {one.span.start:#x}")
            if hva < one.hva + one.size and one.hva < hva + size:
                raise HostError(f"{what} overlaps the region at {one.hva:#x}")
        try:
            span = map_region(fd, Region(gpa, size, offset))
        except (OSError, ValueError, OverflowError) as err:
            raise HostError(f"cannot map {what}: {err}") from err
        return Regions((*self.shared, Shared(hva, span, _file(fd, offset))))

    def without_region(self, row: bytes) -> Regions:
        """Return these without the one that a MEM_REGION names. Raises HostError if it is none."""
        gpa, size, hva, _ = MEM_REGION.unpack(row)
        old = self._find(gpa, size, hva)
        if old is None:
            raise HostError(f"there is no memory region {gpa:#x}+{size:#x} at {hva:#x}")
        if old.times > 1:
            return self._with_times(old, old.times - 1)
        return Regions([one for one in self.shared if one is not old])

    def _find(self, gpa: int, size: int, hva: int) -> Shared | None:
        for one in self.shared:
            if (one.span.start, one.size, one.hva) == (gpa, size, hva):
                return one
        return None

    def _with_times(self, old: Shared, times: int) -> Regions:
        return Regions([one._replace(times=times) if one is old else one for one in self.shared])

    def gpa(self, hva: int) -> int:
        """Return the guest address of a front end's address. Raises GuestError if it has none."""
        for one in self.shared:
            if one.hva <= hva < one.hva + one.size:
                return one.span.start + hva - one.hva
        raise GuestError(f"address {hva:#x} is in no memory region")


def _file(fd: int, offset: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, offset
