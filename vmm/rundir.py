"""The runtime directory of a VM: its lock, its sockets, and the files that outlive it.

`root()/NAME/` holds

    lock          flock()ed for as long as the VM lives; the one truth about that
    pid           of the VM process
    control.sock  console.sock
    vm.json       the configuration in effect
    log           console.log, each with one older .1
    exit.json     how the last run ended
    net           if something of its network is to be cleared away after it

A VM that dies without a word leaves pid and sockets behind. Whoever looks next (`survey`), or
starts it again, finds the lock free, removes them and writes down that it crashed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError
from devices.lines import stamp
from vmm import log, runroot, safefile, sockets
from vmm.owner import Owner

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

CONTROL: Final = "control.sock"
CONSOLE: Final = "console.sock"
NETWORK: Final = "net"  # there as long as bridges or rules are to be cleared away after it
CRASHED: Final = "crashed"  # "reason" in an exit.json that the VM did not write itself

LOCK_TRIES: Final = 10  # a survey holds a dead VM's lock for microseconds: try again
LOCK_PAUSE: Final = 0.01  # seconds between tries
CLEARING_TRIES: Final = 1000  # while the network of one that was killed is cleared away

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
        self._mode = 0o600  # of files
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

    @property
    def lock_fd(self) -> int:
        """The lock, once taken; a process that has inherited it holds the VM."""
        return self._lock

    @property
    def dir_fd(self) -> int:
        """The directory, once taken."""
        return self._dir

    def take(self) -> None:
        """Make the VM ours until every process that has inherited the lock has ended or let go.

        Cleans up after a run that crashed. Raises HostError, naming the process that has the VM.
        """
        try:
            self._lock_it()
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
            safefile.write_json("vm.json", dict(config), self._dir, self._mode)
            self._write_pid()
        except OSError as err:
            raise HostError(f"cannot write to {self.path}: {err.strerror}") from err
        safefile.remove("exit.json", self._dir)

    def give(self, uid: int, gid: int | None = None) -> None:
        """Let user `uid` and members of group `gid` use the VM. Only root can. Raises OSError.

        Members may connect to the sockets and read the files.
        """
        group = -1 if gid is None else gid
        if gid is not None:
            self._mode = 0o640
        for name in (*_RUNNING_FILES, *_LASTING_FILES, "lock"):
            with contextlib.suppress(FileNotFoundError):
                os.chown(name, uid, group, dir_fd=self._dir, follow_symlinks=False)
                if gid is not None:
                    mode = 0o660 if name in (CONTROL, CONSOLE) else self._mode
                    os.chmod(name, mode, dir_fd=self._dir)
        os.fchmod(self._dir, 0o700 if gid is None else 0o750)
        os.fchown(self._dir, uid, group)  # last: from now on the owner can move files in it
        self.permitted = sockets.owner_only(uid, gid)

    def write_exit(self, facts: Mapping[str, Any]) -> None:
        """Write down how this run ended: "reason", "status" and what else helps. Never raises."""
        note = {**facts, "pid": os.getpid(), "time": stamp()}
        try:
            safefile.write_json("exit.json", note, self._dir, self._mode)
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

    def erase(self) -> None:
        """Remove all that is left of a VM that does not run. Raises HostError."""
        try:
            self._lock_it()
        except OSError as err:
            raise HostError(f"cannot remove {self.path}: {err.strerror}") from err
        try:
            runroot.forget_id(self.name)
        except HostError:
            self.leave()
            raise
        self._fresh = True
        self.discard()

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
        safefile.write_file("pid", b"%d\n" % os.getpid(), self._dir, self._mode)

    def _lock_it(self) -> None:
        """Lock the VM. Raises OSError, HostError."""
        for tried in range(CLEARING_TRIES):
            if self._try_lock():
                return
            if tried >= LOCK_TRIES and not self._clearing():
                break
            time.sleep(LOCK_PAUSE)
        raise self._held()

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

    def _clearing(self) -> bool:
        """Whether who has the VM only clears away after it, or has just done so.

        The note of a network is removed a moment before the lock is free; its absence means nothing
        as long as the process that is named has ended.
        """
        pid, names = self._look()
        return _ended(pid) if pid else NETWORK in names

    def _held(self) -> HostError:
        """Say who has the VM."""
        pid, _ = self._look()
        if pid:
            what = f"VM {self.name} is already running (pid {pid})"
            return HostError(what, hint=f"'pyvmctl stop {self.name}' stops it")
        what = f"VM {self.name} is being started or ended by another process"
        return HostError(what, hint="try again in a moment")

    def _look(self) -> tuple[int, list[str]]:
        """Return the number in the pid file and what files there are, without the lock."""
        root_fd = runroot.open_root()
        try:
            dir_fd = safefile.open_dir(self.name, root_fd)
            try:
                return read_pid(dir_fd), os.listdir(dir_fd)
            finally:
                os.close(dir_fd)
        finally:
            os.close(root_fd)


def _ended(pid: int) -> bool:
    """Whether a process has ended, also if nobody has asked how yet."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # there is none
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(0))
    os.close(pidfd)
    return ended


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
        note = {"reason": CRASHED, "detail": detail, "status": 1, "pid": pid, "time": stamp()}
        safefile.write_json("exit.json", note, dir_fd)
    for name in _RUNNING_FILES:
        safefile.remove(name, dir_fd)
    if NETWORK in os.listdir(dir_fd):
        from vmm.net import keeper  # only after a kill of all who would have done it

        with contextlib.suppress(HostError):  # it takes root: then the next one tries
            keeper.sweep()
            safefile.remove(NETWORK, dir_fd)
