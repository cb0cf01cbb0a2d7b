"""The host end of a tap, with real clients as the guest: in namespaces that end with the process.

    unshare --net --mount --propagation private python -m tests.netclient SCENARIO

The tap's kernel side is the guest's network device; what the client sends comes out of the file
descriptor, goes through `Local`, and the answers go back in. For the rest of the host's stack
stands an ARP responder. A scenario is a function of this file; it prints one JSON object. No
sleeping: each step waits for the client's words, a frame, or the kernel's news, with a deadline.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final

from devices.netlocal import HEAD, Local
from tests import netlab

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS: Final = 40
NAME: Final = "guest0"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP_NO_PI: Final = 0x1002
_NEWS: Final = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_: IPv4, IPv6 addresses and routes

UDHCPC_SCRIPT: Final = """#!/bin/sh
case $1 in
deconfig) ip addr flush dev $interface ;;
bound|renew) ip addr replace $ip/$mask dev $interface
    [ -z "$router" ] || ip route replace default via $router dev $interface ;;
esac
echo "EVENT reason=$1|ip=$ip|mask=$subnet|router=$router|dns=$dns|hostname=$hostname"\
"|domain=$domain|search=$search|mtu=$mtu|lease=$lease|server=$serverid|siaddr=$siaddr"
"""
DHCLIENT_SCRIPT: Final = """#!/bin/sh
case $reason in
BOUND|REBOOT|RENEW|REBIND) ip addr replace $new_ip_address/31 dev $interface ;;
EXPIRE|RELEASE|FAIL) ip addr flush dev $interface ;;
esac
echo "EVENT reason=$reason|ip=$new_ip_address|mask=$new_subnet_mask|router=$new_routers"\
"|dns=$new_domain_name_servers|hostname=$new_host_name|domain=$new_domain_name"\
"|search=$new_domain_search|mtu=$new_interface_mtu|lease=$new_dhcp_lease_time"\
"|server=$new_dhcp_server_identifier"
"""
# As Debian's dhclient.conf.
DHCLIENT_WANTS: Final = (
    "subnet-mask, broadcast-address, time-offset, routers, domain-name, domain-name-servers, "
    "domain-search, host-name, netbios-name-servers, netbios-scope, interface-mtu, ntp-servers"
)


class Link:
    """Both ends, and the client."""

    def __init__(self, **more: Any) -> None:
        self.local = Local({**netlab.SETTINGS6, **more})
        self.events: list[dict[str, str]] = []
        self.output = ""
        self._text = b""
        self._deadline = time.monotonic() + SECONDS
        self._tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self._tap, _TUNSETIFF, struct.pack("16sH22x", NAME.encode(), _IFF_TAP_NO_PI))
        self._news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._news.bind((0, _NEWS))
        ip("link", "set", "lo", "up")
        ip("link", "set", NAME, "address", netlab.SETTINGS["lladdr"])
        self._client: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Have the guest's device come up."""
        ip("link", "set", NAME, "up")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a client whose words become events."""
        self._client = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        return self._client

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Serve the link until something is so. Ends the process with all that is known if not."""
        while not done():
            left = self._deadline - time.monotonic()
            if left <= 0:
                sys.exit(f"no {what}: {self.events} {self.local.counts}\n{self.output}")
            fds = [self._tap, self._news.fileno()]
            if self._client is not None and self._client.stdout is not None:
                fds.append(self._client.stdout.fileno())
            for fd in select.select(fds, [], [], left)[0]:
                data = os.read(fd, 65536)
                if fd == self._tap:
                    self._frame(data)
                elif fd != self._news.fileno():
                    self._words(data)

    def event(self, *reasons: str) -> dict[str, str]:
        """Wait for one of these events, and return it."""
        seen = len(self.events)
        self.until(
            " or ".join(reasons),
            lambda: any(event["reason"] in reasons for event in self.events[seen:]),
        )
        return next(event for event in self.events[seen:] if event["reason"] in reasons)

    def _frame(self, frame: bytes) -> None:
        if self.local.wants(frame[:HEAD]):
            for answer in self.local.answer(frame) or ():
                os.write(self._tap, answer)
        elif frame[12:14] == b"\x08\x06" and frame[38:42] == netlab.ip("100.64.1.2"):
            sender = frame[22:32]
            answer = frame[14:20] + b"\0\2" + netlab.HOST + frame[38:42] + sender
            os.write(self._tap, frame[6:12] + netlab.HOST + b"\x08\x06" + answer)

    def _words(self, text: bytes) -> None:
        if not text:
            self._client = None
        self.output += text.decode(errors="replace")
        *lines, self._text = (self._text + text).split(b"\n")
        for line in lines:
            if line.startswith(b"EVENT "):
                fields = line[6:].decode().split("|")
                self.events.append(dict(field.split("=", 1) for field in fields))


def ip(*words: str) -> Any:
    """Run iproute2 with JSON output."""
    text = subprocess.run(["ip", "-j", *words], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(text or "[]")


def addresses() -> dict[str, int]:
    """Return the guest's addresses and their prefix lengths, but for the link-local one."""
    (found,) = ip("addr", "show", "dev", NAME)
    return {
        each["local"]: each["prefixlen"] for each in found["addr_info"] if each["scope"] != "link"
    }


def gateways() -> list[str]:
    """Return the guest's default routes."""
    routes = [*ip("-4", "route", "show", "default"), *ip("-6", "route", "show", "default")]
    return [route["gateway"] for route in routes]


def script(directory: str, text: str) -> str:
    """Write a client's script."""
    path = os.path.join(directory, "script")
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o700)
    return path


def udhcpc(directory: str) -> dict[str, Any]:
    """BusyBox: bound, renewed when told, released when told."""
    link = Link(lease=3600, hostname="web", domain="example.org", mtu=1400)
    link.up()
    client = link.start(
        *("busybox", "udhcpc", "-f", "-i", NAME, "-s", script(directory, UDHCPC_SCRIPT)),
        *("-O", "mtu", "-O", "search"),
    )
    bound = link.event("bound")
    result = {"bound": bound, "addresses": addresses(), "gateways": gateways()}
    client.send_signal(signal.SIGUSR1)
    result["renewed"] = link.event("renew")
    client.send_signal(signal.SIGUSR2)
    link.until("release", lambda: "release" in link.local.counts)
    client.terminate()
    client.wait()
    return {**result, "counts": link.local.counts}


def dhclient(directory: str) -> dict[str, Any]:
    """ISC: bound, rebooted with its lease, refused after a move, released."""
    link = Link(lease=3600, hostname="web", domain="example.org", search=["example.net"], mtu=1400)
    with open(f"{directory}/conf", "w") as file:
        file.write(f"request {DHCLIENT_WANTS};\n")
    command = (
        *("dhclient", "-4", "-d", "-1", "-sf", script(directory, DHCLIENT_SCRIPT)),
        *("-lf", f"{directory}/leases", "-pf", f"{directory}/pid", "-cf", f"{directory}/conf"),
    )
    link.up()

    def run(reason: str) -> dict[str, str]:
        """Run until it has written its lease down, and kill it, so that it cannot release."""
        link.output = ""
        client = link.start(*command, NAME)
        event = link.event(reason)
        link.until("lease", lambda: "renewal in" in link.output)
        client.kill()
        client.wait()
        return event

    result = {"bound": run("BOUND"), "again": run("REBOOT")}
    first = dict(link.local.counts)
    link.local = Local({**netlab.SETTINGS, "address": "100.64.1.5", "host": "100.64.1.2"})
    result["moved"] = run("BOUND")
    return {**result, "counts": first, "counts_moved": link.local.counts}


def kernel(_: str) -> dict[str, Any]:
    """Linux itself: solicits when the link comes up, and makes an address of what it hears."""
    link = Link(mtu=1400, dns=["fd00::53"])
    link.up()
    link.until("address", lambda: bool(addresses()) and bool(gateways()))
    with open(f"/proc/sys/net/ipv6/conf/{NAME}/mtu") as file:
        mtu = int(file.read())
    counts = link.local.counts
    return {"addresses": addresses(), "gateways": gateways(), "counts": counts, "mtu": mtu}


def networkd(directory: str) -> dict[str, Any]:
    """systemd: DHCPv4 and router advertisements, without the rest of systemd."""
    for where in ("/run", "/etc/systemd"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", where], check=True)
    # With /sys read-only it knows that no udev will tell it about devices.
    subprocess.run(["mount", "-o", "remount,bind,ro", "/sys"], check=True)
    os.makedirs("/etc/systemd/network")
    os.makedirs("/run/systemd/netif")
    with open("/etc/systemd/network/guest.network", "w") as file:
        file.write(f"[Match]\nName={NAME}\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=yes\n")
    del directory
    link = Link(lease=3600, dns=["9.9.9.9", "fd00::53"], search=["example.net"])
    client = link.start("/usr/lib/systemd/systemd-networkd", SYSTEMD_LOG_LEVEL="debug")
    link.until("addresses", lambda: len(addresses()) == 2 and len(gateways()) == 2)
    result = {"addresses": addresses(), "gateways": gateways()}
    client.terminate()
    client.wait()
    return {**result, "counts": link.local.counts}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        scenario = {"udhcpc": udhcpc, "dhclient": dhclient, "kernel": kernel, "networkd": networkd}
        print(json.dumps(scenario[sys.argv[1]](scratch)))
