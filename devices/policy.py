"""Who may do what: one row per kind of process. Data only; `jail` applies it.

Columns of a row:

    calls    the system calls it may make, most frequent first; any other ends the process
    limits   resource limits (setrlimit(2)), beside those that every jailed process has
    files    accesses beneath its runtime directory; no path elsewhere can be opened at all

A device's row is what its main loop needs: it begins when the device is built, and everything is
open, mapped and imported. `docs/jail.md` shows these tables and is generated from them.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from devices.landlock import Access
from devices.seccomp import KILL, Arg, Rule, refuse

MIB: Final = 1 << 20

_ANY: Final = 0xFFFFFFFF
_PROT_EXEC: Final = 4


class Policy(NamedTuple):
    """A row."""

    calls: tuple[Rule, ...]
    limits: dict[str, int]
    files: Access = Access(0)
    otherwise: int = KILL  # what becomes of other system calls


def calls(names: str) -> tuple[Rule, ...]:
    """Return one rule per word, each allowing the call whatever its arguments."""
    return tuple(Rule(name) for name in names.split())


# Memory of its own, none of it ever executable.
_MEMORY: Final = (
    Rule("mmap", (Arg(2, _PROT_EXEC, (0,)),), "no PROT_EXEC"),
    *calls("munmap brk mremap madvise"),
)

# What every device process does.
BASE: Final = (
    # eventfds, channels, timers
    *calls("epoll_wait read write futex poll timerfd_settime epoll_ctl close getpid"),
    *_MEMORY,
    # the interpreter: time where the vDSO has none, signals, the end
    *calls("clock_gettime rt_sigreturn rt_sigprocmask restart_syscall exit_group"),
)

LIMITS: Final = {
    "CORE": 0,  # no guest memory in core dumps
    "NPROC": 0,  # no further process or thread
    "MEMLOCK": 0,
    "MSGQUEUE": 0,
    "DATA": 256 * MIB,  # private memory; guest RAM is shared memory and does not count
    # No further descriptor but number 0, which is /dev/null. Not 0, since poll(2) would refuse.
    "NOFILE": 1,
}

DEVICES: Final = {
    "viornd": Policy((*BASE, *calls("getrandom")), {"FSIZE": 0}),
}

# The spawner's own, and what a device does until it enters its jail: namespaces but no mounts,
# no path (its root is empty), no new program.
SPAWNER: Final = Policy(
    (
        # itself
        *calls("read write poll recvmsg sendmsg wait4 pidfd_open pidfd_send_signal pipe2"),
        *calls("clone unshare setsid getppid gettid set_robust_list rseq set_tid_address"),
        # what every process does on its way
        *BASE,
        *calls("mprotect rt_sigaction sigaltstack exit sched_yield sched_getaffinity"),
        *calls("getuid geteuid getgid getegid sysinfo uname"),
        # a device before its jail
        *calls("close_range dup dup2 dup3 fcntl ioctl lseek fstat newfstatat statx ftruncate"),
        *calls("getsockname getsockopt setsockopt epoll_create1 eventfd2 timerfd_create"),
        *calls("pread64 preadv pwrite64 pwritev fallocate fdatasync getrandom memfd_create"),
        *calls("openat getdents64 readlink getcwd"),  # the root: to see that nothing is in it
        *calls("io_uring_setup io_uring_register io_uring_enter"),
        # the jail itself
        *calls("prctl capget capset setrlimit prlimit64 seccomp chdir"),
        *calls("landlock_create_ruleset landlock_restrict_self"),
    ),
    {"CORE": 0},
    otherwise=refuse(errno.EPERM),
)
