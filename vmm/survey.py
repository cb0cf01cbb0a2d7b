"""Which VMs there are: what their runtime directories tell, tidied where a VM has died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import NoSuchVmError
from vmm import cgroup, rundir, runroot, safefile

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL: Final = 0.02  # seconds between looks where no process can be waited for
KNOWN_SHOWN: Final = 8  # names in the text of an error
RESTARTED: Final = "has been started again meanwhile, so how it ended is not known"

# All words for the state of a VM.
STATES: Final = ("starting", "running", "paused", "stopping", "stopped", "crashed", "unknown")
# What a VM process says of itself, in QEMU's words → what vmctl calls it.
_SAID: Final = {
    "prelaunch": "starting",
    "running": "running",
    "paused": "paused",
    "shutdown": "stopping",
}


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

    def state_word(self, live: Mapping[str, Any]) -> str:
        """Return the state for people, one of STATES; `live` is what the VM process says.

        It may be a lie, or {} from one that does not answer.
        """
        if self.state != "running":
            return self.state
        ladder = live.get("ladder")
        if isinstance(ladder, dict) and ladder.get("goal") == "stop":
            return "stopping"
        return _SAID.get(str(live.get("status")), "unknown")


def survey(*, shared: bool = False) -> list[VmInfo]:
    """Return all VMs of root(), by name; cleans up after dead ones. Raises HostError.

    With `shared` also those of root's that this user may use, unless one of his has the name.
    """
    found: dict[str, VmInfo] = {}
    if shared:
        with contextlib.suppress(FileNotFoundError):
            found |= _survey(runroot.open_shared(), runroot.SYSTEM)
    with contextlib.suppress(FileNotFoundError):
        found |= _survey(runroot.open_root(), runroot.root())
    return [found[name] for name in sorted(found)]


def _survey(root_fd: int, root: str) -> dict[str, VmInfo]:
    """Look at all directories in one, and close it."""
    try:
        ids = runroot.read_ids(root_fd)
        found = {}
        for name in filter(runroot.is_name, os.listdir(root_fd)):
            if (info := _look(root_fd, root, name, ids.get(name, 0))) is not None:
                found[name] = info
        return found
    finally:
        os.close(root_fd)


def lookup(word: str) -> VmInfo:
    """Return the VM of that name, else of that number. Raises NoSuchVmError, HostError.

    One of this user's own is meant before one of root's that he may use.
    """
    vms = survey(shared=True)
    own = f"{runroot.root()}/"
    meant = sorted(vms, key=lambda info: not info.path.startswith(own))
    for info in meant:
        if info.name == word:
            return info
    for info in meant:
        if word.isdecimal() and info.id == int(word[:20]):
            return info
    names = ", ".join(info.name for info in vms[:KNOWN_SHOWN])
    if len(vms) > KNOWN_SHOWN:
        names += ", ..."
    where = runroot.root()
    hint = f"in {where} there are: {names}" if vms else f"there are none in {where}"
    raise NoSuchVmError(f"no VM '{word}'", hint=hint)


def wait_end(name: str, seconds: float | None = None, pid: int = 0) -> VmInfo | None:
    """Wait until no process has the VM and return what is left; None when time has run out.

    A VM that is started again before anybody has looked has ended, too: the run that is waited
    for is that of process `pid`, by default of the first one seen. How it ended is not known then;
    "detail" says so. Raises NoSuchVmError, HostError.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while (info := lookup(name)).alive:
        pid = pid or info.pid
        if info.pid and info.pid != pid:
            return info._replace(state="stopped", pid=0, exit={"detail": RESTARTED})
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


def _look(root_fd: int, root: str, name: str, number: int) -> VmInfo | None:
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
    path = f"{root}/{name}"
    try:
        dead, pid = _dead(lock, dir_fd), rundir.read_pid(dir_fd)
        if not dead:
            # While its network is cleared away, the VM is held though its process has ended.
            runs = pid and os.path.exists(f"/proc/{pid}")
            return VmInfo(name, number, "running" if runs else "stopping", pid, {}, path)
        cgroup.remove(name)  # nobody starts the VM while we hold its lock
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
    if rundir.read_pid(dir_fd) or rundir.NETWORK in os.listdir(dir_fd):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat("lock", dir_fd=dir_fd), os.fstat(lock)):
                rundir.clean(dir_fd)
        except OSError:
            pass  # another process is at it, the disk is full, or it is not ours to clean
    return True
