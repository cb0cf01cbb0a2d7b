"""Translation and forwarded ports with real packets: host, guest and outside are three namespaces.

The guest is Linux's own network stack behind a tap, joined to the VM's tap frame by frame.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from devices import tun
from tests.netns import Namespace, namespace
from tests.unit.test_net_links import network

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST, GATE = "100.64.1.3", "100.64.1.2"
OUTSIDE, HOST = "192.0.2.2", "192.0.2.1"
TIMEOUT: Final = 20  # seconds, for what must come
SILENCE: Final = 1  # seconds, for what must not

SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listens", flush=True)
while True:
    client, peer = server.accept()
    client.sendall(peer[0].encode())
    client.close()
"""
CLIENT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as client:
        print(client.recv(100).decode())
except OSError as err:
    print("none")
"""

SENDER = """
import socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.bind((sys.argv[1], 0))
sender.sendto(b"hello", (sys.argv[2], int(sys.argv[3])))
"""


class Place(NamedTuple):
    """A namespace of its own, and a tap that leads into it."""

    pid: int  # of a process in it
    tap: int

    def run(self, *words: str) -> str:
        """Run a program there; return what it prints."""
        words = ("nsenter", f"--net=/proc/{self.pid}/ns/net", *words)
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def connect(self, address: str, port: int, seconds: float = TIMEOUT) -> str:
        """Return as whom a server sees us, "none" if there is no connection."""
        return self.run(sys.executable, "-c", CLIENT, address, str(port), str(seconds))


@contextmanager
def place(*commands: str) -> Iterator[Place]:
    """Make one whose interface eth0 is set up by `ip` commands."""
    with namespace() as made:
        [tap] = tun.open_queues("eth0", 1, "x")
        for command in commands:
            made.run("ip", *command.split())
        process = subprocess.Popen(["sleep", "600"])
    try:
        yield Place(process.pid, tap)
    finally:
        process.kill()
        process.wait()
        os.close(tap)


@contextmanager
def joined(one: int, other: int) -> Iterator[None]:
    """Carry frames between two taps."""
    stop, stopped = os.pipe()

    def carry() -> None:
        while stop not in (ready := select.select([stop, one, other], [], [])[0]):
            for source in ready:
                try:
                    os.write(other if source == one else one, os.read(source, 1 << 17))
                except OSError:  # one is down, or there was nothing after all
                    continue

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.close(stopped)
        thread.join()
        os.close(stop)


@contextmanager
def serving(where: Place | None, address: str, port: int) -> Iterator[None]:
    """Have a server in a place, or on the host."""
    words = [sys.executable, "-c", SERVER, address, str(port)]
    if where:
        words = ["nsenter", f"--net=/proc/{where.pid}/ns/net", *words]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        try:
            yield
        finally:
            process.kill()


class Net(NamedTuple):
    """All three."""

    guest: Place
    outside: Place
    host: Place


@pytest.fixture
def net(runtime_dir: str) -> Iterator[Net]:
    """A host with a VM that has a local interface with NAT, and a neighbour outside."""
    with ExitStack() as stack:
        ns: Namespace = stack.enter_context(namespace())
        [up] = tun.open_queues("up0", 1, "x")
        stack.callback(os.close, up)
        ns.run("ip", "address", "add", f"{HOST}/24", "dev", "up0")
        ns.run("ip", "link", "set", "up0", "up")
        ports = "['2222:22', '127.0.0.1:2223:22', '192.0.2.1:2224:22']"
        text = f"interfaces: [{{local: yes, nat: yes, ports: {ports}}}]"
        [nic] = stack.enter_context(network(text))
        guest = stack.enter_context(
            place(
                f"link set eth0 address {nic.settings['lladdr']} up",
                f"address add {GUEST}/31 dev eth0",
                f"route add default via {GATE}",
            )
        )
        outside = stack.enter_context(
            place(
                "link set eth0 up",
                f"address add {OUTSIDE}/24 dev eth0",
                f"route add 100.64.0.0/10 via {HOST}",
                f"route add 198.51.100.0/24 via {HOST}",
            )
        )
        stack.enter_context(joined(nic.fds["tap0"], guest.tap))
        stack.enter_context(joined(up, outside.tap))
        yield Net(guest, outside, Place(os.getpid(), up))


def test_the_guest_goes_out_under_the_hosts_address(net: Net) -> None:
    """And nobody outside can reach it by its own."""
    with serving(net.outside, OUTSIDE, 80):
        assert net.guest.connect(OUTSIDE, 80) == HOST
    with serving(net.guest, GUEST, 22):
        assert net.host.connect(GUEST, 22) == GATE
        assert net.outside.connect(GUEST, 22, SILENCE) == "none"


def test_ports_lead_to_the_guest(net: Net) -> None:
    """From outside and from the host, as far as their address says."""
    with serving(net.guest, GUEST, 22):
        assert net.outside.connect(HOST, 2222) == OUTSIDE
        assert net.outside.connect(HOST, 2224) == OUTSIDE
        assert net.outside.connect(HOST, 2223, SILENCE) == "none"
        assert net.host.connect("127.0.0.1", 2222) == GATE
        assert net.host.connect("127.0.0.1", 2223) == GATE
        assert net.host.connect("127.0.0.1", 2224, SILENCE) == "none"
        assert net.host.connect(HOST, 2222) != "none"


def test_the_guest_cannot_reach_the_hosts_loopback(net: Net) -> None:
    """Though the tap lets loopback addresses through, for the ports."""
    net.guest.run("ip", "link", "set", "lo", "up")
    net.guest.run("ip", "route", "add", "127.0.0.9/32", "via", GATE, "dev", "eth0")
    net.guest.run("ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
    net.guest.run("sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1")
    with serving(None, "127.0.0.9", 80):
        assert net.host.connect("127.0.0.9", 80) == "127.0.0.1"
        assert net.guest.connect("127.0.0.9", 80, SILENCE) == "none"


def test_the_host_does_not_become_a_router(net: Net) -> None:
    """The neighbour's packets to elsewhere are not forwarded, the guest's are."""
    with namespace() as elsewhere:
        [far] = tun.open_queues("eth0", 1, "x")
        elsewhere.run("ip", "address", "add", "198.51.100.2/24", "dev", "eth0")
        elsewhere.run("ip", "link", "set", "eth0", "up")
        elsewhere.run("ip", "route", "add", "default", "via", "198.51.100.1")
        process = subprocess.Popen(["sleep", "600"])
    [up] = tun.open_queues("up1", 1, "x")
    net.host.run("ip", "address", "add", "198.51.100.1/24", "dev", "up1")
    net.host.run("ip", "link", "set", "up1", "up")
    try:
        with joined(up, far), serving(Place(process.pid, far), "198.51.100.2", 80):
            assert net.guest.connect("198.51.100.2", 80) == "198.51.100.1"
            assert net.outside.connect("198.51.100.2", 80, SILENCE) == "none"
            net.host.run("nft", "delete", "table", "inet", "pyvmd")  # the guard it was
            assert net.outside.connect("198.51.100.2", 80) == OUTSIDE
    finally:
        process.kill()
        process.wait()
        os.close(far)
        os.close(up)


def test_a_forged_source_goes_nowhere(net: Net) -> None:
    """Only the address that the guest was given comes in: of two datagrams the second."""
    net.guest.run("ip", "address", "add", "203.0.113.5/32", "dev", "eth0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((GATE, 80))
        server.settimeout(TIMEOUT)
        for source in ("203.0.113.5", GUEST):
            net.guest.run(sys.executable, "-c", SENDER, source, GATE, "80")
        assert server.recvfrom(100)[1][0] == GUEST
