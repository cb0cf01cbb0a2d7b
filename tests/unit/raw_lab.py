"""An image of a known pattern, and memory to transfer: for tests of devices.raw."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from devices.raw import Raw

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[Raw]:
    """Open a path as a disk."""
    fd = os.open(path, flags)
    try:
        yield Raw(fd)
    finally:
        os.close(fd)


def pieces(data: bytearray | mmap.mmap, *lengths: int) -> list[memoryview]:
    """Cut memory into consecutive views of these lengths."""
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(data)[at : at + length])
        at += length
    return views


def pages(length: int) -> mmap.mmap:
    """Page-aligned memory."""
    return mmap.mmap(-1, length)


def holes(path: Path) -> int:
    """Bytes of a file that have no space."""
    status = path.stat()
    return status.st_size - 512 * status.st_blocks
