"""What `viovhost` hands to a back end: memory, queues, and the books that it is to keep."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

from devices.vhostfront import InflightArea, MemoryRegion
from devices.vhostwire import PeerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import GuestMemory
    from devices.vhostfront import FrontEnd
    from devices.vhostshadow import Shadow

AREA: Final = 1 << 16  # bytes of the in-flight area per queue: back ends need 16 to 32 an entry
HVA: Final = 1 << 44  # added to a GPA: the addresses by which rings are named, nobody's else
#: Where a back end starts whose predecessor is gone, or is just finishing: where the used ring ends
#: when this one has come, for there is one at a time.
USED_END: Final = -1
_HUGE: Final = 1 << 21


class Part:
    """What belongs to one queue, whether it is live or not."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        # Eventfds that only the back end and this process have.
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kick, self.call = os.eventfd(0, flags), os.eventfd(0, flags)
        self.given = (-1, -1)  # the driver's kicks and calls, where queues are not relayed
        self.base = 0  # where the back end is to start, or USED_END
        self.started = False
        self.fresh = True  # nothing can have been missed: it has not run since the driver's start

    def renew(self) -> None:
        """Begin anew, with a queue that has not run."""
        self.base, self.fresh = 0, True


class Kept:
    """The in-flight area of all queues, in a file that outlives this process and any back end.

    A back end makes one and says what it needs; what it has made is copied here, and this file is
    what it is given.
    """

    def __init__(self, fd: int, queues: int) -> None:
        """Map a file of AREA bytes per queue, and keep `fd`."""
        self._fd = fd
        self._bytes = memoryview(mmap.mmap(fd, AREA * queues))
        self.area: InflightArea | None = None

    def make(self, link: FrontEnd, queues: int, queue_size: int) -> InflightArea:
        """Have a back end make one. Raises PeerError."""
        made = link.get_inflight(queues, queue_size)
        content = b""
        try:
            if made.size <= len(self._bytes):
                content = os.pread(made.fd, made.size, made.offset)
        except OSError as err:
            raise PeerError(f"{link.name}: its in-flight area cannot be read") from err
        finally:
            os.close(made.fd)
        if len(content) != made.size:
            raise PeerError(f"{link.name}: makes an in-flight area of {made.size} bytes")
        self._bytes[: made.size] = content
        self.area = area = made._replace(fd=self._fd, offset=0)
        return area

    def save(self) -> Sequence[int] | None:
        """Return what there is, as plain JSON values."""
        area = self.area
        return None if area is None else (area.size, area.queues, area.queue_size)

    def load(self, state: Sequence[int] | None) -> None:
        """Have what `save` described; what it holds is in the file."""
        if state is not None:
            size, queues, queue_size = map(int, state)
            self.area = InflightArea(self._fd, min(size, len(self._bytes)), 0, queues, queue_size)


def regions(memory: GuestMemory, memory_fd: int, rings_fd: int, size: int) -> list[MemoryRegion]:
    """Return what the back end may reach: guest memory, and rings behind it."""
    shared = [
        MemoryRegion(gpa, size, HVA + gpa, offset, memory_fd)
        for gpa, size, offset in memory.regions
    ]
    end = max((region.gpa + region.size for region in shared), default=0)
    gpa = -(-end // _HUGE) * _HUGE
    return [*shared, MemoryRegion(gpa, size, HVA + gpa, 0, rings_fd)]
