"""Back ends to compare: programs that serve one image over vhost-user, and what they use.

with running(Ours(), image, "/tmp/x.sock") as program:
    …                               # connect to the socket
    program.cpu_seconds()           # of all its processes and threads, those that ended, too
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from tools.benches.report import ROOT

DEADLINE = 20.0  # seconds for a program to listen
LEAVE_DEADLINE = 5.0  # to end; qemu-storage-daemon may sleep through a SIGTERM as it starts
DEBIAN_PYTHON = (
    "/usr/bin/python3"  # built with all optimisations, which one from elsewhere may lack
)
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h
PRIORITY = 1  # of SCHED_FIFO


class Image(NamedTuple):
    """A disk image."""

    path: Path
    format: str  # raw or qcow2
    direct: bool  # to be used past the page cache


class Kind(Protocol):
    """A back end that can be started."""

    name: str

    def command(self, image: Image, sock: str) -> list[str]:
        """Return what serves `image` at `sock`."""


class Ours:
    """A device process of this tree."""

    name = "pyvmd"

    def __init__(self, python: str = "") -> None:
        """Run by `python`; "" is Debian's if that can, else the one that runs this."""
        self.python = python or _usual_python()

    def command(self, image: Image, sock: str) -> list[str]:
        """See Kind."""
        cache = "none" if image.direct else "writeback"
        where = ["--socket-path", sock, "--blk-file", str(image.path)]
        return [
            *(self.python, "-m", "devices", "vioblk", *where),
            *("--format", image.format, "--cache", cache),
        ]


class Qsd:
    """qemu-storage-daemon."""

    def __init__(self, aio: str, *, iothread: bool) -> None:
        self.aio, self.iothread = aio, iothread
        self.name = f"QSD {aio}" + (" iothread" if iothread else "")

    def command(self, image: Image, sock: str) -> list[str]:
        """See Kind."""
        direct = "on" if image.direct else "off"
        file = f"driver=file,node-name=file,filename={image.path},aio={self.aio}"
        disk = f"driver={image.format},node-name=disk,file=file"
        export = (
            f"type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={sock}"
        )
        return [
            "qemu-storage-daemon",
            *(("--object", "iothread,id=t") if self.iothread else ()),
            *("--blockdev", f"{file},cache.direct={direct}", "--blockdev", disk),
            *("--export", export + ",iothread=t" * self.iothread),
        ]


class Program:
    """A back end that runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def processes(self) -> list[int]:
        """Return it and what descends from it."""
        found = [self.pid]
        for pid in found:
            for task in _tasks(pid):
                words = _read(f"/proc/{pid}/task/{task}/children")
                found += map(int, words.split())
        return found

    def cpu_seconds(self) -> float:
        """Return the user and system time of all its threads so far."""
        clocks = (~pid << 3 | _CPUCLOCK_SCHED for pid in self.processes())
        return sum(map(time.clock_gettime, clocks))

    def pss(self) -> dict[str, float]:
        """Return its memory in MiB: all (Pss), and what is not of any file (Pss_Anon)."""
        total = {"Pss:": 0, "Pss_Anon:": 0}
        for pid in self.processes():
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
                word, *rest = line.split()
                if word in total:
                    total[word] += int(rest[0])
        return {"pss": total["Pss:"] / 1024, "pss_anon": total["Pss_Anon:"] / 1024}

    def settle(self, cpus: set[int], *, realtime: bool) -> None:
        """Have all of it, and what it starts from now on, run there and so."""
        for pid in self.processes():
            for task in _tasks(pid):
                settle(int(task), cpus, realtime=realtime)


def settle(task: int, cpus: set[int], *, realtime: bool) -> None:
    """Have a thread (0: this one) run on these CPUs, perhaps before all that is not so urgent."""
    policy, priority = (os.SCHED_FIFO, PRIORITY) if realtime else (os.SCHED_OTHER, 0)
    os.sched_setaffinity(task, cpus)
    os.sched_setscheduler(task, policy, os.sched_param(priority))


def may_be_urgent() -> bool:
    """Tell whether this process may have real-time priority."""
    try:
        settle(0, os.sched_getaffinity(0), realtime=True)
    except PermissionError:
        return False
    settle(0, os.sched_getaffinity(0), realtime=False)
    return True


@contextmanager
def running(kind: Kind, image: Image, sock: str) -> Iterator[Program]:
    """Start a back end, wait until it listens, and end it afterwards."""
    Path(sock).unlink(missing_ok=True)
    with subprocess.Popen(
        kind.command(image, sock), cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            end = time.monotonic() + DEADLINE
            while not _listens(sock):
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    assert process.stderr is not None
                    raise SystemExit(f"{kind.name}: {process.stderr.read().decode()}")
                time.sleep(0.01)
            yield Program(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=LEAVE_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()  # leaving the with-statement does not, after a KeyboardInterrupt
            Path(sock).unlink(missing_ok=True)


def _listens(sock: str) -> bool:
    """Tell whether there is a listening socket; connecting would make us its front end."""
    words = (line.split() for line in _read("/proc/net/unix").splitlines())
    # Num RefCount Protocol Flags Type St Inode Path; __SO_ACCEPTCON is 1 << 16.
    return any(row[-1] == sock and int(row[3], 16) & 1 << 16 for row in words if len(row) == 8)


def _usual_python() -> str:
    probe = [DEBIAN_PYTHON, "-c", "import devices.backendcli, devices.vioblk"]
    try:
        usable = not subprocess.run(probe, cwd=ROOT, check=False, capture_output=True).returncode
    except OSError:
        usable = False
    return DEBIAN_PYTHON if usable else sys.executable


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
