"""Guest RAM as the host sees it: guest-physical ranges → bounds-checked memoryviews.

The only module that turns a guest address into memory. Its unit is a list of regions, never
"all of RAM", so that a device can be given a window.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, NamedTuple

from config.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Region(NamedTuple):
    """One stretch of guest RAM; all in bytes, page aligned."""

    gpa: int
    size: int
    offset: int  # where it starts in the memfd


class GuestMemory:
    """Maps regions of a shared memfd and hands out views of them."""

    def __init__(self, fd: int, regions: Sequence[Region]) -> None:
        self.regions = tuple(sorted(regions))
        self._maps = [
            mmap.mmap(fd, region.size, mmap.MAP_SHARED, offset=region.offset)
            for region in self.regions
        ]
        self._views = [
            (region.gpa, region.gpa + region.size, memoryview(mapping))
            for region, mapping in zip(self.regions, self._maps, strict=True)
        ]

    def view(self, gpa: int, length: int) -> memoryview:
        """Return guest bytes gpa..gpa+length; writes go to the guest.

        Raises GuestError unless the range lies wholly inside one region.
        """
        for start, end, whole in self._views:
            if start <= gpa and 0 <= length and gpa + length <= end:
                return whole[gpa - start : gpa - start + length]
        raise GuestError(f"guest address {gpa:#x}+{length:#x} is not RAM")

    def read(self, gpa: int, length: int) -> bytes:
        """Return a private copy of guest bytes."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into guest RAM at `gpa`."""
        self.view(gpa, len(data))[:] = data

    def close(self) -> None:
        """Unmap everything; views handed out must be gone."""
        for _, _, whole in self._views:
            whole.release()
        for mapping in self._maps:
            mapping.close()
