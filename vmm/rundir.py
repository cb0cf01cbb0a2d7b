"""The runtime directory of a VM: its lock, its sockets, and the files that outlive it.

`root()/NAME/` holds

    lock          flock()ed for as long as the VM lives; the one truth about that
    pid           of the VM process
    control.sock  console.sock
    vm.json       the configuration in effect
    log           console.log, each with one older .1
    exit.json     how the last run ended

A VM that dies without a word leaves pid and sockets behind. Whoever looks next (`survey`), or
starts it again, finds the lock free, removes them and writes down that it crashed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError
from vmm import log, runroot, safefile, sockets
from vmm.owner import Owner

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

CONTROL: Final = "control.sock"
CONSOLE: Final = "console.sock"
CRASHED: Final = "crashed"  # "reason" in an exit.json that the VM did not write itself

LOCK_TRIES: Final = 10  # a survey holds a dead VM's lock for microseconds: try again
LOCK_PAUSE: Final = 0.01  # seconds between tries

_RUNNING_FILES: Final = ("pid", CONTROL, CONSOLE)
_LASTING_FILES: Final = ("vm.json", "log", "log.1", "console.log", "console.log.1", "exit.json")

root = runroot.root


class RunDir:
    """The runtime directory of the VM that this process starts or is."""

    def __init__(self, name: str, owner: Owner | None = None) -> None:
        """`owner` may use the VM as well, once it is given to him; by default this user."""
        if not runroot.is_name(name):
            raise HostError(f"'{name}' cannot name a VM", hint="letters, digits, . _ - only")
        self.name, self.path = name, f"{root()}/{name}"
        self.owner = owner or Owner(os.geteuid(), None)
        self.permitted = sockets.owner_only(*self.owner)  # who may use the sockets
        self.id = 0  # known once taken
        self._dir = self._lock = -1
        self._fresh = False  # nothing of an earlier run is here

    @property
    def vm_log(self) -> str:
        """The path of the VM's log."""
        return f"{self.path}/log"

    @property
    def console_log(self) -> str:
        """The path of what the guest printed."""
        return f"{self.path}/console.log"

    def take(self) -> None:
        """Make the VM ours until every process that has inherited the lock has ended or let go.

        Cleans up after a run that crashed. Raises HostError, naming the process that has the VM.
        """
        try:
            for _ in range(LOCK_TRIES):
                if self._try_lock():
                    break
                time.sleep(LOCK_PAUSE)
            else:
                raise HostError(self._held())
            try:
                self._fresh = set(os.listdir(self._dir)) <= {"lock"}
                clean(self._dir)
                self._write_pid()
                self.id = runroot.vm_id(self.name)
            except (OSError, HostError):
                self.discard()
                raise
        except OSError as err:
            raise HostError(f"cannot use {self.path}: {err.strerror}") from err

    def listen_control(self) -> socket.socket:
        """Return the listening control socket. Raises HostError."""
        return self._listen(CONTROL)

    def listen_console(self) -> socket.socket:
        """Return the listening console socket. Raises HostError."""
        return self._listen(CONSOLE)

    def running(self, config: Mapping[str, Any]) -> None:
        """Make this process the VM's, now that the guest runs, and forget how the last run ended.

        `config` becomes vm.json. Raises HostError.
        """
        try:
            safefile.write_json("vm.json", dict(config), self._dir)
            self._write_pid()
        except OSError as err:
            raise HostError(f"cannot write to {self.path}: {err.strerror}") from err
        safefile.remove("exit.json", self._dir)

    def give(self, uid: int, gid: int | None = None) -> None:
        """Let user `uid` and members of group `gid` use the VM. Only root can. Raises OSError."""
        group = -1 if gid is None else gid
        for name in (*_RUNNING_FILES, *_LASTING_FILES, "lock"):
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, uid, group, dir_fd=self._dir, follow_symlinks=False)
                if gid is not None and name in (CONTROL, CONSOLE):
                    os.chmod(name, 0o660, dir_fd=self._dir)
        os.fchmod(self._dir, 0o700 if gid is None else 0o750)
        os.fchown(self._dir, uid, group)  # last: from now on the owner can move files in it
        self.permitted = sockets.owner_only(uid, gid)

    def write_exit(self, facts: Mapping[str, Any]) -> None:
        """Write down how this run ended: "reason", "status" and what else helps. Never raises."""
        note = {**facts, "pid": os.getpid(), "time": log.stamp()}
        try:
            safefile.write_json("exit.json", note, self._dir)
        except OSError as err:
            log.error(f"cannot write exit.json: {err.strerror}")

    def close(self) -> None:
        """The VM has ended: take away what a running VM has, and let go of the lock."""
        for name in _RUNNING_FILES:
            safefile.remove(name, self._dir)
        self.leave()

    def discard(self) -> None:
        """The VM did not come to run: leave only what was there before, and let go."""
        for name in (*_RUNNING_FILES, *_LASTING_FILES) if self._fresh else _RUNNING_FILES:
            safefile.remove(name, self._dir)
        if self._fresh:
            safefile.remove("lock", self._dir)
            with contextlib.suppress(OSError):  # somebody keeps a file there
                os.rmdir(self.path)
        self.leave()

    def leave(self) -> None:
        """Let go in this process only; the VM process it has forked keeps lock and files."""
        for fd in (self._lock, self._dir):
            if fd >= 0:
                os.close(fd)
        self._dir = self._lock = -1

    def _listen(self, name: str) -> socket.socket:
        try:
            return sockets.listen(name, self._dir)
        except OSError as err:
            raise HostError(f"cannot listen on {self.path}/{name}: {err.strerror}") from err

    def _write_pid(self) -> None:
        safefile.write_file("pid", b"%d\n" % os.getpid(), self._dir)

    def _try_lock(self) -> bool:
        """Open the directory, made if need be, and lock it. Raises OSError, HostError."""
        root_fd = runroot.open_root(create=True)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.name, 0o700, dir_fd=root_fd)
            self._dir = safefile.open_dir(self.name, root_fd)
            self._lock = safefile.open_file("lock", os.O_RDWR | os.O_CREAT, self._dir)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before us may have removed file and directory since we opened them.
            there = os.stat(f"{self.name}/lock", dir_fd=root_fd, follow_symlinks=False)
            if os.path.samestat(there, os.fstat(self._lock)):
                if os.geteuid() == 0:
                    # An owner's from an earlier run: until give(), nobody else moves files here.
                    os.fchown(self._dir, 0, 0)
                    os.fchmod(self._dir, 0o700)
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            os.close(root_fd)
        self.leave()
        return False

    def _held(self) -> str:
        """Say who has the VM."""
        root_fd = runroot.open_root()
        try:
            dir_fd = safefile.open_dir(self.name, root_fd)
            pid = read_pid(dir_fd)
            os.close(dir_fd)
        finally:
            os.close(root_fd)
        if pid:
            return f"VM {self.name} is already running (pid {pid})"
        return f"VM {self.name} is being started or ended by another process"


def read_pid(dir_fd: int) -> int:
    """Return the number in a VM's pid file, 0 if there is none."""
    try:
        text = safefile.read_file("pid", dir_fd, limit=32)
        return max(int(text), 0)
    except (OSError, ValueError):
        return 0


def clean(dir_fd: int) -> None:
    """Clear away what a dead VM has left. The caller holds its lock. Raises OSError."""
    pid = read_pid(dir_fd)
    if pid and safefile.read_json("exit.json", dir_fd).get("pid") != pid:
        detail = f"VM process {pid} ended without a word: killed, or a fault of its own"
        note = {"reason": CRASHED, "detail": detail, "status": 1, "pid": pid, "time": log.stamp()}
        safefile.write_json("exit.json", note, dir_fd)
    for name in _RUNNING_FILES:
        safefile.remove(name, dir_fd)
