"""The network device in Linux guests, on taps that pyvmctl has made.

One boot of Debian with a local interface and one on a switch, whose other end is the host; then
quick boots, without systemd: two guests on one switch, and the ways a driver can be attached.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.guestnet import (
    FRAME,
    GUEST,
    HOST,
    LAN_GUEST,
    LAN_HOST,
    LAN_OTHER,
    bulk,
    counters,
    dying,
    iperf,
    iperf_server,
    jumbo_frames_and_pairs,
    lengths,
    mount_debian,
    pull_and_plug,
    reboot_amid_frames,
    sniff,
    spoof,
    take_lease,
)
from tests.guestvm import IMAGES, TREE, GuestVm, linux, pyvmctl
from tests.netns import Namespace, namespace

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

Start = Callable[[dict[str, Any]], GuestVm]


@pytest.fixture
def ns(runtime_dir: str) -> Iterator[Namespace]:
    """A network namespace for the host's side."""
    with namespace() as made:
        yield made


@pytest.fixture
def disk(runtime_dir: str) -> str:
    """Return the path of a copy of the Debian disk."""
    path = f"{runtime_dir}/root.img"
    subprocess.run(["cp", "--sparse=always", f"{IMAGES}/debian.img", path], check=True)
    return path


def test_debian(start_vm: Start, disk: str, ns: Namespace, runtime_dir: str) -> None:
    """Lease, ping, TCP and UDP both ways, offloads, IPv6, MTU, queues, spoofing, capture, link."""
    cmdline = "console=ttyS0 quiet root=/dev/vda rw systemd.show_status=false net.ifnames=0"
    vm = start_vm(
        linux(
            vcpus=2,
            memory="512M",
            cmdline=cmdline,
            disks=[{"path": disk, "format": "raw"}],
            interfaces=[
                {"local": True},
                {"switch": "lan", "locked": True, "mtu": 9000, "queues": 2},
            ],
            switches={"lan": {}},
            **{"local-inet6": "fd00:1:2::/48"},
        )
    )
    ns.run("ip", "address", "add", f"{LAN_HOST}/24", "dev", "vm-lan")
    shell = vm.console
    shell.expect(r"root@debian:~# ", 600)
    shell.send("PS1='/ # '\n")
    shell.shell()

    # The guest's own DHCP client, and the host's stack at the other end.
    shell.run(
        "for i in $(seq 60); do ip -4 address show dev eth0 | grep -q inet && break; sleep 1; done",
        120,
    )
    assert f"inet {GUEST}/31" in shell.run("ip -4 address show dev eth0")
    assert f"default via {HOST} dev eth0" in shell.run("ip route")
    shell.run(f"ping -c 3 -i 0.2 {HOST}")
    ns.run("ping", "-c", "3", "-i", "0.2", GUEST)
    shell.run(
        "sysctl -qw net.ipv6.conf.eth0.accept_ra=2; for i in $(seq 30); do "
        "ip -6 address show dev eth0 | grep -q fd00: && break; sleep 1; done; "
        "ping -6 -c 2 -i 0.2 fd00:1:2:10:6440:103:0:1",
        90,
    )

    # Offloads: what crosses the tap is longer than any packet on a wire, both ways.
    features = shell.run("ethtool -k eth0")
    for feature in ("tcp-segmentation-offload: on", "rx-checksumming: on", "tx-checksumming: on"):
        assert feature in features
    with iperf_server(HOST, runtime_dir):
        for words, what in (("", f"src {GUEST}"), ("-R", f"src {HOST}")):
            seen = sniff(
                "vm1if0",
                f"tcp and {what}",
                f"{runtime_dir}/dump",
                lambda words=words: iperf(vm, f"-c {HOST} {words}"),  # type: ignore[misc]
            )
            assert max(seen) > FRAME
        report = iperf(vm, f"-c {HOST} -u -b 1M -l 1400")["sum"]
        assert report["packets"] > 100
        assert report["lost_packets"] < report["packets"] // 2

        # Connections outlive the process that carries them, and the guest's kernel hears nothing.
        shell.run("dmesg -c > /dev/null")
        with dying(vm, "vionet0"):
            for words in ("", "-R"):
                assert iperf(vm, f"-c {HOST} -t 4 {words}")["sum_received"]["bytes"] > 0
        assert vm.device("vionet0")["lives"] > 3
        assert shell.run("dmesg") == ""

    jumbo_frames_and_pairs(vm, ns)

    # What pyvmctl captures is what tcpdump reads.
    file = f"{runtime_dir}/capture.pcapng"
    command = [sys.executable, "-m", "vmm.cli", "pcap", vm.name, "vionet1", "-w", file]
    with subprocess.Popen(command, cwd=TREE, stderr=subprocess.DEVNULL) as capture:
        try:
            while not os.path.exists(file) or not os.path.getsize(file):
                assert capture.poll() is None
            shell.run(f"ping -c 2 -i 0.2 -s 5000 {LAN_HOST}")
        finally:
            capture.send_signal(signal.SIGINT)
        assert capture.wait(60) == 0
    assert lengths(file).count(14 + 20 + 8 + 5000) == 4

    spoof(vm, ns)
    pull_and_plug(vm)
    vm.console.send("poweroff\n")
    assert vm.wait() == 0


def test_two_guests_on_one_switch(start_vm: Start, disk: str, ns: Namespace) -> None:
    """They reach each other through the host's bridge, in segments longer than a packet."""
    vms = []
    for number in range(2):
        keys: dict[str, Any] = {
            "disks": [{"path": disk, "format": "raw", "readonly": True}],
            "interfaces": [{"switch": "lan"}],
            "switches": {"lan": {}},
        }
        vms.append(start_vm({**linux(**keys), "name": f"linux{number}"}))
    for vm, address in zip(vms, (LAN_GUEST, LAN_OTHER), strict=True):
        vm.console.shell()
        vm.console.run(f"ip address add {address}/24 dev eth0 && ip link set eth0 up")
        mount_debian(vm)
    one, other = vms
    one.console.run(f"ping -c 3 {LAN_OTHER}")
    other.console.run(f"ping -c 3 {LAN_GUEST}")
    other.console.run(
        "chroot /mnt iperf3 -s -D; until grep -q ':1451 .* 0A ' /proc/net/tcp*; do :; done"
    )
    for words in ("", "-R"):
        sender = "linux0" if not words else "linux1"
        vm = one if sender == "linux0" else other
        before = counters(vm, "vionet0")["tx"]
        iperf(one, f"-c {LAN_OTHER} {words}", "chroot /mnt ")
        after = counters(vm, "vionet0")["tx"]
        frames = after["frames"] - before["frames"]
        assert (after["bytes"] - before["bytes"]) / frames > FRAME
    for vm in vms:
        vm.console.send("poweroff -f\n")
        assert vm.wait() == 0
    assert ns.untouched()


@pytest.mark.parametrize("words", ["", "pci=nomsi"], ids=["msix", "intx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_attachment(  # noqa: PLR0917
    start_vm: Start, disk: str, ns: Namespace, runtime_dir: str, packed: bool, words: str
) -> None:
    """All of it, in each of the four ways a driver can be attached; then a reboot amid frames."""
    vm = start_vm(
        linux(
            vcpus=2,
            cmdline=f"console=ttyS0 quiet {words}",
            packed=packed,
            disks=[{"path": disk, "format": "raw", "readonly": True}],
            interfaces=[
                {"local": True},
                {"switch": "lan", "locked": True, "mtu": 9000, "queues": 2},
            ],
            switches={"lan": {}},
            **{"local-inet6": "fd00:1:2::/48"},
        )
    )
    ns.run("ip", "address", "add", f"{LAN_HOST}/24", "dev", "vm-lan")
    shell, chroot = vm.console, "chroot /mnt "
    shell.shell()
    for nic in ("eth0", "eth1"):
        features = shell.run(f"cat /sys/class/net/{nic}/device/features")
        assert features[34] == str(int(packed))  # RING_PACKED
    assert (shell.run("grep -c MSI /proc/interrupts", status=None) == "0") == ("nomsi" in words)
    mount_debian(vm)
    take_lease(vm)
    [lease] = json.loads(pyvmctl("net", "--json").stdout)["leases"]
    assert (lease["vm"], lease["nic"], lease["given"]) == (vm.name, "vionet0", 1)
    assert lease["addresses"][0] == GUEST
    bulk(vm)
    shell.run(
        f"sysctl -w net.ipv6.conf.eth0.accept_ra=2; for i in $(seq 30); do {chroot}"
        "ping -6 -c 1 -W 1 fd00:1:2:10:6440:103:0:1 && break; done > /dev/null; "
        f"{chroot}ping -6 -c 2 fd00:1:2:10:6440:103:0:1",
        120,
    )
    with iperf_server(HOST, runtime_dir):
        for more, way in (("", "tx"), ("-R", "rx")):
            before = counters(vm, "vionet0")[way]
            iperf(vm, f"-c {HOST} {more}", chroot)
            after = counters(vm, "vionet0")[way]
            frames = after["frames"] - before["frames"]
            assert (after["bytes"] - before["bytes"]) / frames > FRAME
        report = iperf(vm, f"-c {HOST} -u -b 1M -l 1400", chroot)["sum"]
        assert report["packets"] > 100
        assert report["lost_packets"] < report["packets"] // 2
    jumbo_frames_and_pairs(vm, ns, chroot)
    spoof(vm, ns, chroot)
    pull_and_plug(vm)
    reboot_amid_frames(vm)
    bulk(vm)
    shell.send("poweroff -f\n")
    assert vm.wait() == 0
    assert ns.untouched()
