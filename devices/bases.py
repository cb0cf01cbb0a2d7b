"""What a qcow2 image stands on: its base, that one's base, and so on.

An overlay names its base in its header, so the names are the words of whoever made the image.
They are followed with the rights of the VM's owner, read-only, and only to local files whose
format the overlay tells, too: what an image looks like decides nothing. A relative name begins
where the image is that holds it, as in QEMU.

Bases are locked for readers: any number of overlays may stand on one, and nobody may write to it
meanwhile.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError, PyvmError
from devices import images
from devices.actas import acting_as
from devices.images import Access

if TYPE_CHECKING:
    from contextlib import ExitStack

    from devices.qcow2head import Header

MAX_IMAGES: Final = 16  # in a chain, the overlay counted; each is a descriptor and a lookup

FORMATS: Final = ("raw", "qcow2")


class Base(NamedTuple):
    """An open image that another stands on."""

    fd: int
    path: str
    format: str  # "raw" or "qcow2"


class BaseName(NamedTuple):
    """What an overlay says of its base."""

    path: str  # where it leads from here
    format: str  # "raw" or "qcow2"


def open_bases(
    fd: int,
    path: str,
    opened: ExitStack,
    *,
    device: str = "",
    direct: bool = False,
    uid: int | None = None,
    write: bool = False,
) -> list[Base]:
    """Open and lock all that the qcow2 image `fd` at `path` stands on, the nearest first.

    `opened` closes them. With `direct` they bypass the page cache; `uid` is whose rights count
    if this process has more; `write` opens the nearest one for a writer. Raises ConfigError,
    HostError.
    """
    chain: list[Base] = []
    seen = [(os.fstat(fd), path)]
    with acting_as(os.geteuid() if uid is None else uid):
        while found := base_of(fd, path, device):
            title = f"base {found.path} of {path}"
            if len(seen) == MAX_IMAGES:
                what = f"{title}: is image {len(seen) + 1} of its chain, and {MAX_IMAGES} is all"
                hint = "make one of several: pyvmctl image convert, or image commit"
                raise ConfigError(what, device=device, hint=hint)
            hint = f"if it has moved: pyvmctl image rebase -u -F {found.format} -b PATH {path}"
            access = Access(found.path, title, write and not chain, device, direct, hint)
            base_fd = images.open_image(access, lock=False)
            opened.callback(os.close, base_fd)
            status = os.fstat(base_fd)
            for other, name in seen:
                if same_file(other, status):
                    what = f"{title}: is {name} again: the chain goes round in circles"
                    raise ConfigError(what, device=device)
            images.lock_image(base_fd, access)
            chain.append(Base(base_fd, found.path, found.format))
            if found.format == "raw":
                break
            seen.append((status, found.path))
            fd, path = base_fd, found.path
    return chain


def base_of(fd: int, path: str, device: str = "") -> BaseName | None:
    """Return what the qcow2 image `fd` at `path` stands on, None if on nothing.

    Raises ConfigError, also for a header that is none, and for a base that may not be opened.
    """
    header = read_header(fd, path, device)
    name, kind = header.backing_file, header.backing_format
    if not name:
        return None
    where = os.path.join(os.path.dirname(path), name)
    rebase = "pyvmctl image rebase -u -F {} -b PATH " + path
    if has_protocol(name):
        what = f"{path}: its base '{name}' is no local file"
        hint = f"{rebase.format('FORMAT')} names one; a file name with a colon in it as ./NAME"
        raise ConfigError(what, device=device, hint=hint)
    if kind not in FORMATS:
        # A raw base may hold what its guest wrote, a qcow2 header of its own making included.
        what = f"{path}: its base {name} is of format '{kind}', not raw or qcow2"
        if not kind:
            what = f"{path}: does not say which format its base {name} has, and that is not guessed"
        hint = f"say so with: {rebase.format('raw')}, or -F qcow2"
        raise ConfigError(what, device=device, hint=hint.replace("PATH", where))
    return BaseName(where, kind)


def read_header(fd: int, path: str, device: str = "") -> Header:
    """Return the header of the qcow2 image `fd` at `path`. Raises ConfigError."""
    from devices import qcow2head

    try:
        return qcow2head.read(fd)
    except PyvmError as err:
        raise ConfigError(f"{path}: {err.what}", device=device, hint=err.hint) from err
    except OSError as err:
        raise ConfigError(f"{path}: cannot read: {err.strerror}", device=device) from err


def has_protocol(name: str) -> bool:
    """Tell whether QEMU would take a base's name for more than a path: `nbd:...`, `json:...`."""
    return ":" in name.partition("/")[0]


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Tell whether two names lead to one image."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)
