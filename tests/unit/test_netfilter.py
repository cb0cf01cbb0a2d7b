"""Which frames pass: a locked interface, receive modes, tables, VLANs."""

from __future__ import annotations

import json
import struct
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from devices.netfilter import (
    CONTROL_MAX,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VLAN,
    HEAD_FROM,
    HEAD_TO,
    MODES,
    TABLE_MAX,
    Class,
    Filter,
)
from tests import netlab
from tests.netlab import BROADCAST, GUEST, HOST

ALL: Final = F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN | F_CTRL_MAC_ADDR
GROUP: Final = bytes.fromhex("01005e000001")
OTHER: Final = bytes.fromhex("020000000009")
NOBODY: Final = bytes(6)


def made(*, locked: bool = False, features: int = ALL) -> Filter:
    """Return a filter with a driver that has left promiscuous mode, if it may."""
    found = Filter(GUEST, locked=locked)
    found.activate(features)
    found.control(Class.RX, MODES.index("promisc"), b"\0")
    return found


def to(dst: bytes, vlan: int | None = None) -> bytes:
    """Return the head of a frame to the guest."""
    tag = b"" if vlan is None else b"\x81\0" + struct.pack("!H", vlan)
    return (dst + HOST + tag + b"\x08\0" + bytes(50))[:HEAD_TO]


def mode(name: str, found: Filter, *, on: bool = True) -> bool:
    return found.control(Class.RX, MODES.index(name), bytes((on,)))


def tables(uni: list[bytes], multi: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (uni, multi))


# Receive modes.


def test_a_new_interface_needs_no_look() -> None:
    """Not locked, promiscuous: everything passes unseen, with and without control features."""
    for features in (0, ALL):
        found = Filter(GUEST, locked=False)
        found.activate(features)
        assert (found.from_needed, found.to_needed) == (False, False)
        assert found.to_guest(to(OTHER, vlan=5))
        assert found.from_guest(HOST + OTHER + b"\x08\x06" + bytes(46))


@pytest.mark.parametrize(
    ("modes", "passing"),
    [
        ((), {GUEST, BROADCAST}),
        (("allmulti",), {GUEST, BROADCAST, GROUP}),
        (("alluni",), {GUEST, BROADCAST, OTHER}),
        (("nouni",), {BROADCAST}),
        (("nouni", "alluni"), {BROADCAST}),
        (("nomulti", "allmulti"), {GUEST, BROADCAST}),
        (("nobcast",), {GUEST}),
        (("nobcast", "nouni", "nomulti", "promisc"), {GUEST, BROADCAST, GROUP, OTHER}),
    ],
)
def test_modes(modes: tuple[str, ...], passing: set[bytes]) -> None:
    """Each mode lets through or keeps out what its name says; promiscuous is above all."""
    found = made()
    assert all(mode(name, found) for name in modes)
    assert {dst for dst in (GUEST, BROADCAST, GROUP, OTHER) if found.to_guest(to(dst))} == passing
    assert found.to_needed == ("promisc" not in modes)


def test_modes_need_their_features() -> None:
    """Commands of what was not negotiated are errors, and so are unknown ones and odd lengths."""
    found = made(features=F_CTRL_RX)
    assert mode("allmulti", found)
    for name in MODES[2:]:
        assert not mode(name, found)
    assert not found.control(Class.RX, len(MODES), b"\1")
    assert not found.control(Class.RX, 0, b"")
    assert not found.control(Class.RX, 0, b"\1\1")
    assert not found.control(Class.VLAN, 0, b"\1\0")
    assert not found.control(Class.MAC, 1, OTHER)
    assert not found.control(3, 0, b"\0")
    bare = made(features=0)
    assert not mode("promisc", bare, on=False)
    assert not bare.to_needed


# MAC tables.


def test_tables_let_their_addresses_through() -> None:
    """Unicast and multicast tables apart; the next set replaces both."""
    found = made()
    assert found.control(Class.MAC, 0, tables([OTHER], [GROUP]))
    assert found.to_guest(to(OTHER))
    assert found.to_guest(to(GROUP))
    assert found.to_guest(to(GUEST))
    assert not found.to_guest(to(HOST))
    both = [HOST, OTHER], [bytes.fromhex("333300000001"), bytes.fromhex("333300000002"), GROUP]
    assert found.control(Class.MAC, 0, tables(*both))
    assert all(found.to_guest(to(mac)) for table in both for mac in table)
    assert found.control(Class.MAC, 0, tables([], []))
    assert not found.to_guest(to(OTHER))
    assert not found.to_guest(to(GROUP))


@pytest.mark.parametrize(
    ("nr_uni", "nr_multi"), [(TABLE_MAX + 1, 1), (0, TABLE_MAX + 1), (0, 4096)]
)
def test_a_table_that_is_too_long_lets_all_of_its_kind_through(nr_uni: int, nr_multi: int) -> None:
    """Passing too much is allowed, losing a frame is not; the other table still counts."""
    uni = [b"\2" + bytes(3) + struct.pack("!H", i) for i in range(nr_uni)]
    multi = [b"\3" + bytes(3) + struct.pack("!H", i) for i in range(nr_multi)]
    found = made()
    assert found.control(Class.MAC, 0, tables(uni, multi))
    assert found.to_guest(to(HOST)) == (nr_uni > TABLE_MAX)
    assert found.to_guest(to(GROUP)) == (nr_multi > TABLE_MAX)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<I", 0),
        struct.pack("<I", 1) + OTHER[:5],
        struct.pack("<I", 0xFFFF_FFFF) + OTHER,  # times six is more than 32 bits
        struct.pack("<I", 0x2AAA_AAAB) + bytes(8),  # times six is 2 modulo 2³²
        tables([OTHER], [GROUP]) + b"\0",
        tables([OTHER], [GROUP])[:-1],
        bytes(CONTROL_MAX + 1),
    ],
)
def test_tables_that_do_not_add_up_are_refused(data: bytes) -> None:
    """Counts are checked against the bytes that came; what was set before stays."""
    found = made()
    assert found.control(Class.MAC, 0, tables([HOST], []))
    assert not found.control(Class.MAC, 0, data)
    assert found.to_guest(to(HOST))
    assert not found.to_guest(to(OTHER))


def test_the_address_can_be_changed() -> None:
    """By a driver that negotiated it, to an address a station may have; a reset brings it back."""
    found = made()
    for bad in (GROUP, NOBODY, OTHER[:5], OTHER + b"\0", b""):
        assert not found.control(Class.MAC, 1, bad)
    assert found.control(Class.MAC, 1, OTHER)
    assert found.lladdr == OTHER
    assert found.to_guest(to(OTHER))
    assert not found.to_guest(to(GUEST))
    found.reset()
    assert found.lladdr == GUEST


# VLANs.


def test_vlans() -> None:
    """A tagged frame passes if its VLAN was added; VLAN 0 is only a priority."""
    found = made()
    assert not found.to_guest(to(GUEST, vlan=5))
    assert found.to_guest(to(GUEST, vlan=0xE000))
    assert found.control(Class.VLAN, 0, b"\5\0")
    assert found.control(Class.VLAN, 0, b"\xff\x0f")
    assert found.to_guest(to(GUEST, vlan=0xE005))
    assert found.to_guest(to(GUEST, vlan=4095))
    assert not found.to_guest(to(OTHER, vlan=5))
    assert not found.to_guest(to(GUEST, vlan=6))
    assert found.control(Class.VLAN, 1, b"\5\0")
    assert not found.to_guest(to(GUEST, vlan=5))
    for command, data in ((0, b"\0\x10"), (0, b"\5"), (2, b"\5\0")):
        assert not found.control(Class.VLAN, command, data)
    assert made(features=F_CTRL_RX).to_guest(to(GUEST, vlan=5))  # not negotiated: all pass


# Locked.

LINK_LOCAL: Final = "fe80::fce1:bbff:fed1:1"


def arp(sender: bytes, kind: bytes = b"\x08\x06") -> bytes:
    return BROADCAST + GUEST + kind + bytes.fromhex("0001080006040001") + sender + bytes(28)


def neighbour(kind: int, *options: bytes) -> bytes:
    begin = {133: 8, 134: 16, 135: 24, 136: 24, 137: 40}[kind]
    body = bytes((kind,)) + bytes(begin - 1)
    return netlab.icmp6(body + b"".join(options), src=LINK_LOCAL)


def tagged(frame: bytes, tags: int) -> bytes:
    return frame[:12] + b"\x81\0\0\x05" * tags + frame[12:]


def behind(frame: bytes, extension: bytes) -> bytes:
    """Put a hop-by-hop extension header into an IPv6 frame."""
    length = int.from_bytes(frame[18:20], "big") + len(extension)
    head = frame[:18] + struct.pack("!HBB", length, 0, 255) + frame[22:54]
    return head + bytes((frame[20], len(extension) // 8 - 1)) + extension[2:] + frame[54:]


def lladdr(kind: int, address: bytes) -> bytes:
    return bytes((kind, 1)) + address


HONEST: Final = {
    "tcp": BROADCAST + GUEST + b"\x08\0\x45" + bytes(8) + b"\x06" + bytes(40),
    "udp": netlab.udp(b"x" * 50, ports=(1, 2)),
    "arp": arp(GUEST),
    "rarp": arp(GUEST, b"\x80\x35"),
    "dhcp": netlab.udp(netlab.bootp((53, b"\1"))),
    "dhcp options": netlab.udp(netlab.bootp((53, b"\1")), ip_options=bytes(40)),
    "dhcp answer": netlab.udp(b"\2" + netlab.bootp(chaddr=OTHER)[1:], ports=(67, 67)),
    "fragment": netlab.udp(netlab.bootp(chaddr=OTHER), fragment=0x2010),
    "solicitation": neighbour(135, lladdr(1, GUEST)),
    "advertisement": neighbour(136, lladdr(2, GUEST)),
    "bare": neighbour(135),
    "nonce": neighbour(135, b"\x0e\1" + OTHER, lladdr(1, GUEST)),
    "router": neighbour(133, lladdr(1, GUEST)),
    "router advertisement": neighbour(134, lladdr(1, GUEST), b"\5\1" + bytes(6)),
    "redirected": neighbour(137, lladdr(2, GUEST), b"\4\x40" + bytes(510)),
    "hop-by-hop": behind(neighbour(136, lladdr(2, GUEST)), bytes(8)),
    "icmpv6": netlab.icmp6(b"\x80\0\0\0" + lladdr(2, OTHER) * 4, src=LINK_LOCAL),
    "udp6": BROADCAST + GUEST + b"\x86\xdd\x60" + bytes(5) + b"\x11" + bytes(50),
    "other": BROADCAST + GUEST + b"\x88\xcc" + bytes(50),
}
SPOOFED: Final = {
    "source": BROADCAST + OTHER + b"\x08\0\x45" + bytes(49),
    "arp": arp(OTHER),
    "rarp": arp(OTHER, b"\x80\x35"),
    "arp of another hardware": BROADCAST
    + GUEST
    + b"\x08\x06"
    + bytes.fromhex("0006")
    + arp(GUEST)[16:],
    "dhcp": netlab.udp(netlab.bootp((53, b"\1"), chaddr=OTHER)),
    "dhcp options": netlab.udp(netlab.bootp(chaddr=OTHER), ip_options=bytes(40)),
    "dhcp fragment": netlab.udp(netlab.bootp(chaddr=OTHER), fragment=0x2000),
    "dhcp first 8 bytes": netlab.udp(netlab.bootp(), fragment=0x2000)[:42],
    "solicitation": neighbour(135, lladdr(1, OTHER)),
    "advertisement": neighbour(136, lladdr(2, OTHER)),
    "advertisement second": neighbour(136, lladdr(2, GUEST), lladdr(2, OTHER)),
    "router": neighbour(133, lladdr(1, OTHER)),
    "router advertisement": neighbour(134, lladdr(1, OTHER)),
    "redirect": neighbour(137, lladdr(2, OTHER)),
    "hop-by-hop": behind(neighbour(136, lladdr(2, OTHER)), bytes(8)),
    "far hop-by-hop": behind(neighbour(136, lladdr(2, OTHER)), bytes(256)),
    "far option": neighbour(136, b"\x0e\x18" + bytes(190), lladdr(2, OTHER)),
    "empty option": neighbour(136, b"\x0e\0" + bytes(6), lladdr(2, OTHER)),
    "short": (BROADCAST + GUEST + b"\x86\xdd" + bytes(20)),
    "runt": BROADCAST,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_frame_passes(name: str) -> None:
    """All that a guest with one address sends, tagged or not."""
    found = made(locked=True)
    assert found.from_needed
    for tags in (0, 1, 2):
        assert found.from_guest(tagged(HONEST[name], tags)[:HEAD_FROM]), tags
        assert found.from_guest(memoryview(tagged(HONEST[name], tags))[:HEAD_FROM]), tags


@pytest.mark.parametrize("name", SPOOFED)
def test_a_spoofed_frame_does_not(name: str) -> None:
    """The source, and every place where neighbours read a hardware address."""
    found = made(locked=True)
    for tags in (0, 1, 2) if len(SPOOFED[name]) > 14 else (0,):
        assert not found.from_guest(tagged(SPOOFED[name], tags)[:HEAD_FROM]), tags


def test_three_tags_hide_nothing() -> None:
    """A locked guest may not send what cannot be looked into."""
    assert not made(locked=True).from_guest(tagged(HONEST["arp"], 3))


def test_a_locked_guest_gets_only_its_own() -> None:
    """Unicast for others is kept out in every mode; groups pass as its driver wishes."""
    found = made(locked=True)
    for name in ("alluni", "promisc"):
        assert mode(name, found)
        assert not found.to_guest(to(OTHER))
        assert found.to_guest(to(GUEST))
        assert found.to_needed
    assert found.to_guest(to(GROUP))
    assert not found.to_guest(b"")


def test_a_locked_guest_keeps_its_address() -> None:
    """The command fails, and nothing changes."""
    found = made(locked=True)
    assert not found.control(Class.MAC, 1, OTHER)
    assert found.lladdr == GUEST
    assert not found.from_guest(HOST + OTHER + b"\x08\0" + bytes(46))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=HEAD_FROM), st.sampled_from(sorted(HONEST)), st.integers(0, HEAD_FROM))
def test_no_bytes_raise(noise: bytes, name: str, at: int) -> None:
    """Frames of any bytes, and good ones that turn into noise somewhere."""
    found = made(locked=True)
    for head in (noise, BROADCAST + GUEST + noise, (HONEST[name][:at] + noise)[:HEAD_FROM]):
        found.from_guest(head)
        found.to_guest(head[:HEAD_TO])
    found.control(noise[0] if noise else 0, at % 7, noise)


def test_state_survives_the_process() -> None:
    """What a driver has set is there again after save, JSON and load."""
    found = made()
    for command in (
        (Class.MAC, 0, tables([OTHER], [GROUP] * (TABLE_MAX + 1))),
        (Class.VLAN, 0, b"\5\0"),
        (Class.RX, MODES.index("nobcast"), b"\1"),
        (Class.MAC, 1, HOST),
    ):
        assert found.control(*command)
    again = Filter(GUEST, locked=False)
    again.load(json.loads(json.dumps(found.save())))
    again.activate(ALL)
    assert again.save() == found.save()
    assert again.to_needed
    for head in (
        to(OTHER),
        to(HOST),
        to(GROUP),
        to(bytes.fromhex("010000000001")),
        to(HOST, vlan=5),
    ):
        assert again.to_guest(head)
    for head in (to(GUEST), to(BROADCAST), to(HOST, vlan=6)):
        assert not again.to_guest(head)


@pytest.mark.parametrize(
    "state", [{}, {"lladdr": "x"}, {**Filter(GUEST, locked=False).save(), "uni": 5}]
)
def test_a_state_that_makes_no_sense_is_refused(state: dict[str, object]) -> None:
    """As one error."""
    with pytest.raises(ConfigError, match="makes no sense"):
        made().load(state)
