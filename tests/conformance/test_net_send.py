"""Sending through the network device: what a guest may ask for, and what becomes of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from config.errors import ConfigError, GuestError
from devices import nethdr as hdr
from devices import nettx
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.taplab import TapLab
from tests.vionetlab import OWN, PEER, NetLab, frame_of
from tools.viodriver.registers import NEEDS_RESET

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALL_HOST = (
    hdr.NET_F_CSUM
    | hdr.NET_F_HOST_TSO4
    | hdr.NET_F_HOST_TSO6
    | hdr.NET_F_HOST_ECN
    | hdr.NET_F_HOST_UFO
    | hdr.NET_F_HOST_USO
)
FRAME = frame_of(1514)


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


def header(  # noqa: PLR0917  in the header's order
    flags: int = 1, gso: int = 0, hdr_len: int = 0, size: int = 0, start: int = 34, offset: int = 16
) -> bytes:
    """A header; by default one that asks for a TCP checksum."""
    return hdr.HEADER.pack(flags, gso, hdr_len, size, start, offset)


def drops(lab: NetLab) -> dict[str, int]:
    """Why frames were not sent."""
    return lab.device.counters["tx"].drops


def tcp_frame(length: int = 4000, *, ethertype: int = 0x0800) -> bytes:
    """A TCP segment that the kernel would cut."""
    ip = b"\x45\0" + (length - 14).to_bytes(2) + bytes.fromhex("0000000040060000")
    ip += bytes([1, 1, 1, 1, 2, 2, 2, 2])
    if ethertype == 0x86DD:
        ip = b"\x60\0\0\0" + (length - 54).to_bytes(2) + b"\x06\x40" + bytes(range(32))
    tcp = bytes.fromhex("000100020000000000000000501003e800000000")
    return (PEER + OWN + ethertype.to_bytes(2) + ip + tcp).ljust(length, b"t")


def test_5_1_6_2_a_checksum_is_asked_for(lab: NetLab, tap: TapLab) -> None:
    """NEEDS_CSUM goes on with its offsets, and nothing else of the header does (§5.1.6.2.2)."""
    lab.start(ALL_HOST)
    written = record(lab)
    lab.transmit(FRAME, header=header(flags=0xFF, hdr_len=99, size=77) + b"\x12\x34")
    [sent] = tap.receive(1)
    assert sent.data == FRAME
    assert hdr.HEADER.unpack(sent.header)[0] == 1
    assert hdr.HEADER.unpack(sent.header)[4:] == (34, 16)
    assert written == [header() + bytes(2)]
    lab.transmit(FRAME, header=header(flags=0xFE))
    assert written[1:] == [bytes(12)]


def record(lab: NetLab) -> list[bytes]:
    """Return a list that gets every header from now on, as the port does."""
    port, written = lab.backend.ports[0], []
    real = port.send

    def send(parts: Sequence[bytes | memoryview]) -> int:
        written.append(bytes(parts[0]))
        return real(parts)

    port.send = send  # type: ignore[misc]
    return written


@pytest.mark.parametrize("ethertype", [0x0800, 0x86DD])
def test_5_1_6_2_a_segment_to_be_cut_goes_on_whole(
    lab: NetLab, tap: TapLab, ethertype: int
) -> None:
    """One frame in, one frame out: the kernel cuts it where it has to. hdr_len is but a hint."""
    lab.start(ALL_HOST)
    kind = hdr.GSO_TCPV4 if ethertype == 0x0800 else hdr.GSO_TCPV6
    start = 34 if ethertype == 0x0800 else 54
    frame = tcp_frame(60000, ethertype=ethertype)
    for hint in (start + 20, 0, 1, 65535):
        lab.transmit(frame, header=header(gso=kind, hdr_len=hint, size=1400, start=start))
        [sent] = tap.receive(1)
        assert sent.data == frame
        assert hdr.HEADER.unpack(sent.header)[:2] == (1, kind)
        assert hdr.HEADER.unpack(sent.header)[3] == 1400


TCP = {"gso": hdr.GSO_TCPV4, "hdr_len": 54, "size": 1400}


@pytest.mark.parametrize(
    ("features", "fields"),
    [
        (0, {}),  # CSUM not negotiated
        (hdr.NET_F_CSUM, TCP),
        (hdr.NET_F_CSUM | hdr.NET_F_HOST_TSO6, TCP),
        (hdr.NET_F_CSUM | hdr.NET_F_HOST_TSO4, TCP | {"gso": hdr.GSO_TCPV4 | hdr.GSO_ECN}),
        (ALL_HOST, TCP | {"flags": 0}),  # to be cut, but not to be summed
        (ALL_HOST, TCP | {"size": 0}),
        (ALL_HOST, TCP | {"size": 1}),  # 60 000 pieces
        (ALL_HOST, TCP | {"gso": 2}),
        (ALL_HOST, TCP | {"gso": 0x7F}),
        (ALL_HOST, TCP | {"gso": hdr.GSO_ECN}),
        (ALL_HOST, TCP | {"gso": hdr.GSO_UDP | hdr.GSO_ECN}),
        (ALL_HOST, {"start": 13}),
        (ALL_HOST, {"start": 59_999}),
        (ALL_HOST, {"start": 65_535, "offset": 65_535}),
        (ALL_HOST, {"offset": 60_000 - 34 - 1}),
        (ALL_HOST, {"offset": 65_535}),
    ],
)
def test_5_1_6_2_1_what_may_not_be_asked_never_reaches_the_tap(
    lab: NetLab, tap: TapLab, features: int, fields: dict[str, int]
) -> None:
    """Not negotiated, or offsets outside the frame: dropped and counted, and the queue goes on."""
    lab.start(features)
    sent = record(lab)
    lab.transmit(tcp_frame(60_000), FRAME, header=header(**fields))
    lab.transmit(FRAME)
    assert drops(lab)["malformed"] >= 1
    assert len(tap.pending()) == len(sent) <= 2
    assert sent[-1] == bytes(12)


def test_5_1_6_2_1_offsets_at_the_very_end_are_right(lab: NetLab, tap: TapLab) -> None:
    """The checksum may be the last two bytes of the frame, and no later."""
    lab.start(ALL_HOST)
    lab.transmit(FRAME, header=header(start=34, offset=1514 - 36))
    assert len(tap.receive(1)) == 1
    lab.transmit(FRAME, header=header(start=34, offset=1514 - 35))
    assert drops(lab) == {"malformed": 1}


def test_a_header_that_was_good_is_not_good_for_every_frame(lab: NetLab, tap: TapLab) -> None:
    """Nor for the driver after a reset, which has negotiated less."""
    lab.start(ALL_HOST)
    asked = header(gso=hdr.GSO_TCPV4, hdr_len=54, size=1400, start=34, offset=16)
    lab.transmit(tcp_frame(), tcp_frame(), header=asked)
    assert [sent.header[1] for sent in tap.receive(2)] == [hdr.GSO_TCPV4] * 2
    lab.transmit(tcp_frame()[:51], header=asked)
    assert drops(lab) == {"malformed": 1}
    lab.start(hdr.NET_F_CSUM)
    lab.transmit(tcp_frame(), header=asked)
    assert drops(lab) == {"malformed": 2}


def test_headers_that_are_remembered_are_few() -> None:
    """However many different ones a driver makes up."""
    rules = hdr.HeaderRules(ALL_HOST, hdr.HEADER_BYTES)
    for start in range(14, 14 + 3 * hdr.KNOWN_MAX):
        assert rules.sanitized(header(start=start) + bytes(2), 1514) is not None
        assert len(rules._known) <= hdr.KNOWN_MAX


def test_what_the_kernel_refuses_is_one_frame_lost(lab: NetLab, tap: TapLab) -> None:
    """UDP is to be cut, but the checksum asked for is TCP's: that passes our checks alone."""
    lab.start(ALL_HOST)
    lab.transmit(FRAME, header=header(gso=hdr.GSO_UDP_L4, hdr_len=54, size=1400))
    lab.transmit(FRAME)
    assert [sent.data for sent in tap.receive(1)] == [FRAME]
    assert drops(lab) == {"refused": 1}
    assert lab.said == []


def test_frames_too_short_and_too_long(lab: NetLab, tap: TapLab) -> None:
    """Less than a header, less than an Ethernet head, more than any frame: dropped by reason."""
    _, tx, _ = lab.start(F_INDIRECT_DESC)
    for data in (b"", b"x", bytes(11), bytes(12), bytes(12 + 13), bytes(12 + hdr.MAX_FRAME + 1)):
        tx.add([data] if data else [b"", b""])
    lab.serve_queue(1)
    assert tap.pending() == []
    assert drops(lab) == {"malformed": 3, "short": 2, "too long": 1}
    lab.transmit(frame_of(14))
    assert [len(sent.data) for sent in tap.receive(1)] == [14]


@pytest.mark.parametrize("ring", [F_INDIRECT_DESC, F_INDIRECT_DESC | F_RING_PACKED])
def test_a_descriptor_for_every_byte(tap: TapLab, ring: int) -> None:
    """As many as a chain may have: more than one call could take, and still one frame."""
    with NetLab(tap, packed=bool(ring & F_RING_PACKED)) as lab:
        _, tx, _ = lab.start(ring)
        whole = bytes(12) + frame_of(1012)
        tx.add([whole[i : i + 1] for i in range(1024)], indirect=True)
        frame = frame_of(1036, 7)
        whole = bytes(12) + frame
        tx.add([whole[:20], *(whole[i : i + 1] for i in range(20, 1043)), whole[1043:]][:1024])
        lab.serve_queue(1)
        first, second = tap.receive(2)
        assert (first.data, second.data) == (frame_of(1012), frame[:1031])
        tx.add([bytes(64)] * 1025, indirect=True)
        lab.schedule(1)
        with pytest.raises(GuestError, match="1024"):
            lab.serve()


@pytest.mark.parametrize("extra", [[64], [1, 1]])
def test_a_writable_descriptor_needs_a_reset(lab: NetLab, extra: Sequence[int]) -> None:
    """§5.1.6.2 has no use for one, so it can only be a broken driver."""
    _, tx, _ = lab.start()
    tx.add([bytes(12) + FRAME], extra)
    lab.schedule(1)
    with pytest.raises(GuestError, match="writable"):
        lab.serve()


def test_a_header_is_fetched_once(
    lab: NetLab, tap: TapLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is sent, whatever the guest does to it meanwhile."""
    _, tx, _ = lab.start(ALL_HOST)
    request = tx.place([header() + bytes(2) + FRAME])
    gpa = request.segments[0].gpa
    real = hdr.HeaderRules.sanitized

    def sanitized(rules: hdr.HeaderRules, found: bytes, size: int) -> bytes | None:
        lab.memory.write(gpa, b"\xff" * 12)
        return real(rules, found, size)

    monkeypatch.setattr(hdr.HeaderRules, "sanitized", sanitized)
    tx.submit(request)
    lab.serve_queue(1)
    [sent] = tap.receive(1)
    assert hdr.HEADER.unpack(sent.header)[4:] == (34, 16)


def test_locked_a_foreign_source_is_not_sent(tap: TapLab) -> None:
    """As vmd's locked lladdr; and what was checked is what is sent."""
    with NetLab(tap, locked=True) as lab:
        _, tx, _ = lab.start()
        lab.transmit(frame_of(100), frame_of(100, source=PEER), frame_of(60, 1))
        assert [sent.data for sent in tap.receive(2)] == [frame_of(100), frame_of(60, 1)]
        assert drops(lab) == {"filtered": 1}
        # The guest rewrites the source as soon as it has been looked at.
        request = tx.place([bytes(12) + frame_of(1000)])
        accept = lab.device._served[0].sender.accept
        assert accept is not None

        def rewriting(head: bytes) -> bool:
            verdict = accept(head)
            lab.memory.write(request.segments[0].gpa + 12 + 6, PEER)
            return verdict

        lab.device._served[0].sender.accept = rewriting
        tx.submit(request)
        lab.serve_queue(1)
        assert [sent.data for sent in tap.receive(1)] == [frame_of(1000)]


@pytest.mark.parametrize(
    "cuts", [(12,), (1,) * 40, (12, 6, 6, 2, 200), (312,) + (1,) * 500, (312,) + (1,) * 1022]
)
def test_locked_however_a_frame_is_cut(tap: TapLab, cuts: Sequence[int]) -> None:
    """The head that is looked at is gathered from as many descriptors as it takes."""
    with NetLab(tap, locked=True) as lab:
        lab.start(F_INDIRECT_DESC)
        lab.transmit(frame_of(1400), cuts=cuts)
        lab.transmit(frame_of(1400, source=PEER), cuts=cuts)
        assert [sent.data for sent in tap.receive(1)] == [frame_of(1400)]
        assert drops(lab) == {"filtered": 1}


def test_a_limit_of_frames(lab: NetLab, tap: TapLab) -> None:
    """What is too much waits in the ring, in order, for a timer; lifting the limit lets it go."""
    lab.start(F_EVENT_IDX)
    assert lab.device.setting("tx_pps", 20) == 20  # two at once
    frames = [frame_of(60, i) for i in range(8)]
    for frame in frames:
        lab.offer(frame)
    lab.schedule(1)
    lab.serve()
    assert len(tap.receive(2)) == 2
    assert lab.queues[1].outstanding - len(lab.queues[1].collect()) == 6
    [armed] = [timer for timer in lab.timers if timer.seconds is not None]
    assert 0 < (armed.seconds or 0) <= 0.1
    lab.device.setting("tx_pps", 0)
    lab.serve_queue(1)
    assert [sent.data for sent in tap.receive(6)] == frames[2:]


def test_a_limit_of_bytes(lab: NetLab, tap: TapLab) -> None:
    """One frame may go beyond what is left, and is paid for later."""
    lab.start()
    lab.device.setting("tx_rate", 1000)
    for i in range(3):
        lab.offer(frame_of(1514, i))
    lab.schedule(1)
    lab.serve()
    assert [sent.data for sent in tap.receive(1)] == [frame_of(1514, 0)]
    [armed] = [timer for timer in lab.timers if timer.seconds is not None]
    assert 1.3 < (armed.seconds or 0) <= 1.5


@pytest.mark.parametrize("value", [-1, 1.5, True, "fast", None, 1 << 60])
def test_a_limit_that_is_none(lab: NetLab, value: object) -> None:
    """Is refused by name."""
    with pytest.raises(ConfigError, match="rx_rate"):
        lab.device.setting("rx_rate", value)


def test_a_flood_of_frames_ends_a_turn(lab: NetLab, tap: TapLab) -> None:
    """After a budget others have their turn: here what comes the other way."""
    lab.start()
    requests = [lab.queues[1].place([bytes(12) + frame_of(60, i)]) for i in range(256)]
    lab.queues[1].submit(*requests)
    lab.give(4, 1600)
    tap.send(frame_of(60, to=OWN, source=PEER))
    lab.scheduled[:] = [1, 0]
    lab.turn()
    sent = lab.device.counters["tx"].frames
    assert sent <= nettx.BUDGET // nettx.FRAME_COST + nettx.BATCH
    assert lab.scheduled[0] == 0
    lab.turn()
    assert lab.device.counters["rx"].frames == 1
    assert (nettx.BUDGET // nettx.FRAME_COST) <= 256


def test_a_port_that_is_full_gets_the_rest_later(lab: NetLab, tap: TapLab) -> None:
    """Frames that could not be written stay in the ring, in order, until epoll says so."""
    lab.start(F_EVENT_IDX)
    port = lab.backend.ports[0]
    send, room = port.send, [3]

    def full(parts: Sequence[bytes | memoryview]) -> int:
        if not room[0]:
            raise BlockingIOError
        room[0] -= 1
        return send(parts)

    port.send = full  # type: ignore[misc]
    for i in range(10):
        lab.offer(frame_of(60, i))
    lab.scheduled[:] = [1]
    lab.turn()
    assert len(tap.receive(3)) == 3
    assert lab.registers.transport.live[1].nr_in_flight == 0  # type: ignore[union-attr]
    room[0] = 100
    lab.serve()
    assert [sent.data for sent in tap.receive(7)] == [frame_of(60, i) for i in range(3, 10)]


def test_no_more_than_an_interrupt_per_batch(lab: NetLab, tap: TapLab) -> None:
    """64 frames are one used index, and one call."""
    lab.start()
    for i in range(64):
        lab.offer(frame_of(60, i))
    lab.serve_queue(1)
    assert lab.interrupts == [1]
    assert lab.status & NEEDS_RESET == 0
