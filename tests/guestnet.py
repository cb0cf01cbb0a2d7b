"""What the tests of networks do with a Linux guest: run iperf3 and tcpdump, move bytes, look.

The guest's interface eth0 is local, eth1 is on a switch whose other end is the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from tests.backends import wait_until
from tests.guestvm import pyvmctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.guestvm import GuestVm
    from tests.netns import Namespace

HOST: Final = "100.64.1.2"
GUEST: Final = "100.64.1.3"
LAN_HOST: Final = "10.9.0.1"
LAN_GUEST: Final = "10.9.0.2"
LAN_OTHER: Final = "10.9.0.3"
FRAME: Final = 1514  # bytes of the longest one without offloads, at an MTU of 1500
SECONDS: Final = 2  # of each iperf3
BULK: Final = 4 << 20  # bytes
PORT: Final = 5000
# What udhcpc runs when it has a lease; the address's length comes in bits. It asks again only after
# a time in which even a guest on a busy host has seen the answer.
LEASE: Final = (
    r"printf '#!/bin/sh\n[ $1 = bound ] && ip address add $ip/$mask dev $interface\ntrue\n' > /l; "
    "chmod +x /l; udhcpc -i eth0 -s /l -n -q -t 10 -T 20"
)

# Sends five frames under an address that is not the guest's, past its driver's own.
SPOOF: Final = (
    """perl -e 'socket(S,17,3,0)||die;$to=pack("SnlSCCx8",17,2048,$ARGV[0],0,0,6);"""
    """$f=pack("H*","ffffffffffff"."fee1bbffffff"."0800"."00"x50);"""
    """for(1..5){send(S,$f,0,$to)||die}' $(cat /sys/class/net/eth1/ifindex)"""
)


@contextmanager
def printing(words: list[str], ready: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program, beginning when it has printed `ready`; end it by SIGINT."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True, **more
    ) as process:
        assert process.stdout is not None
        try:
            line = None
            while line != "" and ready not in (line or ""):
                line = process.stdout.readline()
            assert line, f"{words[0]} ended before it said {ready!r}"
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@contextmanager
def iperf_server(address: str, directory: str) -> Iterator[None]:
    """Serve iperf3 on the host; its buffers are files mapped for writing, not possible on 9p."""
    environ = {**os.environ, "TMPDIR": directory}
    words = ["iperf3", "-s", "--forceflush", "-B", address]
    with printing(words, "Server listening", env=environ):
        yield


def iperf(vm: GuestVm, words: str, chroot: str = "") -> dict[str, Any]:
    """Run iperf3 in the guest; return the end of its report."""
    command = f"{chroot}iperf3 -J -t {SECONDS} {words} > /i; tr -d '\\n\\t' < /i"
    found: dict[str, Any] = json.loads(vm.console.run(command, 300))
    assert "error" not in found, found["error"]
    end: dict[str, Any] = found["end"]
    return end


@contextmanager
def dying(vm: GuestVm, name: str) -> Iterator[None]:
    """Have the process of a device killed about once a second meanwhile."""
    over = threading.Event()

    def kill() -> None:
        while not over.wait(1):
            pid = vm.device(name)["pid"]
            if pid:  # else the next one is just being started
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


def lengths(file: str) -> list[int]:
    """Return the lengths of the frames in a file that tcpdump can read."""
    words = ["tcpdump", "-e", "-n", "-r", file]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [int(length) for length in re.findall(r"ethertype .*?, length (\d+):", done.stdout)]


def sniff(tap: str, what: str, file: str, during: Callable[[], object]) -> list[int]:
    """Return the lengths of the frames that tcpdump sees on an interface of the host meanwhile."""
    words = [
        "tcpdump",
        "--immediate-mode",
        "-i",
        tap,
        "-n",
        "-U",
        "-s",
        "96",
        "-c",
        "2000",
        "-w",
        file,
        *what.split(),
    ]
    with printing(words, "listening on"):
        during()
    return lengths(file)


def counters(vm: GuestVm, nic: str) -> dict[str, Any]:
    """Return what the device has counted."""
    done = pyvmctl("nic", "status", vm.name, nic, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def echo(address: str) -> Iterator[list[bytes]]:
    """Send the first caller its bytes back once it has ended; yields the list they are put in."""
    got: list[bytes] = []
    with socket.create_server((address, PORT)) as server:
        server.settimeout(300)

        def serve() -> None:
            caller, _ = server.accept()
            with caller, caller.makefile("rb") as stream:
                got.append(stream.read())
                caller.sendall(got[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield got
        thread.join(60)
        assert not thread.is_alive()


def bulk(vm: GuestVm) -> None:
    """Send random bytes to the host and back; they are the same there and here."""
    shell = vm.console
    shell.run(f"dd if=/dev/urandom of=/f bs=64k count={BULK >> 16} 2>/dev/null")
    digest = shell.run("sha256sum < /f").split()[0]
    with echo(HOST) as got:
        shell.run(f"nc {HOST} {PORT} < /f > /g; cmp /f /g", 300)
    assert len(got[0]) == BULK
    assert hashlib.sha256(got[0]).hexdigest() == digest


def mount_debian(vm: GuestVm) -> None:
    """Make the programs of the Debian disk, which is /dev/vda, usable by `chroot /mnt`."""
    vm.console.run("modprobe ext4; mount -t ext4 -o ro /dev/vda /mnt")
    vm.console.run("mount -t devtmpfs dev /mnt/dev && mount -t tmpfs tmp /mnt/tmp")


def take_lease(vm: GuestVm) -> None:
    """Have busybox' DHCP client set eth0 up."""
    vm.console.run(f"ip link set eth0 up; {LEASE}", 300)
    vm.console.run(f"ping -c 3 {HOST}")


def jumbo_frames_and_pairs(vm: GuestVm, ns: Namespace, chroot: str = "") -> None:
    """Frames of 9000 bytes go through the switch; queue pairs are set at run time."""
    shell = vm.console
    shell.run(f"ip address add {LAN_GUEST}/24 dev eth1; ip link set eth1 mtu 9000 up")
    ns.run("ping", "-c", "2", "-i", "0.2", "-M", "do", "-s", "8972", LAN_GUEST)
    for pairs in (1, 2):
        shell.run(f"{chroot}ethtool -L eth1 combined {pairs}")
        assert counters(vm, "vionet1")["pairs"] == pairs
        shell.run(f"ping -c 2 {LAN_HOST}")


def spoof(vm: GuestVm, ns: Namespace, chroot: str = "") -> None:
    """Nothing leaves the locked eth1 under another address, and it is counted."""
    shell = vm.console
    shell.run("! ip link set eth1 address fe:e1:bb:ff:ff:ff")
    before = counters(vm, "vionet1")["tx"]["drops"].get("filtered", 0)
    shell.run(f"{chroot}{SPOOF}")
    shell.run(f"ping -c 2 {LAN_HOST}")
    assert counters(vm, "vionet1")["tx"]["drops"]["filtered"] >= before + 5
    learnt = ns.run("bridge", "fdb", "show", "dev", "vm1if1")
    assert shell.run("cat /sys/class/net/eth1/address") in learnt
    assert "fe:e1:bb:ff:ff:ff" not in learnt


def pull_and_plug(vm: GuestVm) -> None:
    """The guest sees that the cable is pulled, and frames go through once it is back."""
    shell = vm.console
    assert pyvmctl("nic", "link", vm.name, "0", "down").returncode == 0
    shell.run(
        "for i in $(seq 30); do test $(cat /sys/class/net/eth0/carrier) = 0 && break; "
        "sleep 1; done; test $(cat /sys/class/net/eth0/carrier) = 0",
        60,
    )
    assert pyvmctl("nic", "link", vm.name, "vionet0", "up").returncode == 0
    shell.run(
        f"for i in $(seq 30); do ping -c 1 -W 1 {HOST} && break; done > /dev/null; "
        f"ping -c 1 {HOST}",
        90,
    )


def reboot_amid_frames(vm: GuestVm) -> None:
    """Reset the guest while its eth0 is flooded, and take a lease again."""
    flood = ["ping", "-f", "-q", "-s", "1000", GUEST]
    before = counters(vm, "vionet0")["tx"]["frames"]
    with subprocess.Popen(flood, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(
                lambda: counters(vm, "vionet0")["tx"]["frames"] > before + 20, "it is flooded"
            )
            # At once: a reboot in good order marks the rings broken, and then Linux 6.1 itself
            # never comes out of its own transmit interrupt.
            vm.console.send("echo b > /proc/sysrq-trigger\n")
            vm.console.expect("pyvmd-guest: init", 300)
            vm.console.shell()
            take_lease(vm)
        finally:
            process.kill()
