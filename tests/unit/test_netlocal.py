"""The host end of a local interface: what it picks out, router advertisements, settings."""

from __future__ import annotations

import struct
from typing import Any, Final

import pytest

from config.errors import ConfigError
from devices import frames, netsettings
from devices.netlocal import ANNOUNCE_EVERY, HEAD, Local
from tests import netlab

LINK_LOCAL: Final = "fe80::fce1:bbff:fed1:1"
SOLICIT: Final = b"\x85\0\0\0" + bytes(4) + b"\1\1" + netlab.GUEST
BARE_SOLICIT: Final = b"\x85\0\0\0" + bytes(4)
DHCP: Final = netlab.udp(netlab.bootp((53, b"\1")))


def tagged(frame: bytes) -> bytes:
    """Put a VLAN tag into a frame."""
    return frame[:12] + b"\x81\0\0\x05" + frame[12:]


@pytest.mark.parametrize(
    ("frame", "ours"),
    [
        (DHCP, True),
        (netlab.udp(b"", ip_options=bytes(4)), True),  # `answer` looks closer
        (netlab.udp(b"", ports=(68, 53)), False),
        (tagged(DHCP), False),
        (netlab.icmp6(SOLICIT, src=LINK_LOCAL), True),
        (netlab.icmp6(b"\x87\0\0\0" + bytes(20), src=LINK_LOCAL), False),  # a neighbour's
        (tagged(netlab.icmp6(SOLICIT, src=LINK_LOCAL)), False),
        (bytes(12) + b"\x08\x06" + bytes(50), False),
        (b"", False),
    ],
)
def test_wants_picks_out_what_might_be_ours(frame: bytes, ours: bool) -> None:
    """By the first 64 bytes, as bytes or as a view; a shorter head is no error."""
    local = Local(netlab.SETTINGS6)
    assert local.wants(frame[:HEAD]) is ours
    assert local.wants(memoryview(frame)[:HEAD]) is ours
    for length in range(len(frame)):
        local.wants(frame[:length])


def test_what_is_answered_is_wanted() -> None:
    """No frame that `answer` would serve is passed over by `wants`."""
    local = Local(netlab.SETTINGS6)
    for frame in (DHCP, netlab.icmp6(SOLICIT, src=LINK_LOCAL)):
        assert local.answer(frame)
        assert local.wants(frame[:HEAD])
        assert local.answer(tagged(frame)) is None


def advertisement(frame: bytes) -> tuple[netlab.Seen, dict[int, bytes]]:
    """Take an advertisement apart; options by type, without type and length."""
    seen = netlab.see(frame)
    kind, code, _, hops, flags, lifetime, reachable, retrans = struct.unpack(
        "!BBHBBHII", seen.payload[:16]
    )
    assert (kind, code, hops, flags, lifetime, reachable, retrans) == (134, 0, 64, 0, 65535, 0, 0)
    assert (seen.src, seen.ttl, seen.src_mac) == ("fe80::1", 255, netlab.HOST)
    options, rest = {}, seen.payload[16:]
    while rest:
        options[rest[0]], rest = rest[2 : 8 * rest[1]], rest[8 * rest[1] :]
    return seen, options


def test_a_solicitation_is_answered() -> None:
    """To the one that asked, from the router, with a prefix that makes an address."""
    answers = Local(netlab.SETTINGS6).answer(netlab.icmp6(SOLICIT, src=LINK_LOCAL))
    assert answers is not None
    (frame,) = answers
    seen, options = advertisement(frame)
    assert (seen.dst_mac, seen.dst) == (netlab.GUEST, LINK_LOCAL)
    assert options[1] == netlab.HOST
    length, flags, valid, preferred, _ = struct.unpack("!BBIII", options[3][:14])
    assert (length, flags, valid, preferred) == (64, 0xC0, 0xFFFFFFFF, 0xFFFFFFFF)
    assert options[3][14:] == netlab.ip("fd00:1:2:10::")
    assert options.keys() == {1, 3}


def test_a_solicitation_without_address_is_answered_to_all() -> None:
    """The first one of a guest that has no address yet; on Ethernet still to it alone."""
    answers = Local(netlab.SETTINGS6).answer(netlab.icmp6(BARE_SOLICIT, src="::"))
    assert answers is not None
    seen, _ = advertisement(answers[0])
    assert (seen.dst_mac, seen.dst) == (netlab.GUEST, "ff02::1")


def test_everything_that_can_be_told() -> None:
    """MTU, resolvers and search domains (RFC 4861 §4.6.4, RFC 8106 §5)."""
    more = {
        "mtu": 1400,
        "dns": ["9.9.9.9", "fd00::53", "fd00::54"],
        "search": ["example.org", "example.net"],
        "length6": 96,
    }
    local = Local({**netlab.SETTINGS6, **more})
    (frame,) = local.announce()
    seen, options = advertisement(frame)
    assert (seen.dst_mac, seen.dst) == (bytes.fromhex("333300000001"), "ff02::1")
    assert options[5] == b"\0\0" + (1400).to_bytes(4, "big")
    assert options[25] == b"\0\0" + b"\xff" * 4 + netlab.ip("fd00::53") + netlab.ip("fd00::54")
    assert options[31][:6] == b"\0\0" + b"\xff" * 4
    assert options[31][6:].rstrip(b"\0") + b"\0" == b"\7example\3org\0\7example\3net\0"
    # No address can be made of 96 bits: on-link, not autonomous.
    assert options[3][:2] == b"\x60\x80"
    assert options[3][14:] == netlab.ip("fd00:1:2:10:6440:103::")
    assert local.counts == {"advertisement": 1}


@pytest.mark.parametrize(("mtu", "told"), [(0, False), (1279, False), (1280, True)])
def test_an_mtu_that_ipv6_cannot_have_is_not_told(mtu: int, told: bool) -> None:
    """The least is 1280; a smaller one concerns IPv4 alone."""
    (frame,) = Local({**netlab.SETTINGS6, "mtu": mtu}).announce()
    assert (5 in advertisement(frame)[1]) is told


def test_advertisements_outlive_three_lost_ones() -> None:
    """What is good for 65535 s is repeated in time."""
    assert ANNOUNCE_EVERY * 3 < 65535


def test_the_largest_advertisement_fits_a_frame() -> None:
    """Eight resolvers and as many search domains as the settings allow."""
    more = {"mtu": 9000, "dns": [f"fd00::{i}" for i in range(8)], "search": ["a" * 40] * 6}
    (frame,) = Local({**netlab.SETTINGS6, **more}).announce()
    advertisement(frame)
    assert len(frame) <= 1280


@pytest.mark.parametrize(
    "frame",
    [
        netlab.icmp6(SOLICIT, src=LINK_LOCAL, ttl=254),  # came from elsewhere
        netlab.icmp6(SOLICIT, src="::"),  # an lladdr without an address
        netlab.icmp6(SOLICIT, src="ff02::5"),
        netlab.icmp6(SOLICIT, src=LINK_LOCAL, dst="fd00::1"),
        netlab.icmp6(SOLICIT, src=LINK_LOCAL, src_mac=b"\1\0\0\0\0\1"),
        netlab.icmp6(b"\x85\1" + SOLICIT[2:], src=LINK_LOCAL),
        netlab.icmp6(SOLICIT[:8] + b"\1\0" + bytes(6), src=LINK_LOCAL),  # an empty option
        netlab.icmp6(SOLICIT[:8] + b"\1\2" + bytes(6), src=LINK_LOCAL),  # runs past the end
        netlab.icmp6(SOLICIT + b"\1", src=LINK_LOCAL),
        netlab.icmp6(SOLICIT[:7], src=LINK_LOCAL),
        netlab.icmp6(b"\x86" + SOLICIT[1:], src=LINK_LOCAL),
        netlab.icmp6(SOLICIT, src=LINK_LOCAL)[:-1] + b"\0",  # checksum
    ],
)
def test_bad_solicitations_go_on(frame: bytes) -> None:
    """RFC 4861 §6.1.1: what is not valid is not answered."""
    assert Local(netlab.SETTINGS6).answer(frame) is None


def test_without_ipv6_nothing_is_advertised() -> None:
    """`address6` left out: IPv4 alone."""
    local = Local(netlab.SETTINGS)
    assert local.answer(netlab.icmp6(SOLICIT, src=LINK_LOCAL)) is None
    assert local.announce() == []


def test_the_hosts_mac_address_defaults_to_the_guests_plus_one() -> None:
    """As vmd makes it up; the last byte wraps without a carry."""
    config = {**netlab.SETTINGS, "host_lladdr": "", "lladdr": "fe:e1:bb:d1:00:ff"}
    assert netsettings.parse(config).host_lladdr == bytes.fromhex("fee1bbd10000")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("lladdr", bad) for bad in ("", "01:00:00:00:00:01", "fe:e1", "00:00:00:00:00:00")),
        *(("lladdr", bad) for bad in ("fe:e1:bb:d1:00:0g", "fe:e1:bb:d1:00: 1", None)),
        *(("address", bad) for bad in ("", "100.64.1", "fd00::1", 7, "100.64.1.3\0")),
        *(("host", bad) for bad in ("", None)),
        *(("length", bad) for bad in (0, 33, "31", True)),
        *(("dns", bad) for bad in ("9.9.9.9", ["x"], ["9.9.9.9"] * 9, [None])),
        *(("hostname", bad) for bad in ("a..b", "x" * 64, ".", "é", 5)),
        *(("search", bad) for bad in ([""], ["a." * 50 + "a"] * 3, ["a"] * 7)),
        *(("lease", bad) for bad in (-1, 1 << 32, 1.5)),
        *(("mtu", bad) for bad in (67, 65536)),
        *(("boot_file", bad) for bad in ("x" * 128,)),
        *(("address6", bad) for bad in ("100.64.1.3", "fd00::x")),
        *(("length6", bad) for bad in (0, 129)),
        *(("router6", bad) for bad in ("", "fe80::1%eth0")),
        ("lladr", "fe:e1:bb:d1:00:01"),
    ],
)
def test_bad_settings_are_named(setting: str, value: Any) -> None:
    """Each in an error that names it."""
    with pytest.raises(ConfigError, match=setting):
        Local({**netlab.SETTINGS6, setting: value})


def test_what_must_be_given() -> None:
    """The guest's MAC address and both IPv4 addresses."""
    for key in ("lladdr", "address", "host"):
        with pytest.raises(ConfigError, match=key):
            Local({name: value for name, value in netlab.SETTINGS.items() if name != key})


def test_search_names_that_just_fit_one_option() -> None:
    """The bound of the settings is that of what is sent."""
    names = ["a" * 63 + "." + "b" * 56] * 2
    parsed = netsettings.parse({**netlab.SETTINGS, "search": names})
    assert len(b"".join(map(frames.wire_name, parsed.search))) <= 255


@pytest.mark.parametrize(
    "more",
    [
        {"mtu": 68, "length": 1, "length6": 1, "lease": 1},
        {"mtu": 65535, "length": 32, "length6": 128, "lease": 0xFFFF_FFFF, "boot_file": "x" * 127},
    ],
)
def test_the_ends_of_each_range_are_allowed(more: dict[str, Any]) -> None:
    """And make answers that can be read."""
    local = Local({**netlab.SETTINGS6, **more})
    answers = [*(local.answer(DHCP) or ()), *local.announce()]
    assert len(answers) == 2
    for answer in answers:
        netlab.see(answer)
