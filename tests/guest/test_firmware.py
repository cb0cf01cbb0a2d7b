"""Debian from its own disk through SeaBIOS and GRUB, as on any PC."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.guestvm import IMAGES, GuestVm

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

Start = Callable[[dict[str, Any]], GuestVm]


def overlay(directory: str) -> dict[str, Any]:
    """Make an empty overlay of the bootable disk; return its row of vm.yaml."""
    path, base = f"{directory}/disk.qcow2", f"{IMAGES}/bootable.img"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path], check=True
    )
    return {"path": path, "format": "qcow2"}


def disc(directory: str) -> tuple[str, dict[str, str]]:
    """Make an ISO image; return its path, and the SHA-256 sums of its files."""
    tree, sums = f"{directory}/tree", {}
    os.mkdir(tree)
    for name, size in (("small", 100), ("large", (2 << 20) + 1)):
        data = random.Random(name).randbytes(size)  # noqa: S311  the same bytes each time
        with open(f"{tree}/{name}", "wb") as file:
            file.write(data)
        sums[name] = hashlib.sha256(data).hexdigest()
    words = ["-as", "mkisofs", "-quiet", "-R", "-o", f"{tree}.iso", tree]
    subprocess.run(["xorriso", *words], check=True, capture_output=True)
    return f"{tree}.iso", sums


def test_debian_from_its_disk(start_vm: Start, runtime_dir: str) -> None:
    """Root is a partition on an overlay, both CPUs run, ACPI is fine, the disc can be read."""
    disk = overlay(runtime_dir)
    iso, sums = disc(runtime_dir)
    vm = start_vm(
        {
            "name": "debian",
            "vcpus": 2,
            "memory": "512M",
            "boot": {"firmware": "seabios", "order": ["disk", "cdrom"]},
            "disks": [disk],
            "cdrom": iso,
        }
    )
    shell = vm.console
    shell.expect(r"SeaBIOS \(version", 120)
    shell.expect("pyvmd-guest: GRUB", 120)
    shell.expect(r"root@debian:~# ", 600)
    shell.send("PS1='/ # '\n")
    shell.shell()
    assert shell.run("findmnt -no SOURCE,FSTYPE /") == "/dev/vda1 ext4"
    assert shell.run("systemctl --failed --no-legend --plain") == ""
    assert shell.run("nproc") == "2"
    assert int(shell.run("awk '/MemTotal/ {print $2}' /proc/meminfo")) > 440 << 10

    complaints = "ACPI( BIOS)? (Error|Warning|Exception)|Firmware (Bug|Warn)|BIOS bug"
    assert shell.run(f"dmesg | grep -E '{complaints}'", status=1) == ""
    tables = shell.run("ls /sys/firmware/acpi/tables")
    assert set(tables.split()) >= {"APIC", "DSDT", "FACP", "FACS", "SPCR"}
    assert "PYVMD" in shell.run("dmesg | grep 'ACPI: XSDT'")
    assert shell.run("dmesg | grep -c 'ACPI: PM: (supports S0 S5)'") == "1"

    shell.run("mount -o ro /dev/sr0 /mnt")
    for name, checksum in sums.items():
        assert shell.run(f"sha256sum < /mnt/{name}").split()[0] == checksum

    shell.run("echo written > /root/mark && sync")
    shell.send("poweroff\n")
    assert vm.wait() == 0
    assert "guest power-off (ACPI S5)" in vm.log()
    check = subprocess.run(["qemu-img", "check", disk["path"]], capture_output=True, check=False)
    assert check.returncode == 0, check.stdout
