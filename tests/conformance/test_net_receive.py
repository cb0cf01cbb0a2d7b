"""Receiving through the network device: buffers that run out, do not fit, or must not be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from devices import nethdr as hdr
from devices import netrx
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.conformance.test_net_send import header, tcp_frame
from tests.taplab import TapLab
from tests.vionetlab import OWN, PEER, NetLab, frame_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OFFLOADS = hdr.NET_F_GUEST_CSUM | hdr.NET_F_GUEST_TSO4
BIG = tcp_frame(60_000)
BIG_HEADER = header(gso=hdr.GSO_TCPV4, hdr_len=54, size=1400)


@pytest.fixture
def tap() -> Iterator[TapLab]:
    """A tap of one queue."""
    with TapLab() as tap:
        yield tap


@pytest.fixture
def lab(tap: TapLab) -> Iterator[NetLab]:
    """A device on it."""
    with NetLab(tap) as lab:
        yield lab


def frame(length: int, seed: int = 0) -> bytes:
    """A frame to the guest."""
    return frame_of(length, seed, to=OWN, source=PEER)


def drops(lab: NetLab) -> dict[str, int]:
    """Why frames were not received."""
    return lab.device.counters["rx"].drops


def test_frames_of_all_lengths_in_turn(lab: NetLab, tap: TapLab) -> None:
    """Whatever the frame before was like, long after short and short after long."""
    lab.start(F_INDIRECT_DESC | OFFLOADS | hdr.NET_F_MRG_RXBUF)
    lengths = [60, 3000, 60, 60_000, 60_000, 60, 1514, 60_000, 20_000, 14, 4000, 4000, 40_000, 60]
    frames = [tcp_frame(n) if n > 1514 else frame(n, n) for n in lengths]
    found = []
    for turn in range(3):
        for n, data in zip(lengths, frames, strict=True):
            tap.send(data, BIG_HEADER if n > 1514 else bytes(10))
        for _ in range(3):
            lab.give(24, *((4096,), (2000, 96, 2000), (4084, 12))[turn])
            found += lab.received()
    assert [got.data for got in found] == frames * 3
    assert [got.buffers for got in found] == [-(-(n + 12) // 4096) for n in lengths] * 3
    assert drops(lab) == {}


def test_without_buffers_the_tap_is_left_alone(lab: NetLab, tap: TapLab) -> None:
    """It is not watched, since that would spin, until a kick brings buffers (CVE-2020-16843)."""
    lab.start(F_EVENT_IDX | hdr.NET_F_MRG_RXBUF)
    tap.send(frame(60))
    lab.serve()
    assert lab.watched == {}
    assert lab.serve() == 0
    queue = lab.queues[0]
    queue.add([], [2048])
    assert queue.kick_needed()
    lab.schedule(0)
    assert [got.data for got in lab.received()] == [frame(60)]


@pytest.mark.parametrize("events", [0, F_EVENT_IDX])
def test_kicks_are_wanted_only_without_buffers(lab: NetLab, tap: TapLab, events: int) -> None:
    """As long as there are buffers, giving more needs no kick."""
    lab.start(events | hdr.NET_F_MRG_RXBUF)
    queue = lab.queues[0]
    lab.give(8, 2048)
    assert queue.kick_needed()
    lab.serve()
    queue.add([], [2048])
    assert not queue.kick_needed()
    for i in range(9):
        tap.send(frame(60, i))
    assert len(lab.received()) == 9
    queue.add([], [2048])
    assert queue.kick_needed()


def test_a_frame_waits_for_enough_buffers(lab: NetLab, tap: TapLab) -> None:
    """It is held, whole, and nothing overtakes it."""
    lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    lab.give(10, 4096)
    tap.send(BIG, BIG_HEADER)
    tap.send(frame(60))
    assert lab.received() == []
    assert lab.watched == {}
    lab.give(4, 4096)
    assert lab.received() == []
    lab.give(3, 4096)
    found = lab.received()
    assert [got.data for got in found] == [BIG, frame(60)]
    assert [got.buffers for got in found] == [15, 1]
    assert not [timer for timer in lab.timers if timer.seconds is not None]


def test_a_frame_is_not_held_for_ever(lab: NetLab, tap: TapLab) -> None:
    """A driver that refills only when it has received something must not wait for us."""
    lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    lab.give(10, 4096)
    tap.send(BIG, BIG_HEADER)
    tap.send(frame(60))
    assert lab.received() == []
    [patience] = [timer for timer in lab.timers if timer.seconds is not None]
    assert patience.seconds == netrx.HOLD
    patience.fire()
    assert [got.data for got in lab.received()] == [frame(60)]
    assert drops(lab) == {"no buffers": 1}


@pytest.mark.parametrize("ring", [0, F_RING_PACKED, F_INDIRECT_DESC])
def test_a_frame_longer_than_the_whole_ring_is_dropped(tap: TapLab, ring: int) -> None:
    """No driver can ever give enough buffers for it, so that waiting would stall the queue."""
    with NetLab(tap, packed=bool(ring)) as lab:
        lab.start(ring | OFFLOADS | hdr.NET_F_MRG_RXBUF, size=8)
        lengths = (1000, 1000) if ring == 0 else (2000,)
        lab.give(8 // len(lengths), *lengths)
        tap.send(BIG, BIG_HEADER)
        tap.send(frame(60))
        assert [got.data for got in lab.received()] == [frame(60)]
        assert drops(lab) == {"too long": 1}


@pytest.mark.parametrize("features", [0, hdr.NET_F_MRG_RXBUF])
@pytest.mark.parametrize(
    ("readable", "writable", "words"),
    [([b"x"], [2048], "readable"), ([b"x" * 2048], [], "readable"), ([], [11], "less than a head")],
)
def test_buffers_nothing_can_be_received_in(  # noqa: PLR0917
    lab: NetLab,
    tap: TapLab,
    features: int,
    readable: list[bytes],
    writable: list[int],
    words: str,
) -> None:
    """§5.1.6.3.1: the driver has broken a rule, and is told so."""
    lab.start(features)
    lab.queues[0].add(readable, writable)
    tap.send(frame(60))
    lab.schedule(0)
    with pytest.raises(GuestError, match=words):
        lab.serve()


def test_num_buffers_of_a_frame_cut_anywhere(lab: NetLab, tap: TapLab) -> None:
    """The header may be a descriptor of its own, or twelve (CVE-2021-3748, CVE-2022-2132)."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    for lengths in ((12, 100), (1,) * 112, (11, 101), (10, 1, 1, 100)):
        lab.give(2, *lengths)
        tap.send(frame(150))
        [got] = lab.received()
        assert (got.data, got.buffers) == (frame(150), 2)


def test_5_1_6_4_1_without_guest_csum_the_header_is_0(lab: NetLab, tap: TapLab) -> None:
    """The kernel completes the checksum then, and whatever it says of it is not told."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(4, 2048)
    data = tcp_frame(100)
    tap.send(data, header())
    [got] = lab.received()
    assert got.header == bytes(10) + b"\1\0"
    assert got.data != data
    assert got.data[:50] == data[:50]


def test_a_frame_of_before_a_reset_needs_no_offload(lab: NetLab, tap: TapLab) -> None:
    """It waited with offloads that the next driver has not; it is dropped, not misunderstood."""
    lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    for _ in range(2):
        tap.send(BIG, BIG_HEADER)
        tap.send(tcp_frame(100), header())
        tap.send(frame(60))
        lab.start(hdr.NET_F_MRG_RXBUF)
        lab.give(64, 4096)
        assert [got.data for got in lab.received()] == [frame(60)]
        lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    assert drops(lab) == {"stale offload": 4}


def test_a_segment_of_before_a_reset_is_not_for_a_driver_that_only_sums(
    lab: NetLab, tap: TapLab
) -> None:
    """It takes incomplete checksums, and no frame to be cut."""
    lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    tap.send(BIG, BIG_HEADER)
    tap.send(tcp_frame(100), header())
    lab.start(hdr.NET_F_GUEST_CSUM | hdr.NET_F_MRG_RXBUF)
    lab.give(64, 4096)
    [got] = lab.received()
    assert (got.data, got.header[:2]) == (tcp_frame(100), b"\1\0")
    assert drops(lab) == {"stale offload": 1}


@pytest.mark.parametrize("locked", [False, True])
def test_5_1_6_4_1_flags_are_0_whatever_the_kernel_says(tap: TapLab, locked: bool) -> None:
    """DATA_VALID is not for a driver without GUEST_CSUM."""
    with NetLab(tap, locked=locked) as lab:
        lab.start(hdr.NET_F_MRG_RXBUF)
        port = lab.backend.ports[0]
        real = port.receive

        def receive(views: Sequence[memoryview]) -> int:
            size = real(views)
            views[0][0] = 2
            return size

        port.receive = receive  # type: ignore[misc]
        lab.give(4, 2048)
        tap.send(frame(60))
        [got] = lab.received()
        assert got.header == bytes(10) + b"\1\0"


@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
def test_a_pause_gives_the_buffers_back(tap: TapLab, ring: int) -> None:
    """No buffer is in flight, so that the cursors say everything; afterwards it goes on."""
    with NetLab(tap, packed=bool(ring)) as lab:
        lab.start(ring | hdr.NET_F_MRG_RXBUF)
        lab.give(20, 2048)
        lab.serve()
        queue = lab.registers.transport.live[0]
        assert queue is not None
        assert queue.nr_in_flight == 20
        lab.device.pause()
        assert queue.nr_in_flight == 0
        tap.send(frame(60))
        lab.device.unpause()
        lab.schedule(0)
        assert [got.data for got in lab.received()] == [frame(60)]


def test_a_held_frame_is_lost_to_a_pause(lab: NetLab, tap: TapLab) -> None:
    """Part of it is in buffers that go back."""
    lab.start(OFFLOADS | hdr.NET_F_MRG_RXBUF)
    lab.give(10, 4096)
    tap.send(BIG, BIG_HEADER)
    lab.serve()
    lab.device.pause()
    lab.device.unpause()
    tap.send(frame(60))
    lab.schedule(0)
    assert [got.data for got in lab.received()] == [frame(60)]
    assert drops(lab) == {"no buffers": 1}


@pytest.mark.parametrize("how", ["device", "queue"])
def test_after_a_reset_no_buffer_is_written(lab: NetLab, tap: TapLab, how: str) -> None:
    """Not those that were popped long ago, either."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(20, 2048)
    lab.serve()
    if how == "device":
        lab.status = 0
    else:
        lab.registers.transport.reset_queue(0)
    before = lab.memory.read(0x10000, 1 << 20)
    tap.send(frame(60))
    lab.serve()
    assert lab.watched == {}
    assert lab.memory.read(0x10000, 1 << 20) == before
    assert lab.queues[0].collect() == []


def test_a_needed_reset_ends_receiving(lab: NetLab, tap: TapLab) -> None:
    """The transport takes the queues away; the tap must not be watched in vain."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(20, 2048)
    lab.serve()
    lab.registers.transport.fail(GuestError("elsewhere"))
    before = lab.memory.read(0x10000, 1 << 20)
    tap.send(frame(60))
    assert lab.serve() <= 1
    assert lab.watched == {}
    assert lab.memory.read(0x10000, 1 << 20) == before


def test_locked_foreign_frames_never_touch_guest_memory(tap: TapLab) -> None:
    """A buffer that was not used is still the guest's to look at."""
    with NetLab(tap, locked=True) as lab:
        lab.start(hdr.NET_F_MRG_RXBUF)
        lab.give(20, 2048)
        lab.serve()
        before = lab.memory.read(0x10000, 1 << 20)
        tap.send(frame_of(500, to=PEER, source=PEER))
        lab.serve()
        assert lab.memory.read(0x10000, 1 << 20) == before
        assert drops(lab) == {"filtered": 1}
        tap.send(frame(500))
        tap.send(frame_of(500, to=b"\xff" * 6, source=PEER))
        assert [got.data for got in lab.received()] == [
            frame(500),
            frame_of(500, to=b"\xff" * 6, source=PEER),
        ]


def test_a_limit(lab: NetLab, tap: TapLab) -> None:
    """What is too much waits in the tap, which is not watched meanwhile."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.device.setting("rx_pps", 20)
    lab.give(20, 2048)
    for i in range(8):
        tap.send(frame(60, i))
    assert len(lab.received()) == 2
    assert lab.watched == {}
    [armed] = [timer for timer in lab.timers if timer.seconds is not None]
    assert armed.seconds is not None
    assert 0 < armed.seconds <= 0.1
    lab.device.setting("rx_pps", 0)
    assert [got.data for got in lab.received()] == [frame(60, i) for i in range(2, 8)]


def test_a_flood_of_frames_ends_a_turn(lab: NetLab, tap: TapLab) -> None:
    """After a budget others have their turn: here what is to be sent."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(250, 2048)
    for i in range(300):
        tap.send(frame(1514, i))
    lab.offer(frame_of(60))
    lab.scheduled[:] = [0, 1]
    lab.turn()
    received = lab.device.counters["rx"].frames
    assert received <= netrx.BUDGET // (1514 + netrx.FRAME_COST) + 1
    assert lab.scheduled == [1]
    assert list(lab.watched) == lab.fds
    lab.turn()
    assert len(tap.receive(1)) == 1
    assert len(lab.received()) == 250


def test_no_more_than_an_interrupt_per_turn(lab: NetLab, tap: TapLab) -> None:
    """However many frames, they become used together."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(100, 2048)
    lab.serve()
    for i in range(100):
        tap.send(frame(60, i))
    assert len(lab.received()) == 100
    assert lab.interrupts == [0]


@pytest.mark.parametrize("size", [12, 13, 25, 26])
def test_buffers_shorter_than_any_frame(lab: NetLab, tap: TapLab, size: int) -> None:
    """With MRG_RXBUF it takes several; without, every frame is dropped and nothing spins."""
    lab.start(hdr.NET_F_MRG_RXBUF)
    lab.give(20, size)
    for i in range(3):
        tap.send(frame(60, i))
    assert [got.data for got in lab.received()] == [frame(60, i) for i in range(3)]
    lab.start()
    lab.give(20, size)
    tap.send(frame(60))
    assert lab.received() == []
    assert drops(lab) == {"too long": 1}


def test_5_1_6_4_1_ecn_only_where_it_was_negotiated(lab: NetLab, tap: TapLab) -> None:
    """Else such a segment comes cut up; and one that waited since before is not delivered."""
    data = tcp_frame(4054)
    head = header(gso=hdr.GSO_TCPV4 | hdr.GSO_ECN, hdr_len=54, size=1000)
    lab.start(OFFLOADS | hdr.NET_F_GUEST_ECN)
    lab.give(8, 8192)
    tap.send(data, head)
    [got] = lab.received()
    assert (got.header[:2], got.data) == (b"\1\x81", data)
    lab.start(OFFLOADS)
    lab.give(8, 8192)
    tap.send(data, head)
    assert [(got.header[1], len(got.data)) for got in lab.received()] == [(0, 1054)] * 4
    lab.start(OFFLOADS | hdr.NET_F_GUEST_ECN)
    tap.send(data, head)
    lab.start(OFFLOADS)
    lab.give(8, 8192)
    assert lab.received() == []
    assert drops(lab) == {"stale offload": 1}


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("buffer", [2048, 512])
def test_5_1_4_1_no_packet_is_longer_than_the_mtu(tap: TapLab, buffer: int, locked: bool) -> None:
    """But one that is to be cut. A tag comes on top; who was told no MTU gets all there is."""
    features = OFFLOADS | hdr.NET_F_MRG_RXBUF
    lengths = [1418, 1419, 60, 1500, 1418]
    with NetLab(tap, mtu=1400, locked=locked) as lab:
        for told in (hdr.NET_F_MTU, 0):
            lab.start(features | told)
            lab.give(200, buffer)
            for n in lengths:
                tap.send(frame(n, n))
            tap.send(BIG, BIG_HEADER)
            fits = [n for n in lengths if n <= 1418 or not told]
            found = [got.data for got in lab.received()]
            assert found == [frame(n, n) for n in fits] + [BIG] * (not locked)
            assert drops(lab).get("too long", 0) == 2


@pytest.mark.parametrize("size", [0, 1, 25])
def test_a_port_that_delivers_next_to_nothing_does_not_hold_the_turn(
    lab: NetLab, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Frames shorter than any cost as much as others: a turn ends, and they are counted."""
    lab.start(hdr.NET_F_GUEST_CSUM)
    lab.give(4, 2048)
    lab.serve()
    turns = netrx.BUDGET // netrx.FRAME_COST + 1
    monkeypatch.setattr(lab.device._backend.ports[0], "receive", lambda _: size)
    lab.schedule(0)
    lab.turn()
    assert 0 < drops(lab)["short"] <= turns
    assert lab.device.counters["rx"].frames == 0
