"""Landlock: what this process may do with the file system, TCP, and processes outside (ABI 1-7).

Everything the running kernel can deny is denied, and then allowed again beneath given
directories. Descriptors that are open already keep working. Newer kernels can deny more (TCP from
ABI 4, signals and abstract sockets from 6); `denied` names what this one can.
"""

from __future__ import annotations

import os
from enum import IntFlag
from struct import Struct
from typing import TYPE_CHECKING, Final

from devices import syscalls

if TYPE_CHECKING:
    from collections.abc import Mapping

NEWEST_ABI: Final = 7  # up to which the bits below are complete


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_* (linux/landlock.h)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # ABI 2
    TRUNCATE = 1 << 14  # ABI 3
    IOCTL_DEV = 1 << 15  # ABI 5


NET_ALL: Final = 0b11  # bind and connect of TCP sockets
SCOPE_SOCKETS: Final = 1  # abstract Unix sockets
SCOPE_SIGNALS: Final = 2

_RULESET: Final = Struct("<QQQ")  # handled_access_fs, handled_access_net, scoped
_PATH_BENEATH: Final = Struct("<Qi")  # packed
_VERSION_FLAG: Final = 1
_RULE_PATH_BENEATH: Final = 1


def abi() -> int:
    """Return the ABI version of the running kernel, at most NEWEST_ABI; 0 without Landlock."""
    try:
        return min(syscalls.call("landlock_create_ruleset", None, 0, _VERSION_FLAG), NEWEST_ABI)
    except OSError:
        return 0


def handled_fs(version: int) -> int:
    """Return the file-system accesses that ABI `version` can deny."""
    newer = ((2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL_DEV))
    return (1 << 13) - 1 | sum(access for since, access in newer if version >= since)


def ruleset(version: int, *, signals: bool = True) -> bytes:
    """Return the struct landlock_ruleset_attr that denies all that ABI `version` can.

    `signals` False leaves signals to processes outside allowed.
    """
    scoped = SCOPE_SOCKETS | (SCOPE_SIGNALS if signals else 0)
    attr = _RULESET.pack(handled_fs(version), NET_ALL, scoped)
    # An older kernel takes a longer struct only if what it does not know is 0.
    return attr[: 24 if version >= 6 else 16 if version >= 4 else 8]


def denied(version: int, *, signals: bool = True) -> list[str]:
    """Name what `restrict` denies on a kernel of ABI `version`."""
    return [
        *(["files"] if version >= 1 else []),
        *(["TCP"] if version >= 4 else []),
        *(["abstract sockets"] if version >= 6 else []),
        *(["signals"] if version >= 6 and signals else []),
    ]


def restrict(allowed: Mapping[int, Access] | None = None, *, signals: bool = True) -> int:
    """Deny this thread, and all it starts, everything but `allowed` beneath directories.

    Those are given as descriptors. Needs no_new_privs. Returns the ABI version, 0 if this kernel
    has no Landlock; then nothing is denied. Raises OSError.
    """
    version = abi()
    if not version:
        return 0
    attr = ruleset(version, signals=signals)
    fd = syscalls.call("landlock_create_ruleset", attr, len(attr), 0)
    try:
        for directory, access in (allowed or {}).items():
            rule = _PATH_BENEATH.pack(access & handled_fs(version), directory)
            syscalls.call("landlock_add_rule", fd, _RULE_PATH_BENEATH, rule, 0)
        syscalls.call("landlock_restrict_self", fd, 0)
    finally:
        os.close(fd)
    return version
