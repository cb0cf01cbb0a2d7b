"""The other end for tests of network protocols: frames made and read without any of our code.

Checksums are summed word by word (RFC 1071 §4.1), heads are taken apart by hand, so that a mistake
in `devices.frames` cannot hide behind itself.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final, NamedTuple

GUEST: Final = bytes.fromhex("fee1bbd10001")
HOST: Final = bytes.fromhex("fee1bad10001")
SETTINGS: Final[dict[str, Any]] = {
    "lladdr": "fe:e1:bb:d1:00:01",
    "host_lladdr": "fe:e1:ba:d1:00:01",
    "address": "100.64.1.3",
    "host": "100.64.1.2",
}
SETTINGS6: Final[dict[str, Any]] = {
    **SETTINGS,
    "address6": "fd00:1:2:10:6440:103:0:2",
    "router6": "fe80::1",
}
BROADCAST: Final = b"\xff" * 6
COOKIE: Final = bytes((99, 130, 83, 99))

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)


def ip(text: str) -> bytes:
    """Return an address of either family in network order."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def words_sum(data: bytes) -> int:
    """Return the one's complement sum, carries folded in one at a time."""
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    """Return the pseudo-header of RFC 793 or RFC 8200 §8.1."""
    if len(src) == 4:
        return src + dst + struct.pack("!BBH", 0, protocol, length)
    return src + dst + struct.pack("!IHBB", length, 0, 0, protocol)


class Seen(NamedTuple):
    """A frame taken apart, every length and checksum of it checked."""

    dst_mac: bytes
    src_mac: bytes
    src: str
    dst: str
    ttl: int
    ports: tuple[int, int]  # (0, 0) for ICMPv6
    payload: bytes


def see(frame: bytes) -> Seen:
    """Take a frame apart that holds UDP or ICMPv6. Raises AssertionError where it is not right."""
    assert len(frame) >= 60
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00":
        assert packet[0] == 0x45
        assert words_sum(packet[:20]) == 0xFFFF
        (length,) = struct.unpack("!H", packet[2:4])
        ttl, protocol, src, dst, data = (
            packet[8],
            packet[9],
            packet[12:16],
            packet[16:20],
            packet[20:length],
        )
    else:
        assert kind == b"\x86\xdd"
        assert packet[0] >> 4 == 6
        (length,) = struct.unpack("!H", packet[4:6])
        protocol, ttl, src, dst, data = (
            packet[6],
            packet[7],
            packet[8:24],
            packet[24:40],
            packet[40 : 40 + length],
        )
        length += 40
    assert len(packet) == length or (len(frame) == 60 and not any(packet[length:]))
    assert words_sum(pseudo(src, dst, protocol, len(data)) + data) == 0xFFFF
    family = socket.AF_INET if len(src) == 4 else socket.AF_INET6
    ports, payload = (0, 0), data
    if protocol == 17:
        sport, dport, udp_length, check = struct.unpack("!HHHH", data[:8])
        assert udp_length == len(data)
        assert check != 0
        ports, payload = (sport, dport), data[8:]
    else:
        assert protocol == 58
    return Seen(
        frame[:6],
        frame[6:12],
        socket.inet_ntop(family, src),
        socket.inet_ntop(family, dst),
        ttl,
        ports,
        payload,
    )


def udp(
    payload: bytes,
    *,
    src: str = "0.0.0.0",
    dst: str = "255.255.255.255",
    ports: tuple[int, int] = (68, 67),
    src_mac: bytes = GUEST,
    dst_mac: bytes = BROADCAST,
    ip_options: bytes = b"",
    fragment: int = 0,
    check: int | None = None,
) -> bytes:
    """Return a frame as a client sends it. `check` replaces the UDP checksum."""
    a, b = ip(src), ip(dst)
    length = 8 + len(payload)
    data = struct.pack("!HHHH", *ports, length, 0) + payload
    if check is None:
        check = 0xFFFF - words_sum(pseudo(a, b, 17, length) + data) or 0xFFFF
    data = data[:6] + struct.pack("!H", check) + data[8:]
    head_bytes = 20 + len(ip_options)
    head = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x40 | head_bytes // 4, 0x10, head_bytes + length, 0, fragment, 64, 17, 0, a, b),
    )
    head += ip_options
    head = head[:10] + struct.pack("!H", 0xFFFF - words_sum(head)) + head[12:]
    return dst_mac + src_mac + b"\x08\x00" + head + data


def icmp6(
    message: bytes,
    *,
    src: str,
    dst: str = "ff02::2",
    ttl: int = 255,
    src_mac: bytes = GUEST,
) -> bytes:
    """Return a frame with an ICMPv6 message whose checksum bytes are 0."""
    a, b = ip(src), ip(dst)
    check = 0xFFFF - words_sum(pseudo(a, b, 58, len(message)) + message)
    message = message[:2] + struct.pack("!H", check) + message[4:]
    head = struct.pack("!IHBB", 6 << 28, len(message), 58, ttl) + a + b
    return b"\x33\x33\0\0\0\x02" + src_mac + b"\x86\xdd" + head + message


def option(code: int, data: bytes) -> bytes:
    """Return a DHCP option."""
    return bytes((code, len(data))) + data


def bootp(
    *options: tuple[int, bytes],
    ciaddr: str = "0.0.0.0",
    giaddr: str = "0.0.0.0",
    flags: int = 0,
    hops: int = 0,
    chaddr: bytes = GUEST,
    sname: bytes = b"",
    file: bytes = b"",
    cookie: bytes = COOKIE,
    pad: int = 300,
) -> bytes:
    """Return a BOOTREQUEST, padded to `pad` bytes."""
    head = struct.pack("!BBBBIHH", 1, 1, 6, hops, 0x12345678, 7, flags)
    head += ip(ciaddr) + bytes(8) + ip(giaddr) + chaddr.ljust(16, b"\0")
    head += sname.ljust(64, b"\0") + file.ljust(128, b"\0")
    body = b"".join(option(code, data) for code, data in options)
    return (head + cookie + body + b"\xff").ljust(pad, b"\0")


class Reply(NamedTuple):
    """A BOOTREPLY taken apart."""

    flags: int
    ciaddr: str
    yiaddr: str
    siaddr: str
    giaddr: str
    options: dict[int, bytes]  # of the options area alone, in its order
    sname: bytes
    file: bytes

    @property
    def type(self) -> int:
        """The message type; 0 for BOOTP."""
        return self.options.get(53, b"\0")[0]


def reply(payload: bytes) -> Reply:
    """Take a reply apart. Raises AssertionError where it does not answer `bootp`."""
    assert payload[:4] == bytes((2, 1, 6, 0))
    assert payload[4:8] == bytes.fromhex("12345678")
    assert payload[8:10] == bytes(2)  # secs
    assert payload[28:44] == GUEST.ljust(16, b"\0")
    assert payload[236:240] == COOKIE
    assert len(payload) >= 300
    options = read_options(payload[240:])
    ciaddr, yiaddr, siaddr, giaddr = (
        socket.inet_ntoa(payload[at : at + 4]) for at in (12, 16, 20, 24)
    )
    flags = int.from_bytes(payload[10:12], "big")
    sname, file = payload[44:108], payload[108:236]
    return Reply(flags, ciaddr, yiaddr, siaddr, giaddr, options, sname, file)


def read_options(area: bytes) -> dict[int, bytes]:
    """Return the options of one area, which must end as it should."""
    options: dict[int, bytes] = {}
    at = 0
    while area[at] != 255:
        assert area[at] != 0
        code, length = area[at], area[at + 1]
        options[code] = options.get(code, b"") + area[at + 2 : at + 2 + length]
        at += 2 + length
    assert not any(area[at + 1 :])
    return options


def all_options(answer: Reply) -> dict[int, bytes]:
    """Read overloaded fields after the options, in the order of RFC 3396 §5."""
    overload = answer.options.get(52, b"\0")[0]
    found = dict(answer.options)
    if overload & 1:
        found |= read_options(answer.file)
    if overload & 2:
        found |= read_options(answer.sname)
    return found
