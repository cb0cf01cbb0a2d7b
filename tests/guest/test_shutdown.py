"""A Linux guest is asked to go down: by its vmmci driver, by its power button, by Ctrl-Alt-Del."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tests.guestvm import IMAGES, GuestVm, linux, pyvmctl

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

Start = Callable[[dict[str, Any]], GuestVm]

CMDLINE = "console=ttyS0 quiet root=/dev/vda rw systemd.show_status=false"
BOOT = 600  # seconds, in tools/kvmhost
LONG = "300s"


@pytest.fixture
def disk(runtime_dir: str) -> str:
    """Return a copy of the Debian disk."""
    path = f"{runtime_dir}/root.img"
    subprocess.run(["cp", "--sparse=always", f"{IMAGES}/debian.img", path], check=True)
    return path


def debian(disk: str) -> dict[str, Any]:
    """Return the vm.yaml of a Debian that has the time it needs on a slow host."""
    disks = [{"path": disk, "format": "raw"}]
    times = {"ack-timeout": LONG, "shutdown-timeout": LONG}
    return linux(memory="512M", cmdline=CMDLINE, disks=disks, vmmci=times)


def log_in(vm: GuestVm) -> None:
    """Wait for the shell of a Debian that boots; from now on its journal is on its disk."""
    vm.console.expect(r"root@debian:~# ", BOOT)
    vm.console.send("PS1='/ # '\n")
    vm.console.shell()
    vm.console.run("mkdir -p /var/log/journal && journalctl --flush")


def stop(vm: GuestVm) -> dict[str, Any]:
    """Stop the VM and return how it ended."""
    assert pyvmctl("stop", "-w", vm.name, timeout=BOOT).returncode == 0
    ended: dict[str, Any] = json.loads(pyvmctl("wait", "--json", vm.name).stdout)["exit"]
    return ended


def journal(disk: str, runtime_dir: str) -> str:
    """Return what the guest's journal has of its last boot, a message a line."""
    there = f"{runtime_dir}/journal"
    dump = f"rdump /var/log/journal {runtime_dir}"
    subprocess.run(["debugfs", "-R", dump, disk], capture_output=True, check=True)
    words = ["journalctl", "--directory", there, "--boot", "--output=cat", "--no-pager"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def in_order(text: str, *words: str) -> bool:
    """Tell whether `text` has these, one after the other."""
    at = 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return False
    return True


def seconds_between(log: str, first: str, last: str) -> float:
    """Return the time from one line of a VM's log to another."""
    times = [
        datetime.fromisoformat(next(line for line in log.splitlines() if word in line).split()[0])
        for word in (first, last)
    ]
    return (times[1] - times[0]).total_seconds()


def fsck(disk: str) -> None:
    """Check that the file system was unmounted: no journal to replay, no error."""
    superblock = subprocess.run(
        ["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True
    ).stdout
    assert "needs_recovery" not in superblock
    assert "Filesystem state:         clean" in superblock
    subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=True)


def test_debian_by_vmmci(start_vm: Start, disk: str, runtime_dir: str) -> None:
    """The module binds, sets the clock, reboots in place, and shuts down in good order."""
    vm = start_vm(debian(disk))
    log_in(vm)
    assert vm.console.run("readlink /sys/bus/pci/drivers/vmmci/0000:*").endswith("/0000:00:03.0")
    boot_id = vm.console.run("cat /proc/sys/kernel/random/boot_id")
    devices = [row["pid"] for row in vm.status()["live"]["devices"]]
    if "PYVMD_KVMHOST" in os.environ:  # a host whose clock is nobody else's
        for step in (7200, -7200):
            time.clock_settime(time.CLOCK_REALTIME, time.time() + step)
            half_way = int(time.time()) - step // 2
            there = f"$(date +%s) {'-gt' if step > 0 else '-lt'} {half_way}"
            vm.console.run(f"until [ {there} ]; do sleep 0.2; done")
        assert vm.console.run("dmesg | grep -c 'vmmci.*clock set'") == "2"

    asked = time.monotonic()
    assert pyvmctl("reboot", "-w", vm.name, timeout=BOOT).returncode == 0
    log_in(vm)
    assert vm.console.run("cat /proc/sys/kernel/random/boot_id") != boot_id
    assert float(vm.console.run("cut -d' ' -f1 /proc/uptime")) < time.monotonic() - asked
    lines = "journalctl --boot=-1 --output=cat --no-pager | grep -e 'host asks' -e 'Reached target'"
    before = vm.console.run(lines)
    assert in_order(before, "the host asks for a reboot", "Reached target reboot.target"), before
    assert vm.status()["pid"] == vm.pid
    assert [row["pid"] for row in vm.status()["live"]["devices"]] == devices
    assert vm.console.run("dmesg | grep -ci 'ext4-fs.*recovery'", status=1) == "0"

    ended = stop(vm)
    vm.console.expect("reboot: Power down")
    assert (ended["status"], ended["how"]) == (0, "stop")
    assert "stop: vmmci taken" in vm.log()
    assert "stop: power button" not in vm.log()
    fsck(disk)
    told = journal(disk, runtime_dir)
    assert in_order(told, "the host asks for a shutdown", "Reached target poweroff.target"), told


def test_debian_by_power_button(start_vm: Start, disk: str, runtime_dir: str) -> None:
    """Without the driver, logind hears the power button."""
    vm = start_vm(debian(disk))
    log_in(vm)
    vm.console.run("rmmod vmmci")
    ended = stop(vm)
    assert (ended["status"], ended["how"]) == (0, "stop")
    assert "stop: vmmci unable: no driver" in vm.log()
    assert "stop: power button asked" in vm.log()
    assert "stop: Ctrl-Alt-Del" not in vm.log()
    fsck(disk)
    told = journal(disk, runtime_dir)
    assert in_order(told, "Power key pressed", "Reached target poweroff.target"), told


def test_busybox_that_powers_off_by_itself(start_vm: Start) -> None:
    """The module says so before the machine is off; that is the guest's end, nobody's stop."""
    vm = start_vm(linux(vmmci={"ack-timeout": LONG, "shutdown-timeout": LONG}))
    vm.console.shell()
    vm.console.send("poweroff -f\n")
    assert vm.wait(BOOT) == 0
    ended = json.loads(pyvmctl("wait", "--json", vm.name).stdout)["exit"]
    assert ended["how"] == "guest-poweroff"
    assert in_order(vm.log(), "power-off: guest announced", "ends: guest power-off (ACPI S5)")


def test_busybox_by_ctrl_alt_del(start_vm: Start) -> None:
    """With neither: the kernel restarts at Ctrl-Alt-Del, and that is the end."""
    vm = start_vm(linux(vmmci={"ack-timeout": LONG, "shutdown-timeout": LONG}))
    vm.console.shell()
    vm.console.run("rmmod vmmci")
    ended = stop(vm)
    assert (ended["status"], ended["how"]) == (0, "stop")
    assert ended["detail"].startswith("guest reset (")


def test_busybox_that_ignores_all(start_vm: Start) -> None:
    """Its init is told of Ctrl-Alt-Del, and does nothing: its time runs out."""
    vm = start_vm(linux(vmmci={"ack-timeout": "30s", "shutdown-timeout": "5s"}))
    vm.console.shell()
    vm.console.run("rmmod vmmci; echo 0 > /proc/sys/kernel/ctrl-alt-del")
    ended = stop(vm)
    assert (ended["status"], ended["how"]) == (124, "timeout")
    log = vm.log()
    assert 5 <= seconds_between(log, "Ctrl-Alt-Del taken", "Ctrl-Alt-Del overdue") < 60
    assert seconds_between(log, "Ctrl-Alt-Del asked", "Ctrl-Alt-Del taken") < 60
    assert seconds_between(log, "Ctrl-Alt-Del overdue", "ends: asked to stop") < 60
