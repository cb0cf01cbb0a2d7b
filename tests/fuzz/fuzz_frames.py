"""Fuzz target of all that looks into frames: heads, the local responder, filters, captures.

    python -m tests.fuzz.fuzz_frames --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_frames --atheris [atheris options] [corpus directory]

An input is a byte, and then a frame, which is also taken for a command of the control queue.
Nothing may be raised. What is parsed must be inside the frame, with the checksums that
`tests.netlab` finds; what a locked filter lets through must have the guest's address.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from devices import frames
from devices.netfilter import HEAD_FROM, HEAD_TO, Filter
from devices.netlocal import HEAD, Local
from devices.pcap import OUTBOUND, Capture
from tests import netlab
from tests.fuzz.run import FoundError, mutate, run

if TYPE_CHECKING:
    from random import Random

_LOCAL: Final = Local(netlab.SETTINGS6)
_LOCKED: Final = Filter(netlab.GUEST, locked=True)
_OPEN: Final = Filter(netlab.GUEST, locked=False)
_NULL: Final = os.open("/dev/null", os.O_WRONLY)
_CAPTURE: Final = Capture(_NULL, "fuzz", snaplen=96)


def one_input(data: bytes) -> int:
    """Run one input; return 1 if something understood it."""
    if not data:
        return 0
    frame = data[1:]
    parsed = _parse(frame)
    partial = bool(data[0] & 1)
    answers = _LOCAL.answer(frame, partial=partial)
    if answers is not None and not _LOCAL.wants(frame[:HEAD]):
        raise FoundError("answered, and not wanted")
    for answer in answers or ():
        netlab.see(answer)
    if _LOCKED.from_guest(frame[:HEAD_FROM]) and frame[6:12] != netlab.GUEST:
        raise FoundError("a foreign source passes")
    if _LOCKED.to_guest(frame[:HEAD_TO]) and not frame[0] & 1 and frame[:6] != netlab.GUEST:
        raise FoundError("a foreign destination passes")
    _filter(data)
    _CAPTURE.add(OUTBOUND, [frame[:20], frame[20:]], len(frame))
    _CAPTURE.flush()
    return int(parsed or bool(answers))


def _parse(frame: bytes) -> bool:
    """Read as far as it goes, and check what was read."""
    head = frames.parse_ethernet(frame)
    if head is None:
        return False
    read = {frames.IPV4: frames.parse_ipv4, frames.IPV6: frames.parse_ipv6}.get(head.ethertype)
    packet = read(frame, head.at) if read else None
    if packet is None:
        return False
    if not head.at + 20 <= packet.at <= packet.end <= len(frame):
        raise FoundError(f"{packet} in {len(frame)} bytes")
    datagram = frames.parse_udp(frame, packet)
    message = frames.sound_icmpv6(frame, packet)
    data = frame[packet.at : packet.end]
    if datagram is not None:
        length = 8 + len(datagram.payload)
        if data[6:8] != b"\0\0" and _sum(packet, data[:length]) != 0xFFFF:
            raise FoundError("a wrong checksum is taken")
    elif message is not None and _sum(packet, data) != 0xFFFF:
        raise FoundError("a wrong checksum is taken")
    return datagram is not None or message is not None


def _sum(packet: frames.Packet, data: bytes) -> int:
    return netlab.words_sum(
        netlab.pseudo(packet.src, packet.dst, packet.protocol, len(data)) + data
    )


def _filter(data: bytes) -> None:
    """Let the frame be a command to a filter, and then a frame for it."""
    _OPEN.activate(int.from_bytes(data[:1]) << 18)
    if len(data) > 3 and _OPEN.control(data[1] & 3, data[2] & 7, data[3:]):
        again = Filter(netlab.GUEST, locked=False)
        again.load(_OPEN.save())
        if again.save() != _OPEN.save():
            raise FoundError("state is lost")
    _OPEN.to_guest(data[1 : 1 + HEAD_TO])
    _OPEN.from_guest(data[1 : 1 + HEAD_FROM])
    if data[0] & 0x80:
        _OPEN.reset()


def make_up(rng: Random) -> bytes:
    """Return a frame that somebody will understand."""
    body = rng.randbytes(rng.randrange(100))
    solicit = b"\x85\0\0\0" + bytes(4) + rng.choice((b"", b"\1\1" + netlab.GUEST, body))
    frame = rng.choice(
        (
            netlab.udp(body, ip_options=bytes(4 * rng.randrange(11))),
            netlab.udp(netlab.bootp((53, b"\1"))),
            netlab.icmp6(solicit, src=rng.choice(("::", "fe80::5"))),
            netlab.icmp6(b"\x88" + bytes(23) + b"\2\1" + netlab.GUEST, src="fe80::5"),
            b"\xff" * 6 + netlab.GUEST + b"\x08\x06\0\1\x08\0\6\4\0\1" + netlab.GUEST + body,
            bytes((1, 0, 1, 0, 0, 0)) + netlab.GUEST + bytes((1, 0, 0, 0)) + netlab.HOST,
            bytes((2, 0)) + rng.randbytes(2),
            bytes((0, rng.randrange(6), 1)),
        )
    )
    if rng.random() < 0.3:
        frame = frame[:12] + rng.choice((b"\x81\0\0\5", b"\x88\xa8\0\5\x81\0\0\7")) + frame[12:]
    return rng.randbytes(1) + frame


if __name__ == "__main__":
    sys.exit(run("frames", one_input, make_up, mutate, "of them answered", keep_from=1))
