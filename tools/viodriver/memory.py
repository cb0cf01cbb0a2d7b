"""Guest memory of a driver's own: a sealed memfd, mapped here and shared with the device."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from devices.guestmem import GuestMemory, Region

if TYPE_CHECKING:
    from collections.abc import Sequence

_F_ADD_SEALS: Final = 1033  # fcntl.F_ADD_SEALS is missing where Python was built on old headers
_SEALS: Final = 1 | 2 | 4  # F_SEAL_SEAL, SHRINK, GROW


def make_memfd(size: int) -> int:
    """Return a sealed memfd of `size` bytes, as a VM process makes for its guest."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    return fd


def make_memory(size: int = 1 << 20, regions: Sequence[Region] = ()) -> GuestMemory:
    """Return guest memory of a new memfd of `size` bytes, in one region at 0 or in `regions`."""
    fd = make_memfd(size)
    try:
        return GuestMemory(fd, regions or [Region(0, size, 0)])
    finally:
        os.close(fd)
