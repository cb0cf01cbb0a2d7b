"""Feature bits of a network device, and the header in front of every frame (virtio 1.2 §5.1).

    0 u8 flags      1 u8 gso_type   2 u16 hdr_len      4 u16 gso_size
    6 u16 csum_start     8 u16 csum_offset     10 u16 num_buffers, unless a legacy driver is
                                                  without MRG_RXBUF (§5.1.6.1)

What a guest writes there tells the host's network stack where to sum and how to cut. `HeaderRules`
looks at a private copy, and what goes on is built from that.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

NET_F_CSUM: Final = 1 << 0  # the device takes frames whose checksum is not complete
NET_F_GUEST_CSUM: Final = 1 << 1  # and so does the driver
NET_F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
NET_F_MTU: Final = 1 << 3
NET_F_MAC: Final = 1 << 5
NET_F_GUEST_TSO4: Final = 1 << 7
NET_F_GUEST_TSO6: Final = 1 << 8
NET_F_GUEST_ECN: Final = 1 << 9
NET_F_GUEST_UFO: Final = 1 << 10
NET_F_HOST_TSO4: Final = 1 << 11
NET_F_HOST_TSO6: Final = 1 << 12
NET_F_HOST_ECN: Final = 1 << 13
NET_F_HOST_UFO: Final = 1 << 14
NET_F_MRG_RXBUF: Final = 1 << 15
NET_F_STATUS: Final = 1 << 16
NET_F_CTRL_VQ: Final = 1 << 17
NET_F_CTRL_RX: Final = 1 << 18
NET_F_CTRL_VLAN: Final = 1 << 19
NET_F_CTRL_RX_EXTRA: Final = 1 << 20
NET_F_GUEST_ANNOUNCE: Final = 1 << 21
NET_F_MQ: Final = 1 << 22
NET_F_CTRL_MAC_ADDR: Final = 1 << 23
NET_F_GUEST_USO4: Final = 1 << 54
NET_F_GUEST_USO6: Final = 1 << 55
NET_F_HOST_USO: Final = 1 << 56
NET_F_SPEED_DUPLEX: Final = 1 << 63

#: What CTRL_GUEST_OFFLOADS switches, by the same bits as the features (§5.1.6.5.6).
GUEST_OFFLOADS: Final = (
    NET_F_GUEST_CSUM
    | NET_F_GUEST_TSO4
    | NET_F_GUEST_TSO6
    | NET_F_GUEST_ECN
    | NET_F_GUEST_UFO
    | NET_F_GUEST_USO4
    | NET_F_GUEST_USO6
)

#: Which bit needs which (§5.1.3.1). That ECN needs one of two TSO bits is no pair, and not here.
DEPENDENCIES: Final = (
    (NET_F_GUEST_TSO4, NET_F_GUEST_CSUM),
    (NET_F_GUEST_TSO6, NET_F_GUEST_CSUM),
    (NET_F_GUEST_UFO, NET_F_GUEST_CSUM),
    (NET_F_GUEST_USO4, NET_F_GUEST_CSUM),
    (NET_F_GUEST_USO6, NET_F_GUEST_CSUM),
    (NET_F_HOST_TSO4, NET_F_CSUM),
    (NET_F_HOST_TSO6, NET_F_CSUM),
    (NET_F_HOST_UFO, NET_F_CSUM),
    (NET_F_HOST_USO, NET_F_CSUM),
    (NET_F_CTRL_RX, NET_F_CTRL_VQ),
    (NET_F_CTRL_VLAN, NET_F_CTRL_VQ),
    (NET_F_GUEST_ANNOUNCE, NET_F_CTRL_VQ),
    (NET_F_MQ, NET_F_CTRL_VQ),
    (NET_F_CTRL_MAC_ADDR, NET_F_CTRL_VQ),
)

HDR_F_NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

HEADER: Final = Struct("<BBHHHH")  # without num_buffers
HEADER_BYTES: Final = 12
OLD_HEADER_BYTES: Final = 10  # of a legacy driver without MRG_RXBUF

ETHERNET: Final = 14  # bytes of a frame's head
VLAN_TAG: Final = 4  # bytes more
#: Longest frame: 64 KiB less one of IP, its Ethernet head, a VLAN tag.
MAX_FRAME: Final = 65535 + ETHERNET + VLAN_TAG
#: Pieces one frame may be cut into. A segment of TCP carries 48 bytes at least (Linux's lower
#: bound); a guest that asks for smaller ones makes the host's work, not its own.
MAX_SEGMENTS: Final = 1400
KNOWN_MAX: Final = 256  # headers of frames that are remembered

_fields: Final = HEADER.unpack_from


class HeaderRules:
    """What one driver may ask for in the header of a frame it sends (§5.1.6.2)."""

    __slots__ = ("_csum", "_gso", "_known", "_rest", "zero")

    def __init__(self, features: int, header_bytes: int) -> None:
        """Take the features it has negotiated, and how long its headers are."""
        self.zero = bytes(header_bytes)
        self._rest = bytes(header_bytes - HEADER.size)
        self._known: dict[tuple[bytes, int], bytes] = {}
        self._csum = bool(features & NET_F_CSUM)
        kinds = {
            GSO_TCPV4: NET_F_HOST_TSO4,
            GSO_TCPV6: NET_F_HOST_TSO6,
            GSO_UDP: NET_F_HOST_UFO,
            GSO_UDP_L4: NET_F_HOST_USO,
        }
        gso = {kind for kind, bit in kinds.items() if features & bit}
        if features & NET_F_HOST_ECN:
            gso |= {kind | GSO_ECN for kind in gso & {GSO_TCPV4, GSO_TCPV6}}
        self._gso = frozenset(gso)

    def sanitized(self, header: bytes, size: int) -> bytes | None:
        """Return the header that a frame of `size` bytes goes on with; None: it does not.

        Only NEEDS_CSUM counts of the flags, and what no flag asks for becomes 0. The frames of a
        bulk transfer are alike, so answers are remembered.
        """
        known = self._known.get((header, size))
        if known is not None:
            return known
        good = self._judged(header, size)
        if good is not None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[header, size] = good
        return good

    def _judged(self, header: bytes, size: int) -> bytes | None:
        flags, gso_type, hdr_len, gso_size, start, offset = _fields(header)
        flags &= HDR_F_NEEDS_CSUM
        if gso_type:
            if (
                gso_type not in self._gso
                or not flags
                or not gso_size
                or size > gso_size * MAX_SEGMENTS
            ):
                return None
        elif flags:
            gso_size = hdr_len = 0
        else:
            return self.zero
        if not self._csum or start < ETHERNET or start + offset + 2 > size:
            return None
        if hdr_len > size:  # only a hint (§5.1.6.2.1)
            hdr_len = 0
        return HEADER.pack(flags, gso_type, hdr_len, gso_size, start, offset) + self._rest


def gso_types(offloads: int) -> frozenset[int]:
    """Return the gso types of received frames that a driver with these offloads takes."""
    kinds = {
        GSO_TCPV4: NET_F_GUEST_TSO4,
        GSO_TCPV6: NET_F_GUEST_TSO6,
        GSO_UDP: NET_F_GUEST_UFO,
        GSO_UDP_L4: NET_F_GUEST_USO4 | NET_F_GUEST_USO6,
    }
    taken = {kind for kind, bits in kinds.items() if offloads & bits}
    if offloads & NET_F_GUEST_ECN:
        taken |= {kind | GSO_ECN for kind in taken & {GSO_TCPV4, GSO_TCPV6}}
    return frozenset(taken | {GSO_NONE})
