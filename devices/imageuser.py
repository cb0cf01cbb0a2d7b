"""Who uses an image: its locks, and names for error messages and for whoever looks at one.

    bytes   a writer    many readers   QEMU, for whatever has the image open (block/file-posix.c)
    0–99    exclusive   shared
    100                 shared         shared: it reads
    101, 103                           shared: it writes; it changes the size
    201, 203            shared         shared: nobody else may
    others  exclusive

A writer locks the whole file without an end, however it grows. QEMU locks what it does and what it
does not bear, all shared, and then looks whether others have locked the counterpart of either. So a
reader here has to look, too: at what no reader of ours locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from struct import pack, unpack
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from devices.images import Access

DEVICE_TITLE: Final = "pyvmd: "  # what device processes show of themselves begins so

BACK_END: Final = "vhost-user"  # in place of a VM's name, where there is none

# struct flock: type, whence, start, length (0: to the end, wherever it moves), pid.
FLOCK: Final = "@hhqqi4x"

_READS: Final = ((0, 101), (201, 1), (203, 1))  # start and length of what a reader locks
_WRITES: Final = (101, 103)


def lock(fd: int, *, write: bool) -> None:
    """Lock an image for a writer or a reader, as long as it is open. Raises OSError.

    EAGAIN is somebody else's lock, or EACCES.
    """
    kind, ranges = (fcntl.F_WRLCK, ((0, 0),)) if write else (fcntl.F_RDLCK, _READS)
    for start, length in ranges:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack(FLOCK, kind, os.SEEK_SET, start, length, 0))
    if not write and _qemu_writes(fd):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def locked(fd: int) -> str:
    """Return "writes" or "reads" for what the holder of a lock on the image does, "" for none."""
    try:
        kind = _lock_at(fd, 0, 0)
        if kind == fcntl.F_RDLCK and _qemu_writes(fd):
            return "writes"
    except OSError:
        return ""  # this file system has no locks
    return {fcntl.F_WRLCK: "writes", fcntl.F_RDLCK: "reads"}.get(kind, "")


def _qemu_writes(fd: int) -> bool:
    return any(_lock_at(fd, byte, 1) != fcntl.F_UNLCK for byte in _WRITES)


def _lock_at(fd: int, start: int, length: int) -> int:
    """Return the type of somebody else's lock there. Raises OSError."""
    probe = pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind: int = unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe))[0]
    return kind


def user_of(access: Access, own: int) -> str:
    """Return who has the image open, as far as we may see; "" if nobody is found.

    `own` is how many descriptors of this process are no sign of another user. For an error
    message: slow, and out of date at once.
    """
    try:
        wanted = os.stat(access.path)
        pids = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return ""
    ours = str(os.getpid())
    if _count_open(ours, wanted) > own:
        return "another disk of this VM has it" if access.device else "it is named twice"
    found = ""
    for pid in pids:
        if pid == ours or not _count_open(pid, wanted):
            continue
        title = _title(pid)
        if title.startswith(DEVICE_TITLE):  # "pyvmd: web/vioblk0"
            vm, _, device = title.removeprefix(DEVICE_TITLE).partition("/")
            if vm == BACK_END:
                return f"a vhost-user back end has it open ({device}, process {pid})"
            return f"VM {vm} has it open ({device}, process {pid})"
        found = found or f"process {pid} ({title}) has it open"
    return found


def _count_open(pid: str, wanted: os.stat_result) -> int:
    """Return how many descriptors of a process are this file."""
    count = 0
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # the one this listing is made with
                count += os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), wanted)
    except OSError:
        pass  # somebody else's process, or one that has ended
    return count


def _title(pid: str) -> str:
    """Return how ps(1) would show a process."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(200).rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        return "?"
    return words.decode("utf-8", "replace") or "?"
