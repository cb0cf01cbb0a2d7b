"""Memory that is a file, where a read or write can fail: such a failure is told, not fatal.

Where a mapped file has no page to give (it was cut short, its medium fails, its file system is
full), the access itself gets SIGBUS, which ends a process. Here the page is replaced by one of
zeroes, the access goes on, and `failures` grows, so that whoever copied looks there afterwards and
does it again with system calls, which say why.

    with-statements and exceptions do not help: the signal arrives inside of memcpy(3)

The handler is Python, called by way of ctypes in the middle of that memcpy. That is sound because
it can be nowhere else: only copies of memoryviews touch what is `guard`ed, they hold the
interpreter's lock, and they keep the interpreter's own state whole, as any C function does that
calls back. A SIGBUS anywhere else goes to whoever had the signal before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from typing import Final, cast

_SA_SIGINFO: Final = 4
_SA_NODEFER: Final = 0x40000000
_SI_ADDR: Final = 16  # offset of si_addr in siginfo_t
_PAGE: Final = mmap.PAGESIZE
_MAP_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of the C library on x86-64 (sigaction(2))."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


#: Addresses of pages that could not be had, since somebody last emptied the list.
failures: Final[list[int]] = []
_guarded: Final[dict[int, int]] = {}  # start → end
_before: Final = _Action()  # who had the signal before us
_installed: list[bool] = []


def install() -> None:
    """Have SIGBUS come here; once is enough. To be called outside of any jail. Raises OSError."""
    if _installed:
        return
    action = _Action(ctypes.cast(_callback, ctypes.c_void_p), flags=_SA_SIGINFO | _SA_NODEFER)
    if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _installed.append(True)


def map_file(fd: int, length: int, offset: int, *, write: bool) -> memoryview:
    """Map a part of a file, page aligned, and guard it. Raises OSError.

    No descriptor is kept, unlike with mmap.mmap: a jail has no room for one. `unmap` is a must.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE * write
    start = _libc.mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
    if start == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _guarded[start] = start + -(-length // _PAGE) * _PAGE
    view = memoryview((ctypes.c_ubyte * length).from_address(start)).cast("B")
    return view if write else view.toreadonly()


def unmap(view: memoryview) -> None:
    """Undo map_file; nobody may touch the view, or one made of it, any more."""
    start = ctypes.addressof(cast("ctypes.Array[ctypes.c_ubyte]", view.obj))
    end = _guarded.pop(start)
    view.release()
    _libc.munmap(start, end - start)


def _bus_error(_number: int, info: int, _context: int) -> None:
    """Put a page where there is none. If the place is not guarded, stand aside: it comes again."""
    address = ctypes.c_uint64.from_address(info + _SI_ADDR).value
    page = address & -_PAGE
    if any(start <= address < end for start, end in _guarded.items()):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        if _libc.mmap(page, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page:
            failures.append(page)
            return
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)


# Made on import: it is code, and a spawner makes no more of that once it has its filter.
_callback: Final = _HANDLER(_bus_error)
