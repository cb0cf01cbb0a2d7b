"""What a Linux host offers, found by trying: the half of `pyvmctl doctor` that knows no KVM."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from vmm.table import scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

State = Literal["ok", "warn", "fail"]

MIN_PYTHON: Final = (3, 11)
LOW_MEMORY: Final = 256 << 20  # bytes; less than this is hardly one small VM
PACKAGES: Final = ("config", "devices", "vmm")
CONTROLLERS: Final = ("cpu", "memory", "pids")  # that limits on a VM would need

_SYS_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_CAP_NET_ADMIN: Final = 12
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_DEADLINE_MS: Final = 5000


class Check(NamedTuple):
    """One finding. `value` is the fact as JSON, for programs."""

    state: State
    text: str
    remedy: str = ""
    value: Any = None


def python() -> Check:
    """The interpreter's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < MIN_PYTHON:
        return Check("fail", version, "install Python 3.11 or newer", version)
    return Check("ok", version, value=version)


def kernel() -> Check:
    """The host kernel's release."""
    release = os.uname().release
    return Check("ok", release, value=release)


def memory(path: str = "/proc/meminfo") -> Check:
    """Memory that VMs could have now, in bytes."""
    with open(path) as file:
        facts = dict(line.split(":", 1) for line in file)
    free = int(facts["MemAvailable"].split()[0]) << 10
    low = free < LOW_MEMORY
    return Check(
        "warn" if low else "ok", f"{scaled(free)} free", "stop something" if low else "", free
    )


def device(path: str, module: str, purpose: str) -> Check:
    """A device node that some VMs need."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Check("warn", f"{path}: no permission ({purpose})", join_group(path), False)
    except OSError as err:
        return Check("warn", f"{path}: {err.strerror} ({purpose})", f"modprobe {module}", False)
    return Check("ok", path, value=True)


def program(name: str, package: str, purpose: str) -> Check:
    """A program that some VMs need."""
    from vmm.net import programs  # a light module of a package that few verbs need

    path = programs.find(name)
    if not path:
        return Check(
            "warn", f"{name} is not installed ({purpose})", f"apt install {package}", False
        )
    return Check("ok", path, value=True)


def net_admin(path: str = "/proc/self/status") -> Check:
    """Whether this user may make taps and bridges."""
    with open(path) as file:
        [caps] = [int(line.split()[1], 16) for line in file if line.startswith("CapEff:")]
    if caps >> _CAP_NET_ADMIN & 1:
        return Check("ok", "taps and bridges can be made", value=True)
    remedy = "as root: ip tuntap add NAME mode tap user YOU; or 'type: user' in vm.yaml"
    return Check("warn", "no right to make taps and bridges", remedy, False)


def join_group(device: str) -> str:
    """Return the command that lets this user open `device`."""
    import grp  # only asked for in trouble
    import pwd

    status = os.stat(device)
    try:
        group, user = grp.getgrgid(status.st_gid).gr_name, pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"ask the administrator for access to {device}"
    if status.st_mode & 0o060 != 0o060:
        return f"chgrp kvm {device} && chmod 660 {device}, then usermod -aG kvm {user}"
    return f"usermod -aG {group} {user}, then log in again"


def landlock() -> Check:
    """The Landlock ABI, which confines device processes to no files at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(
        _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION
    )
    if abi < 1:
        why = os.strerror(ctypes.get_errno())
        return Check("warn", f"none: {why}", "boot with lsm=landlock,... (Linux 5.13 or newer)", 0)
    return Check("ok", f"ABI {abi}", value=abi)


def seccomp(path: str = "/proc/sys/kernel/seccomp/actions_avail") -> Check:
    """Whether filters that kill the process can be installed."""
    try:
        with open(path) as file:
            actions = file.read().split()
    except OSError as err:
        return Check("warn", f"none: {err.strerror}", "a kernel with CONFIG_SECCOMP_FILTER", [])
    state: State = "ok" if "kill_process" in actions else "warn"
    return Check(state, " ".join(actions), "" if state == "ok" else "a newer kernel", actions)


def user_namespaces() -> Check:
    """Whether a process of this user can have namespaces of its own; a child tries."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET
    status = _in_child(lambda: ctypes.get_errno() if libc.unshare(flags) else 0)
    if not status:
        return Check("ok", "user, mount, net", value=True)
    remedy = {
        errno.ENOSPC: "sysctl user.max_user_namespaces=10000",
        errno.EPERM: "sysctl kernel.unprivileged_userns_clone=1 "
        "(Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0)",
    }
    return Check("warn", f"none: {os.strerror(status)}", remedy.get(status, ""), False)


def _in_child(function: Callable[[], int]) -> int:
    """Return what `function` returns (0–255) in a forked child, ETIMEDOUT if it hangs."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(function())
        finally:
            os._exit(errno.EIO)
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(_DEADLINE_MS):
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return errno.ETIMEDOUT
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(fd)


def cgroup(mounts: str = "/proc/self/mounts", own: str = "/proc/self/cgroup") -> Check:
    """Whether this process may make cgroups (version 2) below its own, to limit a VM."""
    remedy = "start VMs from a unit or scope with Delegate=cpu memory pids io"
    try:
        with open(mounts) as file:
            roots = [f[1] for f in map(str.split, file) if len(f) > 2 and f[2] == "cgroup2"]
        with open(own) as file:
            paths = [line[3:].strip() for line in file if line.startswith("0::")]
    except OSError as err:
        return Check("warn", f"not known: {err.strerror}", value=None)
    if not roots or not paths:
        return Check(
            "warn", "no cgroup version 2 here", "boot with systemd.unified_cgroup_hierarchy", []
        )
    here = os.path.normpath(f"{roots[0]}/{paths[0]}")
    try:
        with open(f"{here}/cgroup.controllers") as file:
            controllers = file.read().split()
    except OSError as err:
        return Check("warn", f"{here}: {err.strerror}", remedy, [])
    if not os.access(here, os.W_OK):
        return Check("warn", f"{here} is not delegated to you", remedy, controllers)
    if missing := [name for name in CONTROLLERS if name not in controllers]:
        return Check("warn", f"{here} lacks {' '.join(missing)}", remedy, controllers)
    return Check("ok", f"{here}: {' '.join(controllers)}", value=controllers)


def bytecode(directories: Iterable[str] = ()) -> Check:
    """Whether starts find compiled modules; without them each takes twice as long."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    stale = []
    for directory in directories or [f"{top}/{name}" for name in PACKAGES]:
        cache = f"{directory}/__pycache__"
        if os.access(cache if os.path.isdir(cache) else directory, os.W_OK):
            continue  # the first start that needs one writes it
        for name in sorted(os.listdir(directory)):
            compiled = f"{cache}/{name[:-3]}.{sys.implementation.cache_tag}.pyc"
            if name.endswith(".py") and not os.path.exists(compiled):
                stale.append(name)
    if stale:
        remedy = f"as the owner of the installation: {sys.executable} -m compileall {top}"
        return Check("warn", f"{len(stale)} modules are compiled at every start", remedy, False)
    if sys.dont_write_bytecode:
        remedy = "unset PYTHONDONTWRITEBYTECODE"
        return Check("warn", "Python is told not to keep compiled modules", remedy, False)
    return Check("ok", "modules are kept compiled", value=True)
