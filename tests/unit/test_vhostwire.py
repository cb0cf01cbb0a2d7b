"""vhost-user messages on a socket: whole, in pieces, too long, with too many descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from devices import vhostwire
from devices.vhostwire import FRONT, HEADER, Front, Message, PeerError, Wire, misshapen
from tests.descriptors import count_before


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    """Return one end as Wire, and its peer's bare socket."""
    ours, theirs = socket.socketpair()
    wire = Wire(ours, "peer")
    yield wire, theirs
    wire.close()
    theirs.close()


def nr_open() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))


def test_round_trip(ends: tuple[Wire, socket.socket]) -> None:
    """A message arrives as it was sent, with copies of its descriptors."""
    wire, theirs = ends
    other = Wire(theirs.dup(), "other")
    fd = os.memfd_create("x")
    wire.send(Message(Front.SET_LOG_FD, 0, b"12345678", (fd,)))
    message = other.wait(10)
    assert message[:3] == (Front.SET_LOG_FD, vhostwire.VERSION, b"12345678")
    assert os.path.sameopenfile(message.fds[0], fd)
    vhostwire.drop(message)
    os.close(fd)
    other.close()


def test_in_pieces(ends: tuple[Wire, socket.socket]) -> None:
    """A message that comes byte by byte is there with its last one, and so is the next."""
    wire, theirs = ends
    data = HEADER.pack(Front.SET_FEATURES, vhostwire.VERSION, 8) + bytes(range(8))
    for byte in data[:-1]:
        theirs.send(bytes([byte]))
        assert wire.receive() is None
    theirs.send(data[-1:] + data)
    for _ in range(2):
        message = wire.receive()
        assert message is not None
        assert message.payload == bytes(range(8))
    assert wire.receive() is None


@pytest.mark.parametrize(
    ("data", "count", "match"),
    [
        (HEADER.pack(1, 1, vhostwire.PAYLOAD_MAX + 1), 0, "message of 4097 bytes"),
        (HEADER.pack(1, 1, 0xFFFFFFFF), 1, "message of 4294967295 bytes"),
        (HEADER.pack(1, 2, 0), 1, "version 2"),
        (HEADER.pack(1, 1, 0), vhostwire.REGIONS_MAX + 1, "too many descriptors"),
    ],
)
def test_nonsense(ends: tuple[Wire, socket.socket], data: bytes, count: int, match: str) -> None:
    """What cannot be a message is an error, and its descriptors are closed."""
    wire, theirs = ends
    before = count_before()
    socket.send_fds(theirs, [data], [theirs.fileno()] * count)
    with pytest.raises(PeerError, match=match):
        wire.receive()
    assert nr_open() == before


def test_descriptor_in_the_middle(ends: tuple[Wire, socket.socket]) -> None:
    """Descriptors come with the first byte of a message, or not at all."""
    wire, theirs = ends
    before = count_before()
    data = HEADER.pack(Front.SET_FEATURES, vhostwire.VERSION, 8) + bytes(8)
    socket.send_fds(theirs, [data[:4]], [theirs.fileno()])
    assert wire.receive() is None
    socket.send_fds(theirs, [data[4:]], [theirs.fileno()])
    with pytest.raises(PeerError, match="middle of a message"):
        wire.receive()
    assert nr_open() == before


def test_end(ends: tuple[Wire, socket.socket]) -> None:
    """A peer that hangs up half-way takes its descriptors along."""
    wire, theirs = ends
    before = count_before()
    socket.send_fds(theirs, [b"\1"], [wire.fileno()])
    assert wire.receive() is None
    theirs.close()
    with pytest.raises(PeerError, match="hung up"):
        wire.receive()
    assert nr_open() == before - 1


def test_silence(ends: tuple[Wire, socket.socket]) -> None:
    """Waiting has an end."""
    with pytest.raises(PeerError, match="does not answer"):
        ends[0].wait(0.01)


def test_reader_gone(ends: tuple[Wire, socket.socket]) -> None:
    """A peer that does not read is an error, not a wait."""
    messages = [Message(Front.SET_CONFIG, 0, bytes(200))] * 10_000
    with pytest.raises(PeerError, match="peer: "):
        list(map(ends[0].send, messages))


@pytest.mark.parametrize("request_", [*FRONT, 0, 22, 99])
def test_shapes(request_: int) -> None:
    """One byte or one descriptor more than its row allows makes a message misshapen."""
    shape = FRONT.get(request_)
    if shape is None:
        assert "unknown" in misshapen(Message(request_, 0), FRONT, -1)
        return
    most, (fewest, highest) = max(shape.least, shape.most), shape.fds
    good = Message(request_, 0, bytes(shape.least), (0,) * fewest)
    assert misshapen(good, FRONT, -1) == ""
    assert misshapen(good._replace(payload=bytes(most), fds=(0,) * highest), FRONT, -1) == ""
    assert "bytes" in misshapen(good._replace(payload=bytes(most + 1)), FRONT, -1)
    assert "descriptors" in misshapen(good._replace(fds=(0,) * (highest + 1)), FRONT, -1)
    if shape.least:
        assert "bytes" in misshapen(good._replace(payload=bytes(shape.least - 1)), FRONT, -1)
    if fewest:
        assert "descriptors" in misshapen(good._replace(fds=()), FRONT, -1)
    if shape.needs:
        assert "needs" in misshapen(good, FRONT, 0)
