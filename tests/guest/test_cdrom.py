"""The CD-ROM drive in a Linux guest: sr_mod finds it, mounts discs, and sees them come and go."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.guestvm import GuestVm, linux, pyvmctl

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

Start = Callable[[dict[str, Any]], GuestVm]

CMDLINE: Final = "console=ttyS0 quiet pyvmd.modules=virtio_pci,virtio_scsi,sr_mod,isofs"
TIMEOUT: Final = 120  # seconds


def burn(directory: str, label: str, seed: int) -> tuple[str, dict[str, str]]:
    """Make an ISO image; return its path, and the MD5 sums of its files."""
    tree = f"{directory}/{label}"
    os.makedirs(f"{tree}/sub")
    rng = random.Random(seed)  # noqa: S311  any bytes will do, but the same ones each time
    sums = {}
    for name, size in (("one", 1), ("sub/block", 2048), ("sub/large", (3 << 20) + 77)):
        data = rng.randbytes(size)
        with open(f"{tree}/{name}", "wb") as file:
            file.write(data)
        sums[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    words = ["-as", "mkisofs", "-quiet", "-R", "-V", label, "-o", f"{tree}.iso", tree]
    subprocess.run(["xorriso", *words], check=True, capture_output=True)
    return f"{tree}.iso", sums


def read_back(vm: GuestVm, label: str, sums: dict[str, str]) -> None:
    """Mount the disc, compare every file, unmount it."""
    shell = vm.console
    shell.run("mount -t iso9660 -o ro /dev/sr0 /mnt", 120)
    for name, checksum in sums.items():
        assert shell.run(f"md5sum < /mnt/{name}", 120).split()[0] == checksum, (label, name)
    shell.run("umount /mnt")


def test_discs(start_vm: Start, runtime_dir: str) -> None:
    """One boot: the first disc, a tray locked by a mount, eject, another disc."""
    first, first_sums = burn(runtime_dir, "FIRST", 1)
    second, second_sums = burn(runtime_dir, "SECOND", 2)
    vm = start_vm(linux(cmdline=CMDLINE, cdrom=first))
    shell = vm.console
    shell.shell()
    assert shell.run("cat /sys/block/sr0/device/vendor /sys/block/sr0/device/model").split() == [
        "PYVMD",
        "CD-ROM",
    ]
    assert int(shell.run("cat /sys/block/sr0/size")) * 512 == os.path.getsize(first)
    read_back(vm, "FIRST", first_sums)

    shell.run("mount -t iso9660 -o ro /dev/sr0 /mnt")  # an open drive is locked
    refused = pyvmctl("cdrom", "eject", vm.name)
    assert refused.returncode == 1
    assert "the guest has locked the tray" in refused.stderr
    shell.run("umount /mnt")
    assert pyvmctl("cdrom", "eject", vm.name).returncode == 0
    shell.run("! dd if=/dev/sr0 of=/dev/null count=1 2>&1")
    done = pyvmctl("cdrom", "insert", vm.name, second)
    assert done.returncode == 0, done.stderr
    read_back(vm, "SECOND", second_sums)
    assert int(shell.run("cat /sys/block/sr0/size")) * 512 == os.path.getsize(second)

    [drive] = [row for row in vm.status()["live"]["devices"] if row["name"] == "vioscsi"]
    assert (drive["medium"], drive["tray_open"], drive["locked"]) == (second, False, False)
    shell.send("poweroff -f\n")
    assert vm.wait() == 0


def drive(vm: GuestVm) -> dict[str, Any]:
    """Return what status tells of the drive."""
    [found] = [row for row in vm.status()["live"]["devices"] if row["name"] == "vioscsi"]
    return dict(found)


def kill(vm: GuestVm) -> None:
    """Kill the drive's process."""
    os.kill(drive(vm)["pid"], signal.SIGKILL)


def test_its_process_is_killed(start_vm: Start, runtime_dir: str) -> None:
    """While the guest reads, between eject and insert, and while a mount holds the disc."""
    first, first_sums = burn(runtime_dir, "FIRST", 1)
    second, second_sums = burn(runtime_dir, "SECOND", 2)
    vm = start_vm(linux(cmdline=CMDLINE, cdrom=first))
    shell = vm.console
    shell.shell()
    shell.run("mount -t iso9660 -o ro /dev/sr0 /mnt", TIMEOUT)
    again = "echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/sub/large"
    shell.run(f"touch /sums; (while [ ! -e /stop ]; do {again}; done > /sums 2>&1) & true")
    for _ in range(3):
        kill(vm)
        seen, end = int(shell.run("wc -l < /sums")), time.monotonic() + TIMEOUT
        while int(shell.run("wc -l < /sums")) < seen + 2:  # the first may have been cached
            assert time.monotonic() < end, shell.run("dmesg | tail")
    shell.run("touch /stop; wait", TIMEOUT)
    assert shell.run("sort -u /sums").split() == [first_sums["sub/large"], "-"]

    assert drive(vm)["locked"]
    assert "the guest has locked the tray" in pyvmctl("cdrom", "eject", vm.name).stderr
    shell.run("umount /mnt")
    assert pyvmctl("cdrom", "eject", vm.name).returncode == 0
    kill(vm)
    done = pyvmctl("cdrom", "insert", vm.name, second)
    assert done.returncode == 0, done.stderr
    kill(vm)
    read_back(vm, "SECOND", second_sums)
    found = drive(vm)
    assert (found["medium"], found["tray_open"], found["state"]) == (second, False, "running")
    assert found["lives"] == 6
    told = shell.run("dmesg")
    assert "sr 0:0:0:0" in told
    for trouble in ("I/O error", "abort", "timed out", "scsi host0: reset", "Medium Error"):
        assert trouble not in told
    shell.send("poweroff -f\n")
    assert vm.wait() == 0
