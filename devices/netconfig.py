"""What a network device shows its driver: features, and the configuration space (virtio 1.2 §5.1).

Read-only but for the address, which legacy drivers may write:

     0 u8[6] mac     6 u16 status     8 u16 max_virtqueue_pairs     10 u16 mtu
    12 u32 speed in Mb/s, or all ones     16 u8 duplex
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from devices import nethdr as hdr

S_LINK_UP: Final = 1
S_ANNOUNCE: Final = 2
SPEED: Final = 10_000  # Mb/s, what one has to say
NO_SPEED: Final = 0xFFFF_FFFF
FULL_DUPLEX: Final = 1
NO_DUPLEX: Final = 0xFF

_CONFIG: Final = Struct("<6sHHHIB")
_ALWAYS: Final = (
    hdr.NET_F_MAC
    | hdr.NET_F_STATUS
    | hdr.NET_F_MRG_RXBUF
    | hdr.NET_F_CTRL_VQ
    | hdr.NET_F_CTRL_RX
    | hdr.NET_F_CTRL_RX_EXTRA
    | hdr.NET_F_CTRL_VLAN
    | hdr.NET_F_CTRL_MAC_ADDR
    | hdr.NET_F_GUEST_ANNOUNCE
    | hdr.NET_F_SPEED_DUPLEX
)


def offered(backend: int, mtu: int, pairs: int) -> int:
    """Return the features of a device with a backend of these; mtu 0: not told."""
    features = backend | _ALWAYS | hdr.NET_F_MTU * (mtu > 0) | hdr.NET_F_MQ * (pairs > 1)
    return features | hdr.NET_F_CTRL_GUEST_OFFLOADS * (features & hdr.GUEST_OFFLOADS > 0)


def config_space(lladdr: bytes, pairs: int, mtu: int, *, up: bool, announcing: bool) -> bytes:
    """Return the configuration space, little-endian."""
    return _CONFIG.pack(
        lladdr,
        S_LINK_UP * up | S_ANNOUNCE * announcing,
        pairs,
        mtu,
        SPEED if up else NO_SPEED,
        FULL_DUPLEX if up else NO_DUPLEX,
    )
