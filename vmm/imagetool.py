"""Where the image tool meets the formats' own code: images as disks, and as runs of data.

The one module of `vmm` that imports it, and only when an image is worked on. In a VM, that code
runs in a jailed device process; here it runs with the caller's rights on images that no VM has,
which is why each is locked for as long as it is open.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import ConfigError, HostError, PyvmError
from devices import images, qcow2check, qcow2head
from devices.bases import open_bases, read_header
from devices.images import Access
from devices.qcow2 import open_chain
from devices.qcow2create import create
from devices.raw import Disk
from vmm import imagename
from vmm.imagecopy import BASE, DATA, ZERO, Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import ExitStack

    from devices.bases import Base
    from devices.qcow2head import Header
    from vmm.imagename import ImageName
    from vmm.progress import Work

_SAY_QCOW2: Final = "say qcow2:PATH if it is one"
_STORED: Final = ("data", "compressed")


class Image(NamedTuple):
    """An open image."""

    path: str
    format: str
    fd: int
    disk: Disk  # what a guest sees
    bases: Sequence[Base] = ()
    header: Header | None = None  # of a qcow2 image, as it was when it was opened


class Shape(NamedTuple):
    """What a new qcow2 image is like."""

    cluster_size: int = 64 << 10  # bytes, a power of two from 512 to 2 MiB
    version: int = 3  # or 2
    refcount_bits: int = 16  # a power of two up to 64; 16 in version 2


# Opening.


def open_file(name: ImageName, opened: ExitStack, *, write: bool = False) -> tuple[int, str]:
    """Open and lock an image without looking into it; return descriptor and format.

    `opened` closes it. Raises ConfigError, HostError.
    """
    hint = f"make it with: pyvmctl create -s 10G {name.path}"
    fd = images.open_image(Access(name.path, name.path, write, hint=hint))
    opened.callback(os.close, fd)
    return fd, imagename.settle(name, os.pread(fd, len(imagename.QCOW2_MAGIC), 0))


def open_image(
    name: ImageName, opened: ExitStack, *, write: bool = False, write_base: bool = False
) -> Image:
    """Open and lock an image and all it stands on; `opened` closes them.

    With `write_base` the nearest base can be written to, too. Raises ConfigError, HostError.
    """
    fd, kind = open_file(name, opened, write=write)
    if kind == "raw":
        return Image(name.path, kind, fd, open_disk(name.path, fd, kind))
    bases = open_bases(fd, name.path, opened, write=write_base)
    header = read_header(fd, name.path)
    return Image(name.path, kind, fd, open_disk(name.path, fd, kind, bases), bases, header)


def open_qcow2_alone(name: ImageName, opened: ExitStack, *, write: bool) -> int:
    """Open and lock a qcow2 image and nothing that it stands on. Raises ConfigError, HostError."""
    fd, kind = open_file(name, opened, write=write)
    if kind != "qcow2":
        raise ConfigError(f"{name.path}: is a raw image, which is all data", hint=_SAY_QCOW2)
    return fd


def open_disk(path: str, fd: int, kind: str, bases: Sequence[Base] = ()) -> Disk:
    """Return the disk that an open image and its bases make. Raises ConfigError, HostError."""
    with speaking_of(path):
        fds = [fd, *(base.fd for base in bases)]
        return open_chain(fds, [kind, *(base.format for base in bases)])


@contextmanager
def speaking_of(path: str) -> Iterator[None]:
    """Name the image in what the formats' code raises: that code knows no names."""
    try:
        yield
    except PyvmError as err:
        if not err.what.startswith(path):
            err.what = f"{path}: {err.what}"
        raise
    except OSError as err:
        raise HostError(f"{path}: {err.strerror or err}") from err


@contextmanager
def writing(path: str, disk: Disk) -> Iterator[None]:
    """Bring a disk to the medium at the end, whatever the end is. Raises as speaking_of() does."""
    with speaking_of(path):
        try:
            yield
        except BaseException:
            with suppress(PyvmError, OSError):  # there is something worse to tell
                disk.finish()
            raise
        disk.flush()
        disk.finish()


# What is where.


def all_runs(image: Image) -> Iterator[Run]:
    """Cut a disk into DATA, wherever in the chain it is, and ZERO. Raises OSError."""
    for run in image.disk.map(0, image.disk.size):
        yield Run(run.offset, run.length, DATA if run.kind in _STORED else ZERO)


def own_runs(image: Image, size: int | None = None) -> Iterator[Run]:
    """Cut a qcow2 disk, or its first `size` bytes, into what it holds itself, and BASE.

    Raises ConfigError, OSError.
    """
    if image.format != "qcow2":
        raise ConfigError(f"{image.path}: a raw image stands on no base", hint=_SAY_QCOW2)
    for run in image.disk.map(0, image.disk.size if size is None else size):
        if run.depth or run.kind == "unallocated":
            kind = BASE
        else:
            kind = DATA if run.kind in _STORED else ZERO
        yield Run(run.offset, run.length, kind)


# Changing.


def format_image(
    fd: int, kind: str, size: int, shape: Shape, *, base: str = "", base_format: str = ""
) -> None:
    """Make an empty file an image. Raises ConfigError, OSError."""
    if kind == "raw":
        os.ftruncate(fd, size)
    else:
        create(fd, size, backing_file=base, backing_format=base_format, **shape._asdict())


def header_of(image: Image) -> Header:
    """Return the header of a qcow2 image. Raises ConfigError."""
    if image.header is None:
        raise ConfigError("is a raw image", hint=_SAY_QCOW2)
    return image.header


def cut(image: Image, size: int) -> None:
    """Shorten a raw image. Raises ConfigError, OSError."""
    if not stat.S_ISREG(os.fstat(image.fd).st_mode):
        raise ConfigError("a block device has the size it has")
    os.ftruncate(image.fd, size)
    os.fsync(image.fd)


def write_base(fd: int, base: str, base_format: str) -> None:
    """Write another base, or "" for none, into the header of a qcow2 image.

    Nobody may have the image's header in memory. Raises ConfigError, OSError.
    """
    old = qcow2head.read(fd)
    header = old._replace(backing_file=base, backing_format=base_format)
    new, before = qcow2head.build(header), qcow2head.build(old)
    os.pwrite(fd, new.ljust(len(before), b"\0"), 0)
    os.fsync(fd)


def check(fd: int, repair: str, work: Work) -> dict[str, Any]:
    """Look for contradictions in a qcow2 image, after mending `repair`: "", "leaks" or "all".

    Raises ConfigError, OSError.
    """
    if not repair:
        return qcow2check.check(fd, work)._asdict()
    return qcow2check.mend(fd, leaks_only=repair == "leaks", progress=work)._asdict()
