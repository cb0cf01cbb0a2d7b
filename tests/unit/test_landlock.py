"""Landlock: what is asked of kernels of every ABI, found in the bytes they are given."""

from __future__ import annotations

import struct

import pytest

from devices import landlock
from devices.landlock import Access

# What each ABI added (Documentation/userspace-api/landlock.rst).
FS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF, 6: 0xFFFF, 7: 0xFFFF}
SIZES = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16, 6: 24, 7: 24}


@pytest.mark.parametrize("version", FS)
def test_everything_an_abi_can_deny_is_handled(version: int) -> None:
    """A file-system access that is not handled is allowed, so all the kernel knows are."""
    assert landlock.handled_fs(version) == FS[version]


@pytest.mark.parametrize("version", FS)
def test_an_older_kernel_is_told_nothing_that_it_does_not_know(version: int) -> None:
    """The struct grew twice; a kernel refuses one that is longer than its own."""
    attr = landlock.ruleset(version)
    assert len(attr) == SIZES[version]
    words = struct.unpack(f"<{len(attr) // 8}Q", attr)
    assert words == (FS[version], 0b11, 0b11)[: len(words)]


def test_signals_can_be_left_out() -> None:
    """The VM process ends its device processes, which are outside its domain."""
    assert struct.unpack("<QQQ", landlock.ruleset(6, signals=False))[2] == landlock.SCOPE_SOCKETS
    assert "signals" not in landlock.denied(7, signals=False)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (0, []),
        (1, ["files"]),
        (3, ["files"]),
        (4, ["files", "TCP"]),
        (7, ["files", "TCP", "abstract sockets", "signals"]),
    ],
)
def test_what_is_denied_is_named(version: int, words: list[str]) -> None:
    """A report claims no more than the kernel can do."""
    assert landlock.denied(version) == words


def test_access_bits_are_those_of_the_kernel() -> None:
    """LANDLOCK_ACCESS_FS_* of linux/landlock.h, first, last, and the newer three."""
    assert (Access.EXECUTE, Access.MAKE_SYM) == (1, 1 << 12)
    assert (Access.REFER, Access.TRUNCATE, Access.IOCTL_DEV) == (1 << 13, 1 << 14, 1 << 15)
