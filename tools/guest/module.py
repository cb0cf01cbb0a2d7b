"""Builds the guest's vmmci module, against the headers of the kernel that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import Final

from tools.guest.kernel import GuestImageError

SOURCES: Final = tuple(
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "vmmci", name)
    for name in ("vmmci.c", "Kbuild")
)
PATH: Final = "updates/vmmci.ko"  # in the module directory
ALIAS: Final = "alias pci:v00000B5Dd00000777sv*sd*bc*sc*i* vmmci\n"


def build(modules: str) -> bytes:
    """Return vmmci.ko for the kernel with that module directory; the same bytes each time.

    Raises GuestImageError, also if the compiler has anything to say.
    """
    headers = f"{modules}/build"
    if not os.path.isdir(headers):
        what = f"no headers of that kernel in {headers}"
        raise GuestImageError(f"{what} (apt-get install linux-headers-amd64)")
    with tempfile.TemporaryDirectory(prefix="vmmci-") as scratch:
        for source in SOURCES:
            shutil.copy(source, scratch)
        flags = f"-Werror -ffile-prefix-map={scratch}=vmmci"
        run("make", "-s", "-C", headers, f"M={scratch}", "W=1", f"KCFLAGS={flags}", "modules")
        run("strip", "--strip-debug", f"{scratch}/vmmci.ko")
        with open(f"{scratch}/vmmci.ko", "rb") as file:
            return file.read()


def run(*command: str) -> None:
    """Run one step. Raises GuestImageError with what it said if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as err:
        raise GuestImageError(f"{command[0]}: {err.strerror} (tools/setup)") from err
    if done.returncode:
        raise GuestImageError(f"{command[0]} failed:\n{(done.stderr or done.stdout)[-2000:]}")
