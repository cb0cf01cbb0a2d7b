"""Makes a disk image with Debian on it: one ext4 file system, no partitions, no kernel.

Booted with the test kernel and initramfs and `root=/dev/vda`, systemd starts a root shell on the
serial console. Needs the network, root and some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Final

from tools.guest.kernel import GuestImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

SUITE: Final = "bookworm"
SIZE: Final = "1G"  # sparse: about 380 MiB are written
PACKAGES: Final = (
    *("systemd-sysv", "udev", "dbus", "kmod", "util-linux", "e2fsprogs"),
    *("iproute2", "iputils-ping", "fio"),
    *("iperf3", "ethtool", "tcpdump", "isc-dhcp-client"),
)
FILES: Final = {
    "etc/hostname": "debian\n",
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/systemd/system/serial-getty@.service.d/autologin.conf": (
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear %I $TERM\n"
    ),
    "etc/systemd/network/20-dhcp.network": "[Match]\nType=ether\n\n[Network]\nDHCP=ipv4\n",
}
UNITS: Final = ("serial-getty@ttyS0", "systemd-networkd")


def build(image: str, modules: str, module_files: Iterable[str]) -> None:
    """Write the image; `modules` is the kernel's module directory, the files are relative to it.

    Raises GuestImageError.
    """
    if os.geteuid():
        raise GuestImageError("debian.img can only be made by root")
    with tempfile.TemporaryDirectory(prefix="debian-", dir=os.path.dirname(image)) as scratch:
        root = f"{scratch}/root"
        run(
            *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"),
            *("--format=directory", SUITE, root),
        )
        for name, text in FILES.items():
            os.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
            with open(f"{root}/{name}", "w", encoding="ascii") as file:
                file.write(text)
        for path in (*module_files, "modules.order", "modules.builtin", "modules.builtin.modinfo"):
            os.makedirs(os.path.dirname(f"{root}{modules}/{path}"), exist_ok=True)
            shutil.copy(f"{modules}/{path}", f"{root}{modules}/{path}")
        run("depmod", "--basedir", root, os.path.basename(modules))
        run("chroot", root, "passwd", "--quiet", "--delete", "root")
        run("systemctl", "--quiet", f"--root={root}", "enable", *UNITS)
        run("mke2fs", "-q", "-t", "ext4", "-L", "debian", "-d", root, image, SIZE)


def run(*command: str) -> None:
    """Run one step. Raises GuestImageError with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise GuestImageError(f"{command[0]} failed with status {done.returncode}:\n{said}")
