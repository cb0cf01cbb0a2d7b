"""Captures: read back block by block, and by tcpdump."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import frames
from devices.pcap import INBOUND, OUTBOUND, Capture
from tests import netlab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEADER: Final = bytes(range(1, 13))  # nothing that may turn up in a capture
FRAME: Final = netlab.udp(b"hello", src="100.64.1.3", dst="100.64.1.2", ports=(1234, 5678))
NOW: Final = 1_700_000_000_123_456_789


class Packet(NamedTuple):
    time: int
    data: bytes
    length: int
    options: dict[int, bytes]


def options(area: bytes) -> dict[int, bytes]:
    """Return a block's options, which must end as they should."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(area):
        code, length = struct.unpack("<HH", area[at : at + 4])
        at += 4
        if code == 0:
            assert at == len(area)
            return found
        found[code] = area[at : at + length]
        at += length + -length % 4
    pytest.fail("options without an end")


def blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks of a capture, both lengths checked."""
    while data:
        kind, length = struct.unpack("<II", data[:8])
        assert length % 4 == 0
        assert data[length - 4 : length] == data[4:8]
        yield kind, data[8 : length - 4]
        data = data[length:]


class Read:
    """A capture taken apart."""

    def __init__(self, data: bytes) -> None:
        (section, head), (interface, about), *rest = blocks(data)
        assert (section, interface) == (0x0A0D0D0A, 1)
        magic, major, minor, length = struct.unpack("<IHHq", head[:16])
        assert (magic, major, minor, length) == (0x1A2B3C4D, 1, 0, -1)
        assert struct.unpack("<HH", about[:4]) == (1, 0)
        (self.snaplen,) = struct.unpack("<I", about[4:8])
        named = options(about[8:])
        assert named[9] == b"\x09"
        self.name = named[2].decode()
        self.packets: list[Packet] = []
        self.statistics: dict[int, int] = {}
        for kind, body in rest:
            if kind == 6:
                interface, high, low, taken, whole = struct.unpack("<IIIII", body[:20])
                assert interface == 0
                end = 20 + taken + -taken % 4
                assert not any(body[20 + taken : end])
                self.packets.append(
                    Packet(high << 32 | low, body[20 : 20 + taken], whole, options(body[end:]))
                )
            else:
                assert kind == 5
                self.statistics = {
                    code: int.from_bytes(value, "little")
                    for code, value in options(body[12:]).items()
                }


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A descriptor, and where it leads."""
    path = tmp_path / "capture"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    yield fd, path
    os.close(fd)


def test_frames_come_back_without_their_header(file: tuple[int, Path]) -> None:
    """Time, direction, bytes and interface; the virtio header is gone."""
    fd, path = file
    capture = Capture(fd, "vionet0", clock=lambda: NOW)
    capture.add(OUTBOUND, [HEADER + FRAME], 12 + len(FRAME))
    capture.add(INBOUND, [HEADER, memoryview(FRAME), b"beyond"], 12 + len(FRAME))
    assert capture.flush()
    assert capture.close()
    found = Read(path.read_bytes())
    assert found.name == "vionet0"
    assert found.packets == [
        (NOW, FRAME, len(FRAME), {2: b"\2\0\0\0"}),
        (NOW, FRAME, len(FRAME), {2: b"\1\0\0\0"}),
    ]
    assert found.statistics == {4: 2, 5: 0}


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200),
    st.lists(st.integers(0, 60), max_size=8),
    st.integers(1, 150),
    st.binary(max_size=20),
)
def test_any_cut_into_views_is_the_same_frame(
    frame: bytes, cuts: list[int], snaplen: int, more: bytes
) -> None:
    """Header and frame in any pieces, empty ones too; what is beyond `length` stays out."""
    reading, writing = os.pipe()
    try:
        capture = Capture(writing, "n", snaplen=snaplen)
        rest = memoryview(HEADER + frame + more)
        views = []
        for cut in cuts:
            views.append(rest[:cut])
            rest = rest[cut:]
        capture.add(INBOUND, [*views, rest], 12 + len(frame))
        assert capture.flush()
        (packet,) = Read(os.read(reading, 65536)).packets
        assert packet.data == frame[:snaplen]
        assert packet.length == len(frame)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_full_pipe_costs_frames_and_never_a_block() -> None:
    """A reader that is slow: no call blocks, losses are told in the capture and at its end."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        capture = Capture(writing, "vionet0", backlog=20_000)
        big = HEADER + bytes(1501)
        for _ in range(200):
            capture.add(OUTBOUND, [big], len(big))
            capture.flush()
        assert capture.lost > 0
        assert capture.captured + capture.lost == 200
        assert capture.backlog <= 20_000
        lost = capture.lost

        data = b""
        while not capture.flush():
            data += os.read(reading, 1 << 20)
        data += os.read(reading, 1 << 20)
        capture.add(INBOUND, [HEADER + FRAME], 12 + len(FRAME))
        capture.add(INBOUND, [HEADER + FRAME], 12 + len(FRAME))
        assert capture.close()
        data += os.read(reading, 1 << 20)

        found = Read(data)
        assert len(found.packets) == capture.captured == 202 - lost
        assert [packet.options.get(4) for packet in found.packets[-3:]] == [
            None,
            lost.to_bytes(8, "little"),
            None,
        ]
        assert found.statistics == {4: 202, 5: lost}
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_that_leaves_ends_the_capture() -> None:
    """The device goes on; what would be captured counts as lost."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    os.close(reading)
    try:
        capture = Capture(writing, "vionet0")
        capture.add(OUTBOUND, [HEADER + FRAME], 12 + len(FRAME))
        assert capture.flush()
        assert capture.error == "Broken pipe"
        capture.add(OUTBOUND, [HEADER + FRAME], 12 + len(FRAME))
        assert capture.lost == 1
        assert capture.backlog == 0
        assert capture.close()
    finally:
        os.close(writing)


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="tcpdump is not installed")
def test_tcpdump_reads_it(file: tuple[int, Path]) -> None:
    """The usual reader, nanoseconds and all."""
    fd, path = file
    capture = Capture(fd, "vionet0", snaplen=80, clock=lambda: NOW)
    views = [HEADER + FRAME]
    capture.add(OUTBOUND, views, 12 + len(FRAME))
    answer = frames.udp4(
        netlab.ip("100.64.1.2"), netlab.ip("100.64.1.3"), (5678, 1234), b"x" * 300, 16
    )
    frame = frames.ethernet(netlab.GUEST, netlab.HOST, frames.IPV4, answer)
    capture.add(INBOUND, [HEADER + frame], 12 + len(frame))
    assert capture.close()
    ran = subprocess.run(
        ["tcpdump", "-r", str(path), "-n", "-e", "-tt", "--nano"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert first.startswith("1700000000.123456789 fe:e1:bb:d1:00:01 > ff:ff:ff:ff:ff:ff")
    assert "100.64.1.3.1234 > 100.64.1.2.5678: UDP, length 5" in first
    assert "100.64.1.2.5678 > 100.64.1.3.1234: UDP, length 300" in second
    assert "snapshot length 80" in ran.stderr
