"""Which frames pass between a guest and its network: by hardware address and by VLAN.

    from the guest    a locked interface lets only frames through that say who they come from
    to the guest      a locked one only what is for the guest; then what its driver asked for

`from_needed` and `to_needed` are False as long as every frame passes: the fast path need not even
fetch a frame's first bytes then. An interface that is not locked never looks at what the guest
sends, and looks at what it gets only once its driver has left promiscuous mode.

**Locked** is vmd's `locked lladdr` (reference §e.2): the source of each frame is the assigned MAC
address, which the guest cannot change, and unicast frames for others do not reach it, whatever
mode its driver sets. vmd looks at the Ethernet head alone. Here the same address must also stand
wherever a frame tells neighbours which hardware address its sender has: ARP and RARP (sender),
neighbour discovery (link-layer address options), DHCP and BOOTP requests (`chaddr`), each behind
up to two VLAN tags. So a locked guest cannot take another's place in a neighbour's table or
another's lease, and cannot be a relay agent. IP addresses are not checked, and router
advertisements pass, as in vmd.

**Receive modes** and tables are those of the control queue (virtio 1.2 §5.1.6.5). A device begins
promiscuous, as drivers without a control queue need, and with empty tables. A table longer than
TABLE_MAX lets everything of its kind through, since passing too much is allowed and losing a
frame is not. A frame tagged with VLAN 0 has a priority only, and is in no VLAN.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices import frames

if TYPE_CHECKING:
    from collections.abc import Mapping

HEAD_FROM: Final = 256  # bytes of a frame that `from_guest` wants, or all of a shorter one
HEAD_TO: Final = 18  # `to_guest`
TABLE_MAX: Final = 64  # addresses of each kind
CONTROL_MAX: Final = 8 + 6 * 2 * 4096  # bytes after class and command that `control` looks at

F_CTRL_RX: Final = 1 << 18  # virtio 1.2 §5.1.3
F_CTRL_VLAN: Final = 1 << 19
F_CTRL_RX_EXTRA: Final = 1 << 20
F_CTRL_MAC_ADDR: Final = 1 << 23

MODES: Final = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")  # commands of RX
_EXTRA: Final = 2  # from this one on they need F_CTRL_RX_EXTRA
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1  # commands of MAC
VLAN_ADD, VLAN_DEL = 0, 1  # commands of VLAN

_IPV4, _IPV6, _ARP, _RARP, _VLAN, _QINQ = (
    kind.to_bytes(2)
    for kind in (frames.IPV4, frames.IPV6, frames.ARP, 0x8035, frames.VLAN, frames.QINQ)
)
_ARP_ETHERNET: Final = b"\0\1"
_BOOTPS: Final = b"\0\x43"
_ND_OPTIONS: Final = {133: 8, 134: 16, 135: 24, 136: 24, 137: 40}  # type → where options begin
_LLADDR_OPTIONS: Final = (1, 2)
_EXTENSIONS: Final = (0, 43, 60)


class Class(IntEnum):
    """Classes of commands that are ours."""

    RX = 0
    MAC = 1
    VLAN = 2


class Filter:
    """The filter of one interface. For one thread."""

    def __init__(self, lladdr: bytes, *, locked: bool) -> None:
        self._assigned, self._locked = lladdr, locked
        self._features = 0
        self.reset()

    def reset(self) -> None:
        """Return to what a driver finds: the assigned address, promiscuous, empty tables."""
        self.lladdr = self._assigned
        self.modes = dict.fromkeys(MODES, False) | {"promisc": True}
        self._uni: frozenset[bytes] | None = frozenset()  # None: too many, so all
        self._multi: frozenset[bytes] | None = frozenset()
        self._vlans = 0  # one bit each
        self.activate(0)

    def activate(self, features: int) -> None:
        """Begin with the features a driver has accepted."""
        self._features = features
        self._settle()

    def _settle(self) -> None:
        self.from_needed = self._locked
        self.to_needed = self._locked or not self.modes["promisc"]

    # Frames.

    def from_guest(self, head: bytes | memoryview) -> bool:
        """Tell whether a frame may leave; `head` is its first HEAD_FROM bytes."""
        if not self._locked:
            return True
        if head[6:12] != self._assigned:
            return False
        kind = head[12:14]
        if kind == _IPV4:
            return head[23:24] != b"\x11" or self._honest_bootp(head, 14)
        if kind in (_VLAN, _QINQ):
            ethernet = frames.parse_ethernet(bytes(head))
            if ethernet is None:
                return False
            at, kind = ethernet.at, ethernet.ethertype.to_bytes(2)
        else:
            at = frames.ETHERNET
        if kind == _IPV6:
            return self._honest_neighbour(head, at)
        if kind in (_ARP, _RARP):
            sender = head[at + 8 : at + 14]
            return head[at : at + 2] == _ARP_ETHERNET and sender == self._assigned
        return kind != _IPV4 or self._honest_bootp(head, at)

    def to_guest(self, head: bytes | memoryview) -> bool:
        """Tell whether a frame is for the guest; `head` is its first HEAD_TO bytes."""
        dst = bytes(head[:6])
        group = dst[:1] != b"" and dst[0] & 1
        if self._locked and not group and dst != self._assigned:
            return False
        modes = self.modes
        if modes["promisc"]:
            return True
        if head[12:14] == _VLAN and self._features & F_CTRL_VLAN:
            vlan = int.from_bytes(head[14:16]) & 0xFFF
            if vlan and not self._vlans >> vlan & 1:
                return False
        if not group:
            if modes["nouni"]:
                return False
            return dst == self.lladdr or modes["alluni"] or self._uni is None or dst in self._uni
        if dst == frames.BROADCAST:
            return not modes["nobcast"]
        if modes["nomulti"]:
            return False
        return modes["allmulti"] or self._multi is None or dst in self._multi

    # The control queue.

    def control(self, kind: int, command: int, data: bytes) -> bool:
        """Do what a driver commands; False is VIRTIO_NET_ERR, and nothing has changed then.

        `data` is what follows class and command, whole. What belongs to other classes is False.
        """
        match kind:
            case Class.RX if self._features & F_CTRL_RX and len(data) == 1:
                extra = command >= _EXTRA and not self._features & F_CTRL_RX_EXTRA
                if extra or command >= len(MODES):
                    return False
                self.modes[MODES[command]] = bool(data[0])
            case Class.MAC if command == MAC_TABLE_SET and self._features & F_CTRL_RX:
                return self._set_tables(data)
            case Class.MAC if command == MAC_ADDR_SET and self._features & F_CTRL_MAC_ADDR:
                return self.set_lladdr(data)
            case Class.VLAN if self._features & F_CTRL_VLAN and len(data) == 2:
                bit = 1 << int.from_bytes(data, "little")
                if bit >> 4096 or command not in (VLAN_ADD, VLAN_DEL):
                    return False
                self._vlans = self._vlans | bit if command == VLAN_ADD else self._vlans & ~bit
            case _:
                return False
        self._settle()
        return True

    def set_lladdr(self, lladdr: bytes) -> bool:
        """Give the interface another address; False if it is locked or that is no station's."""
        if self._locked or len(lladdr) != 6 or lladdr[0] & 1 or not any(lladdr):
            return False
        self.lladdr = bytes(lladdr)
        return True

    def _set_tables(self, data: bytes) -> bool:
        """Take both tables; each is a little-endian count and as many addresses."""
        tables: list[frozenset[bytes] | None] = []
        at = 0
        if len(data) > CONTROL_MAX:
            return False
        for _ in range(2):
            if at + 4 > len(data):
                return False
            count = int.from_bytes(data[at : at + 4], "little")
            end = at + 4 + 6 * count
            if end > len(data):
                return False
            macs = (data[i : i + 6] for i in range(at + 4, end, 6))
            tables.append(frozenset(macs) if count <= TABLE_MAX else None)
            at = end
        if at != len(data):
            return False
        self._uni, self._multi = tables
        return True

    # What a locked guest says about itself.

    def _honest_bootp(self, head: bytes | memoryview, at: int) -> bool:
        """Check the client's hardware address in a DHCP or BOOTP request."""
        if head[at + 9 : at + 10] != b"\x11" or int.from_bytes(head[at + 6 : at + 8]) & 0x1FFF:
            return True  # no UDP, or a fragment without its head
        at += (head[at] & 15) * 4
        if head[at + 2 : at + 4] != _BOOTPS:
            return len(head) >= at + 4
        at += 8
        return head[at : at + 1] == b"\2" or head[at + 28 : at + 34] == self._assigned

    def _honest_neighbour(self, head: bytes | memoryview, at: int) -> bool:
        """Check the link-layer addresses that neighbour discovery tells."""
        if len(head) < at + 40:
            return False
        end = at + 40 + int.from_bytes(head[at + 4 : at + 6])
        protocol, at = head[at + 6], at + 40
        while protocol in _EXTENSIONS:
            if at + 2 > len(head):
                return False
            protocol, at = head[at], at + 8 * (head[at + 1] + 1)
        if protocol != frames.ICMPV6:
            return True
        begin = _ND_OPTIONS.get(head[at]) if at < len(head) else 0
        if begin is None:
            return True
        at += begin or end
        while at < end:
            # What lies behind HEAD_FROM is hidden, and no honest guest has so much before it.
            if at + 8 > len(head) or head[at + 1] == 0:
                return False
            if head[at] in _LLADDR_OPTIONS and head[at + 2 : at + 8] != self._assigned:
                return False
            at += 8 * head[at + 1]
        return begin != 0

    # Life of the process.

    def save(self) -> dict[str, Any]:
        """Return what `load` needs, as plain JSON values."""
        return {
            "lladdr": self.lladdr.hex(),
            "modes": [mode for mode in MODES if self.modes[mode]],
            "uni": None if self._uni is None else sorted(mac.hex() for mac in self._uni),
            "multi": None if self._multi is None else sorted(mac.hex() for mac in self._multi),
            "vlans": f"{self._vlans:x}",
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `save` described, before `activate`. Raises ConfigError."""
        try:
            self.lladdr = bytes.fromhex(state["lladdr"])
            self.modes = {mode: mode in state["modes"] for mode in MODES}
            self._uni, self._multi = (
                None if state[key] is None else frozenset(bytes.fromhex(mac) for mac in state[key])
                for key in ("uni", "multi")
            )
            self._vlans = int(state["vlans"], 16)
        except (KeyError, TypeError, ValueError) as err:
            raise ConfigError(f"the saved filter makes no sense: {err!r}") from err
        self._settle()
