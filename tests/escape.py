"""Things that a device process must not be able to do: what a guest would try that owns one.

Each attempt runs inside a real device process, jailed by the real spawner, when it is told to by a
message (see `tests.jaillab`). It counts as blocked if the kernel ends the process (SIGSYS) or
refuses (OSError, MemoryError), and as an escape if it returns.

seccomp alone would stop nearly all of them, and so would hide whether anything stands behind it.
So attempts are made twice: in the jail as it is, and in one whose filters were left out. Those
that are `deep` must be blocked there, too: by namespaces, the empty root, Landlock, missing
capabilities, limits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from devices import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.jaillab import Outside

KILL, TERM = 9, 15
AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
O_RDWR_CREAT: Final = os.O_RDWR | os.O_CREAT

_struct = ctypes.create_string_buffer(4096)  # for system calls that take or fill some struct
_iovec = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(_struct), 8))


class Attempt(NamedTuple):
    """One thing to try. `outside` says what there is to attack."""

    run: Callable[[Outside], object]
    deep: bool


def call(name: str, *args: Any) -> Callable[[Outside], object]:
    """Return an attempt that is one system call."""
    return lambda _: syscalls.call(name, *args)


def towards(name: str, *args: Any, pid: int = 0) -> Callable[[Outside], object]:
    """Return one with the VM process's id put in at position `pid`."""
    return lambda outside: syscalls.call(name, *args[:pid], outside.vm_pid, *args[pid:])


def _with_descriptor(attack: Callable[[Outside], object]) -> Callable[[Outside], object]:
    """Return an attempt that first makes room for a descriptor, below the limit of one."""

    def run(outside: Outside) -> object:
        os.close(0)
        return attack(outside)

    return run


def _connect(family: int, address: Callable[[Outside], Any]) -> Callable[[Outside], object]:
    def run(outside: Outside) -> None:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            sock.connect(address(outside))

    return _with_descriptor(run)


def _socket(family: int, kind: int = socket.SOCK_DGRAM) -> Callable[[Outside], object]:
    return call("socket", family, kind, 0)


def _executable(prot: int, flags: int) -> Callable[[Outside], object]:
    return call("mmap", None, 4096, prot, flags, -1, 0)


def _executable_ram(outside: Outside) -> object:
    """Map guest memory, which is a memfd, executable."""
    for fd in range(64):
        try:
            return syscalls.call("mmap", None, 4096, 5, mmap.MAP_SHARED, fd, 0)
        except OSError:
            continue
    raise OSError("no descriptor can be mapped")


def _make_executable(_: Outside) -> object:
    memory = mmap.mmap(-1, 4096)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return syscalls.call("mprotect", at, 4096, 5)


def _send_descriptor(_: Outside) -> object:
    """Pass something to the VM process on every socket there is."""
    for fd in range(3, 64):
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            continue
        try:
            return socket.send_fds(sock, [b"x"], [0])
        finally:
            sock.detach()
    raise OSError("no socket")


def _hog(_: Outside) -> object:
    return len(bytearray(1 << 30))


def _deep(**attempts: Callable[[Outside], object]) -> dict[str, Attempt]:
    return {name: Attempt(run, deep=True) for name, run in attempts.items()}


def _filtered(**attempts: Callable[[Outside], object]) -> dict[str, Attempt]:
    return {name: Attempt(run, deep=False) for name, run in attempts.items()}


FILES: Final = _deep(
    open_passwd=call("open", b"/etc/passwd", os.O_RDONLY),
    open_its_own_source=lambda outside: os.open(outside.file, os.O_RDONLY),
    open_kvm=call("openat", AT_FDCWD, b"/dev/kvm", os.O_RDWR),
    open_memory=call("openat", AT_FDCWD, b"/dev/mem", os.O_RDWR),
    open_proc_self_mem=call("openat", AT_FDCWD, b"/proc/self/mem", os.O_RDWR),
    open_proc_root=call("openat", AT_FDCWD, b"/proc/1/root", os.O_RDONLY),
    open_vm_memory=lambda outside: os.open(f"/proc/{outside.vm_pid}/mem", os.O_RDWR),
    reopen_descriptor=call("openat", AT_FDCWD, b"/proc/self/fd/0", os.O_RDWR),
    open_root=call("openat", AT_FDCWD, b"/", os.O_RDONLY | os.O_DIRECTORY),
    open_parent=call("openat", AT_FDCWD, b"../../..", os.O_RDONLY | os.O_DIRECTORY),
    openat2_passwd=call("openat2", AT_FDCWD, b"/etc/passwd", bytes(24), 24),
    open_by_handle=call("open_by_handle_at", 0, _struct, 0),
    name_to_handle=call("name_to_handle_at", AT_FDCWD, b"/etc", _struct, _struct, 0),
    create_file=call("openat", AT_FDCWD, b"/x", O_RDWR_CREAT, 0o600),
    create_nameless=call("openat", AT_FDCWD, b"/", os.O_RDWR | os.O_TMPFILE, 0o600),
    creat=call("creat", b"/x", 0o600),
    mkdir=call("mkdir", b"/x", 0o700),
    mknod=call("mknod", b"/x", 0o60600, 0x100),
    symlink=call("symlink", b"/etc/passwd", b"/x"),
    link=call("linkat", 0, b"", AT_FDCWD, b"/x", AT_EMPTY_PATH),
    unlink=call("unlink", b"/etc/passwd"),
    rename=call("rename", b"/etc/passwd", b"/x"),
    chmod=call("chmod", b"/", 0o777),
    chown=call("chown", b"/", 0, 0),
    truncate=call("truncate", b"/etc/passwd", 0),
    stat=call("stat", b"/etc/passwd", _struct),
    statx=call("statx", AT_FDCWD, b"/etc/passwd", 0, 0, _struct),
    access=call("access", b"/etc/passwd", 4),
    readlink=call("readlink", b"/proc/self/exe", _struct, 4096),
    setxattr=call("setxattr", b"/", b"user.x", b"x", 1, 0),
    execve=call("execve", b"/bin/sh", None, None),
    execveat=call("execveat", 0, b"", None, None, AT_EMPTY_PATH),
    memfd=call("memfd_create", b"x", 0),
    memfd_secret=call("memfd_secret", 0),
    inotify=call("inotify_init1", 0),
    fanotify=call("fanotify_init", 0, 0),
)

NETWORK: Final = _deep(
    socket_inet=_socket(socket.AF_INET),
    socket_inet6=_socket(socket.AF_INET6),
    socket_unix=_socket(socket.AF_UNIX),
    socket_netlink=_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    socket_packet=_socket(socket.AF_PACKET, socket.SOCK_RAW),
    socket_vsock=_socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    socket_alg=_socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    socket_raw=_socket(socket.AF_INET, socket.SOCK_RAW),
    socketpair=call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, _struct),
    connect_control_socket=_connect(socket.AF_UNIX, lambda outside: outside.socket),
    connect_abstract_socket=_connect(socket.AF_UNIX, lambda outside: outside.abstract),
    connect_tcp=_connect(socket.AF_INET, lambda outside: ("127.0.0.1", outside.port)),
    bind_tcp=_with_descriptor(lambda _: socket.socket().bind(("127.0.0.1", 0))),
) | _filtered(
    pass_a_descriptor=_send_descriptor,
    recvmsg=call("recvmsg", 5, bytes(56), 0x40),
    shutdown=call("shutdown", 5, 2),
)

PROCESSES: Final = _deep(
    kill_vm=towards("kill", TERM),
    kill_sibling=lambda outside: syscalls.call("kill", outside.sibling_pid, KILL),
    kill_parent=lambda outside: syscalls.call("kill", outside.spawner_pid, KILL),
    kill_everyone=call("kill", -1, KILL),
    tkill_vm=towards("tkill", TERM),
    tgkill_vm=lambda outside: syscalls.call("tgkill", outside.vm_pid, outside.vm_pid, TERM),
    sigqueue_vm=towards("rt_sigqueueinfo", TERM, _struct),
    pidfd_of_vm=towards("pidfd_open", 0),
    pidfd_of_sibling=lambda outside: syscalls.call("pidfd_open", outside.sibling_pid, 0),
    pidfd_getfd=call("pidfd_getfd", 5, 0, 0),
    ptrace_vm=towards("ptrace", 16, 0, 0, pid=1),
    ptrace_sibling=lambda outside: syscalls.call("ptrace", 16, outside.sibling_pid, 0, 0),
    read_vm_memory=towards("process_vm_readv", _iovec, 1, _iovec, 1, 0),
    write_vm_memory=towards("process_vm_writev", _iovec, 1, _iovec, 1, 0),
    kcmp_vm=lambda outside: syscalls.call("kcmp", outside.vm_pid, 1, 0, 0, 0),
    limits_of_vm=towards("prlimit64", 7, None, _struct),
    priority_of_vm=towards("setpriority", 10, pid=1),
    affinity_of_vm=towards("sched_setaffinity", 8, _struct),
    migrate_vm=towards("migrate_pages", 64, _struct, _struct),
    move_vm_pages=towards("move_pages", 0, None, None, None, 0),
    robust_list_of_vm=towards("get_robust_list", _struct, _struct),
    fork=call("fork"),
    vfork=call("clone", 0x4111, None, None, None, None),
    thread=call("clone", 0x10F00, _struct, None, None, None),
    fork_clone3=call("clone3", bytes(32) + bytes([17]) + bytes(31), 64),
    raise_priority=call("setpriority", 0, 0, -5),
    realtime=call("sched_setscheduler", 0, 1, (10).to_bytes(4, "little")),
    lock_memory=call("mlock", ctypes.addressof(_struct), 4096),
    more_descriptors=call("prlimit64", 0, 7, (1024).to_bytes(8, "little") * 2, None),
    more_memory=_hog,
) | _filtered(
    trace_me=call("ptrace", 0, 0, 0, 0),
    own_memory=call("process_vm_readv", 1, _iovec, 1, _iovec, 1, 0),
)

PRIVILEGES: Final = _deep(
    new_user_namespace=call("unshare", 0x10000000),
    new_mount_namespace=call("unshare", 0x20000),
    new_pid_namespace=call("unshare", 0x20000000),
    new_network_namespace=call("unshare", 0x40000000),
    setns=call("setns", 3, 0),
    mount=call("mount", b"x", b"/", b"tmpfs", 0, b""),
    remount=call("mount", None, b"/", None, 0x20, b""),
    umount=call("umount2", b"/", 2),
    pivot_root=call("pivot_root", b".", b"."),
    chroot=call("chroot", b"/"),
    fsopen=call("fsopen", b"tmpfs", 0),
    open_tree=call("open_tree", AT_FDCWD, b"/", 1),
    move_mount=call("move_mount", 0, b"", AT_FDCWD, b"/", 4),
    setuid=call("setuid", 0),
    setresuid=call("setresuid", 0, 0, 0),
    setgid=call("setgid", 0),
    setgroups=call("setgroups", 1, bytes(4)),
    capset=call("capset", bytes([0x22, 5, 8, 0x20, 0, 0, 0, 0]), b"\xff" * 24),
    ambient=call("prctl", 47, 2, 21, 0, 0),
    securebits=call("prctl", 28, 0, 0, 0, 0),
    keep_capabilities=call("prctl", 8, 1, 0, 0, 0),
    new_privileges=call("prctl", 38, 0, 0, 0, 0),
    set_mm=call("prctl", 35, 1, 0, 0, 0),
) | _filtered(
    dumpable=call("prctl", 4, 1, 0, 0, 0),
    another_filter=call("seccomp", 1, 0, bytes(16)),
    personality=call("personality", 0x0400000),
)

KERNEL: Final = _deep(
    bpf=call("bpf", 0, _struct, 48),
    perf=call("perf_event_open", _struct, 0, -1, -1, 0),
    io_uring=call("io_uring_setup", 8, ctypes.create_string_buffer(120)),
    userfaultfd=call("userfaultfd", 1),
    init_module=call("init_module", _struct, 8, b""),
    finit_module=call("finit_module", 0, b"", 0),
    delete_module=call("delete_module", b"x", 0),
    kexec=call("kexec_load", 0, 0, None, 0),
    reboot=call("reboot", 0xFEE1DEAD - (1 << 32), 672274793, 0, None),
    swapon=call("swapon", b"/x", 0),
    acct=call("acct", None),
    set_time=call("clock_settime", 0, bytes(16)),
    adjust_time=call("adjtimex", b"\x01" + bytes(255)),
    hostname=call("sethostname", b"x", 1),
    io_ports=call("ioperm", 0x80, 1, 1),
    io_privilege=call("iopl", 3),
    quota=call("quotactl", 0, b"/", 0, None),
    hang_up=call("vhangup"),
    inject_typing=call("ioctl", 0, 0x5412, b"x"),
    kvm_ioctl=call("ioctl", 3, 0xAE01, 0),
    eventfd=call("eventfd2", 0, 0),
    epoll=call("epoll_create1", 0),
    pipe=call("pipe2", _struct, 0),
    duplicate=call("dup", 0),
    duplicate_to=call("dup2", 0, 40),
    signalfd=call("signalfd4", -1, bytes(8), 8, 0),
    message_queue=call("mq_open", b"x", O_RDWR_CREAT, 0o600, None),
) | _filtered(
    keyring=call("keyctl", 0, -3, 1),
    add_key=call("add_key", b"user", b"x", b"x", 1, -2),
    kernel_log=call("syslog", 10, None, 0),
    shared_memory=call("shmget", 0, 4096, 0o600),
    semaphore=call("semget", 0, 1, 0o600),
    ldt=call("modify_ldt", 0, _struct, 64),
    clear_nonblocking=call("fcntl", 3, 4, 0),
    owner_of_descriptor=call("fcntl", 3, 8, 1),
    exec_mapping=_executable(5, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    writable_exec_mapping=_executable(7, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    executable_ram=_executable_ram,
    make_executable=_make_executable,
    protection_key=call("pkey_mprotect", ctypes.addressof(_struct) & ~4095, 4096, 5, -1),
)

ATTEMPTS: Final = FILES | NETWORK | PROCESSES | PRIVILEGES | KERNEL
