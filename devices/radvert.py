"""Router advertisements of a local interface (RFC 4861 §6, RFC 4862, RFC 8106).

The host is the guest's only router. An advertisement tells its hardware address, the MTU, the
prefix, resolvers and search domains. With a prefix of 64 bits the guest makes its own address
from it; one of another length is told as on-link only, since no guest makes an address from it.

Prefix and resolvers are good for ever: address and prefix are fixed as long as the VM runs. The
router's own lifetime has 16 bits, so somebody repeats the advertisement (`netlocal.announce`).

Neighbour solicitations are left to the host's stack, which owns `router6` on the tap, and so is
DHCPv6: nothing here tells a guest to use it (flags M and O are 0), and its messages pass.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from devices.frames import (
    IPV6,
    Ethernet,
    Packet,
    ethernet,
    icmp6,
    sound_icmpv6,
    wire_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.netsettings import Settings

ROUTER_SOLICIT: Final = 133
ROUTER_ADVERT: Final = 134

LIFETIME: Final = 65535  # seconds; the most there is (RFC 8319 §4)
_FOREVER: Final = 0xFFFF_FFFF
_HOP_LIMIT: Final = 64
_MIN_MTU: Final = 1280  # IPv6 has none smaller (RFC 8200 §5)
_ON_LINK: Final = 0x80
_AUTONOMOUS: Final = 0x40

_HEAD: Final = Struct("!BBHBBHII")  # RFC 4861 §4.2
_PREFIX: Final = Struct("!BBBBIII16s")  # §4.6.2
_SOURCE_LLADDR, _MTU, _RDNSS, _DNSSL = 1, 5, 25, 31  # option types; 3 is the prefix

_UNSPECIFIED: Final = bytes(16)
ALL_NODES: Final = bytes.fromhex("ff020000000000000000000000000001")
ALL_NODES_MAC: Final = bytes.fromhex("333300000001")
_ALL_ROUTERS: Final = bytes.fromhex("ff020000000000000000000000000002")


class Advertiser:
    """Says the same to whoever asks."""

    def __init__(self, settings: Settings) -> None:
        self._lladdr, self._address = settings.host_lladdr, settings.router6
        self._message = _HEAD.pack(ROUTER_ADVERT, 0, 0, _HOP_LIMIT, 0, LIFETIME, 0, 0) + b"".join(
            _options(settings)
        )

    def unsolicited(self) -> bytes:
        """Return the frame for all nodes."""
        return self._frame(ALL_NODES_MAC, ALL_NODES)

    def answer(self, frame: bytes, head: Ethernet, packet: Packet) -> list[bytes] | None:
        """Answer a good router solicitation; None: it is none (RFC 4861 §6.1.1)."""
        message = sound_icmpv6(frame, packet)
        if message is None or packet.ttl != 255 or len(message) < 8:
            return None
        if message[0] != ROUTER_SOLICIT or message[1] != 0:
            return None
        if packet.dst not in (_ALL_ROUTERS, self._address) or head.src[0] & 1:
            return None
        anonymous = packet.src == _UNSPECIFIED
        if packet.src[0] == 0xFF or not _sound_options(message, 8, anonymous=anonymous):
            return None
        # To all nodes if it has no address yet. On Ethernet always to the one that asked.
        return [self._frame(head.src, ALL_NODES if anonymous else packet.src)]

    def _frame(self, dst_mac: bytes, dst: bytes) -> bytes:
        packet = icmp6(self._address, dst, self._message)
        return ethernet(dst_mac, self._lladdr, IPV6, packet)


def _sound_options(message: bytes, at: int, *, anonymous: bool) -> bool:
    """Check a solicitation's options: none empty or cut short; no lladdr without an address."""
    while at < len(message):
        if at + 2 > len(message) or message[at + 1] == 0:
            return False
        if anonymous and message[at] == _SOURCE_LLADDR:
            return False
        at += 8 * message[at + 1]
    return at == len(message)


def _options(settings: Settings) -> Iterator[bytes]:
    """Yield what an advertisement tells beside the router's lifetime."""
    yield bytes((_SOURCE_LLADDR, 1)) + settings.host_lladdr
    if settings.mtu >= _MIN_MTU:
        yield bytes((_MTU, 1, 0, 0)) + settings.mtu.to_bytes(4)
    length = settings.length6
    prefix = int.from_bytes(settings.address6) >> 128 - length << 128 - length
    flags = _ON_LINK | (_AUTONOMOUS if length == 64 else 0)
    yield _PREFIX.pack(3, 4, length, flags, _FOREVER, _FOREVER, 0, prefix.to_bytes(16))
    if settings.dns6:
        yield _list(_RDNSS, b"".join(settings.dns6))
    names = settings.search or ((settings.domain,) if settings.domain else ())
    if names:
        yield _list(_DNSSL, b"".join(map(wire_name, names)))


def _list(kind: int, data: bytes) -> bytes:
    """Return an option of RFC 8106 §5, padded to units of 8 bytes."""
    padded = data + bytes(-len(data) % 8)
    return bytes((kind, 1 + len(padded) // 8, 0, 0)) + _FOREVER.to_bytes(4) + padded
