"""A file whose reads and writes wait until a test lets them go on: a slow disk, by fuse(4).

with held_file(path, 1 << 20) as file:
    file.hold = True        … what is asked for from now on waits
    file.nr_writes          … how many writes have come
    file.hold = False
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
from contextlib import contextmanager
from struct import Struct
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# linux/fuse.h
_SETATTR, _GETATTR, _OPEN, _READ, _WRITE, _RELEASE = 4, 3, 14, 15, 16, 18
_FSYNC, _FLUSH, _INIT = 20, 25, 26
_NO_ANSWER: Final = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_ASYNC_READ, _ASYNC_DIO = 1 << 0, 1 << 15
_DIRECT_IO: Final = 1
_IN: Final = Struct("=IIQQIIIHH")
_OUT: Final = Struct("=IiQ")
_INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
_ATTR_OUT: Final = Struct("=QII6Q10I")
_OPEN_OUT: Final = Struct("=QIi")
_IO_IN: Final = Struct("=QQI")
_WRITE_IN: Final = 40  # bytes before the data
_DETACH: Final = 2
_MOST: Final = 1 << 17  # bytes of a write

_libc = ctypes.CDLL(None, use_errno=True)


class HeldFile:
    """What the test and the process that is the file share."""

    def __init__(self, size: int) -> None:
        self._words = memoryview(mmap.mmap(-1, 4096)).cast("Q")
        self.content = memoryview(mmap.mmap(-1, size))

    @property
    def hold(self) -> bool:
        """Whether reads and writes wait."""
        return bool(self._words[0])

    @hold.setter
    def hold(self, hold: bool) -> None:
        self._words[0] = hold

    @property
    def nr_reads(self) -> int:
        """How many have come, whether they were done or not."""
        return self._words[1]

    @property
    def nr_writes(self) -> int:
        """How many have come, whether they were done or not."""
        return self._words[2]

    def serve(self, fd: int) -> None:
        """Be the file."""
        poll, held = select.poll(), []
        poll.register(fd, select.POLLIN)
        while True:
            if poll.poll(2):
                message = os.read(fd, _MOST + 4096)
                opcode = _IN.unpack_from(message)[1]
                if opcode in (_READ, _WRITE):
                    self._words[1 + (opcode == _WRITE)] += 1
                    held.append(message)
                elif opcode not in _NO_ANSWER:
                    self._answer(fd, message)
            while held and not self.hold:
                self._answer(fd, held.pop(0))

    def _answer(self, fd: int, message: bytes) -> None:
        _, opcode, unique, *_ = _IN.unpack_from(message)
        error, data = 0, b""
        if opcode == _INIT:
            flags = _ASYNC_READ | _ASYNC_DIO
            data = _INIT_OUT.pack(7, 31, 1 << 17, flags, 64, 64, _MOST, 1, 0, 0, 0)
        elif opcode in (_GETATTR, _SETATTR):
            size = len(self.content)
            mode = (0o100600, 1, os.getuid(), os.getgid(), 0, 4096, 0)
            data = _ATTR_OUT.pack(0, 0, 0, 1, size, size >> 9, 0, 0, 0, 0, 0, 0, *mode)
        elif opcode == _OPEN:
            data = _OPEN_OUT.pack(0, _DIRECT_IO, 0)
        elif opcode in (_READ, _WRITE):
            _, offset, size = _IO_IN.unpack_from(message, _IN.size)
            if opcode == _READ:
                data = bytes(self.content[offset : offset + size])
            else:
                start = _IN.size + _WRITE_IN
                self.content[offset : offset + size] = message[start : start + size]
                data = size.to_bytes(8, "little")
        elif opcode not in (_RELEASE, _FSYNC, _FLUSH):
            error = -errno.ENOSYS
        try:
            os.write(fd, _OUT.pack(_OUT.size + len(data), error, unique) + data)
        except OSError as err:
            if err.errno != errno.ENOENT:  # nobody waits for it any more
                raise


@contextmanager
def held_file(path: Path, size: int) -> Iterator[HeldFile]:
    """Yield a file of `size` zeroes at `path`; skip the test where there can be none."""
    path.touch()
    file = HeldFile(size)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        pytest.skip(f"/dev/fuse: {err.strerror}")
    options = f"fd={fd},rootmode=100600,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    if _libc.mount(b"held", bytes(path), b"fuse", 0, options.encode()) < 0:
        os.close(fd)
        pytest.skip(f"mount: {os.strerror(ctypes.get_errno())}")
    pid = os.fork()
    if not pid:
        try:
            file.serve(fd)
        finally:
            os._exit(1)
    os.close(fd)
    try:
        yield file
    finally:
        file.hold = False
        _libc.umount2(bytes(path), _DETACH)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
