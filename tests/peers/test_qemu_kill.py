"""Back ends of QEMU's guest are killed at work and come back; the guest sees no error.

What is killed is the process that serves a connection, which the program replaces; the program
alone; or the program with all of its processes. QEMU connects again within a second, and gives a
disk the in-flight area of its predecessor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

import pytest

from tests.peers.debian import HOST, Guest, fio
from tests.peers.lab import BackEnd

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1200)]

STEP: Final = 300  # requests between a kill and the next, and after the last


def device(backend: BackEnd) -> None:
    """Kill what serves the connection."""
    backend.kill_device()


def program(backend: BackEnd) -> None:
    """Kill the program, wait until its other processes have followed, and start it again."""
    backend.kill_program()
    backend.start()


def everything(backend: BackEnd) -> None:
    """Kill all processes, and start the program again."""
    backend.kill()
    backend.start()


KILLS: Final[tuple[Callable[[BackEnd], None], ...]] = (device, program, everything)


@pytest.mark.parametrize(
    ("disk", "file"),
    [
        pytest.param("vda", "/root/fio", id="split-qcow2"),
        pytest.param("vdb", "/dev/vdb", id="packed-raw"),
    ],
)
def test_disk(guest: Guest, disk: str, file: str) -> None:
    """All that fio has written is there, whenever the back end was killed."""
    assert "INFLIGHT_SHMFD" in str(guest.qemu.vhost(disk)["protocol-features"])
    pid = guest.repeat(fio(file, "2M"))
    for kill in KILLS:
        guest.progress(disk, STEP)
        kill(guest.backends[disk])
        guest.progress(disk, STEP)
    guest.finish(pid)


def test_network(guest: Guest) -> None:
    """A connection lives through it, and frames go both ways again."""
    for kill in KILLS:
        pid = guest.begin(f"iperf3 -c {HOST} -J -t 5")
        guest.run(
            "a=$(cat /sys/class/net/eth0/statistics/tx_packets);"
            "until [ $(cat /sys/class/net/eth0/statistics/tx_packets) -gt $((a + 50)) ]; do :; done"
        )
        kill(guest.backends["net"])
        guest.run(f"wait {pid}")
        report = json.loads(guest.run("tr -d '\\n\\t' < /tmp/log"))
        assert "error" not in report, report["error"]
        guest.run(f"for i in $(seq 60); do ping -q -c 1 -W 1 {HOST} && break; done")


def test_entropy(guest: Guest) -> None:
    """It comes again when the device is plugged in anew; QEMU 7.2 does not connect again."""
    guest.backends["rng"].kill()
    guest.backends["rng"].start()
    guest.unplug("rng")
    guest.plug_rng()
    guest.run("dd if=/dev/hwrng of=/dev/null bs=4k count=4 iflag=fullblock")


def test_no_errors(guest: Guest) -> None:
    """The guest's kernel has met none."""
    assert guest.run("dmesg --facility=kern --level=emerg,alert,crit,err") == ""


def test_drive(guest: Guest) -> None:
    """It is lost, since QEMU 7.2 does not connect again; nothing else is."""
    guest.backends["scsi"].kill()
    guest.backends["scsi"].start()
    guest.run("cp -a /usr/sbin /root/copy && sync && echo 3 > /proc/sys/vm/drop_caches")
    guest.run("diff -r --no-dereference /usr/sbin /root/copy && rm -r /root/copy")
    guest.run(f"ping -q -c 3 {HOST}")
