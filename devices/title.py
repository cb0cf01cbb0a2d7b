"""What ps(1) shows of a process, and whom it dies with: prctl(2)."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def _arguments() -> tuple[int, int]:
    """Return where execve(2) put this process's arguments; a child's are at the same place."""
    with open("/proc/self/stat", "rb") as file:
        # Fields 48 and 49, counted from after the name, which may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[45]), int(fields[46])


def set_title(title: str) -> None:
    """Show `title` as command line, as far as the old one is long, and its end as name.

    The kernel reads the command line out of the process's own memory: what is written there is
    shown. The first call needs /proc, later ones and those of children do not.
    """
    name = title.encode()
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name[-15:]), 0, 0, 0)
    start, end = _arguments()
    if 0 < start < end:
        shown = b"pyvmd: " + name
        ctypes.memmove(start, shown[: end - start - 1].ljust(end - start, b"\0"), end - start)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; end now if that is over already."""
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        os._exit(1)
