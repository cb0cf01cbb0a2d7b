"""How many descriptors this process has, for tests that see to it that none is left."""

from __future__ import annotations

import gc
import os


def count_before() -> int:
    """Count them once other tests' garbage, which holds some, is gone: it goes at any time."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
