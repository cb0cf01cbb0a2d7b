"""What ps(1) shows of a process, and whom it dies with: prctl(2)."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

_libc = ctypes.CDLL(None, use_errno=True)


def set_title(title: str) -> None:
    """Show `title` as command line, as far as the old one is long, and its end as name.

    The kernel reads the command line out of this process's memory, where the arguments of
    execve(2) were put: what is written there is shown.
    """
    name = title.encode()
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name[-15:]), 0, 0, 0)
    with open("/proc/self/stat", "rb") as file:
        # Fields 48 and 49, counted from after the name, which may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if 0 < start < end:
        shown = b"pyvmd: " + name
        ctypes.memmove(start, shown[: end - start - 1].ljust(end - start, b"\0"), end - start)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; end now if that is over already."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        os._exit(1)
