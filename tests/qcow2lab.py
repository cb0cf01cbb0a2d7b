"""qcow2 images for tests: made by qemu-img and qemu-io, changed by us, judged by both.

Disks here are small, and their contents a `bytearray`: what a test believes of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from devices.qcow2 import Qcow2, open_chain
from devices.qcow2create import create

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from random import Random

    from devices.raw import Disk

needs_qemu: Final = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="no qemu-img and qemu-io (package qemu-utils)",
)


def qemu_img(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run qemu-img; return what it prints. Raises CalledProcessError."""
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], cwd=cwd, check=True, capture_output=True, text=True
    )
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    """Have qemu-io change an image."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True, text=True
    )
    assert "failed" not in done.stdout + done.stderr, done.stdout


def qemu_check(path: Path) -> tuple[int, int]:
    """Return how many corruptions and leaks qemu-img finds."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 2, 3), done.stderr
    found = json.loads(done.stdout)
    assert not found["check-errors"]
    return found.get("corruptions", 0), found.get("leaks", 0)


def content(path: Path, format: str = "qcow2") -> bytes:
    """Return what qemu-img sees in an image, its bases included."""
    flat = path.with_suffix(".flat")
    qemu_img("convert", "-f", format, "-O", "raw", path, flat)
    data = flat.read_bytes()
    flat.unlink()
    return data


@contextmanager
def opened(*paths: Path, formats: Sequence[str] = (), readonly: bool = False) -> Iterator[Disk]:
    """Open a chain, its top first; what is reserved is given back at the end, unless it raised."""
    fds = []
    try:
        for index, path in enumerate(paths):
            fds.append(os.open(path, os.O_RDONLY if index or readonly else os.O_RDWR))
        disk = open_chain(fds, formats or ["qcow2"] * len(paths))
        yield disk
        disk.finish()
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def new_image(path: Path, size: int, **options: Any) -> Iterator[Qcow2]:
    """Make an image of our own, without a base, and open it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        create(fd, size, **options)
        disk = Qcow2(fd)
        yield disk
        disk.finish()
    finally:
        os.close(fd)


def read(disk: Disk, offset: int, length: int) -> bytes:
    """Read as a device does: first the short way, then the long one."""
    data = bytearray(length)
    view = memoryview(data)
    if disk.attempts()[0]([view], offset) != length:
        assert disk.read([view], offset, length) == length
    return bytes(data)


def write(disk: Disk, offset: int, data: bytes) -> None:
    """Write as a device does, until it is reported."""
    view = memoryview(data)
    if disk.attempts()[1]([view], offset) != len(data):
        assert disk.write([view], offset, len(data)) == len(data)
    if disk.pending:
        disk.commit()


def pattern(rng: Random, length: int) -> bytes:
    """Return bytes that tell where they belong, zeroes now and then."""
    if rng.random() < 0.1:
        return bytes(length)
    return rng.randbytes(min(length, 64)).ljust(64, b"~") * (length // 64) + bytes(length % 64)
