"""Frame heads: round trips against another implementation, and every truncation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import frames
from tests import netlab


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=1600).filter(any))
def test_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    """The remainder modulo 65535 is the one's complement sum, odd lengths and carries included."""
    assert frames.checksum(data) == 0xFFFF - netlab.words_sum(data)
    if len(data) % 2 == 0:
        assert frames.ones_sum(data + frames.checksum(data).to_bytes(2)) == 0


def test_a_sum_of_all_ones_has_checksum_0() -> None:
    """65535 is the other zero."""
    assert frames.checksum(b"\xff\xff") == 0
    assert frames.checksum(b"\xff\xfe\x00\x01") == 0


ADDRESSES = st.sampled_from(["10.0.0.1", "255.255.255.255", "0.0.0.0", "100.64.1.3"])
PORTS = st.tuples(st.integers(0, 65535), st.integers(0, 65535))


@settings(max_examples=200, deadline=None)
@given(ADDRESSES, ADDRESSES, PORTS, st.binary(max_size=1400))
def test_udp4_round_trip(src: str, dst: str, ports: tuple[int, int], payload: bytes) -> None:
    """What we build the other implementation reads, and the other way round."""
    packet = frames.udp4(netlab.ip(src), netlab.ip(dst), ports, payload, 16)
    seen = netlab.see(frames.ethernet(netlab.GUEST, netlab.HOST, frames.IPV4, packet))
    assert seen == (netlab.GUEST, netlab.HOST, src, dst, 16, ports, payload)

    theirs = netlab.udp(payload, src=src, dst=dst, ports=ports)
    head = frames.parse_ethernet(theirs)
    assert head == (netlab.BROADCAST, netlab.GUEST, frames.IPV4, (), 14)
    parsed = frames.parse_ipv4(theirs, 14)
    assert parsed == (netlab.ip(src), netlab.ip(dst), 17, 64, 34, len(theirs))
    assert frames.parse_udp(theirs, parsed) == (*ports, payload)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_ipv6_round_trip(payload: bytes) -> None:
    """UDP and ICMPv6 over IPv6."""
    a, b = netlab.ip("fe80::1"), netlab.ip("fd00::2")
    packet = frames.udp6(a, b, (547, 546), payload, 64)
    frame = frames.ethernet(netlab.GUEST, netlab.HOST, frames.IPV6, packet)
    assert netlab.see(frame).payload == payload
    parsed = frames.parse_ipv6(frame, 14)
    assert parsed is not None
    assert frames.parse_udp(frame, parsed) == (547, 546, payload)

    message = b"\x85\0\0\0" + payload
    frame = netlab.icmp6(message, src="fe80::2")
    parsed = frames.parse_ipv6(frame, 14)
    assert parsed is not None
    sound = frames.sound_icmpv6(frame, parsed)
    assert sound is not None
    assert (sound[:2], sound[4:]) == (message[:2], payload)
    built = frames.ethernet(b"\1" * 6, b"\2" * 6, frames.IPV6, frames.icmp6(a, b, message))
    assert netlab.see(built)[2:6] == ("fe80::1", "fd00::2", 255, (0, 0))


def test_udp_checksum_0_is_never_sent() -> None:
    """A sum that comes out as 0 is written as 65535 (RFC 768)."""
    for filler in range(65536):
        payload = filler.to_bytes(2)
        packet = frames.udp4(bytes(4), bytes(4), (0, 0), payload, 16)
        if packet[26:28] == b"\xff\xff":
            break
    else:
        pytest.fail("no payload has that sum")
    frame = frames.ethernet(b"\1" * 6, b"\2" * 6, frames.IPV4, packet)
    assert netlab.see(frame).payload == payload


def parse(frame: bytes) -> object:
    """Read as far as it goes."""
    head = frames.parse_ethernet(frame)
    if head is None:
        return None
    read = frames.parse_ipv4 if head.ethertype == frames.IPV4 else frames.parse_ipv6
    packet = read(frame, head.at)
    if packet is None:
        return None
    return frames.parse_udp(frame, packet) or frames.sound_icmpv6(frame, packet)


@pytest.mark.parametrize(
    "frame",
    [
        netlab.udp(b"payload"),
        netlab.udp(b"payload", ip_options=b"\x01" * 8),
        netlab.icmp6(b"\x85\0\0\0\0\0\0\0", src="fe80::2"),
    ],
)
def test_no_truncation_is_read(frame: bytes) -> None:
    """A frame cut anywhere is None: lengths inside must fit what is there."""
    assert parse(frame) is not None
    for length in range(len(frame)):
        assert parse(frame[:length]) is None, length


@pytest.mark.parametrize(
    "frame",
    [netlab.udp(b"payload" * 9), netlab.icmp6(b"\x85\0\0\0\0\0\0\0", src="fe80::2")],
)
def test_no_flipped_bit_is_missed(frame: bytes) -> None:
    """Each bit of what checksums cover, flipped, makes it None or another frame's."""
    whole = parse(frame)
    for bit in range(14 * 8, 8 * len(frame)):
        changed = bytearray(frame)
        changed[bit // 8] ^= 128 >> bit % 8
        if parse(bytes(changed)) == whole:
            # IPv6 has no checksum of its own: traffic class, flow label, hop limit.
            assert frame[12:14] == b"\x86\xdd"
            assert bit // 8 in (14, 15, 16, 17, 21)


@pytest.mark.parametrize("fragment", [0x2000, 0x0001, 0x1FFF])
def test_fragments_are_not_read(fragment: int) -> None:
    """A part of a datagram has no UDP head to trust."""
    assert parse(netlab.udp(b"payload", fragment=fragment)) is None
    assert parse(netlab.udp(b"payload", fragment=0x4000)) is not None  # "don't" is none


def test_udp_checksums() -> None:
    """0 is none over IPv4; a partial one is not looked at; a wrong one is refused."""
    right, none, wrong = (netlab.udp(b"x", check=check) for check in (None, 0, 1))
    for frame, partial, good in (
        *((right, False, True), (none, False, True), (wrong, False, False)),
        *((right, True, True), (wrong, True, True)),
    ):
        packet = frames.parse_ipv4(frame, 14)
        assert packet is not None
        assert (frames.parse_udp(frame, packet, partial=partial) is not None) == good


def test_udp6_without_checksum_is_refused() -> None:
    """IPv6 knows none without (RFC 8200 §8.1)."""
    a, b = netlab.ip("fe80::1"), netlab.ip("fd00::2")
    frame = bytearray(
        frames.ethernet(b"\1" * 6, b"\2" * 6, frames.IPV6, frames.udp6(a, b, (1, 2), b"", 64))
    )
    frame[60:62] = bytes(2)
    packet = frames.parse_ipv6(bytes(frame), 14)
    assert packet is not None
    assert frames.parse_udp(bytes(frame), packet) is None


def test_vlan_tags_are_stepped_over_and_counted() -> None:
    """Two at most; a third is nobody's."""
    inner = b"\x08\x00rest"
    one = b"\1" * 6 + b"\2" * 6 + b"\x81\0\x20\x05"
    two = b"\1" * 6 + b"\2" * 6 + b"\x88\xa8\x00\x07" + b"\x81\0\x20\x05"
    assert frames.parse_ethernet(one + inner) == (b"\1" * 6, b"\2" * 6, 0x800, (0x2005,), 18)
    assert frames.parse_ethernet(two + inner) == (b"\1" * 6, b"\2" * 6, 0x800, (7, 0x2005), 22)
    assert frames.parse_ethernet(two + b"\x81\0\x20\x05" + inner) is None
    assert frames.parse_ethernet(two) is None


def test_ipv6_extensions_are_stepped_over() -> None:
    """Hop-by-hop, routing and destination options; a fragment or a head past the end is None."""
    message = frames.icmp6(netlab.ip("fe80::2"), netlab.ip("ff02::2"), b"\x85\0\0\0\0\0\0\0")
    body = message[40:]

    def packet(first: int, between: bytes) -> frames.Packet | None:
        length = (len(between) + len(body)).to_bytes(2)
        frame = bytes(14) + message[:4] + length + bytes((first, 255)) + message[8:40]
        return frames.parse_ipv6(frame + between + body, 14)

    chained = bytes((60, 0)) + bytes(6) + bytes((43, 1)) + bytes(14) + bytes((58, 0)) + bytes(6)
    found = packet(0, chained)
    assert found is not None
    assert (found.protocol, found.at) == (58, 14 + 40 + 32)
    fragment = packet(44, bytes((58, 0)) + bytes(6))
    assert fragment is not None
    assert fragment.protocol == 44  # nobody takes it for ICMPv6
    assert packet(0, bytes((58, 9)) + bytes(6)) is None
