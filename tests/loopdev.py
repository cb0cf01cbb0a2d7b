"""A loop device for a test: a block device whose bytes are a file's."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/loop.h
_SET_FD: Final = 0x4C00
_CLR_FD: Final = 0x4C01
_SET_CAPACITY: Final = 0x4C07
_SET_BLOCK_SIZE: Final = 0x4C09
_CTL_GET_FREE: Final = 0x4C82


@contextmanager
def loop_device(image: str, block_size: int = 512) -> Iterator[str]:
    """Attach `image` to a free loop device and yield its path; skip the test if we may not."""
    while not (found := _attach(image)):
        pass
    path, device = found
    try:
        fcntl.ioctl(device, _SET_BLOCK_SIZE, block_size)
        yield path
    finally:
        fcntl.ioctl(device, _CLR_FD)
        os.close(device)


def _attach(image: str) -> tuple[str, int] | None:
    """Try the device that is free now; None if somebody else was quicker, or is not quite gone."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
        finally:
            os.close(control)
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.ENXIO:
            return None
        pytest.skip(f"loop devices: {err.strerror}")
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _SET_FD, backing)
    except OSError as err:
        os.close(device)
        if err.errno == errno.EBUSY:
            return None
        raise
    finally:
        os.close(backing)
    return path, device


def look_again(path: str) -> None:
    """Let a loop device take the size that its file has now."""
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.ioctl(device, _SET_CAPACITY)
    os.close(device)
