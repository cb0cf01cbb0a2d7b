"""Disk images: opened and locked here, with the rights of whoever starts the VM.

A device process gets the descriptor and never a path. The format is what vm.yaml says: a guest
can write any header into a raw image, so nothing in an image decides how it is read. Symbolic
links are followed, since /dev/disk/by-id is made of them and the rights are the caller's own.

**Locks** are OFD locks on the whole file, for one writer or many readers. They belong to the open
file, so the device process holds it too, and it ends with the last of them, however that dies.
QEMU locks single bytes of an image in the same way, so each keeps the other out. Block devices
are opened exclusively as well, which keeps mounted ones out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from struct import pack, unpack
from typing import TYPE_CHECKING, Final

from config.errors import ConfigError, HostError

if TYPE_CHECKING:
    from config.model import DiskConfig

SECTOR: Final = 512
DEVICE_TITLE: Final = "pyvmd: "  # what device processes show of themselves begins so

_BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
# struct flock: type, whence, start, length (0: to the end, wherever it moves), pid.
_FLOCK: Final = "@hhqqi4x"
_HINTS: Final = {
    errno.ENOENT: "make it with: truncate -s 10G PATH",
    errno.EROFS: "the file system is read-only; readonly: true needs no more",
    errno.ETXTBSY: "a running program is no disk",
}


def open_disk(disk: DiskConfig, name: str) -> int:
    """Open and lock a disk's image; return the descriptor, the caller's to close.

    `name` is the device's, for messages. Raises ConfigError for what vm.yaml or the image's owner
    must mend, HostError for an image that is in use and for what the host cannot do.
    """
    if disk.format != "raw":
        raise ConfigError(
            f"disk {disk.path}: {disk.format} images cannot be used yet",
            device=name,
            hint="convert it with: qemu-img convert -O raw",
        )
    fd = _open(disk, name)
    try:
        _check(fd, disk, name)
        _lock(fd, disk, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(disk: DiskConfig, name: str) -> int:
    # Non-blocking until we know what it is: a FIFO must be refused, not waited for.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    flags |= os.O_RDONLY if disk.readonly else os.O_RDWR
    if not disk.readonly and _is_block_device(disk.path):
        flags |= os.O_EXCL
    if disk.cache == "none":
        flags |= os.O_DIRECT
    try:
        fd = os.open(disk.path, flags)
    except ValueError as err:
        raise ConfigError(f"disk {disk.path!r}: not a file name", device=name) from err
    except OSError as err:
        raise _explain(err, disk, name) from err
    # With O_NONBLOCK, io_uring would give up where it has to wait.
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # open(2) will say why


def _explain(err: OSError, disk: DiskConfig, name: str) -> ConfigError | HostError:
    """Turn an error of open(2) into one that says what to do."""
    what = f"disk {disk.path}: cannot open: {err.strerror}"
    access = "readable" if disk.readonly else "readable and writable"
    hint = _HINTS.get(err.errno or 0, "")
    if err.errno == errno.EINVAL and disk.cache == "none":
        what = f"disk {disk.path}: cache none: {file_system(disk.path)} has no O_DIRECT"
        return ConfigError(what, device=name, hint="use cache: writeback")
    if err.errno == errno.EISDIR:
        return ConfigError(f"disk {disk.path}: is a directory", device=name)
    if err.errno == errno.EBUSY:
        user = _user_of(disk.path, own=0) or "it is mounted, or part of another device"
        return HostError(f"disk {disk.path}: in use: {user}", device=name)
    if err.errno in (errno.EACCES, errno.EPERM):
        hint = f"make it {access} for uid {os.geteuid()}"
    if err.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENXIO):
        return HostError(what, device=name)
    return ConfigError(what, device=name, hint=hint)


def _check(fd: int, disk: DiskConfig, name: str) -> None:
    """Refuse what is no disk. Raises ConfigError, HostError."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        size = status.st_size
    elif stat.S_ISBLK(status.st_mode):
        try:
            size = unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        except OSError as err:
            what = f"disk {disk.path}: cannot tell its size: {err.strerror}"
            raise HostError(what, device=name) from err
    else:
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "neither file nor block device"
        raise ConfigError(f"disk {disk.path}: is {kind}", device=name)
    least = max(disk.block_size, SECTOR)
    if size < least:
        raise ConfigError(
            f"disk {disk.path}: has {size} bytes, less than one block of {least}",
            device=name,
            hint="make it larger with truncate(1)",
        )


def _lock(fd: int, disk: DiskConfig, name: str) -> None:
    """Lock the image as long as `fd`, or a copy of it in a device process, is open."""
    kind = fcntl.F_RDLCK if disk.readonly else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
    except OSError as err:
        if err.errno not in (errno.EAGAIN, errno.EACCES):
            what = f"disk {disk.path}: {file_system(disk.path)} cannot lock it: {err.strerror}"
            raise HostError(what, device=name) from err
        user = _user_of(disk.path, own=1) or "another program has locked it"
        raise HostError(
            f"disk {disk.path}: in use: {user}",
            device=name,
            hint="one VM may write to an image, or many read it with readonly: true",
        ) from err


def file_system(path: str) -> str:
    """Return the type of the file system that holds `path`, as mount(8) calls it."""
    real = os.path.realpath(path)
    best, kind = "", "the file system"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields, _, tail = line.partition(" - ")
                point = fields.split()[4].encode().decode("unicode_escape")
                inside = point in ("/", real) or real.startswith(point + "/")
                if inside and len(point) >= len(best):  # the latest mount there hides the others
                    best, kind = point, tail.split()[0]
    except OSError:
        pass  # no /proc: then without its name
    return kind


def _user_of(path: str, own: int) -> str:
    """Return who has the image open, as far as we may see; "" if nobody is found.

    `own` is how many descriptors of this process are no sign of another user. For an error
    message: slow, and out of date at once.
    """
    try:
        wanted = os.stat(path)
        pids = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return ""
    ours = str(os.getpid())
    if _count_open(ours, wanted) > own:
        return "it is another disk of this VM"
    found = ""
    for pid in pids:
        if pid == ours or not _count_open(pid, wanted):
            continue
        title = _title(pid)
        if title.startswith(DEVICE_TITLE):  # "pyvmd: web/vioblk0"
            vm, _, device = title.removeprefix(DEVICE_TITLE).partition("/")
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
