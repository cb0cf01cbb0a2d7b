"""DHCP responder by RFC 2131, with messages in the formats of the usual clients."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.dhcpwire import parse
from devices.netlocal import Local
from tests import netlab
from tests.netlab import ACK, DECLINE, DISCOVER, INFORM, NAK, OFFER, RELEASE, REQUEST

HOST_IP: Final = netlab.ip("100.64.1.2")
GUEST_IP: Final = netlab.ip("100.64.1.3")
FOREVER: Final = b"\xff" * 4


def ask(
    *options: tuple[int, bytes],
    config: dict[str, Any] | None = None,
    sent: dict[str, Any] | None = None,
    **message: Any,
) -> tuple[netlab.Seen, netlab.Reply] | list[bytes] | None:
    """Send one message in one frame; return the answer taken apart, or [] or None."""
    local = Local({**netlab.SETTINGS, **(config or {})})
    frame = netlab.udp(netlab.bootp(*options, **message), **(sent or {}))
    answers = local.answer(frame)
    if answers:
        (only,) = answers
        assert len(only) <= 1514
        assert local.wants(frame[:64])
        seen = netlab.see(only)
        return seen, netlab.reply(seen.payload)
    return answers


def answered(*options: tuple[int, bytes], **rest: Any) -> tuple[netlab.Seen, netlab.Reply]:
    """As `ask`, for what must be answered."""
    found = ask(*options, **rest)
    assert isinstance(found, tuple)
    return found


def kind(number: int) -> tuple[int, bytes]:
    return 53, bytes((number,))


# The parameter lists of clients, as they send them unless told otherwise.
UDHCPC: Final = (55, bytes((1, 3, 6, 12, 15, 28, 42)))
DHCLIENT: Final = (55, bytes((1, 28, 2, 3, 15, 6, 119, 12, 44, 47, 26, 121, 42)))
NETWORKD: Final = (55, bytes((1, 3, 6, 12, 15, 26, 33, 42, 119, 120, 121)))
OPENBSD: Final = (55, bytes((1, 28, 3, 121, 15, 6, 12, 119)))

CLIENTS: Final = {
    "udhcpc": (
        [(61, b"\x01" + netlab.GUEST), (57, b"\x02\x40"), UDHCPC, (60, b"udhcp 1.35.0")],
        {},
    ),
    "dhclient": ([(12, b"guest"), DHCLIENT], {}),
    # Short of the 300 bytes of BOOTP, asks for broadcasts, identifies itself by a DUID.
    "networkd": (
        [(61, b"\xff\xb6\x22\x0f\xeb\0\x02" + bytes(10)), NETWORKD, (57, b"\x05\xdc")],
        {"flags": 0x8000, "pad": 0},
    ),
    "openbsd": ([OPENBSD, (61, b"\x01" + netlab.GUEST)], {}),
    "plain": ([], {}),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_four_messages(client: str) -> None:
    """DISCOVER, OFFER, REQUEST, ACK, in each client's own words."""
    more, fields = CLIENTS[client]
    seen, offer = answered(kind(DISCOVER), *more, **fields)
    assert offer.type == OFFER
    assert offer.yiaddr == "100.64.1.3"
    assert offer.siaddr == "100.64.1.2"
    assert offer.options[54] == HOST_IP
    assert offer.options[51] == FOREVER
    assert offer.options[1] == b"\xff\xff\xff\xfe"
    assert offer.options[3] == HOST_IP
    assert offer.options[6] == HOST_IP
    assert 58 not in offer.options
    assert seen.src == "100.64.1.2"
    assert seen.ports == (67, 68)
    assert seen.ttl == 16
    assert seen.src_mac == netlab.HOST
    if fields.get("flags"):
        assert (seen.dst_mac, seen.dst) == (netlab.BROADCAST, "255.255.255.255")
    else:
        assert (seen.dst_mac, seen.dst) == (netlab.GUEST, "100.64.1.3")

    chosen = (50, netlab.ip(offer.yiaddr)), (54, offer.options[54])
    _, ack = answered(kind(REQUEST), *chosen, *more, **fields)
    assert ack.type == ACK
    assert ack.yiaddr == "100.64.1.3"
    assert ack.options[51] == FOREVER


def test_every_answer_needs_the_right_checksum() -> None:
    """A wrong UDP checksum goes past us; none, and one left to the device, do not."""
    payload = netlab.bootp(kind(DISCOVER))
    local = Local(netlab.SETTINGS)
    assert local.answer(netlab.udp(payload, check=1)) is None
    assert local.answer(netlab.udp(payload, check=0))
    assert local.answer(netlab.udp(payload, check=1), partial=True)


def test_selecting_another_server_is_not_ours() -> None:
    """REQUEST, DECLINE and RELEASE name the server they mean."""
    for number in (REQUEST, DECLINE, RELEASE):
        assert ask(kind(number), (50, GUEST_IP), (54, b"\x0a\0\0\1")) is None


@pytest.mark.parametrize("server", [(), ((54, HOST_IP),)])
def test_another_address_is_refused(server: tuple[tuple[int, bytes], ...]) -> None:
    """Selecting and init-reboot: NAK, broadcast, with a reason and no address."""
    seen, nak = answered(
        kind(REQUEST), (50, netlab.ip("100.64.1.9")), *server, (61, b"\x01" + netlab.GUEST)
    )
    assert nak.type == NAK
    assert (nak.yiaddr, nak.siaddr, nak.ciaddr) == ("0.0.0.0",) * 3
    assert nak.options.keys() == {53, 54, 56, 61}
    assert (seen.dst_mac, seen.dst) == (netlab.BROADCAST, "255.255.255.255")


def test_init_reboot_is_acknowledged() -> None:
    """A client that remembers the right address keeps it."""
    assert answered(kind(REQUEST), (50, GUEST_IP))[1].type == ACK


@pytest.mark.parametrize(
    "to",
    [
        {"dst": "100.64.1.2", "dst_mac": netlab.HOST},  # renewing
        {},  # rebinding
    ],
)
def test_renewals_are_acknowledged(to: dict[str, Any]) -> None:
    """`ciaddr` has the address: the answer goes there, as unicast, whatever the flag says."""
    sent = {"src": "100.64.1.3", **to}
    seen, ack = answered(kind(REQUEST), ciaddr="100.64.1.3", sent=sent, flags=0x8000)
    assert ack.type == ACK
    assert (ack.yiaddr, ack.ciaddr) == ("100.64.1.3", "100.64.1.3")
    assert (seen.dst_mac, seen.dst) == (netlab.GUEST, "100.64.1.3")


def test_renewing_another_address_is_refused() -> None:
    """Whoever moved here with an old lease is told so."""
    seen, nak = answered(kind(REQUEST), ciaddr="10.0.0.7", sent={"src": "10.0.0.7"})
    assert nak.type == NAK
    assert seen.dst == "255.255.255.255"


def test_lease_times() -> None:
    """T1 and T2 at a half and seven eighths (RFC 2131 §4.4.5)."""
    _, ack = answered(kind(REQUEST), config={"lease": 3600})
    assert ack.options[51] == (3600).to_bytes(4, "big")
    assert ack.options[58] == (1800).to_bytes(4, "big")
    assert ack.options[59] == (3150).to_bytes(4, "big")


def test_inform_gets_parameters_and_no_lease() -> None:
    """RFC 2131 §4.3.5: no yiaddr, no lease time, to `ciaddr`."""
    seen, ack = answered(kind(INFORM), ciaddr="100.64.1.3", sent={"src": "100.64.1.3"})
    assert ack.type == ACK
    assert (ack.yiaddr, ack.ciaddr) == ("0.0.0.0", "100.64.1.3")
    assert not {51, 58, 59} & ack.options.keys()
    assert ack.options[6] == HOST_IP
    assert (seen.dst_mac, seen.dst) == (netlab.GUEST, "100.64.1.3")


def test_decline_and_release_are_noted() -> None:
    """No answer; they stay here; a decline is worth a line in the log."""
    said: list[str] = []
    local = Local(netlab.SETTINGS, said.append)
    for number in (DECLINE, RELEASE):
        assert local.answer(netlab.udp(netlab.bootp(kind(number), (54, HOST_IP)))) == []
    assert local.counts == {"decline": 1, "release": 1}
    assert len(said) == 1
    assert "DHCPDECLINE" in said[0]


@pytest.mark.parametrize("number", [OFFER, ACK, NAK, 0, 9, 10, 13, 255])
def test_other_types_are_not_ours(number: int) -> None:
    """Lease queries and what servers send: no NAK, which would cost the guest its address."""
    assert ask(kind(number)) is None


def test_rapid_commit_saves_two_messages() -> None:
    """RFC 4039: ACK to a DISCOVER that asks for it."""
    _, ack = answered(kind(DISCOVER), (80, b""))
    assert ack.type == ACK
    assert ack.options[80] == b""
    assert 80 not in answered(kind(DISCOVER))[1].options


@pytest.mark.parametrize(
    "message",
    [
        {"cookie": bytes(4)},
        {},
        {"cookie": netlab.COOKIE + b"\x35\x09\x01"},  # runs past the end... of 300 bytes
    ],
)
def test_bootp(message: dict[str, Any]) -> None:
    """Without a type: no type, no lease, options in the 64 bytes of BOOTP."""
    seen, answer = answered(config={"hostname": "h" * 63, "domain": "d" * 60}, **message)
    assert answer.yiaddr == "100.64.1.3"
    assert answer.siaddr == "100.64.1.2"
    assert answer.options.keys() >= {1, 3, 6}
    assert not {51, 53, 54} & answer.options.keys()
    assert len(seen.payload) == 300


def test_broken_options_count_as_bootp() -> None:
    """As in vmd; also if what is broken comes behind the type."""
    broken = b"\x35\x01\x01" + b"\x0c\xff"
    _, answer = answered(cookie=netlab.COOKIE + broken, pad=300)
    assert answer.type == 0


def test_relay_agents_get_the_answer_and_their_option_back() -> None:
    """To giaddr, port 67; option 82 as it came, and last (RFC 3046 §2.2)."""
    relay = b"\x01\x04eth1\x02\x06abcdef"
    seen, offer = answered(
        kind(DISCOVER),
        (82, relay),
        (61, b"\x01" + netlab.GUEST),
        giaddr="100.64.1.3",
        hops=1,
        flags=0x8000,
        sent={"src": "100.64.1.3", "ports": (67, 67)},
    )
    assert (seen.dst, seen.ports, seen.dst_mac) == ("100.64.1.3", (67, 67), netlab.GUEST)
    assert offer.giaddr == "100.64.1.3"
    assert offer.flags == 0x8000
    assert list(offer.options)[-1] == 82
    assert offer.options[82] == relay

    seen, nak = answered(
        kind(REQUEST),
        (50, b"\x0a\0\0\x09"),
        (82, relay),
        giaddr="100.64.1.3",
        sent={"ports": (67, 67)},
    )
    assert nak.type == NAK
    assert nak.options[82] == relay
    assert nak.flags == 0x8000  # the relay is to broadcast it (RFC 2131 §4.3.2)
    assert (seen.dst, seen.ports) == ("100.64.1.3", (67, 67))


FULL: Final = {
    "hostname": "web",
    "domain": "example.org",
    "search": ["example.org", "example.net"],
    "mtu": 1400,
    "dns": ["9.9.9.9", "fd00::53", "149.112.112.112"],
    "router": "100.64.1.2",
    "lease": 600,
}


def test_parameters_come_as_asked() -> None:
    """Those listed, in that order but for the mask; the three that are always told; no others."""
    _, ack = answered(kind(REQUEST), (55, bytes((26, 3, 119, 200))), config=FULL)
    assert list(ack.options) == [53, 54, 51, 58, 59, 1, 26, 3, 119, 6]
    assert ack.options[26] == (1400).to_bytes(2, "big")
    assert ack.options[6] == netlab.ip("9.9.9.9") + netlab.ip("149.112.112.112")
    assert ack.options[119] == b"\7example\3org\0\7example\3net\0"


def test_unasked_parameters_are_the_usual_ones() -> None:
    """A client that lists nothing learns what there is; a /31 has no broadcast address."""
    _, ack = answered(kind(REQUEST), config=FULL)
    assert list(ack.options) == [53, 54, 51, 58, 59, 1, 3, 6, 12, 15, 26, 119]
    assert ack.options[12] == b"web"
    assert ack.options[15] == b"example.org"


def test_wider_links_have_a_broadcast_address() -> None:
    """A /29 as anywhere."""
    config = {"length": 29, "address": "10.1.2.11", "host": "10.1.2.9"}
    _, ack = answered(kind(REQUEST), config=config)
    assert ack.options[1] == netlab.ip("255.255.255.248")
    assert ack.options[28] == netlab.ip("10.1.2.15")
    assert ack.options[3] == netlab.ip("10.1.2.9")


def test_a_host_route_comes_as_classless_routes() -> None:
    """With a /32 the router is on no link: option 121 says that it is (RFC 3442)."""
    config = {"length": 32, "router": "10.0.0.1"}
    _, ack = answered(kind(REQUEST), config=config)
    on_link = b"\x20" + netlab.ip("10.0.0.1") + bytes(4) + b"\x20" + HOST_IP + bytes(4)
    assert ack.options[121] == on_link + b"\0" + netlab.ip("10.0.0.1")
    assert 121 not in answered(kind(REQUEST), DHCLIENT)[1].options


def test_boot_file() -> None:
    """What a network boot loads (vmd)."""
    for number in (DISCOVER, REQUEST):
        _, answer = answered(kind(number), config={"boot_file": "auto_install"})
        assert answer.file.rstrip(b"\0") == b"auto_install"


BIG_ID: Final = (61, b"\xff" + bytes(range(1, 200)))


def test_what_does_not_fit_overloads_file_and_sname() -> None:
    """308 bytes of options are all that every client takes; the fields have 191 more."""
    config = {**FULL, "search": [f"{'s' * 60}.example", f"{'t' * 40}.example"]}
    seen, ack = answered(kind(REQUEST), BIG_ID, config=config)
    assert len(seen.payload) + 28 <= 576
    assert ack.options[52] in (b"\1", b"\3")
    found = netlab.all_options(ack)
    assert found.keys() >= {1, 3, 6, 12, 15, 26, 51, 53, 54, 61, 119}
    assert found[61] == BIG_ID[1]
    assert found[119].startswith(b"\x3c" + b"s" * 60 + b"\7example\0")

    # A client that takes more gets it in one place.
    seen, ack = answered(kind(REQUEST), BIG_ID, (57, b"\x05\xdc"), config=config)
    assert 52 not in ack.options
    assert ack.options[119] == found[119]

    # With a file name there, only sname is left, and less is told; never a broken message.
    config["boot_file"] = "auto_install"
    seen, ack = answered(kind(REQUEST), BIG_ID, (82, bytes(240)), config=config)
    assert len(seen.payload) + 28 <= 576
    assert ack.file.rstrip(b"\0") == b"auto_install"
    assert ack.options[52] == b"\2"
    assert list(ack.options)[-1] == 82
    assert netlab.all_options(ack).keys() >= {1, 3, 6, 51, 53, 54, 82}


def test_no_answer_is_a_byte_too_long() -> None:
    """576 bytes with IPv4 and UDP heads, filled to the last byte by some lengths, never beyond."""
    lengths = set()
    for size in range(1, 256):
        seen, ack = answered(kind(REQUEST), (61, bytes(size)), (82, bytes(40)), config=FULL)
        lengths.add(len(seen.payload) + 28)
        netlab.all_options(ack)
    assert max(lengths) == 576

    lengths = set()
    for size in range(1, 64):
        seen, answer = answered(config={"hostname": "h" * size})
        lengths.add(len(seen.payload))
        if 12 in answer.options:
            longest = size
    assert lengths == {300}
    assert longest == 64 - 4 - 1 - 18 - 2  # cookie, end, the three that are always told, its head


@pytest.mark.parametrize("code", [61, 82])
def test_what_cannot_be_echoed_is_left_out(code: int) -> None:
    """In several parts it may be longer than one option of ours (RFC 3396)."""
    halves = (code, bytes(range(1, 129))), (code, bytes(range(127)))
    wide = (57, b"\x05\xdc")
    _, ack = answered(kind(REQUEST), *halves, wide, pad=0)
    assert ack.options[code] == halves[0][1] + halves[1][1]
    _, ack = answered(kind(REQUEST), *halves, (code, b"x"), wide, pad=0)
    assert code not in ack.options


def test_overloaded_and_split_requests_are_read() -> None:
    """Options in `file` and `sname`, one of them in two parts (RFC 3396)."""
    half = netlab.option(50, GUEST_IP[:2])
    rest = netlab.option(50, GUEST_IP[2:])
    _, ack = answered(kind(REQUEST), (52, b"\3"), file=half + b"\xff", sname=rest + b"\xff")
    assert ack.type == ACK
    wrong = netlab.option(50, b"\x0a\0\0\1")
    _, nak = answered(kind(REQUEST), (52, b"\1"), file=wrong + b"\xff")
    assert nak.type == NAK


def test_a_request_for_a_file_is_not_ours() -> None:
    """As in vmd: whoever serves files on this host may answer."""
    assert ask(kind(DISCOVER), file=b"pxelinux.0") is None


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"src_mac": netlab.HOST}, {}),
        ({"dst_mac": b"\2\0\0\0\0\1"}, {}),
        ({"dst": "10.0.0.1"}, {}),  # another server, reached through us
        ({"ports": (68, 68)}, {}),
        ({"ports": (1068, 67)}, {}),
        ({}, {"chaddr": netlab.HOST}),
        ({}, {"hops": 1}),
    ],
)
def test_what_is_not_for_us_goes_on(sent: dict[str, Any], message: dict[str, Any]) -> None:
    """From another station, to another station, for another client."""
    assert ask(kind(DISCOVER), sent=sent, **message) is None


def test_a_changed_mac_address_is_followed() -> None:
    """The lease belongs to the guest, whatever address it has given itself."""
    local = Local(netlab.SETTINGS)
    other = bytes.fromhex("0202030405 06".replace(" ", ""))
    frame = netlab.udp(netlab.bootp(kind(DISCOVER), chaddr=other), src_mac=other)
    assert local.answer(frame) is None
    local.lladdr = other
    answers = local.answer(frame)
    assert answers
    assert answers[0][:6] == other


def test_ip_options_are_understood() -> None:
    """`wants` passes them to `answer`, which knows where the datagram begins."""
    frame = netlab.udp(netlab.bootp(kind(DISCOVER)), ip_options=b"\x01" * 12)
    local = Local(netlab.SETTINGS)
    assert local.wants(frame[:64])
    assert local.answer(frame)


def test_no_truncation_is_answered() -> None:
    """A frame cut anywhere goes past us."""
    local = Local(netlab.SETTINGS)
    frame = netlab.udp(netlab.bootp(kind(REQUEST), UDHCPC))
    assert local.answer(frame)
    for length in range(len(frame)):
        assert local.answer(frame[:length]) is None, length


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 254), st.binary(max_size=40)), max_size=8),
    st.sampled_from(["0.0.0.0", "100.64.1.3", "10.9.8.7"]),
    st.sampled_from(["0.0.0.0", "100.64.1.3"]),
    st.integers(0, 0xFFFF),
    st.sampled_from([0, 300, 1400]),
)
def test_whatever_is_asked_an_answer_is_well_formed(
    options: list[tuple[int, bytes]], ciaddr: str, giaddr: str, flags: int, pad: int
) -> None:
    """Any options, any size: `see` and `reply` check every length and checksum of the answer."""
    found = ask(*options, config=FULL, ciaddr=ciaddr, giaddr=giaddr, flags=flags, pad=pad)
    if isinstance(found, tuple):
        seen, answer = found
        assert answer.yiaddr in ("100.64.1.3", "0.0.0.0")
        assert len(seen.payload) + 28 <= 1500
        netlab.all_options(answer)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_options_of_any_bytes_are_survived(area: bytes) -> None:
    """The reader ends and returns what is there."""
    message = parse(netlab.bootp(cookie=netlab.COOKIE + area))
    assert message is not None
    assert all(0 < code < 255 for code in message.options)
