"""Debian under QEMU, with what it is made of served by our back ends over vhost-user."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from tests.peers import debian, lab
from tests.peers.debian import HOST, Guest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1200)]

SECONDS: Final = 3  # of each iperf3


def test_debian(guest: Guest) -> None:
    """Debian is up, every unit, from a disk of ours, with a queue for each of its CPUs."""
    assert guest.run("findmnt -no SOURCE,FSTYPE /") == "/dev/vda ext4"
    assert guest.run("systemctl --failed --no-legend --plain") == ""
    assert guest.run("ls /sys/block/vda/mq").split() == [str(cpu) for cpu in range(lab.CPUS)]


def test_entropy(guest: Guest) -> None:
    """A mebibyte of it comes, and is not all the same."""
    assert "virtio" in guest.run("cat /sys/class/misc/hw_random/rng_current")
    guest.run("dd if=/dev/hwrng of=/tmp/rng bs=64k count=16 iflag=fullblock 2>/dev/null")
    assert int(guest.run("gzip -c /tmp/rng | wc -c")) > 1 << 20


def test_disc(guest: Guest) -> None:
    """The file on the CD is what was burnt."""
    model = guest.run("cat /sys/block/sr0/device/vendor /sys/block/sr0/device/model")
    assert model.split() == ["PYVMD", "CD-ROM"]
    guest.run("mount -t iso9660 -o ro /dev/sr0 /mnt")
    assert guest.run("sha256sum < /mnt/file").split()[0] == guest.digest
    guest.run("umount /mnt")


def test_files(guest: Guest) -> None:
    """What is copied to the root disk, and read again from the medium, is the same."""
    guest.run("cp -a /usr/bin /root/copy && sync && echo 3 > /proc/sys/vm/drop_caches")
    guest.run("diff -r --no-dereference /usr/bin /root/copy && rm -r /root/copy")


def test_fio(guest: Guest) -> None:
    """What fio writes through a packed ring, at a depth of 128, it reads again."""
    assert guest.run("cat /sys/block/vdb/serial") == "scratch-1"
    assert guest.run("cat /sys/block/vdb/device/features")[34] == "1"  # RING_PACKED
    guest.run(f"{debian.fio('/dev/vdb', '4M')} > /tmp/log 2>&1")


def iperf(guest: Guest, words: str) -> dict[str, Any]:
    """Run iperf3 in the guest; return the end of its report."""
    command = f"iperf3 -c {HOST} -J -t {SECONDS} {words} > /tmp/i; tr -d '\\n\\t' < /tmp/i"
    found: dict[str, Any] = json.loads(guest.run(command))
    assert "error" not in found, found["error"]
    end: dict[str, Any] = found["end"]
    return end


def test_network(guest: Guest) -> None:
    """TCP both ways, offloaded, on both pairs of queues; UDP without loss; ping."""
    guest.run(f"ping -q -c 3 {HOST}")
    assert guest.run("ls -d /sys/class/net/eth0/queues/rx-*").count("rx-") == debian.PAIRS
    assert "tcp-segmentation-offload: on" in guest.run("ethtool -k eth0")
    for words in ("-P 4", "-P 4 -R"):
        end = iperf(guest, words)
        assert end["sum_received"]["bytes"] > 1 << 20
    assert iperf(guest, "-u -b 500K")["sum"]["lost_packets"] == 0


def test_no_errors(guest: Guest) -> None:
    """The guest's kernel has met none."""
    assert guest.run("dmesg --facility=kern --level=emerg,alert,crit,err") == ""
