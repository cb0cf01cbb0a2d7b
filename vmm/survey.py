"""Which VMs there are: what their runtime directories tell, tidied where a VM has died."""

from __future__ import annotations

import fcntl
import os
import select
import time
from typing import Any, Final, NamedTuple

from config.errors import NoSuchVmError
from vmm import rundir, runroot, safefile

POLL: Final = 0.02  # seconds between looks where no process can be waited for
KNOWN_SHOWN: Final = 8  # names in the text of an error


class VmInfo(NamedTuple):
    """What the files of one VM tell."""

    name: str
    id: int  # small and stable; 0 if it has none
    state: str  # "running", "stopping", "stopped" or "crashed"
    pid: int  # of the VM process, while running
    exit: dict[str, Any]  # exit.json: how the last run ended; {} while running
    path: str  # of its directory

    @property
    def alive(self) -> bool:
        """Whether a process has the VM."""
        return self.state in ("running", "stopping")


def survey() -> list[VmInfo]:
    """Return all VMs of root(), by name; cleans up after dead ones. Raises HostError."""
    try:
        root_fd = runroot.open_root()
    except FileNotFoundError:
        return []
    try:
        ids = runroot.read_ids(root_fd)
        names = sorted(filter(runroot.is_name, os.listdir(root_fd)))
        found = [_look(root_fd, name, ids.get(name, 0)) for name in names]
    finally:
        os.close(root_fd)
    return [info for info in found if info is not None]


def lookup(word: str) -> VmInfo:
    """Return the VM of that name, else of that number. Raises NoSuchVmError, HostError."""
    vms = survey()
    for info in vms:
        if info.name == word:
            return info
    for info in vms:
        if word.isdecimal() and info.id == int(word[:20]):
            return info
    names = ", ".join(info.name for info in vms[:KNOWN_SHOWN])
    if len(vms) > KNOWN_SHOWN:
        names += ", ..."
    where = runroot.root()
    hint = f"in {where} there are: {names}" if vms else f"there are none in {where}"
    raise NoSuchVmError(f"no VM '{word}'", hint=hint)


def wait_end(name: str, seconds: float | None = None) -> VmInfo | None:
    """Wait until no process has the VM and return what is left; None when time has run out.

    Raises NoSuchVmError, HostError.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while (info := lookup(name)).alive:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        _wait_process(info, left)
    return info


def _wait_process(info: VmInfo, seconds: float | None) -> None:
    """Wait for the VM process, if it can be told for sure which that is, else a moment."""
    try:
        pidfd = os.pidfd_open(info.pid) if info.pid else -1
    except OSError:
        pidfd = -1
    if pidfd < 0:
        time.sleep(POLL if seconds is None else min(POLL, seconds))
        return
    try:
        # The number may have been used anew, but not while it is that of a running VM.
        if lookup(info.name) == info:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(None if seconds is None else max(seconds, 0) * 1000)
    finally:
        os.close(pidfd)


def _look(root_fd: int, name: str, number: int) -> VmInfo | None:
    """Look at one directory; None if there is no VM in it, or not one of ours to look at."""
    try:
        dir_fd = safefile.open_dir(name, root_fd)
    except OSError:
        return None
    try:
        lock = safefile.open_file("lock", os.O_RDONLY, dir_fd)
    except OSError:
        os.close(dir_fd)
        return None
    path = f"{runroot.root()}/{name}"
    try:
        dead, pid = _dead(lock, dir_fd), rundir.read_pid(dir_fd)
        if not dead:
            return VmInfo(name, number, "running" if pid else "stopping", pid, {}, path)
        ended = safefile.read_json("exit.json", dir_fd)
        if not (pid or ended or safefile.read_json("vm.json", dir_fd)):
            return None  # being started, or given up
        # A pid is left only where this user could not clean up.
        state = "crashed" if pid or ended.get("reason") == rundir.CRASHED else "stopped"
        return VmInfo(name, number, state, 0, ended, path)
    finally:
        os.close(lock)
        os.close(dir_fd)


def _dead(lock: int, dir_fd: int) -> bool:
    """Tell whether no process has the VM; clean up if so, as far as this user may."""
    try:
        # Shared first, so that two surveys do not take each other for the VM.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if rundir.read_pid(dir_fd):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat("lock", dir_fd=dir_fd), os.fstat(lock)):
                rundir.clean(dir_fd)
        except OSError:
            pass  # another process is at it, the disk is full, or it is not ours to clean
    return True
