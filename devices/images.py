"""Disk images: opened and locked here, with the rights of whoever starts the VM or the tool.

A device process gets the descriptor and never a path. The format is what vm.yaml says: a guest
can write any header into a raw image, so nothing in an image decides how it is read. Symbolic
links are followed, since /dev/disk/by-id is made of them and the rights are the caller's own.
What a qcow2 image stands on is opened by `devices.bases`.

**Locks** are OFD locks, for one writer or many readers. They belong to the open file, so the device
process holds it too, and it ends with the last of them, however that dies. Which bytes they are on,
so that QEMU and pyvmd see each other's, is in `devices.imageuser`. Block devices are opened
exclusively as well, which keeps mounted ones out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from struct import unpack
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError, HostError
from devices import imageuser
from devices.imageuser import user_of

if TYPE_CHECKING:
    from config.model import DiskConfig

SECTOR: Final = 512

_BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
_HINTS: Final = {
    errno.EROFS: "the file system is read-only; a disk with readonly: true needs no more",
    errno.ETXTBSY: "a running program is no disk",
}


class Access(NamedTuple):
    """How an image is to be opened, and how to speak of it."""

    path: str
    title: str  # "disk /srv/web.img"
    write: bool
    device: str = ""  # the device's name, for messages
    direct: bool = False  # past the page cache (O_DIRECT)
    hint: str = ""  # what to do if there is no such file


def open_disk(disk: DiskConfig, name: str) -> int:
    """Open and lock a disk's image; return the descriptor, the caller's to close.

    `name` is the device's, for messages. Raises ConfigError for what vm.yaml or the image's owner
    must mend, HostError for an image that is in use and for what the host cannot do.
    """
    path = disk.path
    hint = f"make it with: pyvmctl create -s 10G {disk.format}:PATH"
    access = Access(path, f"disk {path}", not disk.readonly, name, disk.cache == "none", hint)
    fd = open_image(access)
    try:
        least = max(disk.block_size, SECTOR)
        if disk.format == "raw" and (size := size_of(fd, access)) < least:
            raise ConfigError(
                f"disk {path}: has {size} bytes, less than one block of {least}",
                device=name,
                hint="make it larger with: pyvmctl image resize",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_disc(path: str, name: str = "vioscsi") -> int:
    """Open an ISO image or a block device for reading, and lock it against writers.

    `name` is the device's, for messages; the caller closes. Raises ConfigError, HostError.
    """
    access = Access(path, f"disc {path}", write=False, device=name)
    fd = open_image(access)
    try:
        if not size_of(fd, access):
            raise ConfigError(f"disc {path}: is empty", device=name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_image(access: Access, *, lock: bool = True) -> int:
    """Open a regular file or block device and, with `lock`, lock it; the caller closes it.

    Raises ConfigError, HostError as open_disk() does.
    """
    fd = _open(access)
    try:
        size_of(fd, access)
        if lock:
            lock_image(fd, access)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(access: Access) -> int:
    # Non-blocking until we know what it is: a FIFO must be refused, not waited for.
    flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    flags |= os.O_RDWR if access.write else os.O_RDONLY
    if access.write and _is_block_device(access.path):
        flags |= os.O_EXCL
    if access.direct:
        flags |= os.O_DIRECT
    try:
        fd = os.open(access.path, flags)
    except ValueError as err:
        what = f"{access.title!r}: not a file name"
        raise ConfigError(what, device=access.device) from err
    except OSError as err:
        raise _explain(err, access) from err
    # With O_NONBLOCK, io_uring would give up where it has to wait.
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # open(2) will say why


def _explain(err: OSError, access: Access) -> ConfigError | HostError:
    """Turn an error of open(2) into one that says what to do."""
    title, device = access.title, access.device
    what = f"{title}: cannot open: {err.strerror}"
    rights = "readable and writable" if access.write else "readable"
    hint = _HINTS.get(err.errno or 0, "")
    if err.errno == errno.ENOENT:
        hint = access.hint
    if err.errno == errno.EINVAL and access.direct:
        what = f"{title}: cache none: {file_system(access.path)} has no O_DIRECT"
        return ConfigError(what, device=device, hint="use cache: writeback")
    if err.errno == errno.EISDIR:
        return ConfigError(f"{title}: is a directory", device=device)
    if err.errno == errno.EBUSY:
        user = user_of(access, own=0) or "it is mounted, or part of another device"
        return HostError(f"{title}: in use: {user}", device=device)
    if err.errno in (errno.EACCES, errno.EPERM):
        hint = f"make it {rights} for uid {os.geteuid()}"
    if err.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENXIO):
        return HostError(what, device=device)
    return ConfigError(what, device=device, hint=hint)


def size_of(fd: int, access: Access) -> int:
    """Return the bytes of an open image. Raises ConfigError for what is no image, HostError."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        try:
            size: int = unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
        except OSError as err:
            what = f"{access.title}: cannot tell its size: {err.strerror}"
            raise HostError(what, device=access.device) from err
        return size
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "neither file nor block device"
    raise ConfigError(f"{access.title}: is {kind}", device=access.device)


def lock_image(fd: int, access: Access) -> None:
    """Lock the image as long as `fd`, or a copy of it in a device process, is open.

    For one writer, or with others for readers, as `access` says. Raises HostError.
    """
    try:
        imageuser.lock(fd, write=access.write)
    except OSError as err:
        if err.errno not in (errno.EAGAIN, errno.EACCES):
            what = f"{access.title}: {file_system(access.path)} cannot lock it: {err.strerror}"
            raise HostError(what, device=access.device) from err
        user = user_of(access, own=1) or "another program has locked it"
        raise HostError(
            f"{access.title}: in use: {user}",
            device=access.device,
            hint="one VM may write to an image, or many read it with readonly: true or as a base",
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
