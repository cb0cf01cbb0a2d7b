"""The network device on a passt socket: frames behind their lengths, however they are cut."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest

from devices import nethdr as hdr
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.netconfig import S_LINK_UP
from devices.nethdr import MAX_FRAME
from devices.stream import Stream
from tests.vionetlab import OWN, PEER, NetLab, frame_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pair(NamedTuple):
    """A device on a stream, and its other end."""

    lab: NetLab
    peer: socket.socket

    def sent(self) -> list[bytes]:
        """What has come out of the stream, in whole frames."""
        data = bytearray()
        try:
            while piece := self.peer.recv(1 << 20):
                data += piece
                self.lab.serve()
        except BlockingIOError:
            pass
        frames = []
        while data:
            length = int.from_bytes(data[:4])
            frames.append(bytes(data[4 : 4 + length]))
            assert len(frames[-1]) == length
            del data[: 4 + length]
        return frames


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A driver that takes frames in parts."""
    mine, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 10)  # frames go in parts
    mine.setblocking(False)
    with mine, NetLab(stream=theirs.detach(), backend="stream") as lab:
        lab.start(hdr.NET_F_MRG_RXBUF | hdr.NET_F_STATUS | F_EVENT_IDX | F_INDIRECT_DESC)
        yield Pair(lab, mine)


def message(frame: bytes) -> bytes:
    """A frame as it is in the stream."""
    return len(frame).to_bytes(4) + frame


def frame(length: int, seed: int = 0) -> bytes:
    """A frame to the guest."""
    return frame_of(length, seed, to=OWN, source=PEER)


def test_no_offloads_are_offered(pair: Pair) -> None:
    """A stream has none, and so nothing switches them."""
    offered = pair.lab.offered()
    assert not offered & (hdr.GUEST_OFFLOADS | hdr.NET_F_CSUM | hdr.NET_F_CTRL_GUEST_OFFLOADS)
    assert not offered & (hdr.NET_F_HOST_TSO4 | hdr.NET_F_HOST_USO | hdr.NET_F_HOST_UFO)


def test_frames_are_sent_behind_their_length(pair: Pair) -> None:
    """Without the virtio header."""
    frames = [frame_of(length, length) for length in (14, 60, 1514, 9000)]
    pair.lab.transmit(*frames, cuts=(12, 5, 1))
    assert pair.sent() == frames


def test_a_header_that_asks_for_anything_is_refused(pair: Pair) -> None:
    """Nobody would do it."""
    pair.lab.transmit(frame_of(60), header=b"\1\0\0\0\0\0\x22\0\x10\0")
    assert pair.sent() == []
    assert pair.lab.device.counters["tx"].drops == {"malformed": 1}


@pytest.mark.parametrize(("step", "more"), [(1, 4), (3, 10), (100, 37), (1518, 37), (5000, 37)])
def test_frames_are_received_however_they_come(pair: Pair, step: int, more: int) -> None:
    """Byte by byte, or many at once; in buffers smaller than they are."""
    frames = [frame(14 + more * i, i) for i in range(50)]
    data = b"".join(map(message, frames))
    found = []
    pair.lab.give(50, 700)
    for at in range(0, len(data), step):
        pair.peer.send(data[at : at + step])
        pair.lab.serve()
        found += pair.lab.collect()
        pair.lab.give(64 - pair.lab.queues[0].outstanding, 700)
    found += pair.lab.received()
    assert [got.data for got in found] == frames
    assert {got.header[:10] for got in found} == {bytes(10)}


def test_frames_read_ahead_wait_for_buffers(pair: Pair) -> None:
    """They are not forgotten because the socket has nothing more to say."""
    for i in range(20):
        pair.peer.send(message(frame(100, i)))
    found = []
    for _ in range(20):
        pair.lab.give(1, 2048)
        found += pair.lab.received()
    assert [got.data for got in found] == [frame(100, i) for i in range(20)]


def test_frames_read_ahead_outlive_a_budget(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that ends before them is followed by another, without an event."""
    monkeypatch.setattr("devices.netrx.BUDGET", 1)
    pair.lab.give(20, 2048)
    pair.lab.serve()
    pair.peer.send(b"".join(message(frame(100, i)) for i in range(20)))
    assert len(pair.lab.received()) == 20


def test_a_peer_that_does_not_read(pair: Pair) -> None:
    """Frames wait in the ring, none in part in the stream, and all arrive in order later."""
    frames = [frame_of(9000, i) for i in range(120)]
    for data in frames:
        pair.lab.offer(data)
    pair.lab.schedule(1)
    pair.lab.serve()
    back = len(pair.lab.queues[1].collect())
    assert back < 120
    assert pair.lab.registers.transport.live[1].nr_in_flight == 0  # type: ignore[union-attr]
    assert pair.sent() == frames
    assert back + len(pair.lab.queues[1].collect()) == 120


def fill(stream: Stream, parts: list[bytes]) -> int:
    """Send a frame until it cannot be; return how often that was done."""
    sent = 0
    with suppress(BlockingIOError):
        while stream.send(parts):
            sent += 1
    return sent


@pytest.mark.parametrize("length", [60, 1514, 9000, MAX_FRAME])
def test_nothing_is_written_in_part(length: int) -> None:
    """Whoever goes on for a process that was killed begins with a frame, so none has begun."""
    mine, theirs = socket.socketpair()
    stream = Stream(theirs.fileno())
    parts = [bytes(12), bytes(length)]
    with mine, theirs:
        for _ in range(3):
            sent = fill(stream, parts)
            assert sent > 1
            waiting = bytearray(sent * (length + 4))
            assert mine.recv_into(waiting, len(waiting), socket.MSG_WAITALL) == len(waiting)
            assert bytes(waiting) == message(parts[1]) * sent
            with pytest.raises(BlockingIOError):
                mine.recv(1, socket.MSG_DONTWAIT)


def test_another_goes_on_in_the_middle_of_nothing() -> None:
    """Two readers, one after the other, get every frame that the first has not taken."""
    mine, theirs = socket.socketpair()
    frames = [frame(100, i) for i in range(4)]
    data = b"".join(map(message, frames))
    room = [memoryview(bytearray(2048))]
    with mine, theirs:
        mine.send(data[:-50])
        first = Stream(theirs.fileno())
        for _ in range(3):
            assert first.receive(room) == 112
        with pytest.raises(BlockingIOError):
            first.receive(room)
        mine.send(data[-50:])
        assert Stream(theirs.fileno()).receive(room) == 112
        assert bytes(room[0][12:112]) == frames[3]


@pytest.mark.parametrize("data", [b"\0\0\0\0", b"\0\0\0\x0d" + bytes(13), b"\xff\xff\xff\xff"])
def test_a_peer_that_makes_no_sense(pair: Pair, data: bytes) -> None:
    """No frame is that long: what follows cannot be told apart, and the link is lost."""
    pair.lab.give(4, 2048)
    pair.peer.send(message(frame(60)) + data)
    pair.lab.serve()
    pair.lab.give(4, 2048)
    assert [got.data for got in pair.lab.received()] == [frame(60)]
    assert not pair.lab.device.config()[6] & S_LINK_UP
    assert len(pair.lab.said) == 1
    assert pair.lab.watched == {}


@pytest.mark.parametrize("sends", [False, True])
def test_a_peer_that_is_gone(pair: Pair, sends: bool) -> None:
    """The link is lost, told once, and nothing spins."""
    pair.lab.give(4, 2048)
    pair.lab.serve()
    pair.peer.close()
    if sends:
        pair.lab.transmit(frame_of(60))
    pair.lab.serve()
    for _ in range(5):
        pair.lab.transmit(frame_of(60))
    assert pair.lab.serve() == 0
    assert len(pair.lab.said) == 1
    assert pair.lab.device.counters["tx"].drops["link down"] >= 5


def test_a_frame_in_part_is_no_work(pair: Pair) -> None:
    """A peer that begins one and says no more does not make the device spin."""
    pair.lab.give(4, 2048)
    pair.peer.send(message(frame(60))[:20])
    assert pair.lab.serve() < 10
    assert pair.lab.serve() == 0
    pair.peer.send(message(frame(60))[20:])
    assert [got.data for got in pair.lab.received()] == [frame(60)]


def test_what_was_read_ahead_is_gone_with_the_link(pair: Pair) -> None:
    """A frame of before does not come out of a cable that was pulled."""
    pair.lab.device.setting("link", False)
    pair.peer.send(message(frame(60)))
    pair.lab.give(4, 2048)
    assert pair.lab.received() == []
    pair.lab.device.setting("link", True)
    assert os.get_blocking(pair.lab.fds[0]) is False
