"""A network for a user without rights: passt(1), which speaks for the guest by sockets of its own.

    vionet ── socket, frames behind their lengths ── passt ── TCP, UDP, ICMP sockets of the host

passt gives the guest the host's own address and resolvers by DHCP, and makes its connections. It
confines itself, puts itself into the background once it is ready, and ends when the other end of
its socket is closed, by whatever death. What it says until it is ready is the error, if it fails.
Services that the host has on its loopback addresses only stay out of the guest's reach.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from vmm.net import programs

if TYPE_CHECKING:
    from vmm.net.plan import Nic
    from vmm.owner import Owner

_OPTIONS: Final = ("--fd", "3", "--quiet", "--no-map-gw")
_CHATTER: Final = ("Failed to send", "Don't run as root", "No external routable interface for")


class Passt:
    """One passt being started, and our end of its stream."""

    def __init__(self, nic: Nic, owner: Owner) -> None:
        """Start it, as the VM's owner if we are root. Raises HostError."""
        self._device = nic.device
        path = programs.need("passt", "'type: user'")
        ours, theirs = socket.socketpair()
        try:
            self._run = programs.Run(words(path, nic, owner), fd=theirs.fileno())
        except HostError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.fd = ours.detach()

    def ready(self) -> None:
        """Wait until it serves. Raises HostError with what it says if it does not."""
        status, said = self._run.wait()
        if status:
            lines = [line for line in said.splitlines() if not line.startswith(_CHATTER)]
            told = "; ".join(lines) or f"exit status {status}"
            raise HostError(f"passt does not start: {told}", device=self._device, hint=_hint(told))


def words(path: str, nic: Nic, owner: Owner) -> list[str]:
    """Return passt's command line."""
    found = [path, *_OPTIONS]
    if os.geteuid() == 0 and owner.uid:
        found += ["--runas", f"{owner.uid}:{owner.uid if owner.gid is None else owner.gid}"]
    if nic.mtu:
        found += ["--mtu", str(nic.mtu)]
    for protocol in ("tcp", "udp"):
        for port in nic.ports:
            if port.protocol == protocol:
                where = f"{port.address}/" if port.address else ""
                found += [f"--{protocol}-ports", f"{where}{port.port}:{port.guest_port}"]
    return found


def _hint(told: str) -> str:
    if "bind" in told:
        return "a port of 'ports' is in use, or below 1024 and not for this user"
    if "interface" in told:
        return "the host has no default route, so there is no network to share"
    return ""
