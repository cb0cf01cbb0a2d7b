"""What a device process has done: a page of counters that it writes and the VM process reads.

No message is needed for a look, so looking costs a busy device nothing and waits for none that
hangs; and the page outlives the process. Its size is sealed, and it is read, never mapped: a
device that was taken over can count wrongly, and nothing else.
"""

from __future__ import annotations

import fcntl
import os
from struct import unpack

from devices.spec import BUSY, COUNTERS_SIZE, COUNTERS_STRIDE, SPECS


class Counters:
    """The counters of one device."""

    def __init__(self, kind: str, processes: int = 1) -> None:
        """Make the page for a device that so many processes serve."""
        self._names, self._processes = SPECS[kind].counters, processes
        #: For the device process.
        self.fd = os.memfd_create("pyvmd-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, COUNTERS_SIZE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def read(self) -> dict[str, int]:
        """Return each counter by its name in the device's spec, summed over all processes."""
        count = len(self._names)
        pages = [
            unpack(f"<{count}Q", os.pread(self.fd, 8 * count, 8 * COUNTERS_STRIDE * n))
            for n in range(self._processes)
        ]
        return dict(zip(self._names, map(sum, zip(*pages, strict=True)), strict=True))

    def busy(self) -> bool:
        """Whether the device says that it waits for the host, for a slow disk above all."""
        return os.pread(self.fd, 8, 8 * BUSY) != bytes(8)

    def close(self) -> None:
        """Free the page, once the device process has done so, too."""
        os.close(self.fd)
