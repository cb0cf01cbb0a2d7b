"""Debian's stock kernel as a guest: it boots, sees what vm.yaml says, reboots and powers off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.guestvm import GuestVm, linux, pyvmctl
from vmm.qmpclient import QmpClient

pytestmark = pytest.mark.guest

Start = Callable[[dict[str, Any]], GuestVm]

# What a kernel keeps for itself of the memory it is given: its image and struct pages.
KERNEL_SHARE = 0.75


@pytest.mark.parametrize("memory", ["256M", "5G"])
@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["vmlinuz", "vmlinux"])
def test_boot(start_vm: Start, kernel: str, vcpus: int, memory: str) -> None:
    """A bzImage and an ELF vmlinux boot to a shell; nproc and free agree with vm.yaml."""
    vm = start_vm(linux(kernel=kernel, vcpus=vcpus, memory=memory))
    vm.console.shell()
    assert vm.console.run("nproc") == str(vcpus)
    words = vm.console.run("free -m | grep Mem:").split()
    size = {"256M": 256, "5G": 5120}[memory]
    assert KERNEL_SHARE * size < int(words[1]) <= size
    assert vm.console.run("dmesg | grep -iE 'not responding|acpi error|bug:'", status=1) == ""
    vm.console.send("poweroff -f\n")
    assert vm.wait() == 0


def test_reboot_comes_back(start_vm: Start) -> None:
    """`reboot -f` resets in place: same process, new uptime, same devices."""
    vm = start_vm(linux(vcpus=2))
    vm.console.shell()
    vm.console.run("touch /before")
    vm.console.send("reboot -f\n")
    vm.console.shell()
    assert vm.console.run("ls /before 2>&1 | grep -c 'No such'") == "1"
    assert vm.console.run("nproc") == "2"
    assert vm.status()["pid"] == vm.pid
    vm.console.send("poweroff -f\n")
    assert vm.wait() == 0
    assert "resets: " in vm.log()


@pytest.mark.parametrize("how", ["acpi", "kbd", "triple", "pci"])
def test_every_way_to_reset(start_vm: Start, how: str) -> None:
    """ACPI's reset register, the keyboard controller, a triple fault and 0xCF9 all reset."""
    vm = start_vm(linux(cmdline=f"console=ttyS0 quiet reboot={how}"))
    vm.console.shell()
    vm.console.send("reboot -f\n")
    vm.console.shell()
    assert vm.status()["pid"] == vm.pid


def test_ctrl_alt_del(start_vm: Start) -> None:
    """The guest's keyboard driver binds, and Ctrl-Alt-Del typed on request resets the guest."""
    vm = start_vm(linux())
    vm.console.shell()
    assert vm.console.run("grep -c 'AT Translated Set 2' /proc/bus/input/devices") == "1"
    vm.console.run("echo 1 > /proc/sys/kernel/ctrl-alt-del")  # the kernel's own restart
    with QmpClient(f"{vm.directory}/control.sock") as client:
        client.call("x-pyvmd-ctrl-alt-del")
    vm.console.shell()
    assert vm.status()["pid"] == vm.pid


def test_pause_stops_the_guests_clock(start_vm: Start) -> None:
    """A paused guest prints nothing; resumed, it goes on and no watchdog complains."""
    vm = start_vm(linux(vcpus=2))
    vm.console.shell()
    assert pyvmctl("pause", vm.name).returncode == 0
    assert vm.status()["state"] == "paused"
    vm.console.send("echo a; echo b\n")
    assert pyvmctl("unpause", vm.name).returncode == 0
    assert vm.console.run("echo still here") == "still here"
    assert vm.console.run("dmesg | grep -iE 'soft lockup|rcu.*stall'", status=1) == ""
