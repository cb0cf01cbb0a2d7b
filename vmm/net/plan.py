"""What a VM's interfaces need on the host, as data. Nothing is looked at or changed here."""

from __future__ import annotations

import binascii
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from config import localnet

if TYPE_CHECKING:
    from config.model import NicConfig, PortConfig, SwitchConfig, VmConfig

BRIDGE_PREFIX: Final = "vm-"
_MACHINE_ID: Final = "/etc/machine-id"


class Nic(NamedTuple):
    """One interface."""

    vm: str
    number: int  # among all of the VM, from 0
    config: NicConfig
    tap: str  # name of the host's interface, or "fd:5"; "" for type user
    link: localnet.Link | None  # addresses, for a local one
    bridge: str  # to join, or ""
    switch: SwitchConfig | None
    mtu: int  # asked for, or 0
    group: int

    @property
    def device(self) -> str:
        """The device's name."""
        return f"vionet{self.number}"

    @property
    def own_bridge(self) -> bool:
        """Whether its bridge is one that we make."""
        return self.switch is not None and not self.switch.bridge

    @property
    def locked(self) -> bool:
        """Whether it is, by itself or by its switch."""
        return self.config.locked or (self.switch is not None and self.switch.locked)

    @property
    def ports(self) -> tuple[PortConfig, ...]:
        """The forwards to it."""
        return self.config.ports

    @property
    def alias(self) -> str:
        """How its tap is marked as ours; its MAC address follows."""
        return f"pyvmd vm={self.vm} nic={self.number} lladdr="

    @property
    def lasting(self) -> bool:
        """Whether something of it outlasts its tap."""
        return self.own_bridge or self.config.nat


def plan(config: VmConfig, vm_id: int) -> list[Nic]:
    """Return what the VM of that id needs. Raises ConfigError where addresses have run out."""
    pool = localnet.parse_pool(config.local_prefix)
    switches = {switch.name: switch for switch in config.switches}
    found = []
    for index, nic in enumerate(config.interfaces):
        if nic.vhost_user:
            continue
        switch = switches.get(nic.switch)
        found.append(
            Nic(
                vm=config.name,
                number=index,
                config=nic,
                tap="" if nic.type == "user" else nic.tap or f"vm{vm_id}if{index}",
                link=localnet.link(pool, vm_id, index, _pool6(config)) if nic.local else None,
                bridge=(switch.bridge or BRIDGE_PREFIX + switch.name) if switch else "",
                switch=switch,
                mtu=nic.mtu or (switch.mtu if switch else 0),
                group=nic.group or (switch.group if switch else 0),
            )
        )
    return found


def _pool6(config: VmConfig) -> localnet.Pool | None:
    if config.local_inet6 == "auto":
        import hashlib  # 3 ms, for those who ask for it

        return localnet.unique_pool6(hashlib.sha256(b"pyvmd" + _machine_id()).digest())
    return localnet.parse_pool6(config.local_inet6) if config.local_inet6 else None


def guest_lladdr(vm: str, index: int, attempt: int = 0) -> str:
    """Return a MAC address for an interface without one: fe:e1:bb:d1:xx:xx as in vmd.

    vmd draws the last two bytes at every start. Here they follow from host, user, VM and
    interface, so that leases and names of interfaces in the guest stay; `attempt` 1, 2, … gives
    others, should the first be in use.
    """
    text = b"%s %d %s %d %d" % (_machine_id(), os.getuid(), vm.encode(), index, attempt)
    number = binascii.crc32(text)
    return f"fe:e1:bb:{0xD0 | index + 1 & 15:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


def host_lladdr(lladdr: str) -> str:
    """Return the MAC address of the host's side: the third byte one less, as in vmd."""
    parts = bytearray.fromhex(lladdr.replace(":", ""))
    parts[2] = parts[2] - 1 & 255
    parts[0] = parts[0] & 0xFE | 2  # it is ours, not a manufacturer's
    return parts.hex(":")


def _machine_id() -> bytes:
    """Return what this host is known by; not for others' eyes, so only digests of it leave."""
    try:
        with open(_MACHINE_ID, "rb") as file:
            return file.read(64).strip()
    except OSError:
        return os.uname().nodename.encode()
