"""What the image tool does with images: create, convert, resize, commit, rebase, check.

New images are drafts until they are complete, so whatever ends the work leaves what was there
before. Images that are changed in place are valid after every step, and read as they did.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import ConfigError
from config.units import format_size
from devices import images
from devices.bases import MAX_IMAGES, has_protocol
from devices.images import SECTOR, Access
from vmm import imagecopy, imagetool
from vmm.draft import Draft, exists
from vmm.imagecopy import BASE, ZERO, Run
from vmm.imagetool import Shape, speaking_of, writing
from vmm.progress import Work
from vmm.usage import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmm.imagename import ImageName
    from vmm.imagetool import Image

_TOO_LONG: Final = f"more than {MAX_IMAGES} images in a chain"


class Making(NamedTuple):
    """An image that is to be made."""

    name: ImageName  # its format is settled
    size: int = 0  # bytes; 0: as its base's or its source's
    shape: Shape = Shape()
    force: bool = False  # replace what has the name


def create(how: Making, base: ImageName | None) -> dict[str, Any]:
    """Make an empty image, perhaps on a base; return facts for JSON. Raises PyvmError."""
    path, kind = how.name
    size, written, base_format = how.size, "", ""
    with ExitStack() as opened:
        draft = _draft(how, opened)
        if base is not None:
            if kind != "qcow2":
                hint = "name it qcow2:PATH, or with the ending .qcow2"
                raise UsageError(f"{path}: only a qcow2 image can stand on a base", hint=hint)
            below = imagetool.open_image(base, opened)
            if len(below.bases) + 2 > MAX_IMAGES:
                hint = "make one of several: pyvmctl image convert"
                raise ConfigError(f"{path}: {_TOO_LONG}", hint=hint)
            written, base_format = _written(base.path, path), below.format
            size = size or _whole_sectors(below.disk.size)
        with speaking_of(path):
            imagetool.format_image(
                draft.fd, kind, size, how.shape, base=written, base_format=base_format
            )
        draft.publish(replace=how.force)
    facts = {"path": path, "format": kind, "size": size}
    return {**facts, "base": written or None, "base_format": base_format or None}


def convert(source: ImageName, how: Making, *, quiet: bool = False) -> dict[str, Any]:
    """Make an image that holds what `source` and its bases do. Raises PyvmError."""
    path, kind = how.name
    with ExitStack() as opened:
        work = opened.enter_context(Work(f"convert {source.path}", quiet=quiet))
        image = imagetool.open_image(source, opened)
        least = image.disk.size if kind == "raw" else _whole_sectors(image.disk.size)
        size = how.size or least
        if size < least:
            what = f"{path}: {format_size(size)} is too small"
            raise UsageError(f"{what}: {image.path} has {format_size(image.disk.size)}")
        draft = _draft(how, opened)
        with speaking_of(path):
            imagetool.format_image(draft.fd, kind, size, how.shape)
        with speaking_of(image.path):  # looked at twice: an image may have any number of runs
            work.start(_bytes(imagetool.all_runs(image)))
        target = imagetool.open_disk(path, draft.fd, kind)
        with writing(f"{image.path} to {path}", target):
            imagecopy.copy(image.disk, target, imagetool.all_runs(image), work, fresh=True)
        draft.publish(replace=how.force)
    return {"path": path, "format": kind, "size": size}


def resize(
    name: ImageName, number: int, *, add: bool, shrink: bool, quiet: bool = False
) -> dict[str, Any]:
    """Give an image another size: `number` bytes, or so many more. Raises PyvmError."""
    with ExitStack() as opened:
        work = opened.enter_context(Work(f"shrink {name.path}", quiet=quiet))
        image = imagetool.open_image(name, opened, write=True)
        before = image.disk.size
        size = before + number if add else number
        if size < before and not shrink:
            what = f"{image.path}: has {format_size(before)}, and what is behind"
            raise ConfigError(f"{what} {format_size(size)} would be lost", hint="--shrink cuts it")
        if size < before and image.format == "qcow2":
            _shrink(image, size, work, opened)
        else:
            with writing(image.path, image.disk):
                if size > before:
                    image.disk.resize(size)
                elif size < before:
                    imagetool.cut(image, size)
    return {"path": name.path, "format": image.format, "size": size, "before": before}


def _shrink(image: Image, size: int, work: Work, opened: ExitStack) -> None:
    """Put a smaller qcow2 image in the place of one: with its own data, on the same base."""
    with speaking_of(image.path):
        draft = _successor(image, size, opened)
        target = imagetool.open_disk(image.path, draft.fd, "qcow2", image.bases)
        work.start(_bytes(_own(image, size)))
    with writing(image.path, target):
        imagecopy.copy(image.disk, target, _own(image, size), work, fresh=not image.bases)
    draft.publish(replace=True)


def _successor(image: Image, size: int, opened: ExitStack) -> Draft:
    """Make an empty qcow2 image like this one. Raises ConfigError for what it would lose."""
    header = imagetool.header_of(image)
    if header.snapshots:
        what = f"its {header.snapshots} internal snapshots would be lost"
        raise ConfigError(what, hint="qemu-img snapshot -d deletes them")
    draft = opened.enter_context(Draft(os.path.realpath(image.path)))
    draft.resemble(os.fstat(image.fd))
    shape = Shape(header.cluster_size, header.version, header.refcount_bits)
    base, base_format = header.backing_file, header.backing_format
    imagetool.format_image(draft.fd, "qcow2", size, shape, base=base, base_format=base_format)
    return draft


def commit(name: ImageName, *, empty: bool, quiet: bool = False) -> dict[str, Any]:
    """Write an overlay's own data into its base, then `empty` the overlay. Raises PyvmError."""
    with ExitStack() as opened:
        work = opened.enter_context(Work(f"commit {name.path}", quiet=quiet))
        image = imagetool.open_image(name, opened, write=True, write_base=True)
        if not image.bases:
            raise ConfigError(f"{image.path}: stands on no base")
        base, *rest = image.bases
        with speaking_of(image.path):
            successor = _successor(image, image.disk.size, opened) if empty else None
            copied = _bytes(_own(image))
        work.start(copied)
        target = imagetool.open_disk(base.path, base.fd, base.format, rest)
        with writing(f"{image.path} to {base.path}", target):
            if target.size < image.disk.size:
                target.resize(image.disk.size)
            imagecopy.copy(image.disk, target, _own(image), work)
        if successor is not None:
            successor.publish(replace=True)
    return {"path": name.path, "base": base.path, "copied": copied, "emptied": empty}


def rebase(
    name: ImageName, base: ImageName | None, *, unsafe: bool, quiet: bool = False
) -> dict[str, Any]:
    """Put an overlay on another base, or on none; unless `unsafe` it reads as before.

    Raises PyvmError.
    """
    written = _written(base.path, name.path) if base else ""
    with ExitStack() as opened:
        work = opened.enter_context(Work(f"rebase {name.path}", quiet=quiet))
        if unsafe:
            fd = imagetool.open_qcow2_alone(name, opened, write=True)
            base_format = base.format if base else ""
            if base and not base_format:
                raise UsageError(f"{base.path}: of which format? (-F raw, or -F qcow2)")
            if base and os.path.exists(base.path) and os.path.samefile(base.path, name.path):
                raise ConfigError(f"{name.path}: cannot stand on itself")
        else:
            fd, base_format = _copy_difference(name, base, work, opened)
        with speaking_of(name.path):
            imagetool.write_base(fd, written, base_format)
    return {"path": name.path, "base": written or None, "base_format": base_format or None}


def _copy_difference(
    name: ImageName, base: ImageName | None, work: Work, opened: ExitStack
) -> tuple[int, str]:
    """Make an overlay hold all that would read differently on another base.

    Returns its descriptor and the base's format.
    """
    image = imagetool.open_image(name, opened, write=True)
    below = imagetool.open_image(base, opened) if base else None
    if below and len(below.bases) + 2 > MAX_IMAGES:
        raise ConfigError(f"{image.path}: {_TOO_LONG}")
    with speaking_of(image.path):
        runs = list(_doubtful(image, below))
    work.start(_bytes(runs))
    with writing(image.path, image.disk):
        imagecopy.copy_differing(image.disk, below.disk if below else None, runs, work)
    return image.fd, below.format if below else ""


def _doubtful(image: Image, below: Image | None) -> Iterator[Run]:
    """Cut out what may read differently on another base: not an overlay's own, not zeroes."""
    layers = [list(imagetool.own_runs(image)), list(imagetool.all_runs(image))]
    layers.append(list(imagetool.all_runs(below)) if below else [])
    for offset, length, kinds in imagecopy.together(image.disk.size, *layers):
        if kinds[0] == BASE and kinds[1:] != (ZERO, ZERO):
            yield Run(offset, length, BASE)


def check(name: ImageName, repair: str, *, quiet: bool = False) -> dict[str, Any]:
    """Look for contradictions in a qcow2 image, after mending `repair`: "", "leaks" or "all".

    Raises PyvmError if it cannot be looked at to its end.
    """
    with ExitStack() as opened:
        work = opened.enter_context(Work(f"check {name.path}", quiet=quiet))
        fd = imagetool.open_qcow2_alone(name, opened, write=bool(repair))
        with speaking_of(name.path):
            return {"path": name.path, **imagetool.check(fd, repair, work)}


def verdict(facts: dict[str, Any]) -> str:
    """Return check()'s result in a line."""
    left = [f"{facts[word]} {word}" for word in ("corruptions", "leaks") if facts[word]]
    mended = f", {facts['mended']} mended" if facts["mended"] else ""
    return f"{facts['path']}: {' and '.join(left) or 'clean'}{mended}"


def _draft(how: Making, opened: ExitStack) -> Draft:
    """Begin a new image; what it replaces is locked meanwhile. Raises HostError, ConfigError."""
    path, old = how.name.path, None
    if how.name.format == "raw" and how.shape != Shape():
        raise UsageError(f"{path}: a raw image has no options")
    if os.path.lexists(path):
        if not how.force:
            raise exists(path)
        path = os.path.realpath(path)
    if os.path.exists(path):
        fd = images.open_image(Access(path, path, write=True))
        opened.callback(os.close, fd)
        old = os.fstat(fd)
        if not stat.S_ISREG(old.st_mode):
            raise ConfigError(f"{path}: is a block device, which no new file can replace")
    draft = opened.enter_context(Draft(path))
    if old:
        draft.resemble(old)
    return draft


def _written(base: str, image: str) -> str:
    """Return how an image names its base: a relative path begins where the image is."""
    if os.path.isabs(base):
        return base
    place = os.path.dirname(image)
    written = os.path.relpath(base, place or ".")
    if os.path.realpath(os.path.join(place, written)) != os.path.realpath(base):
        return os.path.abspath(base)  # a symbolic link to a directory is on the way
    return f"./{written}" if has_protocol(written) else written


def _whole_sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def _own(image: Image, size: int | None = None) -> Iterator[Run]:
    """Cut out what a qcow2 disk, or its first `size` bytes, holds itself."""
    return (run for run in imagetool.own_runs(image, size) if run.kind != BASE)


def _bytes(runs: Iterable[Run]) -> int:
    return sum(run.length for run in runs)
