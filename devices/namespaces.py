"""Namespaces: a view of the system with nothing in it (namespaces(7)).

A process id namespace begins with a child, and a process cannot leave it to begin another. So a
device process is the grandchild of its spawner: the process between them moves to new namespaces,
forks, and ends; the spawner adopts the orphan.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices import privileges, syscalls

if TYPE_CHECKING:
    from collections.abc import Sequence

# CLONE_NEW* (linux/sched.h), in the order in which one may need the one before.
SPACES: Final = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}

_MS_RDONLY: Final = 1
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MS_MOVE: Final = 0x2000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MNT_DETACH: Final = 2

_MOUNT_POINT: Final = "/proc"  # any directory that every host has


def unshare(spaces: Sequence[str]) -> dict[str, str]:
    """Move to new namespaces, all that the host allows; return why not for the others.

    The one for process ids takes in the next child, not this process.
    """
    try:
        syscalls.call("unshare", sum(SPACES[name] for name in spaces))
    except OSError:
        pass
    else:
        return {}
    failed = {}
    for name in spaces:
        try:
            syscalls.call("unshare", SPACES[name])
        except OSError as err:
            failed[name] = os.strerror(err.errno or 0)
    return failed


def map_self(uid: int, gid: int) -> None:
    """Give this process's ids their own names in its new user namespace, and map no others.

    Without it this process could not make further user namespaces. Raises OSError.
    """
    # /proc/self belongs to root while this process is not dumpable, as after a change of user.
    privileges.dumpable(True)
    try:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            fd = os.open(f"/proc/self/{file}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
    finally:
        privileges.dumpable(False)


def empty_root() -> None:
    """Make an empty read-only file system the root, in a mount namespace of our own.

    Where the root cannot be exchanged, since it is the initramfs, it is covered. Raises OSError.
    """
    mount(None, "/", "", _MS_REC | _MS_PRIVATE, "")
    flags = _MS_RDONLY | _MS_NOSUID_NODEV_NOEXEC
    mount("pyvmd", _MOUNT_POINT, "tmpfs", flags, "nr_inodes=1,mode=0555")
    os.chdir(_MOUNT_POINT)
    try:
        syscalls.call("pivot_root", b".", b".")
    except OSError:
        # Moved there, and not just chroot: who is in a chroot may not make user namespaces.
        mount(".", "/", "", _MS_MOVE, "")
        os.chroot(".")
    else:
        # The old root is mounted over the new one now, and "." is still in the old one.
        syscalls.call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def mount(source: str | None, target: str, kind: str, flags: int, options: str) -> None:
    """Attach a file system to a directory. Raises OSError."""
    syscalls.call(
        "mount",
        None if source is None else source.encode(),
        target.encode(),
        kind.encode(),
        flags,
        options.encode(),
    )


def vanished_root() -> None:
    """Make a directory that exists no more the root: nothing is in it, nothing can be made there.

    For who may chroot(2) and nothing else. Raises OSError.
    """
    name = f".pyvmd-{os.getpid()}"
    parent = os.open("/tmp", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: S108
    try:
        os.mkdir(name, 0o500, dir_fd=parent)
        directory = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            os.rmdir(name, dir_fd=parent)
            os.fchdir(directory)
            os.chroot(".")
        finally:
            os.close(directory)
    finally:
        os.close(parent)


def fork(spaces: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Fork into new namespaces; the caller, who adopts orphans, is the child's parent.

    Returns the child's process id as the caller sees it; in the child 0, and why which namespaces
    could not be had. The child goes on once the caller is its parent. Raises HostError, OSError.
    """
    ours, theirs = os.pipe()
    gate, opener = os.pipe()
    try:
        between = os.fork()
    except OSError:
        for fd in (ours, theirs, gate, opener):
            os.close(fd)
        raise
    if not between:
        failed = unshare(spaces)
        try:
            child = os.fork()
        except OSError:
            os._exit(1)
        if child:
            os.write(theirs, child.to_bytes(4, "little"))
            os._exit(0)
        for fd in (ours, theirs, opener):
            os.close(fd)
        os.read(gate, 1)  # ends when the spawner has closed its end, and the process between too
        os.close(gate)
        return 0, failed
    os.close(theirs)
    os.close(gate)
    answer = os.read(ours, 4)
    os.close(ours)
    os.waitpid(between, 0)
    os.close(opener)
    if len(answer) < 4:
        raise HostError("cannot fork a device process")
    return int.from_bytes(answer, "little"), {}
