"""Interfaces of the host: taps, bridges, addresses. The only module that imports pyroute2.

Runs in processes of its own (`keeper.apart`), under the lock of all networks. A tap or bridge that
was there before stays as it is: what vm.yaml says of it is compared, and a difference is an error
that says how to set it. With the rights of a user that is the only way; root can have all made.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from config.errors import HostError
from devices import tun
from vmm.net import rules
from vmm.net.plan import guest_lladdr, host_lladdr

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from config.model import SwitchConfig
    from vmm.net.plan import Nic

BRIDGE_ALIAS: Final = "pyvmd switch="  # its name follows
TAP_ALIAS: Final = "pyvmd vm="
VANISH_SECONDS: Final = 1.0  # for a tap to go by itself, with its last descriptor
USUAL_MTU: Final = 1500  # bytes
ATTEMPTS: Final = 64  # MAC addresses tried for one interface
_CAP_NET_ADMIN: Final = 12
_IFF_UP: Final = 1
_RESOLVERS: Final = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")


def may_change() -> bool:
    """Whether this process may make and change interfaces."""
    with open("/proc/self/status") as file:
        [caps] = [int(line.split()[1], 16) for line in file if line.startswith("CapEff:")]
    return bool(caps >> _CAP_NET_ADMIN & 1)


class Links:
    """A connection to the kernel. A context manager. Its methods raise HostError."""

    def __init__(self) -> None:
        self._ip = IPRoute(ext_ack=True, strict_check=True)

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._ip.close()

    # Setting up.

    def set_up(self, nic: Nic) -> tuple[dict[str, Any], list[int]]:
        """Make one interface's network; return facts for the VM process, and the tap's queues."""
        if nic.tap.startswith("fd:"):
            fd = int(nic.tap[3:])
            facts = {"tap": tun.name_of(fd, nic.device), "lladdr": self._lladdr(nic, "")}
            return {**facts, "mtu": nic.mtu}, [os.dup(fd)]
        existed = self._find(nic.tap) is not None
        if not existed and nic.switch:
            self._bridge(nic, nic.switch)  # what is missing is told before anything is made
        fds = tun.open_queues(nic.tap, nic.config.queues, nic.device)
        try:
            facts = self._check(nic) if existed else self._configure(nic)
        except NetlinkError as err:
            raise HostError(f"cannot set up {nic.tap}: {_words(err)}", device=nic.device) from err
        return facts, fds

    def _configure(self, nic: Nic) -> dict[str, Any]:
        """Give a tap that we have made all it is to have."""
        index, link = self._there(nic.tap)["index"], nic.link
        bridge = self._bridge(nic, nic.switch) if nic.switch else None
        lladdr = self._lladdr(nic, nic.bridge)
        mtu = nic.mtu or (bridge.get_attr("IFLA_MTU") if bridge else 0) or USUAL_MTU
        self._ip.link("set", index=index, ifalias=nic.alias + lladdr, mtu=mtu)
        self._ip.link("set", index=index, address=host_lladdr(lladdr))
        if nic.group:
            self._ip.link("set", index=index, group=nic.group)
        # The host has no address of its own making on a guest's side.
        word = "addr_gen_mode" if link and link.host6 else "disable_ipv6"
        rules.write_sysctl(f"ipv6/conf/{nic.tap}/{word}", 1)
        if bridge:
            self._ip.link("set", index=index, master=bridge["index"])
        if link:
            # Only the address that the guest was given may come from there.
            rules.write_sysctl(f"ipv4/conf/{nic.tap}/rp_filter", 1)
            self._free(link.host, nic)
        if nic.config.up:
            self._ip.link("set", index=index, state="up")
        if link:
            self._ip.addr("add", index=index, address=link.host, prefixlen=link.length)
            if link.host6:
                rules.write_sysctl(f"ipv6/conf/{nic.tap}/accept_ra", 0)
                for address, length in ((link.host6, link.length6), (link.router6, 64)):
                    flags = 0x02  # IFA_F_NODAD: nobody else is there
                    self._ip.addr(
                        "add", index=index, address=address, prefixlen=length, flags=flags
                    )
            if nic.config.nat:
                rules.set_up(nic, link)
        return {
            "tap": nic.tap,
            "lladdr": lladdr,
            "host_lladdr": host_lladdr(lladdr),
            "mtu": mtu if nic.mtu or mtu != USUAL_MTU else 0,
            "dns": resolvers() if nic.config.nat else [],
        }

    def _check(self, nic: Nic) -> dict[str, Any]:
        """Compare a tap that was there before with what vm.yaml says."""
        tap = self._there(nic.tap)
        if (tap.get_attr("IFLA_IFALIAS") or "").startswith(TAP_ALIAS):
            raise HostError(
                f"tap {nic.tap} is that of another VM",
                device=nic.device,
                hint="give another name, or leave 'tap' out",
            )
        if nic.config.nat:
            what = f"{nic.tap} was there before, and 'nat' is for taps that we make"
            raise HostError(what, device=nic.device, hint="leave 'tap' or 'nat' out")
        mtu = tap.get_attr("IFLA_MTU")
        wrong = ("", "")
        if nic.mtu and mtu != nic.mtu:
            wrong = f"has an mtu of {mtu}, not {nic.mtu}", f"mtu {nic.mtu}"
        elif nic.config.up != bool(tap["flags"] & _IFF_UP):
            word = "up" if nic.config.up else "down"
            wrong = f"is not {word}", word
        elif nic.switch and tap.get_attr("IFLA_MASTER") != self._bridge(nic, nic.switch)["index"]:
            wrong = f"is not in bridge {nic.bridge}", f"master {nic.bridge}"
        if wrong[0]:
            raise HostError(
                f"{nic.tap} was there before, and {wrong[0]}",
                device=nic.device,
                hint=f"as root: ip link set {nic.tap} {wrong[1]}",
            )
        if nic.link and (nic.link.host not in self._addresses(tap["index"])):
            host = f"{nic.link.host}/{nic.link.length}"
            raise HostError(
                f"{nic.tap} was there before, and has not the address {host}",
                device=nic.device,
                hint=f"as root: ip address add {host} dev {nic.tap}",
            )
        return {
            "tap": nic.tap,
            "lladdr": self._lladdr(nic, nic.bridge),
            "host_lladdr": tap.get_attr("IFLA_ADDRESS"),
            "mtu": nic.mtu or (mtu if mtu != USUAL_MTU else 0),
            "dns": [],
        }

    def _bridge(self, nic: Nic, switch: SwitchConfig) -> Any:
        """Return the bridge of an interface's switch, made if it is to be ours."""
        name = nic.bridge
        found = self._find(name)
        if found is None and switch.bridge:
            raise HostError(
                f"switch {switch.name}: there is no bridge {name}",
                device=nic.device,
                hint=f"as root: ip link add {name} type bridge; or leave 'bridge' out, and "
                "one is made",
            )
        if found is None:
            if not may_change():
                what = f"no right to make a bridge for switch {switch.name}"
                raise HostError(what, device=nic.device, hint=tun.REMEDY)
            # Without STP a port still waits forward_delay until it forwards.
            self._ip.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
            found = self._there(name)
            self._ip.link("set", index=found["index"], ifalias=BRIDGE_ALIAS + switch.name)
            rules.write_sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
            if switch.up:
                self._ip.link("set", index=found["index"], state="up")
            return self._there(name)
        if _kind(found) != "bridge":
            what = f"switch {switch.name}: {name} is no bridge"
            raise HostError(what, device=nic.device, hint="give the name of one as 'bridge'")
        if not switch.bridge and not _alias(found).startswith(BRIDGE_ALIAS):
            raise HostError(
                f"switch {switch.name}: there is a bridge {name} that we have not made",
                device=nic.device,
                hint=f"say 'bridge: {name}' if that is the one to use",
            )
        return found

    def _lladdr(self, nic: Nic, bridge: str) -> str:
        """Return the guest's MAC address, which no other interface of the switch may have."""
        taken = self._taken(bridge) if bridge else {}
        lladdr = nic.config.lladdr
        if lladdr in taken:
            what = f"MAC address {lladdr} is {taken[lladdr]}'s on switch {nic.config.switch}"
            raise HostError(what, device=nic.device, hint="give another 'lladdr'")
        if lladdr:
            return lladdr
        for attempt in range(ATTEMPTS):
            if (lladdr := guest_lladdr(nic.vm, nic.number, attempt)) not in taken:
                return lladdr
        raise HostError("no MAC address is free", device=nic.device, hint="give 'lladdr'")

    def _taken(self, bridge: str) -> dict[str, str]:
        """Return MAC address → owner, of a bridge's other interfaces."""
        found = self._find(bridge)
        if found is None:
            return {}
        taken = {}
        for link in self._ip.get_links():
            if link.get_attr("IFLA_MASTER") == found["index"]:
                words = _marks(link)
                if "lladdr" in words:
                    taken[words["lladdr"]] = f"VM {words['vm']}"
                taken[link.get_attr("IFLA_ADDRESS")] = link.get_attr("IFLA_IFNAME")
        return taken

    def _free(self, address: str, nic: Nic) -> None:
        """Check that no interface has a local address of ours yet."""
        for found in self._ip.get_addr():
            if found.get_attr("IFA_LOCAL") == address:
                name = self._name(found["index"])
                raise HostError(
                    f"{address} is the address of {name} already",
                    device=nic.device,
                    hint="give another 'local-prefix'",
                )

    # Clearing away.

    def tear_down(self, vm: str) -> None:
        """Remove what was made for a VM that has ended. Its taps may need a moment to go."""
        deadline = time.monotonic() + VANISH_SECONDS
        while left := [link for link in self._ip.get_links() if _marks(link).get("vm") == vm]:
            if time.monotonic() > deadline:
                for link in left:
                    self._remove(link)
            else:
                time.sleep(0.01)
        self.sweep()

    def sweep(self) -> None:
        """Remove bridges of ours without interfaces, and rules for taps that are gone."""
        links = list(self._ip.get_links())
        rules.sweep(link.get_attr("IFLA_IFNAME") for link in links)
        used = {link.get_attr("IFLA_MASTER") for link in links}
        for link in links:
            if _alias(link).startswith(BRIDGE_ALIAS) and link["index"] not in used:
                self._remove(link)

    def _remove(self, link: Any) -> None:
        try:
            self._ip.link("del", index=link["index"])
        except NetlinkError as err:
            if err.code != errno.ENODEV:
                raise HostError(f"cannot remove an interface: {_words(err)}") from err

    # Looking.

    def listing(self) -> dict[str, Any]:
        """Return what of ours is there, for `pyvmctl net --json`."""
        links = list(self._ip.get_links())
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links}
        masters = {link.get_attr("IFLA_MASTER") for link in links if _marks(link)}
        taps = [
            {
                **self._facts(link),
                "vm": words["vm"],
                "nic": int(words["nic"]),
                "lladdr": words["lladdr"],
                "bridge": names.get(link.get_attr("IFLA_MASTER")),
                "addresses": self._addresses(link["index"]),
            }
            for link in links
            if (words := _marks(link))
        ]
        bridges = [
            {
                **self._facts(link),
                "switch": _alias(link).removeprefix(BRIDGE_ALIAS) if _ours(link) else None,
                "members": sorted(
                    names[other["index"]]
                    for other in links
                    if other.get_attr("IFLA_MASTER") == link["index"]
                ),
            }
            for link in links
            if _ours(link) or link["index"] in masters
        ]
        return {"taps": taps, "bridges": bridges, "tables": rules.tables()}

    def _facts(self, link: Any) -> dict[str, Any]:
        return {
            "name": link.get_attr("IFLA_IFNAME"),
            "mtu": link.get_attr("IFLA_MTU"),
            "up": bool(link["flags"] & _IFF_UP),
            "carrier": link.get_attr("IFLA_CARRIER") == 1,
        }

    def _find(self, name: str) -> Any:
        for link in self._ip.get_links():
            if link.get_attr("IFLA_IFNAME") == name:
                return link
        return None

    def _there(self, name: str) -> Any:
        """Return an interface that must be there, since we have just seen it."""
        found = self._find(name)
        if found is None:
            raise HostError(f"interface {name} has vanished")
        return found

    def _name(self, index: int) -> str:
        for link in self._ip.get_links():
            if link["index"] == index:
                return str(link.get_attr("IFLA_IFNAME"))
        return f"interface {index}"

    def _addresses(self, index: int) -> list[str]:
        found = [entry for entry in self._ip.get_addr() if entry["index"] == index]
        return [str(e.get_attr("IFA_LOCAL") or e.get_attr("IFA_ADDRESS")) for e in found]


def set_up(nics: Sequence[Nic]) -> tuple[list[dict[str, Any]], list[int]]:
    """Make the networks of a VM; return facts of each, and all queues in order."""
    facts, fds = [], []
    with Links() as links:
        for nic in nics:
            fact, queues = links.set_up(nic)
            facts.append(fact)
            fds += queues
    return facts, fds


def tear_down(vm: str) -> None:
    """Remove what was made for a VM."""
    with Links() as links:
        links.tear_down(vm)


def sweep() -> None:
    """Remove what nobody uses any more."""
    with Links() as links:
        links.sweep()


def listing() -> dict[str, Any]:
    """Return what of ours is there."""
    with Links() as links:
        return links.listing()


def resolvers(files: Iterable[str] = _RESOLVERS) -> list[str]:
    """Return the host's IPv4 resolvers that a guest can reach: not those on loopback."""
    for path in files:
        try:
            with open(path) as file:
                words = [line.split() for line in file]
        except OSError:
            continue
        found = [row[1] for row in words if len(row) > 1 and row[0] == "nameserver"]
        if good := [each for each in found if ":" not in each and not each.startswith("127.")]:
            return good[:3]
    return []


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info else ""


def _alias(link: Any) -> str:
    return link.get_attr("IFLA_IFALIAS") or ""


def _ours(link: Any) -> bool:
    return _alias(link).startswith(BRIDGE_ALIAS)


def _marks(link: Any) -> dict[str, str]:
    """Return the words of a tap's alias, if it is one of ours: vm, nic, lladdr."""
    alias = _alias(link)
    if not alias.startswith(TAP_ALIAS):
        return {}
    found = dict(word.partition("=")[::2] for word in alias.split()[1:])
    return found if {"vm", "nic", "lladdr"} <= found.keys() and found["nic"].isdigit() else {}


def _words(err: NetlinkError) -> str:
    """Return what the kernel says, in its own words if it has any."""
    extra = err.args[1] if len(err.args) > 1 else ""
    return str(extra) if extra else os.strerror(err.code)
