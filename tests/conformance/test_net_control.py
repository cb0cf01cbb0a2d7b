"""The control queue (§5.1.6.5), the link, and what a user changes at run time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from config.errors import ConfigError, GuestError
from devices import netctrl, vionet
from devices import nethdr as hdr
from devices.bucket import TokenBucket
from devices.features import F_RING_PACKED
from devices.netlook import Verdicts
from devices.spec import SPECS
from devices.viodev import CONFIG_CHANGE
from devices.virtio import CommonCfg
from tests.conformance.test_net_receive import frame
from tests.conformance.test_net_send import header, tcp_frame
from tests.taplab import TapLab
from tests.vionetlab import OWN, PEER, NetLab, frame_of

if TYPE_CHECKING:
    from collections.abc import Iterator

RX, MAC, VLAN, ANNOUNCE, MQ, OFFLOADS = range(6)
OK, ERR = 0, 1
CONTROLLED = (
    hdr.NET_F_CTRL_VQ
    | hdr.NET_F_CTRL_RX
    | hdr.NET_F_CTRL_RX_EXTRA
    | hdr.NET_F_CTRL_VLAN
    | hdr.NET_F_CTRL_MAC_ADDR
    | hdr.NET_F_CTRL_GUEST_OFFLOADS
    | hdr.NET_F_GUEST_ANNOUNCE
    | hdr.NET_F_GUEST_CSUM
    | hdr.NET_F_GUEST_TSO4
    | hdr.NET_F_STATUS
    | hdr.NET_F_MRG_RXBUF
)
S_LINK_UP, S_ANNOUNCE = 1, 2
OTHER = bytes.fromhex("020000000042")


@pytest.fixture
def tap() -> Iterator[TapLab]:
    """A tap of one queue."""
    with TapLab() as tap:
        yield tap


@pytest.fixture
def lab(tap: TapLab) -> Iterator[NetLab]:
    """A device whose driver has accepted everything."""
    with NetLab(tap) as lab:
        lab.start(CONTROLLED)
        lab.give(64, 4096)
        lab.serve()
        yield lab


@pytest.fixture
def pairs() -> Iterator[NetLab]:
    """A device with four queue pairs; `lab.tap` is its tap."""
    with TapLab(4) as tap, NetLab(tap) as lab:
        lab.start(hdr.NET_F_MQ | hdr.NET_F_CTRL_VQ | hdr.NET_F_MRG_RXBUF, arena_bytes=1 << 20)
        lab.tap = tap  # type: ignore[attr-defined]
        yield lab


def status(lab: NetLab) -> int:
    """The status field of the configuration space."""
    return lab.read_config(6, 2)


def table(*addresses: bytes, count: int | None = None) -> bytes:
    """Half of a MAC table."""
    number = len(addresses) if count is None else count
    return number.to_bytes(4, "little") + b"".join(addresses)


def test_a_guest_that_changes_the_hosts_interface_all_the_time_is_slowed_down(lab: NetLab) -> None:
    """Each change takes a lock of the whole host. All are done later, reset or not."""
    now = 0.0
    control, queue = lab.device._control, lab.queues[2]
    control._changes = TokenBucket(netctrl.CHANGES_RATE, netctrl.CHANGES_BURST, lambda: now)
    commands, done = netctrl.CHANGES_BURST + 10, 0
    for n in range(commands):
        wanted = (n & 1) * hdr.NET_F_GUEST_CSUM
        queue.add([bytes((OFFLOADS, 0)) + wanted.to_bytes(8, "little")], [1])
        lab.schedule(2)
        lab.serve()
        done += len(queue.collect())
    assert done == netctrl.CHANGES_BURST
    [resting] = [timer for timer in lab.timers if timer.seconds is not None]
    while done < commands:
        assert resting.seconds is not None
        now += resting.seconds
        resting.fire()
        lab.serve()
        found = queue.collect()
        assert 0 < len(found) <= netctrl.BATCH
        done += len(found)
    lab.start(CONTROLLED)
    lab.queues[2].add([bytes((OFFLOADS, 0)) + bytes(8)], [1])
    lab.schedule(2)
    lab.serve()
    assert lab.queues[2].collect() == []
    assert resting.seconds is not None
    lab.device.reset()
    assert resting.seconds is None


# Commands that do not fit.


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (6, 0, b""),
        (0xFF, 0xFF, b"\0" * 8),
        (RX, 6, b"\1"),
        (RX, 0, b""),
        (RX, 0, b"\1\0"),
        (MAC, 2, OTHER),
        (MAC, 0, b""),
        (MAC, 0, table(OTHER)),  # the second table is missing
        (MAC, 0, table(OTHER, count=2) + table()),
        (MAC, 0, table(OTHER, count=0xFFFF_FFFF) + table()),  # CVE-2014-0150
        (MAC, 0, table(count=0x2AAA_AAAB) + table()),  # times 6 is 2 in 32 bits
        (MAC, 0, table(OTHER) + table() + b"\0"),
        (MAC, 1, OTHER[:5]),
        (MAC, 1, OTHER + b"\0"),
        (MAC, 1, b"\1" + OTHER[1:]),  # a group's
        (VLAN, 0, b"\1"),
        (VLAN, 0, b"\0\x10"),
        (VLAN, 2, b"\1\0"),
        (ANNOUNCE, 1, b""),
        (ANNOUNCE, 0, b"\0"),
        (MQ, 0, b"\1\0"),  # MQ is not negotiated
        (OFFLOADS, 0, b"\0" * 7),
        (OFFLOADS, 1, b"\0" * 8),
        (OFFLOADS, 0, (1 << 8).to_bytes(8, "little")),  # TSO6 is not negotiated
        (OFFLOADS, 0, b"\xff" * 8),
    ],
)
def test_5_1_6_5_a_command_that_cannot_be_is_refused(
    lab: NetLab, kind: int, command: int, data: bytes
) -> None:
    """ERR, and nothing is different."""
    before = lab.device.save()
    assert lab.command(kind, command, data) == ERR
    assert lab.device.save() == before


@pytest.mark.parametrize("kind", range(6))
def test_5_1_6_5_commands_need_their_features(tap: TapLab, kind: int) -> None:
    """A driver with no more than a control queue has no command at all."""
    data = [b"\1", table() + table(), b"\1\0", b"", b"\1\0", bytes(8)][kind]
    with NetLab(tap) as lab:
        lab.start(hdr.NET_F_CTRL_VQ)
        assert lab.command(kind, 0, data) == ERR
        lab.start(CONTROLLED)
        assert lab.command(kind, 0, data) == (ERR if kind == MQ else OK)


def test_5_1_6_5_a_command_cut_anywhere(lab: NetLab) -> None:
    """Class, command, data and ack lie in descriptors as the driver likes; too short is ERR."""
    queue = lab.queues[2]
    tables = table(OTHER) + table(PEER, OTHER)
    whole = bytes([MAC, 0]) + tables
    for readable in (
        [whole],
        [whole[i : i + 1] for i in range(len(whole))],
        [whole[:3], whole[3:]],
    ):
        queue.add(readable, [1, 1])
        lab.schedule(2)
        lab.serve()
        [used] = queue.collect()
        assert (used.written, queue.data(used.request)[0]) == (1, OK)
    for readable in ([b"\0"], []):
        queue.add(readable, [1])
        lab.schedule(2)
        lab.serve()
        [used] = queue.collect()
        assert (used.written, queue.data(used.request)[0]) == (1, ERR)


def test_a_command_longer_than_any_is_not_even_copied(lab: NetLab) -> None:
    """A megabyte of MAC addresses is refused by its length."""
    queue = lab.queues[2]
    queue.add([bytes([MAC, 0]) + table(count=170_000), bytes(1 << 20)], [1])
    lab.schedule(2)
    lab.serve()
    [used] = queue.collect()
    assert queue.data(used.request)[0] == ERR


def test_a_command_without_room_for_its_ack_needs_a_reset(lab: NetLab) -> None:
    """There is no way to answer it."""
    lab.queues[2].add([bytes([RX, 0, 1])], [])
    lab.schedule(2)
    with pytest.raises(GuestError, match="ack"):
        lab.serve()


# What they do.


def test_5_1_6_5_1_receive_modes_decide_what_is_received(lab: NetLab, tap: TapLab) -> None:
    """A device begins promiscuous; then tables and modes count."""

    def arrives(to: bytes) -> bool:
        tap.send(frame_of(60, to=to, source=PEER))
        return len(lab.received()) == 1

    group = bytes.fromhex("01005e000001")
    assert arrives(OTHER)
    assert arrives(group)
    assert lab.command(RX, 0, b"\0") == OK
    assert not arrives(OTHER)
    assert not arrives(group)
    assert arrives(OWN)
    assert arrives(b"\xff" * 6)
    assert lab.command(MAC, 0, table(OTHER) + table(group)) == OK
    assert arrives(OTHER)
    assert arrives(group)
    assert lab.command(RX, 5, b"\1") == OK
    assert not arrives(b"\xff" * 6)
    assert lab.command(RX, 0, b"\1") == OK
    assert arrives(b"\xff" * 6)
    drops = lab.device.counters["rx"].drops
    assert drops == {"filtered": 3}
    lab.start(CONTROLLED)
    lab.give(4, 2048)
    assert arrives(PEER)


def test_5_1_6_5_3_vlans_are_filtered(lab: NetLab, tap: TapLab) -> None:
    """Out of promiscuous mode, only those that were added arrive."""
    tagged = OWN + PEER + b"\x81\0\0\x07\x88\xb5".ljust(60, b"v")
    assert lab.command(RX, 0, b"\0") == OK
    tap.send(tagged)
    assert lab.received() == []
    assert lab.command(VLAN, 0, b"\7\0") == OK
    tap.send(tagged)
    assert [got.data for got in lab.received()] == [tagged]
    assert lab.command(VLAN, 1, b"\7\0") == OK
    tap.send(tagged)
    assert lab.received() == []


def test_5_1_6_5_2_the_address_is_taken(lab: NetLab, tap: TapLab) -> None:
    """It is in the configuration space then, what is for it arrives, and a reset undoes it."""
    assert lab.command(MAC, 1, OTHER) == OK
    assert lab.device.config()[:6] == OTHER
    assert lab.command(RX, 0, b"\0") == OK
    tap.send(frame(60))
    tap.send(frame_of(60, to=OTHER))
    assert [got.data for got in lab.received()] == [frame_of(60, to=OTHER)]
    lab.status = 0
    assert lab.device.config()[:6] == OWN


def test_locked_the_address_stays(tap: TapLab) -> None:
    """The user's word stands against the driver's."""
    with NetLab(tap, locked=True) as lab:
        lab.start(CONTROLLED)
        assert lab.command(MAC, 1, OTHER) == ERR
        assert lab.device.config()[:6] == OWN


def test_5_1_4_4_a_legacy_driver_writes_its_address(tap: TapLab) -> None:
    """Byte by byte in the configuration space; no other driver can, and nothing else."""
    with NetLab(tap) as lab:
        lab.start(CONTROLLED)
        lab.write_config(0, 1, 2)
        assert lab.device.config()[:6] == OWN
        lab.start_legacy(hdr.NET_F_MRG_RXBUF)
        for at, byte in enumerate(OTHER):
            lab.registers.transport.write_config(at, 1, byte)
        lab.registers.transport.write_config(6, 2, 0xFFFF)
        assert lab.device.config()[:8] == OTHER + b"\1\0"


def test_5_1_6_5_6_offloads_at_run_time(lab: NetLab, tap: TapLab) -> None:
    """The tap follows: a segment that was one frame comes in pieces, and then as one again."""
    data, head = tcp_frame(4054), header(gso=hdr.GSO_TCPV4, hdr_len=54, size=1000)
    tap.send(data, head)
    assert [len(got.data) for got in lab.received()] == [4054]
    assert lab.command(OFFLOADS, 0, bytes(8)) == OK
    tap.send(data, head)
    assert [len(got.data) for got in lab.received()] == [1054] * 4
    on = hdr.NET_F_GUEST_CSUM | hdr.NET_F_GUEST_TSO4
    assert lab.command(OFFLOADS, 0, on.to_bytes(8, "little")) == OK
    tap.send(data, head)
    assert [len(got.data) for got in lab.received()] == [4054]
    lab.status = 0
    tap.send(data, head)
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(8, 2048)
    assert [len(got.data) for got in lab.received()] == [1054] * 4


# Queue pairs.


def test_5_1_2_queues_are_numbered_by_pairs(pairs: NetLab) -> None:
    """The control queue is behind the last pair; without MQ it is number 2."""
    assert pairs.read_config(8, 2) == 4
    assert pairs.command(MQ, 0, b"\1\0") == OK
    assert pairs.device._control_index == 8
    pairs.start(CONTROLLED & ~hdr.NET_F_MRG_RXBUF, arena_bytes=1 << 20)
    assert pairs.device._control_index == 2
    assert pairs.command(RX, 0, b"\1") == OK


@pytest.mark.parametrize("count", [0, 5, 0x8000, 0xFFFF])
def test_5_1_6_5_5_no_pairs_that_are_not_there(pairs: NetLab, count: int) -> None:
    """From 1 to what the device has."""
    assert pairs.command(MQ, 0, count.to_bytes(2, "little")) == ERR


def test_5_1_6_5_5_frames_come_on_pairs_in_use(pairs: NetLab) -> None:
    """One at first, as many as the driver says then, one again after a reset."""
    tap: TapLab = pairs.tap  # type: ignore[attr-defined]

    def arrive() -> set[int]:
        for number in range(200):  # flows, as the kernel tells them apart
            ports = number.to_bytes(2) + b"\0\7"
            tap.send(tcp_frame(100)[:34] + ports + tcp_frame(100)[38:])
        pairs.serve()
        found = {pair: len(pairs.collect(pair)) for pair in range(4)}
        assert sum(found.values()) == 200
        return {pair for pair in found if found[pair]}

    for pair in range(4):
        pairs.give(200, 256, pair=pair)
    assert arrive() == {0}
    assert pairs.command(MQ, 0, b"\4\0") == OK
    for pair in range(4):
        pairs.give(200 if pair == 0 else 0, 256, pair=pair)
    assert arrive() == {0, 1, 2, 3}
    pairs.start(hdr.NET_F_MRG_RXBUF, arena_bytes=1 << 20)
    pairs.give(200, 256)
    assert arrive() == {0}


def test_5_1_6_5_5_frames_leave_on_pairs_in_use(pairs: NetLab) -> None:
    """What is sent on another goes nowhere, and comes back."""
    tap: TapLab = pairs.tap  # type: ignore[attr-defined]
    pairs.transmit(frame_of(60, 3), pair=3)
    assert tap.pending() == []
    assert pairs.command(MQ, 0, b"\4\0") == OK
    for pair in range(4):
        pairs.transmit(frame_of(60, pair), pair=pair)
    assert [sent.data for sent in tap.receive(4)] == [frame_of(60, pair) for pair in range(4)]


# The link.


def test_5_1_4_the_configuration_space(tap: TapLab) -> None:
    """As long as the table says, and what is not offered is 0."""
    with NetLab(tap, mtu=1400) as lab:
        assert lab.offered() & hdr.NET_F_MTU
        assert (
            lab.device.config() == OWN + b"\1\0\1\0\x78\5" + (10_000).to_bytes(4, "little") + b"\1"
        )
        assert len(lab.device.config()) == SPECS["vionet"].config_length
        lab.device.setting("link", False)
        assert lab.device.config()[6:8] == b"\0\0"
        assert lab.device.config()[12:] == b"\xff" * 5
    with NetLab(tap) as lab:
        assert not lab.offered() & (hdr.NET_F_MTU | hdr.NET_F_MQ)


def test_5_1_3_1_features_need_others(tap: TapLab) -> None:
    """Those that the text names; none is offered without what it needs."""
    with NetLab(tap) as lab:
        offered = lab.offered()
        for bit, base in hdr.DEPENDENCIES:
            if offered & bit:
                assert offered & base
                assert not lab.negotiate(1 << 32 | bit)
                assert lab.negotiate(1 << 32 | bit | base)


def test_a_link_that_is_down_carries_nothing(lab: NetLab, tap: TapLab) -> None:
    """The driver is told, the host's side sees it, frames are lost both ways, old ones too."""
    lab.interrupts.clear()
    assert lab.device.setting("link", False) is False
    assert lab.interrupts == [CONFIG_CHANGE]
    assert status(lab) == 0
    assert not tap.running
    lab.transmit(frame_of(60))
    assert tap.pending() == []
    assert lab.device.counters["tx"].drops == {"link down": 1}
    assert lab.serve() == 0
    assert lab.device.setting("link", True) is True
    assert tap.running
    assert status(lab) == S_LINK_UP | S_ANNOUNCE
    assert lab.command(ANNOUNCE, 0) == OK
    assert status(lab) == S_LINK_UP
    assert receives(lab, tap)
    lab.transmit(frame_of(60))
    assert len(tap.receive(1)) == 1


def receives(lab: NetLab, tap: TapLab) -> bool:
    """Wait until frames arrive: the host's stack hears of a link a little later than the driver."""
    while not (found := lab.received()):
        tap.send(frame(60))
    return {got.data for got in found} == {frame(60)}


def test_a_device_may_begin_without_a_link(tap: TapLab) -> None:
    """And get it later."""
    with NetLab(tap, link=False) as lab:
        lab.start(CONTROLLED)
        assert status(lab) == 0
        assert not tap.running
        lab.give(4, 2048)
        assert lab.received() == []
        lab.device.setting("link", True)
        assert receives(lab, tap)


def test_5_1_6_5_4_a_driver_is_asked_to_announce_itself(lab: NetLab) -> None:
    """After a pause, which may have been a journey; but only one that can."""
    lab.device.pause()
    lab.device.unpause()
    assert status(lab) == S_LINK_UP | S_ANNOUNCE
    lab.status = 0
    assert status(lab) == S_LINK_UP
    lab.start(hdr.NET_F_STATUS)
    lab.device.unpause()
    assert status(lab) == S_LINK_UP


def test_a_tap_that_is_taken_down_and_up_again(lab: NetLab, tap: TapLab) -> None:
    """The link goes with it and comes back; told once each, whatever the guest goes on sending."""
    tap.set_up(False)
    for _ in range(50):
        lab.transmit(frame_of(60))
    assert status(lab) == 0
    assert len(lab.said) == 1
    assert "taken down" in lab.said[0]
    assert lab.serve() == 0  # nothing spins
    tap.set_up(True)
    lab.serve()
    assert status(lab) & S_LINK_UP
    assert len(lab.said) == 2
    lab.transmit(frame_of(60))
    assert len(tap.receive(1)) == 1
    assert receives(lab, tap)


def test_a_tap_that_is_taken_down_over_a_reset(lab: NetLab, tap: TapLab) -> None:
    """The next driver gets its link when the tap is up again."""
    tap.set_up(False)
    lab.transmit(frame_of(60))
    lab.start(CONTROLLED)
    assert status(lab) == 0
    tap.set_up(True)
    lab.serve()
    assert status(lab) & S_LINK_UP


@pytest.mark.parametrize("first", ["epoll", "send", "receive", "down"])
def test_a_tap_that_is_deleted(lab: NetLab, tap: TapLab, first: str) -> None:
    """However it is noticed: told once, no link, nothing spins, and resets go on working."""
    if first == "send":
        lab.start(CONTROLLED)  # no buffers, so that the tap is not watched
        lab.serve()
    if first == "down":
        tap.set_up(False)
        lab.transmit(frame_of(60))
    tap.delete()
    if first == "receive":
        lab.scheduled[:] = [0]
        lab.turn()
    if first == "send":
        lab.transmit(frame_of(60))
    lab.serve()
    assert status(lab) == 0
    assert [line for line in lab.said if "for good" in line or first == "down"]
    assert len(lab.said) == 1
    for _ in range(3):
        lab.transmit(frame_of(60))
        lab.status = 0
        lab.start(CONTROLLED)
        lab.device.setting("link", False)
        lab.device.setting("link", True)
    assert lab.serve() >= 0
    assert lab.serve() == 0
    assert len(lab.said) == 1
    assert lab.device.setting("counters", None)["lost"]


# The rest of what a user can do.


def test_counters(lab: NetLab, tap: TapLab) -> None:
    """Frames and bytes without headers, and why others were dropped, each way."""
    lab.transmit(frame_of(60), frame_of(100), b"short")
    tap.send(frame(70))
    lab.received()
    facts = lab.device.setting("counters", None)
    assert facts["tx"] == {"frames": 2, "bytes": 160, "drops": {"short": 1}}
    assert facts["rx"] == {"frames": 1, "bytes": 70, "drops": {}}
    assert (facts["link"], facts["pairs"], facts["lladdr"]) == (True, 1, OWN.hex(":"))
    assert facts["capture"] == {"active": False}
    names = SPECS["vionet"].counters
    totals = dict(zip(names, lab.device.totals, strict=False))
    assert {name: value for name, value in totals.items() if value} == {
        "tx_frames": 2,
        "tx_bytes": 160,
        "tx_short": 1,
        "rx_frames": 1,
        "rx_bytes": 70,
    }


@pytest.mark.parametrize("way", ["rx", "tx"])
def test_every_reason_has_a_counter(way: str) -> None:
    """What the code says of a frame it drops is in the spec, and the other way round."""
    source = (Path(vionet.__file__).parent / f"net{way}.py").read_text()
    reasons = set(re.findall(r'drop\("([a-z ]+)"', source))
    reasons |= set(re.findall(r'else "([a-z ]+)"', source))
    reasons |= set(re.findall(r'return "([a-z ]+)"', source))
    counted = {f"{way}_{reason.replace(' ', '_')}" for reason in reasons}
    known = {name for name in SPECS["vionet"].counters if name.startswith(way)}
    assert counted == known - {f"{way}_frames", f"{way}_bytes"}


def test_a_capture(lab: NetLab, tap: TapLab) -> None:
    """Both ways, without headers; it ends when it is told to, and its descriptor is closed."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    assert lab.device.take("capture", {"snaplen": 200}, write)["active"]
    lab.transmit(frame_of(150, 1))
    tap.send(frame(160, 2))
    lab.received()
    for timer in lab.timers:
        if timer.seconds == 0:
            timer.fire()
    totals = lab.device.setting("capture", None)
    assert (totals["captured"], totals["lost"]) == (2, 0)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(write)
    data = os.read(read, 1 << 16)
    os.close(read)
    assert frame_of(150, 1) in data
    assert frame(160, 2) in data
    assert bytes(10) + b"\1\0" + frame(160, 2) not in data
    lab.transmit(frame_of(60))
    assert lab.device._served[0].sender.show is None


@pytest.mark.parametrize("value", [None, {"snaplen": 13}, {"snaplen": 1 << 20}, {"snaplen": "x"}])
def test_a_capture_that_cannot_be(lab: NetLab, value: object) -> None:
    """Is refused, and its descriptor stays the caller's."""
    with pytest.raises(ConfigError, match="snaplen"):
        lab.device.take("capture", value, -1)
    with pytest.raises(ConfigError, match="no setting"):
        lab.device.take("else", value, -1)


def test_a_local_link_answers_itself(tap: TapLab) -> None:
    """A DHCP request stays here and its answer goes to rx; all else goes to the tap."""
    settings = {"lladdr": OWN.hex(":"), "address": "100.64.1.3", "host": "100.64.1.2"}
    with NetLab(tap, local=settings) as lab:
        lab.start(hdr.NET_F_MRG_RXBUF)
        lab.give(8, 2048)
        lab.transmit(discover(), frame_of(60), cuts=(12, 14, 20))
        assert [sent.data for sent in tap.receive(1)] == [frame_of(60)]
        [got] = lab.received()
        assert got.header == bytes(10) + b"\1\0"
        assert bytes([100, 64, 1, 3]) in got.data
        assert lab.device.setting("counters", None)["local"]


def discover() -> bytes:
    """DHCPDISCOVER from the guest."""
    from devices import frames

    bootp = b"\1\1\6\0" + b"abcd" + bytes(20) + OWN.ljust(16, b"\0") + bytes(192)
    bootp += bytes.fromhex("63825363") + b"\x35\1\1\xff"
    packet = frames.udp4(bytes(4), b"\xff" * 4, (68, 67), bootp, 64)
    return frames.ethernet(b"\xff" * 6, OWN, frames.IPV4, packet)


def test_verdicts_are_remembered_and_bounded() -> None:
    """The filter is asked once per head, and a flood of heads takes no memory."""
    asked: list[bytes] = []
    verdicts = Verdicts(lambda head: not asked.append(head))  # type: ignore[func-returns-value]
    for _ in range(3):
        assert verdicts[b"one"]
    assert asked == [b"one"]
    for i in range(5000):
        assert verdicts[i.to_bytes(2)]
    assert len(verdicts) <= Verdicts.MOST


@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
def test_a_successor_goes_on(ring: int) -> None:
    """What was set by commands is saved, and what was in flight is not lost."""
    with TapLab() as tap:
        areas = [memoryview(bytearray(0x9000)) for _ in range(3)]
        with NetLab(tap, packed=bool(ring), inflight=areas) as lab:
            lab.start(CONTROLLED | ring)
            lab.give(20, 2048)
            lab.offer(frame_of(60))
            assert lab.command(RX, 0, b"\0") == OK
            assert lab.command(MAC, 1, OTHER) == OK
            state = lab.registers.transport.save()
            for queue in state["queues"]:
                queue["cursors"] = None  # nobody knows them: it was killed
            with NetLab(tap, packed=bool(ring), inflight=areas, memory=lab.memory) as successor:
                successor.queues, successor.header_bytes = lab.queues, lab.header_bytes
                successor.registers.transport.load(state)
                assert successor.device.config()[:6] == OTHER
                tap.send(frame(60))
                tap.send(frame_of(60, to=OTHER))
                got = successor.received()
                assert [each.data for each in got] == [frame_of(60, to=OTHER)]
                assert successor.read(CommonCfg.DEVICE_STATUS, 1) == 15
