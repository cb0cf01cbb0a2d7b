"""Keys of vm.yaml about networks, and what their values must have to do with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.kinds import Bool, Choice, Int, Path, Rate
from config.model import NicConfig, SwitchConfig
from config.netkinds import IFNAMSIZ, InterfaceName, Lladdr, PerSecond, Port, too_long
from config.tables import NAME, Key, ListOf, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from config.model import FileConfig, PortConfig, VmConfig

BRIDGE_PREFIX: Final = "vm-"  # the bridge of switch lan is vm-lan
MTU: Final = Int(68, 65521)  # a tap's largest; the least that IPv4 works with

# What a NIC of type `user` cannot have: passt has a network of its own.
_NOT_USER: Final = ("switch", "local", "tap", "up", "group", "nat")
# What one can have that another program serves.
_VHOST: Final = ("vhost_user", "lladdr", "mtu", "queues")


def _check_nic(nic: NicConfig) -> Iterator[tuple[str, str]]:
    """Compare the keys of one interface."""
    usual = NicConfig()
    if nic.vhost_user:
        for key in NicConfig._fields:
            if key not in _VHOST and getattr(nic, key) != getattr(usual, key):
                yield key.replace("_", "-"), "has no meaning beside 'vhost-user'"
        return
    if nic.type == "user":
        for key in _NOT_USER:
            if getattr(nic, key) != getattr(usual, key):
                yield key, "has no meaning beside 'type: user': passt is a network of its own"
        if nic.queues > 1:
            yield "queues", "must be 1 with 'type: user': passt has one stream"
    if nic.local and nic.switch:
        yield "local", "not allowed beside 'switch': a bridge takes all frames of its interfaces"
    if nic.local and nic.mtu and nic.mtu < 576:
        yield "mtu", "must be 576 or more for a local interface: DHCP answers are that long"
    if nic.nat and not nic.local:
        yield "nat", "needs 'local: true' beside it: only there the guest's address is known"
    if nic.ports and not (nic.nat or nic.type == "user"):
        yield "ports", "needs 'nat: true' or 'type: user' beside it"
    if nic.tap.startswith("fd:"):
        for key in ("switch", "local", "group", "nat"):
            if getattr(nic, key) != getattr(usual, key):
                yield key, "not allowed beside 'tap: fd:N': who opened the tap has set it up"
        if nic.queues > 1:
            yield "queues", "must be 1 with 'tap: fd:N': that is one queue"


NIC: Final = Table(
    "interface",
    (
        Key(
            "type",
            Choice("tap", "user"),
            "`tap` is an interface of the host, which root makes, or has made before. `user` "
            "goes through passt(1): no rights are needed, and nobody reaches the guest but by "
            "`ports`.",
        ),
        Key("switch", NAME, "The switch that it joins.", absent="none"),
        Key(
            "local",
            Bool(),
            "Make a link between host and guest alone, with addresses from `local-prefix`, which "
            "the guest gets by DHCP.",
        ),
        Key(
            "tap",
            InterfaceName(or_fd=True),
            "The host's interface, made if it is not there. `fd:5` is one that pyvmctl has "
            "inherited as that descriptor.",
            absent="vm3if0 for interface 0 of the VM with the id 3",
        ),
        Key(
            "lladdr",
            Lladdr(),
            "The guest's MAC address.",
            absent="the same at every start on this host",
        ),
        Key(
            "locked",
            Bool(),
            "Let only frames pass that bear the guest's own MAC address, in both directions.",
        ),
        Key(
            "mtu",
            MTU,
            "Largest packet in bytes; the guest is told.",
            absent="the switch's, or else 1500",
        ),
        Key("queues", Int(1, 8), "Queue pairs; more than one helps a guest with many CPUs."),
        Key("link", Bool(), "Start with the cable plugged in; see `pyvmctl nic`."),
        Key("up", Bool(), "Let the host's interface be up."),
        Key(
            "group",
            Int(1, 0x7FFF_FFFF),
            "Interface group of the host's interface, for rules of a firewall (nft `iifgroup`).",
            absent="the switch's, or none",
        ),
        Key("rx-rate", Rate(), "The most that the guest gets, as `10M/s`.", absent="no limit"),
        Key("tx-rate", Rate(), "The most that it may send.", absent="no limit"),
        Key("rx-pps", PerSecond(), "The most frames per second to it.", absent="no limit"),
        Key("tx-pps", PerSecond(), "The most frames per second from it.", absent="no limit"),
        Key(
            "nat",
            Bool(),
            "Let the guest reach what the host reaches, under the host's addresses. IPv4 only.",
        ),
        Key(
            "ports",
            ListOf(Port(), 64),
            "Ports of the host that lead to the guest: `[ADDRESS:]PORT:GUESTPORT[/tcp]`, or "
            "`/udp`. Without an address all of the host's count, 127.0.0.1 as well.",
            absent="none",
        ),
        Key(
            "vhost-user",
            Path(),
            "The socket of a program that takes and gives the guest's frames; see "
            "[vhost-user.md](vhost-user.md). Beside it there are `lladdr`, `mtu` and `queues`.",
            absent="a tap",
        ),
    ),
    NicConfig,
    check=_check_nic,
)


def _check_switch(switch: SwitchConfig) -> Iterator[tuple[str, str]]:
    if switch.bridge and not switch.up:
        yield "up", "not allowed beside 'bridge': a bridge that is not ours stays as it is"
    if not switch.bridge and too_long(BRIDGE_PREFIX + switch.name):
        most = IFNAMSIZ - 1 - len(BRIDGE_PREFIX)
        yield "name", f"more than {most} characters: its bridge could not be named; give 'bridge'"


SWITCH: Final = Table(
    "switch",
    (
        Key("name", NAME, "The switch's name; the key is the name."),
        Key(
            "bridge",
            InterfaceName(),
            "A bridge of the host. It must be there, and stays as it is.",
            absent="vm-NAME, made with the first interface and gone with the last",
        ),
        Key("locked", Bool(), "Lock all of its interfaces to their MAC addresses."),
        Key(
            "mtu",
            MTU,
            "Largest packet in bytes, for interfaces that have no `mtu`.",
            absent="the bridge's",
        ),
        Key("up", Bool(), "Let the bridge be up."),
        Key(
            "group",
            Int(1, 0x7FFF_FFFF),
            "Interface group, for interfaces that have none.",
            absent="none",
        ),
    ),
    SwitchConfig,
    check=_check_switch,
)


def check_vm(vm: VmConfig) -> Iterator[tuple[str, str]]:
    """Look at the interfaces of one VM together."""
    names = [switch.name for switch in vm.switches]
    for index, nic in enumerate(vm.interfaces):
        if nic.switch and nic.switch not in names:
            known = f"there are: {', '.join(names)}" if names else "the file has no 'switches'"
            yield "interfaces", f"[{index}].switch: no switch {nic.switch!r} ({known})"
    yield from (("interfaces", text) for text in _repeated([vm]))


def check_file(file: FileConfig) -> Iterator[tuple[str, str]]:
    """Look at the interfaces of all VMs together. What one VM repeats has been told already."""
    within = {text for vm in file.vms for text in _repeated([vm])}
    yield from (("vms", text) for text in _repeated(file.vms) if text not in within)


def _repeated(vms: Sequence[VmConfig]) -> Iterator[str]:
    """Complain about what only one interface can have."""
    seen: dict[tuple[str, str], str] = {}
    ports: list[tuple[PortConfig, str]] = []
    for vm in vms:
        for index, nic in enumerate(vm.interfaces):
            here = f"{vm.name}.interfaces[{index}]"
            for key in ("lladdr", "tap"):
                value = getattr(nic, key)
                if value and (other := seen.setdefault((key, value), here)) != here:
                    yield f"{here}.{key}: {value} is that of {other} already"
            for port in nic.ports:
                for before, other in ports:
                    if _clash(port, before):
                        yield f"{here}.ports: {port.port}/{port.protocol} leads to {other} already"
                        break
                ports.append((port, here))


def _clash(one: PortConfig, other: PortConfig) -> bool:
    """Tell whether two forwards begin at the same port of the host."""
    same = (one.port, one.protocol) == (other.port, other.protocol)
    return same and (not one.address or not other.address or one.address == other.address)
