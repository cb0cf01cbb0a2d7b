r"""Starts VMs by the real pyvmctl, and talks to the guest in them.

vm = start_vm(linux(vcpus=2))            # the fixture of tests/conftest.py
vm.console.shell()
assert vm.console.run("nproc") == "2"
vm.console.send("poweroff -f\n")
assert vm.wait() == 0
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import Any, Final

from tools.guest.console import Console
from vmm.qmpclient import QmpClient

TREE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGES: Final = os.path.join(os.environ.get("PYVMD_CACHE", f"{TREE}/.cache"), "guest")
COMMAND_TIMEOUT: Final = 120  # seconds for a pyvmctl command, inside tools/kvmhost as well
WAIT_TIMEOUT: Final = 180  # seconds for a guest to power off


def pyvmctl(*words: str, timeout: float = COMMAND_TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run pyvmctl and return what it printed. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        [sys.executable, "-m", "vmm.cli", *words],
        cwd=TREE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def linux(
    *, kernel: str = "vmlinuz", cmdline: str = "console=ttyS0 quiet", **keys: Any
) -> dict[str, Any]:
    """Return the vm.yaml of a guest with the test kernel and initramfs; `keys` add to it."""
    initrd = f"{IMAGES}/initramfs.cpio.gz"
    boot = {"kernel": f"{IMAGES}/{kernel}", "initrd": initrd, "cmdline": cmdline}
    return {"name": "linux", "vcpus": 1, "memory": "256M", "boot": boot, **keys}


class GuestVm:
    """A VM that has been started, with its console attached.

    Starting it fails the test if pyvmctl does.
    """

    def __init__(self, config: dict[str, Any], runtime_dir: str) -> None:
        self.name: str = config["name"]
        self.directory = f"{runtime_dir}/{self.name}"
        self.yaml = f"{runtime_dir}/{self.name}.yaml"
        with open(self.yaml, "w", encoding="utf-8") as file:
            json.dump(config, file)  # all JSON is YAML
        done = pyvmctl("start", "--json", self.yaml)
        assert done.returncode == 0, done.stderr
        self.pid: int = json.loads(done.stdout)["pid"]
        self._pidfd = os.pidfd_open(self.pid)
        self.console = Console(f"{self.directory}/console.sock")

    def status(self) -> dict[str, Any]:
        """Return what `pyvmctl status --json` says of this VM."""
        facts: dict[str, Any] = json.loads(pyvmctl("status", "--json", self.name).stdout)
        return facts

    def device(self, name: str) -> dict[str, Any]:
        """Return what the VM process says of a device."""
        with QmpClient(f"{self.directory}/control.sock") as client:
            devices = client.call("x-pyvmd-info")["devices"]
        [found] = [row for row in devices if row["name"] == name]
        return dict(found)

    def wait(self, timeout: float = WAIT_TIMEOUT) -> int:
        """Wait until the VM process has ended; return the status of `pyvmctl wait`."""
        assert select.select([self._pidfd], [], [], timeout)[0], f"still running: {self.log()}"
        return pyvmctl("wait", self.name).returncode

    def log(self) -> str:
        """Return the VM's log."""
        with open(f"{self.directory}/log", encoding="utf-8") as file:
            return file.read()

    def end(self) -> None:
        """End the VM, if it still runs, and make sure of it; used by the fixture."""
        self.console.close()
        if not select.select([self._pidfd], [], [], 0)[0]:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            assert select.select([self._pidfd], [], [], COMMAND_TIMEOUT)[0], "survived SIGKILL"
        os.close(self._pidfd)
