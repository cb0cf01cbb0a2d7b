"""What the host end of a local interface says to its guest: DHCP, and router advertisements.

A local interface is a link between guest and host alone (vmd, reference §e.3). The network device
shows each frame of the guest to `Local` before it goes to the tap:

    if local.wants(head) and (frames := local.answer(frame, partial=...)) is not None:
        the frame stays here, and `frames` go to the guest, in order
    else:
        the frame goes on to the tap, unchanged

`wants` looks at the first HEAD bytes of a frame, those after the virtio header, and is cheap;
fewer bytes do for a shorter frame. `answer` wants the whole frame, and returns

    None            not ours, or nothing we understand: the host's stack may have it
    []              ours, and it gets no answer: DHCPDECLINE, DHCPRELEASE
    [frame, ...]    ours: these are the answers, complete with checksums, without virtio header

`partial` says that the guest left its transport checksum to us (VIRTIO_NET_HDR_F_NEEDS_CSUM), so
that there is none to verify. Answers are at most MAX_FRAME bytes each, whatever the MTU, and
there is at most one of them. A guest that has no buffer for one loses it and asks again, as on
any network.

`announce()` returns what to send unasked: whenever the driver becomes ready or the link comes up,
and then every ANNOUNCE_EVERY seconds; [] if there is nothing to say.

Frames with a VLAN tag are not ours, as in vmd. Neither ARP nor neighbour discovery is answered
here: the host's own stack owns its addresses. No frame makes any of this raise. The settings are
those of `netsettings`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from devices import frames
from devices.dhcp import CLIENT_PORT, SERVER_PORT, Responder
from devices.netsettings import parse
from devices.radvert import ROUTER_SOLICIT, Advertiser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HEAD: Final = 64  # bytes of a frame that `wants` may look at
MAX_FRAME: Final = 1514  # bytes
ANNOUNCE_EVERY: Final = 18000.0  # seconds; an advertisement is good for 65535 (RFC 8319)

_TTL: Final = 16  # of our datagrams, as in vmd
_IPV4: Final = frames.IPV4.to_bytes(2)
_IPV6: Final = frames.IPV6.to_bytes(2)
_UDP: Final = bytes((frames.UDP,))
_ICMPV6: Final = bytes((frames.ICMPV6,))
_SERVER: Final = SERVER_PORT.to_bytes(2)
_SOLICIT: Final = bytes((ROUTER_SOLICIT,))
_EVERYWHERE: Final = b"\xff" * 4


class Local:
    """The host end of one local interface. For one thread."""

    def __init__(
        self, settings: Mapping[str, Any], warn: Callable[[str], None] = lambda _: None
    ) -> None:
        """Take settings as `netsettings` defines them. Raises ConfigError.

        `warn` gets sentences about what the guest complains of, as often as it does so.
        """
        self._settings = parse(settings)
        self._warn = warn
        self._dhcp = Responder(self._settings)
        self._router = Advertiser(self._settings) if self._settings.address6 else None
        self.lladdr = self._settings.lladdr  # the guest's; changes with its MAC address
        self.counts: dict[str, int] = {}  # how many answers of which kind

    def wants(self, head: bytes | memoryview) -> bool:
        """Tell cheaply whether a frame that begins with `head` might be ours."""
        kind = head[12:14]
        if kind == _IPV4:
            # The port is where it is unless the IPv4 head has options.
            return head[23:24] == _UDP and (head[36:38] == _SERVER or head[14:15] != b"\x45")
        return kind == _IPV6 and head[20:21] == _ICMPV6 and head[54:55] == _SOLICIT

    def answer(self, frame: bytes, *, partial: bool = False) -> list[bytes] | None:
        """Return the answers to a frame that is ours; None if it is not."""
        head = frames.parse_ethernet(frame)
        if head is None or head.tags:
            return None
        if head.ethertype == frames.IPV4:
            return self._dhcp_answer(frame, head, partial=partial)
        if head.ethertype == frames.IPV6 and self._router is not None:
            packet = frames.parse_ipv6(frame, head.at)
            found = self._router.answer(frame, head, packet) if packet else None
            if found:
                self._count("advertisement")
            return found
        return None

    def announce(self) -> list[bytes]:
        """Return what the guest should hear unasked."""
        if self._router is None:
            return []
        self._count("advertisement")
        return [self._router.unsolicited()]

    def _dhcp_answer(
        self, frame: bytes, head: frames.Ethernet, *, partial: bool
    ) -> list[bytes] | None:
        """Answer what a DHCP client or relay of this very guest sends to us or to everybody."""
        ours = self._settings
        if head.src != self.lladdr or head.dst not in (frames.BROADCAST, ours.host_lladdr):
            return None
        packet = frames.parse_ipv4(frame, head.at)
        if packet is None or packet.dst not in (_EVERYWHERE, ours.host):
            return None
        datagram = frames.parse_udp(frame, packet, partial=partial)
        if datagram is None or datagram.dst_port != SERVER_PORT:
            return None
        if datagram.src_port not in (CLIENT_PORT, SERVER_PORT):
            return None
        answer = self._dhcp.answer(datagram.payload, self.lladdr)
        if answer is None:
            return None
        self._count(answer.kind)
        if answer.kind == "decline":
            self._warn("the guest says that somebody else uses its address (DHCPDECLINE)")
        if not answer.payload:
            return []
        ports = (SERVER_PORT, answer.port)
        reply = frames.udp4(ours.host, answer.to, ports, answer.payload, _TTL)
        to = frames.BROADCAST if answer.broadcast else self.lladdr
        return [frames.ethernet(to, ours.host_lladdr, frames.IPV4, reply)]

    def _count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
