"""A real network device process, jailed, on a real tap."""

from __future__ import annotations

import os
import socket
import struct
import termios
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from devices import nethdr as hdr
from devices.features import F_RING_PACKED
from devices.viodev import CONFIG_CHANGE, ImsgType
from tests.conformance.test_net_send import header, tcp_frame
from tests.netdriver import FEATURES, HEADER, NetDriver
from tests.taplab import TapLab
from tests.vionetlab import OWN, PEER, SETTINGS, frame_of
from tools.viodriver.private import DEADLINE, DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIG = tcp_frame(60_000)
BIG_HEADER = header(gso=hdr.GSO_TCPV4, hdr_len=54, size=1400)


class Net(NetDriver):
    """A device process, its driver and its tap."""

    def __init__(
        self, tap: TapLab, spawner: Any, features: int = FEATURES, **settings: Any
    ) -> None:
        self.tap = tap
        nr_pairs = len(tap.fds)
        made = {**SETTINGS, "queues": nr_pairs, "packed": bool(features & F_RING_PACKED)}
        self.host = DeviceHost(
            "vionet",
            {**made, **settings},
            fds={f"tap{n}": fd for n, fd in enumerate(tap.fds)},
            queues=2 * nr_pairs + 1,
            memory_size=48 << 20,
            spawner=spawner,
        )
        self.features = features
        self.queues = self.host.start(features, arena_bytes=4 << 20)


@pytest.fixture
def launch(spawner: Any) -> Iterator[Callable[..., Net]]:
    """Return a function that launches a device on a new tap."""
    made: list[Net] = []

    def launch_(queues: int = 1, **options: Any) -> Net:
        made.append(Net(TapLab(queues), spawner, **options))
        return made[-1]

    yield launch_
    for net in made:
        net.host.close()
        net.tap.__exit__(None, None, None)


@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
def test_everything_in_the_jail(launch: Callable[..., Net], ring: int) -> None:
    """Frames of all sizes both ways, offloads at run time, resets, a pause, settings."""
    net = launch(features=FEATURES | ring)
    frames = [frame_of(60 + i, i) for i in range(100)]
    net.send(*frames)
    assert [sent.data for sent in net.tap.receive(100)] == frames
    net.send(BIG, head=BIG_HEADER + bytes(2))
    assert [sent.data for sent in net.tap.receive(1)] == [BIG]
    net.give(60)
    net.tap.send(BIG, BIG_HEADER)
    assert net.receive(15) == BIG
    assert net.command(5, 0, bytes(8)) == 0
    net.tap.send(frame_of(60, to=OWN, source=PEER))
    assert net.receive(1) == frame_of(60, to=OWN, source=PEER)
    assert net.command(0, 0, b"\0") == 0
    for name in ("rx_rate", "tx_rate", "rx_pps", "tx_pps"):
        assert net.set(name, 1 << 30) == {"value": 1 << 30}
        assert net.set(name, 0) == {"value": 0}
    net.host.ask(ImsgType.PAUSE)
    net.host.ask(ImsgType.UNPAUSE)
    net.tap.send(frame_of(60, 5, to=OWN, source=PEER))
    assert net.receive(1) == frame_of(60, 5, to=OWN, source=PEER)
    assert net.set("link", False) == {"value": False}
    assert net.host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert not net.tap.running
    assert net.set("link", True) == {"value": True}
    net.host.status = 0
    net.queues = net.host.start(net.features, arena_bytes=4 << 20)
    net.send(frame_of(60))
    net.tap.receive(1)
    facts = net.counters()
    assert (facts["tx"]["frames"], facts["rx"]["frames"]) == (102, 3)
    assert facts["tx"]["drops"] == facts["rx"]["drops"] == {}
    assert net.complaints == []


def test_four_queue_pairs_in_the_jail(launch: Callable[..., Net]) -> None:
    """One process serves all; queues are attached and detached at run time."""
    net = launch(4, features=FEATURES | hdr.NET_F_MQ)
    assert net.command(4, 0, b"\4\0") == 0
    for pair in range(4):
        net.give(64, 512, queue=2 * pair)
        net.send(frame_of(60, pair), queue=2 * pair + 1)
    assert [sent.data for sent in net.tap.receive(4)] == [frame_of(60, n) for n in range(4)]
    for number in range(60):
        net.tap.send(tcp_frame(100)[:34] + number.to_bytes(2) + tcp_frame(100)[36:])
    while net.counters()["rx"]["frames"] < 60:
        pass
    assert sum(len(net.queues[2 * pair].collect()) > 0 for pair in range(4)) > 1
    assert net.command(4, 0, b"\1\0") == 0
    assert net.complaints == []


def test_frames_go_on_while_others_flood(launch: Callable[..., Net]) -> None:
    """A guest that sends as fast as it can, and a host that does, starve nobody; the log is quiet.

    Register accesses are answered meanwhile, and what the other direction has arrives.
    """
    net = launch()
    net.tap.stop_listening()
    rx, tx, _ = net.queues
    floods = [tx.place([HEADER + frame_of(60)]) for _ in range(256)]
    net.give(100, 2048)
    tx.submit(*floods)
    seen = 0
    for i in range(300):
        for _ in range(5):
            net.tap.send(frame_of(60, i, to=OWN, source=PEER))
        net.host.kick(1)
        done = [used.request for used in tx.collect()]
        if done:
            tx.submit(*done)
        seen += len(rx.collect())
        net.give(100 - rx.outstanding, 2048)
        assert net.host.read_config(6, 2) == 1
    while seen < 500:
        if not (found := len(rx.collect())) and not rx.enable_calls():
            assert net.host.wait_call(0, DEADLINE), (seen, net.host.said)
        seen += found
        net.give(100 - rx.outstanding, 2048)
    assert net.counters()["tx"]["frames"] > 256
    assert net.complaints == []


def test_a_flood_of_nonsense_leaves_the_log_quiet(launch: Callable[..., Net]) -> None:
    """Frames that may not be sent are counted, not told."""
    net = launch()
    for _ in range(8):
        net.send(*[frame_of(60)] * 50, head=b"\1\7" + bytes(10))
        net.send(*[b"x"] * 50)
    assert net.counters()["tx"]["drops"] == {"malformed": 400, "short": 400}
    assert net.complaints == []


def test_a_tap_deleted_under_the_device(launch: Callable[..., Net]) -> None:
    """It lives, says so once, takes no time, and the guest sees that the link is gone."""
    net = launch()
    net.give(20)
    net.send(frame_of(60))
    net.tap.delete()
    assert net.host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert net.host.read_config(6, 2) == 0
    net.send(*[frame_of(60)] * 20)
    assert len(net.complaints) == 1
    before = cpu_ticks(net.host.process.pid)
    for _ in range(200):
        net.host.read_config(6, 2)
    assert cpu_ticks(net.host.process.pid) - before < 50
    net.host.status = 0
    net.queues = net.host.start(net.features, arena_bytes=4 << 20)
    net.send(frame_of(60))
    assert len(net.complaints) == 1


def test_nothing_is_written_after_a_reset(launch: Callable[..., Net]) -> None:
    """Once status reads 0, buffers are the guest's again, whatever the tap has."""
    net = launch()
    for _ in range(10):
        net.give(100, 2048)
        for i in range(200):
            net.tap.send(frame_of(1514, i, to=OWN, source=PEER))
        net.host.status = 0
        assert net.host.status == 0
        before = net.host.memory.read(0x10000, 1 << 20)
        net.tap.send(frame_of(60, to=OWN, source=PEER))
        net.host.read_config(0, 4)
        assert net.host.memory.read(0x10000, 1 << 20) == before
        net.queues = net.host.start(net.features, arena_bytes=4 << 20)


def test_a_stream_in_the_jail(spawner: Any) -> None:
    """The other way out needs no call that a tap does not."""
    mine, theirs = socket.socketpair()
    settings = {**SETTINGS, "backend": "stream"}
    with (
        mine,
        theirs,
        DeviceHost("vionet", settings, fds={"stream0": theirs.fileno()}, spawner=spawner) as host,
    ):
        rx, tx, _ = host.start(hdr.NET_F_MRG_RXBUF)
        mine.settimeout(DEADLINE)
        tx.add([HEADER + frame_of(60)])
        host.kick(1)
        assert mine.recv(64, socket.MSG_WAITALL) == (60).to_bytes(4) + frame_of(60)
        rx.add([], [2048])
        host.kick(0)
        mine.send((60).to_bytes(4) + frame_of(60, 1))
        assert host.wait_call(0, DEADLINE)
        [used] = rx.collect()
        assert rx.data(used.request, used.written)[12:] == frame_of(60, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(0x1002, "IFF_VNET_HDR"), (0x5001, "a tap"), (0x1001, "a tap, IFF_VNET_HDR")],
)
def test_a_tap_of_the_wrong_kind_is_refused(spawner: Any, flags: int, words: str) -> None:
    """At start, by name."""
    with TapLab(flags=flags) as tap, pytest.raises(HostError, match=words):
        Net(tap, spawner)


def test_what_is_no_tap_is_refused(spawner: Any) -> None:
    """At start, too."""
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(HostError, match="no tap"):
            DeviceHost("vionet", SETTINGS, fds={"tap0": fd}, spawner=spawner)
    finally:
        os.close(fd)


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has used, in ticks of 10 ms."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_ioctls_are_the_kernels() -> None:
    """Numbers of linux/if_tun.h: direction, size, type 'T', number."""
    from devices import policy, tap

    for name, number in {"TUNSETOFFLOAD": 208, "TUNSETVNETHDRSZ": 216, "TUNSETQUEUE": 217}.items():
        assert getattr(tap, name) == 1 << 30 | 4 << 16 | ord("T") << 8 | number
    allowed = {tap.TUNSETOFFLOAD, tap.TUNSETVNETHDRSZ, tap.TUNSETQUEUE, tap.TUNSETCARRIER}
    allowed.add(termios.TIOCOUTQ)  # of passt's socket
    [rule] = [rule for rule in policy.DEVICES["vionet"].calls if rule.name == "ioctl"]
    assert set(rule.args[0].values) == allowed
    assert struct.calcsize("i") == 4
