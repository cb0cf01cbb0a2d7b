"""Small files in a directory that somebody else may write to as well.

A VM's runtime directory belongs to the VM's owner, and root looks into it. So nothing here follows
a symbolic link, opens a FIFO or device, writes to a file with a second name, or reads without a
bound; every name is looked up in a directory descriptor, which nobody can swap underneath.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import Any, Final

JSON_LIMIT: Final = 1 << 20  # bytes; the largest file read_json() takes

_SAFE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_dir(path: str, dir_fd: int | None = None) -> int:
    """Return a descriptor of a directory; a symbolic link as the last part is refused (OSError)."""
    return os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def open_file(name: str, flags: int, dir_fd: int | None = None, mode: int = 0o600) -> int:
    """Open a regular file that has no other name. Raises OSError; never blocks."""
    fd = os.open(name, flags | _SAFE, mode, dir_fd=dir_fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EPERM, "not a regular file, or a hard link to one", name)
    return fd


def read_file(name: str, dir_fd: int | None = None, limit: int = JSON_LIMIT) -> bytes:
    """Return a whole file. Raises OSError, also (EFBIG) when it is longer than `limit` bytes."""
    fd = open_file(name, os.O_RDONLY, dir_fd)
    try:
        data = b""
        while len(data) <= limit and (piece := os.read(fd, limit + 1 - len(data))):
            data += piece
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes", name)
    return data


def write_file(name: str, data: bytes, dir_fd: int, mode: int = 0o600) -> None:
    """Put a file in place in one step: a reader sees the old content or the new. Raises OSError."""
    draft = f".{name}.{os.getpid()}"
    remove(draft, dir_fd)  # left by a process of the same id that was killed
    fd = open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd, mode)
    try:
        # The umask may have taken something. A jailed process cannot change modes: its umask fits.
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
        while data:
            data = data[os.write(fd, data) :]
        os.rename(draft, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError:
        os.unlink(draft, dir_fd=dir_fd)
        raise
    finally:
        os.close(fd)


def read_json(name: str, dir_fd: int) -> dict[str, Any]:
    """Return the object in a JSON file; {} when there is no file or no object in it.

    These files are ours; one that is damaged says nothing, and nobody can act on that knowledge.
    """
    try:
        value = json.loads(read_file(name, dir_fd))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(name: str, value: dict[str, Any], dir_fd: int, mode: int = 0o600) -> None:
    """Put a JSON object in place in one step. Raises OSError."""
    write_file(name, json.dumps(value, indent=1).encode() + b"\n", dir_fd, mode)


def remove(name: str, dir_fd: int) -> None:
    """Unlink a name; one that is gone, or that this user may not remove, is no error."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=dir_fd)
