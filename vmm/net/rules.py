"""Address translation for local interfaces, by nft(8).

Each interface has a table of its own, so that adding and removing it touches nobody's rules:

    inet pyvmd_TAP     from the guest: source address → the host's; from outside: port → guest
    inet pyvmd         only where we have switched IPv4 forwarding on: see below

Rules name the guest's one address and its tap, never a prefix. `ports` hold for connections from
elsewhere (prerouting) and from the host itself (output). For those to 127.0.0.1 the kernel must
let packets with a loopback address out of the tap (route_localnet); what the *guest* sends to
loopback addresses is dropped before anything else looks at it.

**Forwarding.** Translation needs net.ipv4.ip_forward. Where it is off, the host is no router, and
switching it on must not make it one for its neighbours: so table `inet pyvmd` drops all IPv4
forwarding but that of our taps, and with the last of them both the table and forwarding go. Where
forwarding is on already, we neither guard nor switch off anything. IPv6 is not translated: a host
that forwards IPv6 no longer hears the router advertisements it may live on.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from vmm.net import programs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from config.localnet import Link
    from config.model import PortConfig
    from vmm.net.plan import Nic

GUARD: Final = "pyvmd"
PREFIX: Final = "pyvmd_"
IP_FORWARD: Final = "ipv4/ip_forward"
_SYSCTL: Final = "/proc/sys/net"


def table_name(tap: str) -> str:
    """Return the name of a tap's table; nft allows no '-' there, and Linux no '/' in a tap's."""
    return PREFIX + tap.replace("-", "/")


def tap_of(table: str) -> str:
    """Return whose table it is, "" if not one of ours."""
    return table.removeprefix(PREFIX).replace("/", "-") if table.startswith(PREFIX) else ""


def write_sysctl(name: str, value: int) -> None:
    """Set net.NAME. Raises HostError."""
    try:
        with open(f"{_SYSCTL}/{name}", "w") as file:
            file.write(f"{value}\n")
    except OSError as err:
        raise HostError(f"cannot set net/{name} to {value}: {err.strerror}") from err


def text(nic: Nic, link: Link) -> str:
    """Return the table of one interface, as nft reads it."""
    tap, host, guest = nic.tap, link.host, link.guest
    outside = [f'iifname != "{tap}" {_forward(port, guest)}' for port in nic.ports]
    inside = [_forward(port, guest) for port in nic.ports]
    loopback = f'oifname "{tap}" ip saddr 127.0.0.0/8 snat ip to {host}'
    chains = {
        "prerouting": ("nat hook prerouting priority dstnat", outside),
        "output": ("nat hook output priority -100", inside),
        "postrouting": (
            "nat hook postrouting priority srcnat",
            [loopback, f'ip saddr {guest} oifname != "{tap}" masquerade'],
        ),
        "loopback": (
            "filter hook prerouting priority raw",
            [f'iifname "{tap}" ip daddr 127.0.0.0/8 drop'],
        ),
    }
    lines = [f"table inet {table_name(tap)} {{", f'comment "pyvmd: VM {nic.vm}, {nic.device}"']
    for name, (hook, rules) in chains.items():
        lines += [f"chain {name} {{", f"type {hook}; policy accept;", *rules, "}"]
    return "\n".join([*lines, "}", ""])


def _forward(port: PortConfig, guest: str) -> str:
    where = f"ip daddr {port.address}" if port.address else "fib daddr type local"
    return (
        f"meta nfproto ipv4 {where} {port.protocol} dport {port.port} "
        f"dnat ip to {guest}:{port.guest_port}"
    )


_GUARD: Final = f"""\
table inet {GUARD} {{
set taps {{ type ifname; }}
chain forward {{
type filter hook forward priority filter; policy accept;
iifname @taps accept
oifname @taps ct state established,related accept
oifname @taps ct status dnat accept
meta nfproto ipv4 drop
}}
}}
"""


def reaches_loopback(nic: Nic) -> bool:
    """Whether a forward begins at a loopback address."""
    return any(not port.address or port.address.startswith("127.") for port in nic.ports)


def set_up(nic: Nic, link: Link) -> None:
    """Translate for one interface, which is there. Raises HostError with nothing left of it."""
    tables = _tables()
    guarded = GUARD in tables
    wanted = text(nic, link)
    if not guarded and not _forwards():
        wanted, guarded = _GUARD + wanted, True
    if guarded:
        wanted += f'add element inet {GUARD} taps {{ "{nic.tap}" }}\n'
    if table_name(nic.tap) in tables:  # a forerunner's that nobody has cleared away
        wanted = f"delete table inet {table_name(nic.tap)}\n{wanted}"
    _nft(wanted)
    # The guard stands before the door is opened.
    if guarded:
        write_sysctl(IP_FORWARD, 1)
    if reaches_loopback(nic):
        write_sysctl(f"ipv4/conf/{nic.tap}/route_localnet", 1)


def sweep(taps: Iterable[str]) -> list[str]:
    """Remove the tables of all but these taps; return whose. Raises HostError."""
    if not programs.find("nft"):  # then there are no rules of ours
        return []
    there = set(taps)
    tables = _tables()
    ours = [table for table in tables if tap_of(table)]
    gone = [table for table in ours if tap_of(table) not in there]
    lines = [f"delete table inet {table}" for table in gone]
    if GUARD in tables:
        if len(gone) == len(ours):  # the last user has gone: the door is shut before the guard goes
            write_sysctl(IP_FORWARD, 0)
            lines.append(f"delete table inet {GUARD}")
        else:
            names = _guarded() - there
            lines += [f'delete element inet {GUARD} taps {{ "{name}" }}' for name in sorted(names)]
    if lines:
        _nft("\n".join([*lines, ""]))
    return [tap_of(table) for table in gone]


def tables() -> list[str]:
    """Return our tables, for `pyvmctl net`; [] if this user may not look."""
    with suppress(HostError):
        return [name for name in _tables() if name == GUARD or tap_of(name)]
    return []


def _forwards() -> bool:
    with open(f"{_SYSCTL}/{IP_FORWARD}") as file:
        return file.read().strip() != "0"


def _tables() -> list[str]:
    said = json.loads(_nft("", "-j", "list", "tables", "inet"))
    return [row["table"]["name"] for row in said["nftables"] if "table" in row]


def _guarded() -> set[str]:
    said = json.loads(_nft("", "-j", "list", "set", "inet", GUARD, "taps"))
    found = [row["set"].get("elem", []) for row in said["nftables"] if "set" in row]
    return {str(name) for name in (found[0] if found else [])}


def _nft(wanted: str, *words: str) -> str:
    path = programs.need("nft", "'nat: true'")
    status, said = programs.Run([path, *(words or ("-f", "-"))], wanted).wait()
    if status:
        first = said.strip().split("\n")[0]
        raise HostError(f"nft refuses: {first}", hint="is the kernel's nf_tables there?")
    return said
