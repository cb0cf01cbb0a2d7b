"""Starts a VM, runs a few commands in its guest over the console, and powers it off.

`python -m tools.guest.tour vm.yaml` shows what happens as a session at a terminal would, and
exits 0 if the guest did what it was told and the VM process ended well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any, Final

from tools.guest.console import Console, ConsoleError

PYVMCTL: Final = os.path.join(os.path.dirname(sys.executable), "pyvmctl")
COMMANDS: Final = ("uname -a", "nproc", "free -m")
BOOT_TIMEOUT: Final = 300  # seconds; an emulated host on a busy machine is slow
END_TIMEOUT: Final = 120  # seconds


def main(yaml: str) -> int:
    """Run the tour. Returns the exit status."""
    begin = time.monotonic()
    show(f"$ pyvmctl start {yaml}")
    started = subprocess.run(
        [PYVMCTL, "start", "--json", yaml], stdout=subprocess.PIPE, text=True, check=False
    )
    if started.returncode:
        return started.returncode
    vm = json.loads(started.stdout)
    show(f"VM {vm['name']} runs as process {vm['pid']}; its guest boots…")
    try:
        use(vm)
    except (ConsoleError, OSError) as err:
        show(f"quickstart: {err}", sys.stderr)
        pyvmctl("stop", "-f", vm["name"])
        return 1
    status = pyvmctl("wait", "--timeout", f"{END_TIMEOUT}s", vm["name"])
    show(f"The VM process ended with status {status} after {time.monotonic() - begin:.0f} s.")
    return status


def use(vm: dict[str, Any]) -> None:
    """Wait for the guest's shell, use it, power off. Raises ConsoleError."""
    with Console(vm["console"]) as console:
        console.shell(BOOT_TIMEOUT)
        for command in COMMANDS:
            show(f"/ # {command}\n{console.run(command)}")
        show("/ # poweroff -f")
        console.send("poweroff -f\n")


def pyvmctl(*words: str) -> int:
    """Run pyvmctl. Returns its exit status."""
    return subprocess.call([PYVMCTL, *words])


def show(text: str, where: Any = None) -> None:
    """Print at once, for whoever watches."""
    print(text, file=where or sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
