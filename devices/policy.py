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
_NO_EXEC: Final = (Arg(2, _PROT_EXEC, (0,)),)
_MEMORY: Final = (
    Rule("mmap", _NO_EXEC, "no PROT_EXEC"),
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
    # Private memory beyond its spawner's; guest RAM is shared memory and does not count.
    "DATA": 256 * MIB,
    # No further descriptor but number 0, which is /dev/null. Not 0, since poll(2) would refuse.
    # Where descriptors may come later (spec.DeviceSpec.descriptors), jail.enter() makes room.
    "NOFILE": 1,
}

# What kinds whose spec has room for descriptors do beside that.
TAKES: Final = calls("recvmsg")

_AT_EMPTY_PATH: Final = 0x1000
_KEEP_SIZE: Final = 1  # FALLOC_FL_*
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272
_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETQUEUE: Final = 0x400454D9
_TUNSETCARRIER: Final = 0x400454E2
_SIOCOUTQ: Final = 0x5411
_FIONBIO: Final = 0x5421
_AF_UNIX: Final = 1

DEVICES: Final = {
    "vmmci": Policy(BASE, {"FSIZE": 0}),
    "viornd": Policy((*BASE, *calls("getrandom")), {"FSIZE": 0}),
    "vionet": Policy(
        (
            *calls("readv writev recvfrom"),
            *BASE,
            *TAKES,
            Rule(
                "ioctl",
                (
                    Arg(
                        1,
                        _ANY,
                        (
                            *(_TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETQUEUE, _TUNSETCARRIER),
                            _SIOCOUTQ,
                        ),
                    ),
                ),
                "TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE, TUNSETCARRIER, SIOCOUTQ",
            ),
        ),
        {},
    ),
    "vioscsi": Policy(
        (
            *calls("preadv2 preadv"),
            *BASE,
            *TAKES,
            # to see what was put into the drive
            *calls("fstat"),
            Rule("newfstatat", (Arg(3, _ANY, (_AT_EMPTY_PATH,)),), "of a descriptor"),
            Rule("ioctl", (Arg(1, _ANY, (_BLKGETSIZE64,)),), "BLKGETSIZE64"),
        ),
        {"FSIZE": 0},
    ),
    "viovhost": Policy(
        (
            *BASE,
            *TAKES,
            *calls("sendmsg getsockname getsockopt pread64"),
            Rule("socketpair", (Arg(0, _ANY, (_AF_UNIX,)),), "AF_UNIX"),
            Rule("ioctl", (Arg(1, _ANY, (_FIONBIO,)),), "FIONBIO"),
        ),
        {"FSIZE": 0},
    ),
    "vioblk": Policy(
        (
            *calls("preadv2 pwritev2 preadv pwritev io_uring_enter"),
            *BASE,
            *calls("fdatasync ftruncate fstat"),
            Rule("newfstatat", (Arg(3, _ANY, (_AT_EMPTY_PATH,)),), "of a descriptor"),
            Rule(
                "fallocate",
                (Arg(1, _ANY, (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE)),),
                "PUNCH_HOLE, ZERO_RANGE; KEEP_SIZE",
            ),
            # And no fcntl: the VM process shares the eventfds, and must never be made to wait.
            Rule(
                "ioctl", (Arg(1, _ANY, (_BLKDISCARD, _BLKGETSIZE64)),), "BLKDISCARD, BLKGETSIZE64"
            ),
        ),
        {},
    ),
}


_F_DUPFD_CLOEXEC: Final = 1030
_F_ADD_SEALS: Final = 1033

# What a device behind a vhost-user socket does beside its row above: the front end's messages,
# with descriptors of memory, eventfds, a socket; answers; in-flight areas of its own.
VHOST: Final = Policy(
    (
        *calls("recvmsg sendmsg getsockname"),
        # to map a region: how large its file is, and the copy of the descriptor that a map keeps
        *calls("fstat"),
        Rule("newfstatat", (Arg(3, _ANY, (_AT_EMPTY_PATH,)),), "of a descriptor"),
        Rule(
            "fcntl",
            (Arg(1, _ANY, (_F_DUPFD_CLOEXEC, _F_ADD_SEALS)),),
            "F_DUPFD_CLOEXEC, F_ADD_SEALS",
        ),
        *calls("memfd_create ftruncate"),
    ),
    # Where a row has FSIZE 0, it may still make a file in memory.
    {"FSIZE": 64 * MIB},
)
#: How many descriptors may come: regions twice over, kicks, calls, errors, log, back channel.
VHOST_DESCRIPTORS: Final = 1024


def behind_vhost(row: Policy) -> Policy:
    """Return the row of a device behind a vhost-user socket."""
    own = [rule for rule in VHOST.calls if rule not in row.calls]
    limits = {**row.limits, **(VHOST.limits if "FSIZE" in row.limits else {})}
    return Policy((*row.calls, *own), limits, row.files, row.otherwise)


def _beyond_base() -> list[str]:
    """Name the calls that only some devices make, each once."""
    rows = (*DEVICES.values(), VHOST)
    rules = [rule for row in rows for rule in row.calls if rule not in BASE]
    return list(dict.fromkeys(rule.name for rule in rules))


# The spawner's own, and what a device does until it enters its jail: namespaces but no mounts,
# no path (its root is empty), no new program.
SPAWNER: Final = Policy(
    (
        # itself
        *calls("read write poll recvmsg sendmsg wait4 pidfd_open pidfd_send_signal pipe2"),
        *calls("clone unshare getppid gettid set_robust_list rseq exit rt_sigaction"),
        Rule("mprotect", _NO_EXEC, "no PROT_EXEC"),
        # all that any device does later, since this filter stays in force beside the device's
        *BASE,
        *(Rule(name) for name in _beyond_base()),
        # a device before its jail
        *calls("close_range dup2 fcntl ioctl lseek fstat newfstatat fstatfs"),
        *calls("getsockname getsockopt setsockopt epoll_create1 eventfd2 timerfd_create"),
        *calls("pread64 pwrite64 io_uring_setup io_uring_register"),
        # the jail itself
        *calls("prctl capget capset prlimit64 seccomp"),
        *calls("landlock_create_ruleset landlock_restrict_self"),
        *calls("openat getdents64"),  # to see that nothing is in the root
    ),
    {"CORE": 0},
    otherwise=refuse(errno.EPERM),
)

_KVM: Final = 0xAE00  # the "type" byte of every KVM ioctl (linux/kvm.h)
_FIOCLEX: Final = 0x5451
_CLONE_THREAD: Final = 0x00010000
_CLONE_NEW_ANY: Final = 0x7E020000
_PR_SET_NAME: Final = 15

# The process that connects to sockets of other programs, by path.
CONNECTOR: Final = Policy(
    (
        *calls("recvfrom sendto sendmsg connect close read write futex getsockname"),
        Rule("socket", (Arg(0, _ANY, (_AF_UNIX,)),), "AF_UNIX"),
        *_MEMORY,
        *calls("clock_gettime rt_sigreturn rt_sigprocmask restart_syscall exit_group"),
    ),
    {"CORE": 0, "NPROC": 0, "FSIZE": 0},
)


# The VM process, from when the devices are ready: before a kernel is loaded and a vCPU made.
VM_PROCESS: Final = Policy(
    (
        # vCPUs and the event loop
        Rule("ioctl", (Arg(1, 0xFF00, (_KVM,)),), "KVM"),
        *calls("epoll_wait read write futex poll pselect6 clock_gettime clock_nanosleep"),
        *calls("timerfd_settime timerfd_create eventfd2 epoll_ctl close"),
        # channels to devices, clients of control and console
        *calls("recvfrom sendto recvmsg sendmsg accept4 getsockopt setsockopt getsockname"),
        Rule("ioctl", (Arg(1, _ANY, (_FIONBIO, _FIOCLEX)),), "FIONBIO, FIOCLEX"),
        Rule("socketpair", (Arg(0, _ANY, (_AF_UNIX,)),), "AF_UNIX"),
        *calls("fcntl getpid gettid geteuid"),
        # vCPU threads, again at every reset, and how they are stopped
        Rule("clone", (Arg(0, _CLONE_THREAD | _CLONE_NEW_ANY, (_CLONE_THREAD,)),), "threads"),
        Rule("clone3", action=refuse(errno.ENOSYS), only="ENOSYS: use clone"),
        Rule("tgkill", (Arg(0, _ANY, ("self",)),), "its own threads"),
        Rule("prctl", (Arg(0, _ANY, (_PR_SET_NAME,)),), "PR_SET_NAME"),
        *calls("set_robust_list rseq sched_getaffinity exit"),
        Rule("mprotect", _NO_EXEC, "no PROT_EXEC"),
        *_MEMORY,
        *calls("rt_sigreturn rt_sigprocmask rt_sigaction restart_syscall"),
        # kernel images, again at every reset
        *calls("pread64 preadv preadv2 memfd_create fstat newfstatat"),
        # log, console.log, vm.json, exit.json: where, is for Landlock to say
        *calls("openat rename renameat unlink unlinkat rmdir ftruncate chdir dup2"),
        # device processes that must end; the end
        *calls("pidfd_send_signal wait4 getrandom exit_group"),
    ),
    {"CORE": 0},
    Access.READ_FILE
    | Access.READ_DIR
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.MAKE_REG
    | Access.REMOVE_FILE,
)
