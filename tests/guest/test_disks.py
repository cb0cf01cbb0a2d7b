"""Disks and entropy in a Linux guest: each served by a jailed process of its own.

One boot of Debian under systemd; then quick boots, without systemd, of every way a driver can be
attached: MSI-X, INTx, the legacy driver, packed rings; and one whose devices' processes are killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.guestvm import IMAGES, GuestVm, linux
from vmm.qmpclient import QmpClient

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

Start = Callable[[dict[str, Any]], GuestVm]

SCRATCH_SIZE = 256 << 20
JOBS = 16
FIO = (
    f"fio --name=v --filename=/dev/vdb --rw=randrw --bs=4k --size=4M --offset_increment=4M "
    f"--numjobs={JOBS} --ioengine=libaio --iodepth=32 --direct=1 --verify=crc32c "
    f"--verify_fatal=1 --minimal"
)
KILLS = 8
# Small files, again and again until it is told to stop, each block with its checksum.
FIO_ON = (
    "fio --name=v --filename=/dev/vdb --rw=randrw --bs=4k --size=1M --offset_increment=1M "
    "--numjobs=4 --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 "
    "--minimal"
)


@pytest.fixture
def disks(runtime_dir: str) -> list[dict[str, Any]]:
    """Return the rows of vm.yaml for a copy of the Debian disk, and for a scratch disk."""
    root, scratch = f"{runtime_dir}/root.img", f"{runtime_dir}/scratch.img"
    subprocess.run(["cp", "--sparse=always", f"{IMAGES}/debian.img", root], check=True)
    with open(scratch, "wb") as file:
        file.truncate(SCRATCH_SIZE)
    return [
        {"path": root, "format": "raw"},
        {"path": scratch, "format": "raw", "serial": "scratch-1"},
    ]


def counters(vm: GuestVm) -> dict[str, int]:
    """Return how many messages the VM process has had with each device."""
    with QmpClient(f"{vm.directory}/control.sock") as client:
        return {row["name"]: row["messages"] for row in client.call("x-pyvmd-info")["devices"]}


def interrupts(vm: GuestVm) -> int:
    """Return how many interrupts the guest has had from the second disk's queue."""
    device = vm.console.run("basename $(readlink -f /sys/block/vdb/device)")
    rows = vm.console.run(f"grep -E '{device}-req|{device}$' /proc/interrupts")
    return sum(int(word) for row in rows.splitlines() for word in re.findall(r" (\d+)\b", row))


def requests(vm: GuestVm) -> int:
    """Return how many reads and writes the guest has done on the second disk."""
    fields = vm.console.run("cat /sys/block/vdb/stat").split()
    return int(fields[0]) + int(fields[4])


def jailed(vm: GuestVm) -> None:
    """Check that every device is served by a process that has nothing."""
    with QmpClient(f"{vm.directory}/control.sock") as client:
        devices = client.call("x-pyvmd-info")["devices"]
    assert [row["name"] for row in devices] == ["viornd", "vioblk0", "vioblk1", "vmmci"]
    for row in devices:
        with open(f"/proc/{row['pid']}/status", encoding="ascii") as status:
            facts = dict(
                line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line
            )
        assert facts["Seccomp"] == "2"
        assert facts["NoNewPrivs"] == "1"
        assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
        assert os.listdir(f"/proc/{row['pid']}/root") == []


def test_debian(start_vm: Start, disks: list[dict[str, Any]]) -> None:
    """Debian boots under systemd from /dev/vda; fio, mkfs, fsck, fstrim, blkdiscard are clean."""
    cmdline = "console=ttyS0 quiet root=/dev/vda rw systemd.show_status=false"
    vm = start_vm(linux(vcpus=2, memory="512M", cmdline=cmdline, disks=disks))
    shell = vm.console
    shell.expect(r"root@debian:~# ", 600)
    shell.send("PS1='/ # '\n")
    shell.shell()
    jailed(vm)
    assert shell.run("findmnt -no SOURCE,FSTYPE /") == "/dev/vda ext4"
    assert shell.run("systemctl --failed --no-legend --plain") == ""
    assert shell.run("cat /sys/block/vdb/serial") == "scratch-1"
    assert shell.run("dd if=/dev/hwrng of=/dev/null bs=64k count=16 iflag=fullblock 2>&1").count(
        "1048576 bytes"
    )

    before, calls, done = counters(vm), interrupts(vm), requests(vm)
    shell.run(f"{FIO} > /tmp/fio.log 2>&1", 900)
    assert requests(vm) - done >= JOBS * 1024
    assert counters(vm) == before  # no message to the VM process, whatever the guest did
    assert interrupts(vm) - calls <= (requests(vm) - done) / 4

    shell.run("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt")
    shell.run("cp -a /usr/bin /mnt && sync && fstrim -v /mnt")
    shell.run("diff -r --no-dereference /usr/bin /mnt/bin && umount /mnt && fsck.ext4 -fn /dev/vdb")
    shell.run("blkdiscard -f /dev/vdb && cmp -n 67108864 /dev/vdb /dev/zero")
    shell.send("poweroff\n")
    assert vm.wait() == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        pytest.param({}, "", id="msix"),
        pytest.param({}, "pci=nomsi", id="intx"),
        pytest.param({"transitional": True}, "virtio_pci.force_legacy=1", id="legacy"),
        pytest.param(
            {"transitional": True}, "pci=nomsi virtio_pci.force_legacy=1", id="legacy-intx"
        ),
        pytest.param({"packed": True}, "", id="packed"),
        pytest.param({"debug": {"eventfds": False}}, "", id="messages"),
        pytest.param({"debug": {"eventfds": False}}, "pci=nomsi", id="messages-intx"),
    ],
)
def test_attachment(
    start_vm: Start, disks: list[dict[str, Any]], keys: dict[str, Any], words: str
) -> None:
    """The same data comes back in every way a driver can be attached to a device."""
    vm = start_vm(linux(vcpus=2, cmdline=f"console=ttyS0 quiet {words}", disks=disks, **keys))
    shell = vm.console
    shell.shell()
    features = shell.run("cat /sys/block/vdb/device/features")
    assert features[32] == ("0" if "legacy" in words else "1")  # VERSION_1
    assert features[34] == ("1" if "packed" in keys else "0")  # RING_PACKED
    assert bool(shell.run("grep -c MSI /proc/interrupts", status=None) != "0") == (
        "nomsi" not in words
    )
    shell.run("modprobe ext4 && mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt")
    shell.run("mount -t devtmpfs dev /mnt/dev")
    shell.run("mount -t tmpfs tmp /mnt/tmp")
    before = counters(vm)
    shell.run(f"chroot /mnt {FIO} > /mnt/tmp/fio.log 2>&1", 600)
    if "debug" in keys:  # kicks and calls went through the VM process, and it counted them
        assert counters(vm)["vioblk1"] - before["vioblk1"] > JOBS
    elif "nomsi" not in words:
        assert counters(vm) == before
    assert shell.run("dd if=/dev/hwrng of=/dev/null bs=4k count=4 2>&1").count("4+0 records in")
    vm.console.send("poweroff -f\n")
    assert vm.wait() == 0


def kill_at_work(vm: GuestVm, name: str) -> None:
    """Kill a device's process once it has done something, and wait for the next one."""
    before, end = vm.device(name), time.monotonic() + 120
    while (now := vm.device(name))["counters"] == before["counters"]:
        assert time.monotonic() < end, f"{name} does nothing: {now}"
    os.kill(now["pid"], signal.SIGKILL)
    while (found := vm.device(name))["lives"] == now["lives"]:
        assert time.monotonic() < end, f"{name} has no other process: {found}"


def test_processes_are_killed(start_vm: Start, disks: list[dict[str, Any]]) -> None:
    """The guest's checksums are right, entropy flows, and its kernel complains of nothing."""
    vm = start_vm(linux(vcpus=2, cmdline="console=ttyS0 quiet", disks=disks))
    shell = vm.console
    shell.shell()
    shell.run("modprobe ext4 && mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt")
    shell.run("mount -t devtmpfs dev /mnt/dev && mount -t tmpfs tmp /mnt/tmp")
    shell.run("dmesg -c > /dev/null")
    for name, work in (
        ("disk", f"chroot /mnt {FIO_ON} > $t/fio.log 2>&1"),
        ("rng", "dd if=/dev/hwrng of=/dev/null bs=512 count=1 2> /dev/null"),
    ):
        loop = f"while [ ! -e $t/stop ]; do {work} || exit; done; touch $t/{name}.well"
        shell.run(f"t=/mnt/tmp; ({loop}) & sleep 0")
    for _ in range(KILLS):
        kill_at_work(vm, "vioblk1")
        kill_at_work(vm, "viornd")
    shell.run("touch $t/stop; wait; cat $t/fio.log; test -e $t/disk.well -a -e $t/rng.well", 300)
    assert shell.run("dmesg") == ""
    assert {vm.device(name)["lives"] for name in ("vioblk1", "viornd")} == {KILLS + 1}
    assert vm.log().count("another has its place") >= 2
    vm.console.send("poweroff -f\n")
    assert vm.wait() == 0
