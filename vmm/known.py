"""The files whose VMs are known by name, also while they do not run.

A file becomes known when one of its VMs is started, or by `pyvmctl load`. It is read anew whenever
its VMs are asked for, so what is edited counts at the next start. `.files` in the runtime root
holds the paths, and is gone after a reboot of the host, as the VMs are.

A name is a standing order: it must not be somebody else who says what it means later. A file that
another user could change since is refused until it is named again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError, HostError, NoSuchVmError, PyvmError
from config.load import MAX_FILE, load_bytes
from vmm import runroot, safefile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from config.model import Config, VmConfig

MAX_FILES: Final = 1000
REMEDY: Final = "put it back; or 'pyvmctl forget -a' forgets all files, and VMs that do not run"
_FILES: Final = ".files"
_LOCK: Final = ".files.lock"


class Known(NamedTuple):
    """One file: what it says, or why that is unknown."""

    path: str
    config: Config | None
    error: PyvmError | None = None


def files() -> list[str]:
    """Return the known files, first to last. Raises HostError."""
    try:
        root_fd = runroot.open_root()
    except FileNotFoundError:
        return []
    try:
        return _read(root_fd)
    finally:
        os.close(root_fd)


def remember(path: str) -> None:
    """Make a file known, but not a pipe, which cannot be read again. Raises HostError."""
    if os.path.exists(path) and not os.path.isfile(path):
        return
    real = os.path.realpath(path)

    def add(paths: list[str]) -> list[str]:
        if real not in paths and len(paths) >= MAX_FILES:
            raise HostError(f"{MAX_FILES} files are known already", hint="pyvmctl reset vms")
        return paths if real in paths else [*paths, real]

    _change(add)


def forget(paths: Iterable[str]) -> None:
    """Make files unknown. Raises HostError."""
    gone = {os.path.realpath(path) for path in paths}
    _change(lambda paths: [path for path in paths if path not in gone])


def read() -> list[Known]:
    """Return what every known file says now. Raises HostError."""
    found = []
    for path in files():
        try:
            found.append(Known(path, _load(path)))
        except PyvmError as err:
            found.append(Known(path, None, err))
    return found


def find(name: str) -> tuple[VmConfig, Known]:
    """Return the VM of that name and its file. Raises NoSuchVmError, ConfigError, HostError.

    The file that became known last counts where several have the name.
    """
    unknown = None
    for known in reversed(read()):
        for vm in known.config.vms if known.config else ():
            if vm.name == name:
                return vm, known
        unknown = unknown or known.error
    if unknown:  # it may be in there
        raise unknown
    raise NoSuchVmError(
        f"no VM '{name}' in a file that was loaded", hint="start it by its file: start FILE"
    )


def _load(path: str) -> Config:
    """Read a file that nobody but its user, and root, can have changed. Raises PyvmError."""
    try:
        # Non-blocking: a FIFO in the file's place must be refused, not waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as err:
        what = f"{path}:1:1: cannot read it: {err.strerror}"
        raise ConfigError(what, hint=REMEDY) from err
    if not stat.S_ISREG(status.st_mode):
        raise HostError(f"{path} is no file any more", hint=REMEDY)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        hint = f"name it to start its VMs: start {path}"
        raise HostError(f"{path} could have been changed by another user", hint=hint)
    return load_bytes(data, path)


def _change(change: Callable[[list[str]], list[str]]) -> None:
    root_fd = runroot.open_root(create=True)
    try:
        lock = safefile.open_file(_LOCK, os.O_RDWR | os.O_CREAT, root_fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = _read(root_fd)
            if (after := change(before)) != before:
                safefile.write_json(_FILES, {"files": after}, root_fd)
        finally:
            os.close(lock)
    except OSError as err:
        raise HostError(f"cannot note in {runroot.root()}: {err.strerror}") from err
    finally:
        os.close(root_fd)


def _read(root_fd: int) -> list[str]:
    found = safefile.read_json(_FILES, root_fd).get("files")
    listed = found if isinstance(found, list) else []
    return [path for path in listed if isinstance(path, str) and os.path.isabs(path)]
