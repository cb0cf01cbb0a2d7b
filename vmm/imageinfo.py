"""What can be told of an image without reading its data: from headers, and from the file system.

Nothing is locked, so an image that a VM writes to can be looked at, too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from config.errors import PyvmError
from config.units import format_size
from devices import images, imageuser
from devices.bases import MAX_IMAGES, base_of, read_header, same_file
from devices.images import Access
from devices.lines import printable
from vmm import imagename

if TYPE_CHECKING:
    from vmm.imagename import ImageName


def facts(name: ImageName) -> dict[str, Any]:
    """Return what `image info --json` tells; sizes in bytes. Raises PyvmError for the image itself.

    `bases` are all images below it, the nearest first; `broken` says why the last of them cannot
    be used, if it cannot.
    """
    chain, broken = _chain(name)
    top = chain[0]
    return {**top, "bases": chain[1:], "broken": broken}


def _chain(name: ImageName) -> tuple[list[dict[str, Any]], str | None]:
    """Describe an image and what it stands on, as far as that can be opened."""
    chain: list[dict[str, Any]] = []
    seen: list[os.stat_result] = []
    path, kind, title = name.path, name.format, name.path
    try:
        while True:
            access = Access(path, title, write=False)
            fd = images.open_image(access, lock=False)
            try:
                status = os.fstat(fd)
                if any(same_file(status, other) for other in seen):
                    return chain, f"{title}: the chain goes round in circles"
                seen.append(status)
                kind = kind or imagename.settle(name, os.pread(fd, 4, 0))
                chain.append(_describe(fd, access, kind, status))
                base = base_of(fd, path) if kind == "qcow2" else None
            finally:
                os.close(fd)
            if base is None:
                return chain, None
            if len(chain) == MAX_IMAGES:
                return chain, f"{path}: has more than {MAX_IMAGES - 1} bases below it"
            title = f"base {base.path} of {path}"
            path, kind = base.path, base.format
    except PyvmError as err:
        if not chain:
            raise
        return chain, str(err)


def _describe(fd: int, access: Access, kind: str, status: os.stat_result) -> dict[str, Any]:
    """Describe one image. Raises PyvmError."""
    facts: dict[str, Any] = {
        "path": access.path,
        "format": kind,
        "size": images.size_of(fd, access),
        "allocated": status.st_blocks * 512,
        "in_use": _use(fd, access),
    }
    if kind == "qcow2":
        header = read_header(fd, access.path)
        facts |= {
            "size": header.size,
            "version": header.version,
            "cluster_size": header.cluster_size,
            "refcount_bits": header.refcount_bits,
            "dirty": header.dirty,
            "corrupt": header.corrupt,
            "snapshots": header.snapshots,
            "base": header.backing_file or None,
            "base_format": header.backing_format or None,
        }
    return facts


def _use(fd: int, access: Access) -> str | None:
    """Say who uses an image, None if nobody does."""
    how = imageuser.locked(fd)
    if not how:
        return None
    who = imageuser.user_of(access, own=1) or "another program has it open"
    return f"{who}, and {how} it"


def text(facts: dict[str, Any]) -> str:
    """Return facts() for people."""
    lines = [
        ("image", facts["path"]),
        ("format", _format(facts)),
        ("size", f"{format_size(facts['size'])} ({facts['size']} bytes)"),
        ("allocated", format_size(facts["allocated"])),
    ]
    if facts["format"] == "qcow2":
        lines.append(("clusters", format_size(facts["cluster_size"])))
        lines += [("state", word) for word in ("dirty", "corrupt") if facts[word]]
        if facts["snapshots"]:
            lines.append(("snapshots", str(facts["snapshots"])))
    lines += [
        ("base", f"{base['path']} ({_format(base)}, {format_size(base['size'])})")
        for base in facts["bases"]
    ]
    if facts["broken"]:
        lines.append(("broken", facts["broken"]))
    if facts["in_use"]:
        lines.append(("in use", f"{facts['in_use']}"))
    return "\n".join(f"{title + ':':<11}{printable(value)}" for title, value in lines)


def _format(facts: dict[str, Any]) -> str:
    return f"qcow2 version {facts['version']}" if "version" in facts else str(facts["format"])
