"""Programs that serve a guest's devices by vhost-user, and what `status` says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

from tests.guestvm import TREE, GuestVm
from vmm.qmpclient import QmpClient

VIRTIOFSD: Final = "/usr/lib/qemu/virtiofsd"
DEADLINE: Final = 300.0  # seconds for what takes a moment on a machine with nothing else to do


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Look again and again, until something is so."""
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def listens(path: str) -> bool:
    """Whether somebody listens at a socket. Not found by connecting: some serve one only."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        rows = [line.split() for line in table]
    return any(row[3] == "00010000" and row[-1] == path for row in rows[1:])


class Programs:
    """What serves the guest, by name; each listens at a socket of that name."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def socket(self, name: str) -> str:
        """Return the path of a program's socket."""
        return f"{self._directory}/{name}.sock"

    def start(self, name: str, *command: str, fds: Sequence[int] = ()) -> None:
        """Start a program, which inherits `fds`, and wait until it listens."""
        if not shutil.which(command[0]):
            pytest.skip(f"{command[0]} is not installed")
        path = self.socket(name)
        if os.path.exists(path):
            os.unlink(path)
        self._running[name] = subprocess.Popen(command, cwd=TREE, pass_fds=fds)
        wait_until(lambda: listens(path), f"{name} listens")

    def disk(self, image: str) -> None:
        """Start the storage daemon on a raw image, as `disk`."""
        address = f"addr.type=unix,addr.path={self.socket('disk')}"
        export = f"type=vhost-user-blk,id=e,node-name=d,writable=on,{address}"
        self.start(
            "disk",
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={image}"),
            *("--export", export),
        )

    def ours(self, name: str, image: str) -> None:
        """Start our own disk on a raw image."""
        where = f"--socket-path={self.socket(name)}"
        command = (sys.executable, "-m", "devices", "vioblk", where, f"--blk-file={image}")
        self.start(name, *command, "--format=raw")

    def files(self, directory: str) -> None:
        """Start the file system daemon on a directory."""
        path = self.socket("files")
        options = ("-o", f"source={directory}", "-o", "sandbox=chroot", "-o", "log_level=err")
        self.start("files", VIRTIOFSD, f"--socket-path={path}", *options, "-f")

    def kill(self, name: str) -> None:
        """End one, as a crash does."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        """End all."""
        for name in list(self._running):
            self.kill(name)


def peers(vm: GuestVm) -> dict[str, dict[str, Any]]:
    """Return what `status` says of each device that others serve."""
    with QmpClient(f"{vm.directory}/control.sock") as client:
        devices = client.call("x-pyvmd-info")["devices"]
    return {row["name"]: row["vhost_user"] for row in devices if "vhost_user" in row}
