"""What descriptors a process has, for tests that see to it that none is left."""

from __future__ import annotations

import gc
import os
from contextlib import suppress


def count_before() -> int:
    """Count them once other tests' garbage, which holds some, is gone: it goes at any time."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def open_files(pid: int) -> dict[int, str]:
    """Return what another process has open, by its numbers; it may be closing something."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found
