"""Writes cpio archives that the kernel unpacks as an initramfs; equal input gives equal bytes.

The "newc" format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst): per entry a
header of 13 hexadecimal fields of 8 digits, the name with a NUL, the data; header with name and
data are each padded to 4 bytes. Everything belongs to root and dates from 1970.
"""

from __future__ import annotations

import gzip
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAGIC = b"070701"
_END = "TRAILER!!!"


class Node(NamedTuple):
    """What one path is: its st_mode, its bytes (a link's target), and a device's numbers."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


DIRECTORY = Node(stat.S_IFDIR | 0o755)


def file(data: bytes, permissions: int = 0o644) -> Node:
    """Return a regular file."""
    return Node(stat.S_IFREG | permissions, data)


def link(target: str) -> Node:
    """Return a symbolic link."""
    return Node(stat.S_IFLNK | 0o777, target.encode())


def character_device(major: int, minor: int) -> Node:
    """Return a character device for root only."""
    return Node(stat.S_IFCHR | 0o600, device=(major, minor))


def initramfs(nodes: Mapping[str, Node]) -> bytes:
    """Return the gzip-compressed archive of `nodes`, with the directories that they lie in."""
    return gzip.compress(archive(nodes), mtime=0)


def archive(nodes: Mapping[str, Node]) -> bytes:
    """Return the archive of `nodes` (relative path → node) and of their directories, sorted."""
    everything = dict.fromkeys(_directories(nodes), DIRECTORY) | dict(nodes)
    entries = [
        _entry(number, path, everything[path]) for number, path in enumerate(sorted(everything), 1)
    ]
    return b"".join([*entries, _entry(0, _END, Node(0))])


def _directories(paths: Mapping[str, Node]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        parts = path.split("/")[:-1]
        found.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return found


def _entry(inode: int, path: str, node: Node) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(node.mode) else 1
    # ino mode uid gid nlink mtime filesize, device the file is on, device that it is, name, check
    fields = (inode, node.mode, 0, 0, links, 0, len(node.data), 0, 0, *node.device, len(name), 0)
    header = _MAGIC + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name) + _padded(node.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
