"""The directory that holds the runtime directories of all VMs of one user, and their numbers.

Root has /run/pyvmd. A user has $XDG_RUNTIME_DIR/pyvmd, or a private directory under /tmp, where
somebody else may have put a trap first: what others could write to is refused.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from vmm import safefile

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM: Final = "/run/pyvmd"  # root's; others find there what they may use
NAME_LIMIT: Final = 64  # characters in a VM's name

_NAME_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_IDS: Final = ".ids"  # {"web": 1, ...}; no VM is named so, since no name begins with a dot
_IDS_LOCK: Final = ".ids.lock"


def is_name(word: str) -> bool:
    """Tell whether `word` can name a VM: letters, digits, . _ and -, a letter or digit first."""
    return 0 < len(word) <= NAME_LIMIT and word[0] not in "._-" and _NAME_CHARS.issuperset(word)


def root() -> str:
    """Return the directory of all VMs of this user; it need not exist."""
    return _root()[0]


def _root() -> tuple[str, int]:
    """The path, and the mode bits it must not have."""
    if chosen := os.environ.get("PYVMD_RUNTIME_DIR"):
        return os.path.realpath(chosen), 0o002
    uid = os.geteuid()
    if uid == 0:
        return SYSTEM, 0o022
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(os.path.realpath(session), "pyvmd"), 0o022
    return f"/tmp/pyvmd-{uid}", 0o077  # noqa: S108  anyone can make it first: open_root() checks


def open_root(*, create: bool = False) -> int:
    """Return a descriptor of root().

    Raises HostError if others could tamper with it or it cannot be made, FileNotFoundError if it
    is not there and not to be made.
    """
    path, unwanted = _root()
    uid = os.geteuid()
    try:
        if create:
            # Who owns one of root's VMs must be able to pass through.
            os.makedirs(path, 0o755 if uid == 0 else 0o700, exist_ok=True)
        fd = safefile.open_dir(path)
    except FileNotFoundError:
        if create:
            raise HostError(f"cannot make runtime directory {path}") from None
        raise
    except OSError as err:
        link = os.path.islink(path)
        raise _unusable(path, "it is a symbolic link" if link else str(err.strerror)) from err
    status = os.fstat(fd)
    if status.st_uid not in (uid, 0):
        why = f"it belongs to uid {status.st_uid}"
    elif status.st_mode & unwanted:
        why = f"others may write to it or look into it (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return fd
    os.close(fd)
    raise _unusable(path, why)


def _unusable(path: str, why: str) -> HostError:
    hint = "set PYVMD_RUNTIME_DIR to a directory of your own with mode 0700"
    return HostError(f"cannot use runtime directory {path}: {why}", hint=hint)


def open_shared() -> int:
    """Return a descriptor of root's directory, where a user may have VMs that root has started.

    Raises FileNotFoundError if there is none that can be trusted, if this is root, or if
    PYVMD_RUNTIME_DIR says where to look.
    """
    if os.geteuid() and not os.environ.get("PYVMD_RUNTIME_DIR"):
        try:
            fd = safefile.open_dir(SYSTEM)
        except OSError as err:
            raise FileNotFoundError(SYSTEM) from err
        status = os.fstat(fd)
        if status.st_uid == 0 and not status.st_mode & 0o022:
            return fd
        os.close(fd)
    raise FileNotFoundError(SYSTEM)


def vm_id(name: str) -> int:
    """Return the small number of a VM, given on the first call and kept. Raises HostError."""
    with _locked_ids(name) as ids:
        if name not in ids:
            ids[name] = max(ids.values(), default=0) + 1
        return ids[name]


def forget_id(name: str) -> None:
    """Let the number of a VM go. Raises HostError."""
    with _locked_ids(name) as ids:
        ids.pop(name, None)


@contextmanager
def _locked_ids(name: str) -> Iterator[dict[str, int]]:
    """Give the numbers of all VMs, to be changed for VM `name`. Raises HostError."""
    root_fd = open_root(create=True)
    try:
        # A file of mode 0600, not the directory: everyone may lock what everyone may open.
        lock = safefile.open_file(_IDS_LOCK, os.O_RDWR | os.O_CREAT, root_fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ids = read_ids(root_fd)
            before = dict(ids)
            yield ids
            if ids != before:
                # Whoever may pass through root's directory may know its VMs' numbers.
                safefile.write_json(_IDS, dict(ids), root_fd, 0o644)
        finally:
            os.close(lock)
    except OSError as err:
        raise HostError(f"cannot number VM {name} in {root()}: {err.strerror}") from err
    finally:
        os.close(root_fd)


def read_ids(root_fd: int) -> dict[str, int]:
    """Return name → number of every VM that has one."""
    found = safefile.read_json(_IDS, root_fd)
    return {name: n for name, n in found.items() if is_name(name) and type(n) is int and n > 0}
