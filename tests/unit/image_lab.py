"""Images for tests of what opens and works on them; qemu-img makes and judges."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from devices import qcow2head
from devices.qcow2head import Header
from vmm.progress import SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB: Final = 1 << 20

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="no qemu-img")


def qemu_img(*words: str | Path, status: int = 0) -> str:
    """Run qemu-img, which must end with `status`; what it says on standard output."""
    done = subprocess.run(
        ["qemu-img", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done
    return done.stdout


def qemu_info(path: Path | str) -> dict[str, Any]:
    """What qemu-img tells of an image."""
    facts: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    return facts


def qcow2(path: Path | str, size: int = MIB, base: str = "", kind: str = "", **fields: Any) -> None:
    """Make an empty qcow2 image by hand: with any base name and base format, true or not."""
    header = Header(
        version=3,
        cluster_bits=16,
        size=size,
        l1_offset=3 << 16,
        l1_entries=1,
        refcount_offset=1 << 16,
        refcount_clusters=1,
        backing_file=base,
        backing_format=kind,
    )._replace(**fields)
    with open(path, "wb") as file:
        file.write(qcow2head.build(header))
        file.seek(1 << 16)
        file.write((2 << 16).to_bytes(8, "big"))  # one refcount block
        file.seek(2 << 16)
        file.write(b"\0\1" * 4)  # of four clusters
        file.truncate(4 << 16)


def raw(path: Path | str, size: int = MIB, data: bytes = b"") -> None:
    """Make a raw image that begins with `data`."""
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(size)


def allocated(path: Path | str) -> int:
    """Bytes of space that a file takes."""
    return os.stat(path).st_blocks * 512


def nobody_left(directory: Path | str, *expected: str) -> None:
    """Check that there is nothing in a directory but what is expected."""
    assert sorted(os.listdir(directory)) == sorted(expected)


@contextmanager
def signals_count() -> Iterator[None]:
    """Let signals reach this process, whoever started the tests, as with nohup."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * len(SIGNALS)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def fill(path: Path | str, *areas: tuple[int, int, int], kind: str = "qcow2") -> None:
    """Have QEMU write areas: offset, length, byte."""
    words = [word for at, size, byte in areas for word in ("-c", f"write -q -P {byte} {at} {size}")]
    subprocess.run(
        ["qemu-io", "-f", kind, *words, str(path)], check=True, timeout=60, capture_output=True
    )


def content(path: Path | str, kind: str = "qcow2") -> bytes:
    """What a guest would read of a whole disk, as QEMU reads it."""
    copy = f"{path}.content"
    try:
        qemu_img("convert", "-U", "-f", kind, "-O", "raw", path, copy)
        with open(copy, "rb") as file:
            return file.read()
    finally:
        os.unlink(copy)


def sound(path: Path | str) -> None:
    """Check that QEMU finds a qcow2 image without any fault or leak."""
    qemu_img("check", "-q", "-f", "qcow2", path)


def pattern(size: int, *areas: tuple[int, int, int]) -> bytes:
    """What fill() makes of zeroes."""
    data = bytearray(size)
    for at, length, byte in areas:
        data[at : at + length] = bytes((byte,)) * length
    return bytes(data)


def interrupting(function: Any, calls: int, number: int) -> Any:
    """A function that sends this process a signal when it is called for the nth time."""
    count = 0

    def call(*words: Any, **how: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), number)
        return function(*words, **how)

    return call
