"""QEMU as the monitor of vhost-user back ends; its guest is emulated, so no KVM is needed.

disk = BackEnd(our("vioblk", "--blk-file=a.img", "--format=raw"), f"{directory}/vda.sock")
with serving(disk), Qemu(directory, blk("vda", disk.path)) as qemu:
    qemu.login()
    disk.kill()
    disk.start()            # QEMU connects again, a second later at most
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self

from tests.guestvm import IMAGES, TREE
from tools.guest.console import Console
from vmm.qmpclient import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

CPUS: Final = 2
MEMORY: Final = "512M"
DEADLINE: Final = 60.0  # seconds for what takes a moment on a machine that is not busy
BOOT: Final = 600.0  # seconds to the login prompt; 30 on a machine that is not busy
CMDLINE: Final = (
    "console=ttyS0 quiet root=/dev/vda rw systemd.show_status=false net.ifnames=0 mitigations=off "
    "systemd.mask=systemd-networkd.socket systemd.mask=systemd-networkd.service "
    "systemd.mask=e2scrub_reap.service"
)
_LISTENS: Final = 0x10000  # among the flags in /proc/net/unix


def our(kind: str, *words: str) -> list[str]:
    """Return the command that starts one of our own back ends, without its socket."""
    return [sys.executable, "-m", "devices", kind, *words]


def blk(name: str, path: str, more: str = "") -> list[str]:
    """Return QEMU's words for a disk whose back end listens at `path`."""
    device = f"vhost-user-blk-pci,id={name},chardev={name}-c{more}"
    return ["-chardev", f"socket,id={name}-c,path={path},reconnect=1", "-device", device]


def net(name: str, path: str, pairs: int, more: str = "") -> list[str]:
    """Return QEMU's words for a network interface with so many pairs of queues."""
    device = f"virtio-net-pci,id={name},netdev={name}-n,mq=on,vectors=0{more}"
    return [
        *("-chardev", f"socket,id={name}-c,path={path},reconnect=1"),
        *("-netdev", f"vhost-user,id={name}-n,chardev={name}-c,queues={pairs}"),
        *("-device", device),
    ]


def rng(name: str, path: str) -> list[str]:
    """Return QEMU's words for a source of entropy; QEMU 7.2 aborts if it is to connect again."""
    device = f"vhost-user-rng-pci,id={name},chardev={name}-c"
    return ["-chardev", f"socket,id={name}-c,path={path}", "-device", device]


def scsi(name: str, path: str) -> list[str]:
    """Return QEMU's words for a SCSI controller; QEMU 7.2 does not connect again."""
    device = f"vhost-user-scsi-pci,id={name},chardev={name}-c,num_queues=1,param_change=off"
    return ["-chardev", f"socket,id={name}-c,path={path}", "-device", device]


class BackEnd:
    """A back end program, to be killed and started again on the same socket."""

    def __init__(self, words: list[str], path: str, net: int = -1) -> None:
        """`path` is its socket's; `net` is the network namespace to run it in, -1 for ours."""
        self.path = path
        self._fds = (net,) if net >= 0 else ()
        enter = [f"--net=/proc/self/fd/{net}"] if net >= 0 else []
        self._words = [*("nsenter", *enter), *words, f"--socket-path={path}"]
        self._log = f"{path}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns once it listens."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._words,
                cwd=TREE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._fds,
            )
        listening(self.path, self._process, self._log)

    def kill(self) -> None:
        """Kill the program with all of its processes; returns once they are gone."""
        assert self._process is not None
        everybody = _descendants(self._process.pid)
        self._process.kill()
        for pid in everybody:
            _kill(pid)
        self._gone()

    def kill_program(self) -> None:
        """Kill the process that was started; returns once all others have followed by themselves.

        They have the image, and its lock.
        """
        assert self._process is not None
        everybody = [os.pidfd_open(pid) for pid in _descendants(self._process.pid)]
        self._process.kill()
        self._gone()
        for fd in everybody:
            gone = select.select([fd], [], [], DEADLINE)[0]
            os.close(fd)
            assert gone, f"a process of {self._words} lives on without it"

    def kill_device(self) -> None:
        """Kill the process that serves the connection, and nobody else."""
        _kill(int(re.findall(r"served by process (\d+)", self.log())[-1]))

    def _gone(self) -> None:
        assert self._process is not None
        self._process.wait(DEADLINE)
        self._process = None

    def end(self) -> int | None:
        """Ask it to end, if it runs; return its exit status."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._process = None

    def log(self) -> str:
        """Return all it has printed since it was first started."""
        with open(self._log, encoding="utf-8", errors="replace") as file:
            return file.read()


class Qemu:
    """A guest under QEMU, beginning when it runs; ended, if it still runs, at the end."""

    def __init__(self, directory: str, devices: list[str], *more: str) -> None:
        """`directory` keeps its sockets and its log; `devices` and `more` are words for QEMU."""
        self._log = f"{directory}/qemu.log"
        console, monitor = f"{directory}/console.sock", f"{directory}/qmp.sock"
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-accel", "tcg,thread=multi", "-smp", str(CPUS)),
            *("-machine", "pc,memory-backend=ram", "-m", MEMORY),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            *("-kernel", f"{IMAGES}/vmlinuz", "-initrd", f"{IMAGES}/initramfs.cpio.gz"),
            *("-append", CMDLINE),
            *("-chardev", f"socket,id=console,path={console},server=on,wait=off"),
            *("-serial", "chardev:console"),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *devices,
            *more,
        ]
        for path in (console, monitor):
            with suppress(FileNotFoundError):
                os.unlink(path)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            listening(console, self._process, self._log)
            self.console = Console(console)
            listening(monitor, self._process, self._log)
            self.qmp = QmpClient(monitor, DEADLINE)
        except BaseException as err:
            self._process.kill()
            self._process.wait(DEADLINE)
            err.add_note(f"QEMU says: {self.log()}")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.console.close()
        self.qmp.close()
        self._process.kill()
        self._process.wait(DEADLINE)

    def login(self) -> None:
        """Wait until Debian is up, and for its shell."""
        self.console.expect(r"root@debian:~# ", BOOT)
        self.console.send("stty cols 500; PS1='/ # '; set +m\n")
        self.console.shell()

    def wait_status(self, status: str) -> None:
        """Wait until QEMU says that the guest is in some status."""
        deadline = time.monotonic() + BOOT
        while (facts := self.qmp.call("query-status"))["status"] != status:
            assert time.monotonic() < deadline, (facts, self.qmp.call("query-migrate"))
            time.sleep(0.1)

    def log(self) -> str:
        """Return what QEMU has printed, and how it ended, if it did."""
        with open(self._log, encoding="utf-8", errors="replace") as file:
            return f"{file.read()} status {self._process.poll()}"

    def vhost(self, name: str) -> dict[str, Any]:
        """Return what QEMU knows of its connection to the back end of a device."""
        path = f"/machine/peripheral/{name}/virtio-backend"
        found: dict[str, Any] = self.qmp.call("x-query-virtio-status", path=path)["vhost-dev"]
        return found


def listening(path: str, process: subprocess.Popen[bytes], log: str) -> None:
    """Wait until a program listens at `path`; the test fails with its log if it does not."""
    deadline = time.monotonic() + DEADLINE
    while not _listens(path, process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = file.read()[-2000:]
            raise AssertionError(f"{process.args!r} does not listen at {path}: {said}")
        time.sleep(0.02)  # a socket that begins to listen wakes nobody


def _listens(path: str, pid: int) -> bool:
    """Whether there is a listening socket of this name in the network namespace of a process."""
    try:
        with open(f"/proc/{pid}/net/unix", encoding="utf-8") as file:
            rows = [line.split() for line in file]
    except OSError:
        return False
    return any(row[7:] == [path] and int(row[3], 16) & _LISTENS for row in rows[1:])


def _descendants(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children = [int(word) for word in file.read().split()]
    return [one for child in children for one in (child, *_descendants(child))]


def _kill(pid: int) -> None:
    """Kill a process, and wait until it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    gone = select.select([fd], [], [], DEADLINE)[0]
    os.close(fd)
    assert gone, f"process {pid} survives SIGKILL"


@contextmanager
def serving(*backends: BackEnd) -> Iterator[None]:
    """Start back ends; at the end, each must have ended well by SIGTERM."""
    try:
        for backend in backends:
            backend.start()
        yield
    finally:
        statuses = [backend.end() for backend in backends]
    assert not any(statuses), [backend.log() for backend in backends]
