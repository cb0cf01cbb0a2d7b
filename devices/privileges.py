"""What a process may do beyond its own: users, capabilities, prctl(2) switches, limits.

Nothing here can be taken back, and nothing needs the file system.
"""

from __future__ import annotations

import ctypes
import os
import resource
from struct import Struct
from typing import TYPE_CHECKING, Final

from devices import syscalls

if TYPE_CHECKING:
    from collections.abc import Mapping

NOBODY: Final = 65534
CAP_DAC_OVERRIDE: Final = 1
CAP_SYS_ADMIN: Final = 21
_CAP_SETPCAP: Final = 8

_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_GET_SECUREBITS: Final = 27
_PR_SET_SECUREBITS: Final = 28
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_SET_MDWE: Final = 65

_AMBIENT_CLEAR_ALL: Final = 4
_MDWE_REFUSE_EXEC_GAIN: Final = 1
# NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE set, KEEP_CAPS clear, all four locked: becoming
# uid 0 gives nothing.
_SECUREBITS: Final = 0b11101111

_CAP_VERSION: Final = Struct("<Ii").pack(0x20080522, 0)  # version 3, this thread
_CAP_DATA: Final = Struct("<6I")  # effective, permitted, inheritable; low words, then high words


def _prctl(option: int, *args: int) -> int:
    return syscalls.call("prctl", option, *args, *[0] * (4 - len(args)))


def become(uid: int, gid: int, saved: int) -> None:
    """Become a user with no supplementary groups, and keep root's capabilities for a moment.

    `saved` is the saved user id: who has it may signal this process. Raises OSError.
    """
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, saved)
    _set(permitted())  # they were kept, but are not in effect


def permitted() -> int:
    """Return the permitted capabilities as a mask."""
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    syscalls.call("capget", _CAP_VERSION, data)
    _, low, _, _, high, _ = _CAP_DATA.unpack(data)
    mask: int = low | high << 32
    return mask


def _set(capabilities: int) -> None:
    """Make these permitted and in effect, and none inheritable."""
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    syscalls.call("capset", _CAP_VERSION, _CAP_DATA.pack(low, low, 0, high, high, 0))


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability but the mask `keep`, and the ways to get one back.

    The bounding set can only be emptied by who has CAP_SETPCAP; without it nothing but
    no_new_privs stands between this process and a set-uid program. Raises OSError.
    """
    if permitted() & 1 << _CAP_SETPCAP:
        for capability in range(64):
            try:
                if _prctl(_PR_CAPBSET_READ, capability):
                    _prctl(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # EINVAL: this kernel knows no more of them
        if _prctl(_PR_GET_SECUREBITS) != _SECUREBITS:
            _prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    _prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _set(permitted() & keep)


def no_new_privs() -> None:
    """Make execve(2) unable to give anything; seccomp and Landlock ask for it. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def dumpable(on: bool) -> None:
    """Allow or forbid core dumps of this process, and that its user's others look into it."""
    _prctl(_PR_SET_DUMPABLE, int(on))


def no_new_code() -> None:
    """Let no memory become executable any more (Linux 6.3). Raises OSError."""
    _prctl(_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def private_memory() -> int:
    """Return the bytes that RLIMIT_DATA counts of this process, and its stack (proc(5), statm)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def limit(limits: Mapping[str, int]) -> None:
    """Set resource limits, named as in setrlimit(2) without RLIMIT_; lower ones stay.

    Raises OSError, ValueError.
    """
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(number)
        new = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (new, new))
