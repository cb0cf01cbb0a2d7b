"""Fuzz target of the network device: any frames to send, any control commands, any framing.

    python -m tests.fuzz.fuzz_net --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_net --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up. tests/unit/test_net_fuzz.py runs the same target
from hypothesis.

An input is a byte of settings, then requests, each of them

    0  what: frame to send, control command, frame to receive    2  how it is cut, see CUTS
    1  length of what follows                                    3  what follows

The only exception the target may see is GuestError. What is sent has a header that no guest could
use to harm the host's stack, and was offered; every ack is 0 or 1; what is received arrives as it
was, or not at all; the log stays empty.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError
from devices import nethdr as hdr
from devices.features import F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1
from devices.netdevice import Vionet
from tests.fuzz.run import change, run
from tests.vionetlab import SETTINGS
from tools.viodriver import NoRoomError, make_memory, open_driver

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

CUTS: Final = (0, 12, 1, 10, 14, 60, 5, 13)
OFFLOADS: Final = (
    hdr.GUEST_OFFLOADS
    | hdr.NET_F_CSUM
    | hdr.NET_F_HOST_TSO4
    | hdr.NET_F_HOST_TSO6
    | hdr.NET_F_HOST_ECN
    | hdr.NET_F_HOST_UFO
    | hdr.NET_F_HOST_USO
)


class FoundError(Exception):
    """The target did what no input may make it do."""


class Host:
    """Hears what the device says, and nothing else."""

    def __init__(self) -> None:
        self.nr_lines = 0

    def log(self, _level: int, _text: str) -> None:
        self.nr_lines += 1

    def timer(self, _callback: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Wire:
    """A backend, and its only port, that remembers."""

    features, fd, buffered, edge = OFFLOADS, 0, False, 0

    def __init__(self) -> None:
        self.ports = [self]
        self.sent: list[bytes] = []
        self.coming: deque[bytes] = deque()

    def send(self, parts: Sequence[bytes | memoryview]) -> int:
        if type(parts[0]) is not bytes or len(parts) > 1024:
            raise FoundError("a header that is the guest's, or more parts than there can be")
        self.sent.append(b"".join(parts))
        return len(self.sent[-1])

    def receive(self, views: Sequence[memoryview]) -> int:
        if not self.coming:
            raise BlockingIOError
        data, at = self.coming.popleft(), 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return at

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Bench:
    """One device, made once; every input starts with a reset."""

    def __init__(self) -> None:
        self.memory = make_memory(4 << 20)
        self.host, self.wire, self.header_bytes = Host(), Wire(), hdr.HEADER_BYTES
        self.device = Vionet(self.memory, self.host, self.wire, SETTINGS)  # type: ignore[arg-type]

    def run(self, data: bytes) -> int:
        """Serve the requests of one input; return how many frames went through."""
        if not data:
            return 0
        features = F_INDIRECT_DESC * (data[0] & 1) | F_RING_PACKED * (data[0] >> 1 & 1)
        features |= hdr.NET_F_MRG_RXBUF * (data[0] >> 2 & 1) | F_VERSION_1 * (not data[0] & 16)
        if data[0] & 8:
            features |= self.device.features & ~(hdr.NET_F_MRG_RXBUF * (not data[0] & 4))
        long = features & (F_VERSION_1 | hdr.NET_F_MRG_RXBUF)
        self.header_bytes = hdr.HEADER_BYTES if long else hdr.OLD_HEADER_BYTES
        drivers = [
            open_driver(self.memory, 64, 0x1000 + (n << 20), features, arena_bytes=900 << 10)
            for n in range(3)
        ]
        queues = [driver.open_device() for driver in drivers]
        self.device.reset()
        self.device.activate(features, queues)
        self.wire.sent.clear()
        self.wire.coming.clear()
        offered, acks, coming = self._offer(drivers, data)
        with contextlib.suppress(GuestError):
            for index in (1, 2, 0):
                while self.device.kick(index, queues[index]):
                    pass
        return self._check(drivers, features, offered, acks, coming)

    def _offer(self, drivers: Sequence[Any], data: bytes) -> tuple[set[bytes], int, list[bytes]]:
        at, offered, acks, coming = 1, set(), 0, []
        for _ in range(24):
            if len(data) - at < 3:
                break
            what, length, cut = data[at], data[at + 1], data[at + 2]
            body = data[at + 3 : at + 3 + length]
            at += 3 + len(body)
            if what & 64:
                body += bytes(1000 * (what & 7))
            with contextlib.suppress(NoRoomError):
                if what % 3 == 0:
                    drivers[1].add(_cut(body, cut), [1] * (cut > 250))
                    offered.add(body[self.header_bytes :])
                elif what % 3 == 1:
                    drivers[2].add(_cut(body, cut), [1] * (cut < 250))
                    acks += 1
                else:
                    frame = bytes(self.header_bytes) + body.ljust(60, b"r")
                    coming.append(frame)
                    self.wire.coming.append(frame)
                    drivers[0].add([], [max(length, 1)] * (1 + cut % 3))
        return offered, acks, coming

    def _check(
        self,
        drivers: Sequence[Any],
        features: int,
        offered: set[bytes],
        acks: int,
        coming: list[bytes],
    ) -> int:
        for frame in self.wire.sent:
            header, body = frame[: self.header_bytes], frame[self.header_bytes :]
            if body not in offered:
                raise FoundError("a frame was sent that nobody offered")
            flags, gso, hdr_len, size, start, offset = hdr.HEADER.unpack_from(header)
            if flags > 1 or (flags and not features & hdr.NET_F_CSUM):
                raise FoundError(f"flags {flags}")
            if flags and start + offset + 2 > len(body):
                raise FoundError(f"a checksum at {start} + {offset} of {len(body)}")
            if gso and (not flags or not size or not features & OFFLOADS & ~3):
                raise FoundError(f"gso type {gso} with flags {flags} and size {size}")
            if hdr_len > len(body):
                raise FoundError(f"a head of {hdr_len} bytes of {len(body)}")
        for used in drivers[2].collect():
            acks -= 1
            if used.written != 1 or drivers[2].data(used.request)[0] > 1:
                raise FoundError("a command without an ack")
        used_rx = drivers[0].collect()
        got = [drivers[0].data(used.request, used.written) for used in used_rx]
        whole = b"".join(got)
        for frame in coming:
            mine = len(frame)
            if whole[self.header_bytes : mine] == frame[self.header_bytes :]:
                whole = whole[mine:]
        if whole:
            raise FoundError("something was received that nobody sent")
        if self.host.nr_lines:
            raise FoundError("the log of a healthy tap has lines")
        return len(self.wire.sent) + len(got)


def _cut(data: bytes, how: int) -> list[bytes]:
    """Cut data into pieces, all of one length but the last; with bit 5 some are empty."""
    step = max(CUTS[how & 7] or len(data) or 1, -(-len(data) // 60))
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    return [b"", *pieces, b""] if how & 32 else pieces or [b""]


_bench: Final = Bench()


def one_input(data: bytes) -> int:
    """Run one input; return how many frames went through, a measure of how far it went."""
    return _bench.run(data)


def make_up(rng: Random) -> bytes:
    """Return an input of requests most of which are nearly right."""
    parts = [bytes([rng.randrange(32)])]
    for _ in range(rng.randint(1, 10)):
        what = rng.choice((0, 1, 2, 64 + 2, 66, 69, rng.randrange(256)))
        if what % 3 == 1:
            command = bytes([rng.randrange(7), rng.randrange(3)])
            count = rng.choice((0, 1, 2, 0x2AAA_AAAB))
            tables = count.to_bytes(4, "little") + bytes(6 * (count & 3)) + bytes(4)
            body = command + rng.choice((b"\1", b"\1\0", bytes(8), tables, bytes(6), b""))
        else:
            gso = rng.choice((0, 0, 1, 4, 3, 5, 0x81, rng.randrange(256)))
            size, start = rng.choice((0, 1, 500, 1400)), rng.choice((14, 34, 54, 60, 5000))
            flags = rng.choice((0, 1, 1, 3, 255))
            header = hdr.HEADER.pack(flags, gso, rng.choice((0, 54, 9999)), size, start, 16)
            body = header + bytes(2) + rng.randbytes(rng.choice((13, 14, 60, 100)))
        parts.append(bytes([what, len(body), rng.choice((0, 1, 3, 4, rng.randrange(256)))]) + body)
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(run("the network device", one_input, make_up, change, "frames went through"))
