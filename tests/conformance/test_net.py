"""Frames through the network device, both ways, for every kind of ring and header (§5.1.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.nethdr import NET_F_GUEST_TSO4, NET_F_MRG_RXBUF
from tests.taplab import TapLab
from tests.vionetlab import OWN, PEER, NetLab, frame_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class Shape(NamedTuple):
    """One way of using the device."""

    ring: int = 0
    merge: bool = True
    legacy: bool = False


SHAPES = {
    "split": Shape(),
    "indirect": Shape(F_INDIRECT_DESC | F_EVENT_IDX),
    "packed": Shape(F_RING_PACKED | F_EVENT_IDX),
    "packed indirect": Shape(F_RING_PACKED | F_INDIRECT_DESC),
    "in order": Shape(F_IN_ORDER | F_EVENT_IDX),
    "whole": Shape(merge=False),
    "whole packed": Shape(F_RING_PACKED, merge=False),
    "legacy": Shape(merge=False, legacy=True),
    "legacy merged": Shape(F_INDIRECT_DESC, legacy=True),
}


@pytest.fixture
def tap() -> Iterator[TapLab]:
    """A tap of one queue."""
    with TapLab() as tap:
        yield tap


@pytest.fixture(params=SHAPES)
def lab(tap: TapLab, request: pytest.FixtureRequest) -> Iterator[NetLab]:
    """A device that is driven in one of these ways."""
    shape = SHAPES[request.param]
    with NetLab(tap, packed=bool(shape.ring & F_RING_PACKED)) as lab:
        features = shape.ring | NET_F_MRG_RXBUF * shape.merge
        (lab.start_legacy if shape.legacy else lab.start)(features)
        yield lab


LENGTHS = (14, 15, 59, 60, 61, 128, 1000, 1513, 1514)
CUTS: tuple[tuple[int, ...], ...] = ((), (12,), (10,), (1,) * 30, (5, 0, 0, 40), (12, 14), (26,))


def test_every_frame_sent_arrives_once_in_order_unchanged(lab: NetLab, tap: TapLab) -> None:
    """Whatever its length, and however it is cut into descriptors (§2.7.4.1)."""
    frames: list[bytes] = []
    for turn in range(4):
        for i, length in enumerate(LENGTHS):
            cuts = CUTS[(turn + i) % len(CUTS)]
            frames.append(frame_of(length, len(frames)))
            lab.offer(frames[-1], cuts=[cut for cut in cuts if sum(cuts) < length])
        lab.serve_queue(1)
    assert [sent.data for sent in tap.receive(len(frames))] == frames
    assert lab.device.counters["tx"].facts() == {
        "frames": len(frames),
        "bytes": sum(map(len, frames)),
        "drops": {},
    }


def test_every_frame_received_arrives_once_in_order_unchanged(lab: NetLab, tap: TapLab) -> None:
    """In buffers of one descriptor or several, as many of them as there are or fewer."""
    frames = [frame_of(LENGTHS[i % 9], i, to=OWN, source=PEER) for i in range(100)]
    for frame in frames:
        tap.send(frame)
    found = []
    for turn in range(10):
        lab.give(6, 1600)
        lab.give(6, *((12, 1514), (1, 11, 14, 1500), (1,) * 12 + (1600,))[turn % 3])
        found += lab.received()
    assert [got.data for got in found] == frames
    assert {got.buffers for got in found} == {1}
    plain = bytes(10) + (b"\1\0" if lab.header_bytes == 12 else b"")
    assert {got.header for got in found} == {plain}
    facts = lab.device.counters["rx"].facts()
    assert facts == {"frames": 100, "bytes": sum(map(len, frames)), "drops": {}}


@pytest.mark.parametrize("size", [100, 512, 1526, 4096])
@pytest.mark.parametrize("ring", [0, F_RING_PACKED, F_INDIRECT_DESC | F_EVENT_IDX])
def test_a_frame_takes_as_many_buffers_as_it_needs(tap: TapLab, size: int, ring: int) -> None:
    """With MRG_RXBUF: num_buffers of them, all full but the last (§5.1.6.4)."""
    with NetLab(tap, packed=bool(ring & F_RING_PACKED)) as lab:
        lab.start(ring | NET_F_MRG_RXBUF)
        lengths = [60, 1514, 1514, 100, 87, 88, 89, 1514, 60, 60, 1514, 500, 513] * 3
        frames = [frame_of(length, i, to=OWN, source=PEER) for i, length in enumerate(lengths)]
        for frame in frames:
            tap.send(frame)
        found = []
        for _ in range(40):
            lab.give(25, *((size,) if ring != F_RING_PACKED else (size // 2, size - size // 2)))
            found += lab.received()
            if len(found) == len(frames):
                break
        assert [got.data for got in found] == frames
        assert [got.buffers for got in found] == [-(-(n + 12) // size) for n in lengths]


def test_a_frame_that_fits_no_buffer_is_dropped(tap: TapLab) -> None:
    """Without MRG_RXBUF one buffer is all there is; the queue goes on (CVE-2015-7295)."""
    with NetLab(tap) as lab:
        lab.start()
        lab.give(8, 12 + 100)
        for length in (100, 101, 1514, 60):
            tap.send(frame_of(length, length, to=OWN, source=PEER))
        assert [len(got.data) for got in lab.received()] == [100, 60]
        assert lab.device.counters["rx"].drops == {"too long": 2}
        assert lab.queues[0].outstanding == 6


def test_64_kib_in_one_frame(tap: TapLab) -> None:
    """A frame of the kernel's segmentation offload, header and all, in both directions."""
    head = PEER + OWN + b"\x08\x00" + bytes.fromhex("4500fdd400000000400600000101010102020202")
    frame = (head + bytes.fromhex("000100020000000000000000501003e800000000")).ljust(65000, b"x")
    header = bytes.fromhex("01013600980522001000")
    with NetLab(tap) as lab:
        lab.start(lab.device.features)
        lab.transmit(frame, header=header, cuts=(12, 54, 4096, 32768))
        [sent] = tap.receive(1)
        assert sent.data == frame
        assert sent.header[:2] == b"\1\1"
        lab.give(100, 1526)
        for _ in range(2):
            tap.send(frame, header)
        found = lab.received()
        assert [got.data for got in found] == [frame, frame]
        assert [got.buffers for got in found] == [43, 43]
        assert found[0].header[:2] == b"\1\1"
        assert lab.device.features & NET_F_GUEST_TSO4
