"""Heads of Ethernet, IPv4, IPv6 and UDP: parsed, built, checksummed. Bytes in, bytes out.

A parser returns None for what is too short, inconsistent or not of its kind, and never raises:
the bytes come from a guest. Numbers inside are big-endian; addresses stay bytes.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

ETHERNET: Final = 14  # bytes of a head without VLAN tags
MIN_FRAME: Final = 60  # bytes, without the check sequence (IEEE 802.3); shorter ones are padded
BROADCAST: Final = b"\xff" * 6

IPV4, ARP, VLAN, IPV6, QINQ = 0x0800, 0x0806, 0x8100, 0x86DD, 0x88A8
UDP, ICMPV6 = 17, 58

_VLANS_MAX: Final = 2  # tags that a head may carry
_MORE_OR_OFFSET: Final = 0x3FFF  # of IPv4's fragment word: part of a larger datagram
_DONT_FRAGMENT: Final = 0x4000

_IPV4: Final = Struct("!BBHHHBBH4s4s")  # RFC 791 §3.1
_IPV6: Final = Struct("!IHBB16s16s")  # RFC 8200 §3
_UDP: Final = Struct("!HHHH")  # RFC 768
_EXTENSIONS: Final = frozenset((0, 43, 60))  # hop-by-hop, routing, destination (RFC 8200 §4)


class Ethernet(NamedTuple):
    """A frame's head."""

    dst: bytes  # 6
    src: bytes  # 6
    ethertype: int  # of the payload, behind the tags
    tags: tuple[int, ...]  # VLAN tag control words, outermost first
    at: int  # where the payload begins


class Packet(NamedTuple):
    """What an IPv4 or IPv6 head says; the payload is frame[at:end]."""

    src: bytes  # 4 or 16
    dst: bytes
    protocol: int  # of the payload; for IPv6 behind the extension headers
    ttl: int  # hop limit for IPv6
    at: int
    end: int  # without padding of the frame


class Datagram(NamedTuple):
    """UDP."""

    src_port: int
    dst_port: int
    payload: bytes


def ones_sum(data: bytes) -> int:
    """Return the one's complement sum of 16-bit words, an odd last byte padded (RFC 1071).

    2¹⁶ is 1 modulo 65535, so the remainder of the whole as one number is that sum. The sum 65535
    comes out as 0.
    """
    return int.from_bytes(data if len(data) % 2 == 0 else data + b"\0") % 0xFFFF


def checksum(data: bytes) -> int:
    """Return the Internet checksum of `data`, which holds at least one byte that is not 0."""
    return 0xFFFF - (ones_sum(data) or 0xFFFF)


def parse_ethernet(frame: bytes) -> Ethernet | None:
    """Read the head and up to two VLAN tags."""
    if len(frame) < ETHERNET:
        return None
    tags: list[int] = []
    at = ETHERNET
    ethertype = int.from_bytes(frame[12:14])
    while ethertype in (VLAN, QINQ):
        if len(tags) == _VLANS_MAX or len(frame) < at + 4:
            return None
        tags.append(int.from_bytes(frame[at : at + 2]))
        ethertype = int.from_bytes(frame[at + 2 : at + 4])
        at += 4
    return Ethernet(bytes(frame[:6]), bytes(frame[6:12]), ethertype, tuple(tags), at)


def parse_ipv4(frame: bytes, at: int) -> Packet | None:
    """Read an IPv4 head with a good checksum. None for a fragment, too."""
    if len(frame) < at + _IPV4.size:
        return None
    version, _, length, _, fragment, ttl, protocol, _, src, dst = _IPV4.unpack_from(frame, at)
    head = (version & 15) * 4
    if version >> 4 != 4 or head < _IPV4.size or not head <= length <= len(frame) - at:
        return None
    if fragment & _MORE_OR_OFFSET or ones_sum(bytes(frame[at : at + head])):
        return None
    return Packet(src, dst, protocol, ttl, at + head, at + length)


def parse_ipv6(frame: bytes, at: int) -> Packet | None:
    """Read an IPv6 head and its extension headers. A fragment keeps protocol 44."""
    if len(frame) < at + _IPV6.size:
        return None
    word, length, protocol, hops, src, dst = _IPV6.unpack_from(frame, at)
    at += _IPV6.size
    end = at + length
    if word >> 28 != 6 or end > len(frame):
        return None
    while protocol in _EXTENSIONS:  # each at least 8 bytes, so this ends
        if at + 8 > end:
            return None
        protocol, at = frame[at], at + 8 * (frame[at + 1] + 1)
    return Packet(src, dst, protocol, hops, at, end) if at <= end else None


def parse_udp(frame: bytes, packet: Packet, *, partial: bool = False) -> Datagram | None:
    """Read a UDP datagram with a good checksum.

    `partial`: whoever sent it left the checksum to the device, and there is none to verify. Over
    IPv4 it may also be 0, for none.
    """
    at = packet.at
    if packet.protocol != UDP or packet.end < at + _UDP.size:
        return None
    src_port, dst_port, length, given = _UDP.unpack_from(frame, at)
    if not _UDP.size <= length <= packet.end - at:
        return None
    data = bytes(frame[at : at + length])
    unsummed = partial or (given == 0 and len(packet.src) == 4)
    if not unsummed and (given == 0 or ones_sum(_pseudo(packet.src, packet.dst, UDP, data) + data)):
        return None
    return Datagram(src_port, dst_port, data[_UDP.size :])


def sound_icmpv6(frame: bytes, packet: Packet) -> bytes | None:
    """Return an ICMPv6 message with a good checksum (RFC 4443 §2.3)."""
    data = bytes(frame[packet.at : packet.end])
    if packet.protocol != ICMPV6 or len(data) < 4:
        return None
    return None if ones_sum(_pseudo(packet.src, packet.dst, ICMPV6, data) + data) else data


# Building.


def ethernet(dst: bytes, src: bytes, ethertype: int, payload: bytes) -> bytes:
    """Return a frame of at least MIN_FRAME bytes."""
    return (dst + src + ethertype.to_bytes(2) + payload).ljust(MIN_FRAME, b"\0")


def udp4(src: bytes, dst: bytes, ports: tuple[int, int], payload: bytes, ttl: int) -> bytes:
    """Return an IPv4 packet with a UDP datagram from ports[0] to ports[1], checksums filled in."""
    data = _udp(src, dst, ports, payload)
    length = _IPV4.size + len(data)
    fields = (0x45, 0, length, 0, _DONT_FRAGMENT, ttl, UDP)
    head = _IPV4.pack(*fields, checksum(_IPV4.pack(*fields, 0, src, dst)), src, dst)
    return head + data


def udp6(src: bytes, dst: bytes, ports: tuple[int, int], payload: bytes, ttl: int) -> bytes:
    """Return an IPv6 packet with a UDP datagram."""
    return _ipv6(src, dst, UDP, _udp(src, dst, ports, payload), ttl)


def icmp6(src: bytes, dst: bytes, message: bytes) -> bytes:
    """Return an IPv6 packet, hop limit 255, with an ICMPv6 message, whose checksum is filled in."""
    blank = message[:2] + b"\0\0" + message[4:]
    check = checksum(_pseudo(src, dst, ICMPV6, blank) + blank)
    return _ipv6(src, dst, ICMPV6, blank[:2] + check.to_bytes(2) + blank[4:], 255)


def wire_name(name: bytes) -> bytes:
    """Return a domain name as DNS writes it, uncompressed (RFC 1035 §3.1)."""
    labels = name.rstrip(b".").split(b".")
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def _ipv6(src: bytes, dst: bytes, protocol: int, data: bytes, ttl: int) -> bytes:
    return _IPV6.pack(6 << 28, len(data), protocol, ttl, src, dst) + data


def _udp(src: bytes, dst: bytes, ports: tuple[int, int], payload: bytes) -> bytes:
    length = _UDP.size + len(payload)
    blank = _UDP.pack(*ports, length, 0) + payload
    # 0 would say that there is none (RFC 768).
    check = checksum(_pseudo(src, dst, UDP, blank) + blank) or 0xFFFF
    return _UDP.pack(*ports, length, check) + payload


def _pseudo(src: bytes, dst: bytes, protocol: int, data: bytes) -> bytes:
    """Return what is summed beside a datagram; IPv6's wider fields add up to the same."""
    return src + dst + len(data).to_bytes(4) + protocol.to_bytes(4)
