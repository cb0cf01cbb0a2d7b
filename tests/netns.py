"""A network namespace for a test: what it does to interfaces, the host never sees.

with namespace() as ns:          # this thread, and all processes it starts, are in it
    ns.ip("link", "show")
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """Where the test is."""

    def run(self, *words: str) -> str:
        """Run a program; return what it prints. Raises CalledProcessError."""
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    def links(self) -> dict[str, dict[str, Any]]:
        """Return all interfaces but lo, by name."""
        found = json.loads(self.run("ip", "-d", "-j", "link"))
        return {link["ifname"]: link for link in found if link["ifname"] != "lo"}

    def addresses(self, name: str) -> list[str]:
        """Return the addresses of an interface, with their lengths."""
        [found] = json.loads(self.run("ip", "-j", "address", "show", "dev", name))
        return [f"{each['local']}/{each['prefixlen']}" for each in found["addr_info"]]

    def tables(self) -> list[str]:
        """Return the names of all nftables tables."""
        return [line.split()[2] for line in self.run("nft", "list", "tables").splitlines()]

    def sysctl(self, name: str) -> str:
        """Return the value of net.NAME."""
        with open(f"/proc/sys/net/{name}") as file:
            return file.read().strip()

    def untouched(self) -> bool:
        """Whether it is as it was when it was made."""
        return not self.links() and not self.tables() and self.sysctl("ipv4/ip_forward") == "0"


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Enter a new network namespace, and leave it at the end. Skips the test without the right."""
    if os.geteuid():
        pytest.skip("needs root: makes a network namespace with taps, bridges and rules")
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespaces here: {os.strerror(ctypes.get_errno())}")
        ns = Namespace()
        ns.run("ip", "link", "set", "lo", "up")
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("0")
        yield ns
    finally:
        assert _libc.setns(home, _CLONE_NEWNET) == 0
        os.close(home)
