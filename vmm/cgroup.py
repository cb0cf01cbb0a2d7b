"""A VM's control group (cgroup version 2): its processes may not use more than `limits` says.

Where groups may be made is the host's to say. A unit or scope with Delegate=yes is ours; there
no process may be in a group whose children are limited, so pyvmctl itself goes to a leaf first:

    HERE                 the unit's or scope's own group; no process is left in it
    HERE/pyvmctl         pyvmctl
    HERE/pyvmd-NAME      the processes of VM NAME; systemd removes it with the unit

Elsewhere only root can, at the top:

    /sys/fs/cgroup/pyvmd/NAME    removed by the next pyvmctl that sees the VM ended

Everything is done before the VM process forks, so whatever it forks is in the group, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Final

from config.errors import HostError

if TYPE_CHECKING:
    from config.model import LimitsConfig

PERIOD: Final = 100_000  # microseconds over which CPU time is shared out; the kernel's default
LEAF: Final = "pyvmctl"
TOP: Final = "pyvmd"
MOUNTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")  # where root's groups are looked for

_REMEDY: Final = (
    "start it from a unit with Delegate=yes, or by "
    "systemd-run --scope -p Delegate=yes (--user) pyvmctl start ..."
)


def enter(name: str, limits: LimitsConfig, proc: str = "/proc/self") -> str:
    """Put this process into a group of its own with these limits; return its path.

    Raises HostError where that cannot be.
    """
    parent = settle(limits, proc)
    path = f"{parent}/{name}" if os.path.basename(parent) == TOP else f"{parent}/{TOP}-{name}"
    try:
        os.makedirs(path, exist_ok=True)
        if _read(f"{path}/cgroup.procs"):
            raise HostError(f"the cgroup {path} is in use", hint="by a VM of the same name?")
        for file, value in _settings(limits).items():
            _write(f"{path}/{file}", value)
        _write(f"{path}/cgroup.procs", "0")  # this process
    except OSError as err:
        with contextlib.suppress(OSError):
            os.rmdir(path)
        what = f"cannot limit the VM by the cgroup {path}: {err.strerror}"
        raise HostError(what, hint=_REMEDY) from err
    return path


def settle(limits: LimitsConfig, proc: str = "/proc/self") -> str:
    """Return the group to make VMs' groups in, with the controllers that `limits` need.

    May put this process into a leaf, out of the way. Raises HostError.
    """
    wanted = sorted({file.partition(".")[0] for file in _settings(limits)})
    top, here = _place(proc)
    if os.path.basename(here) == LEAF:
        here = os.path.dirname(here)
    lacking = set(wanted) - set(_read(f"{top}/cgroup.controllers").split())
    if lacking:
        what = f"this host's cgroups of version 2 have no {' and no '.join(sorted(lacking))}"
        hint = "boot with systemd.unified_cgroup_hierarchy=1, or leave 'limits' out"
        raise HostError(what, hint=hint)
    # What is missing where we are was not delegated to us.
    if here != top and set(wanted) <= set(_read(f"{here}/cgroup.controllers").split()):
        try:
            _move_over(here)
            _enable(here, wanted)
        except OSError as err:
            why = err
        else:
            return here
    else:
        why = OSError(errno.EACCES, os.strerror(errno.EACCES))
    if os.geteuid():
        what = f"cannot limit VMs in the cgroup {here}: {why.strerror}"
        raise HostError(what, hint=_REMEDY) from why
    try:
        _enable(top, wanted)
        os.makedirs(f"{top}/{TOP}", exist_ok=True)
        _enable(f"{top}/{TOP}", wanted)
    except OSError as err:
        raise HostError(f"cannot limit VMs in {top}: {err.strerror}", hint=_REMEDY) from err
    return f"{top}/{TOP}"


def remove(name: str) -> None:
    """Remove what is left of a VM that has ended, as far as this user may."""
    if os.geteuid() == 0:
        for mount in MOUNTS:
            with contextlib.suppress(OSError):  # there is none, or somebody is in it
                os.rmdir(f"{mount}/{TOP}/{name}")


def _settings(limits: LimitsConfig) -> dict[str, str]:
    """Return what to write, by file; the part before the dot is the controller."""
    found = {}
    if limits.cpu:
        found["cpu.max"] = f"{limits.cpu * PERIOD // 100} {PERIOD}"
    if limits.memory:
        found["memory.max"] = str(limits.memory)
        found["memory.oom.group"] = "1"  # half a VM is worse than none
    return found


def _place(proc: str) -> tuple[str, str]:
    """Return the directories of the root group and of this process's. Raises HostError."""
    mounts = [line.split() for line in _read(f"{proc}/mounts").splitlines()]
    roots = [row[1] for row in mounts if len(row) > 2 and row[2] == "cgroup2"]
    own = [row[3:] for row in _read(f"{proc}/cgroup").splitlines() if row.startswith("0::")]
    if not roots or not own:
        raise HostError("this host has no cgroups of version 2", hint="leave 'limits' out")
    return roots[0], os.path.normpath(f"{roots[0]}/{own[0]}")


def _move_over(here: str) -> None:
    """Leave a group that is to be limited. Raises OSError."""
    if str(os.getpid()) in _read(f"{here}/cgroup.procs").split():
        os.makedirs(f"{here}/{LEAF}", exist_ok=True)
        _write(f"{here}/{LEAF}/cgroup.procs", "0")


def _enable(path: str, controllers: list[str]) -> None:
    """Let a group's children be limited. Raises OSError, EBUSY if there are processes in it."""
    missing = set(controllers) - set(_read(f"{path}/cgroup.subtree_control").split())
    if missing:
        _write(f"{path}/cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)))


def _read(path: str) -> str:
    """Return a small file's text, "" if it cannot be read."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
