"""Fuzz target of a vhost-user connection: any messages with any descriptors, rings that live.

    python -m tests.fuzz.fuzz_vhostuser --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_vhostuser --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up. tests/unit/test_vhostuser_fuzz.py runs the same
target from hypothesis.

An input is a byte that says which device, and steps, each of them

    0-99     a message: number in FRONT, flags, kinds of descriptors (3 bits each), length, payload
    100-199  a message in two pieces
    200-219  a kick, 220-239 a request of the driver, 240-255 bytes that are no message

The only exception the target may see is PeerError, and then the connection is over. Nothing is
written outside of the regions, and afterwards no descriptor is left.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

from devices import vhostwire
from devices.device import INFO
from devices.features import F_RING_PACKED, F_VERSION_1
from devices.guestmem import GuestMemory, Region
from devices.loop import Loop
from devices.vhostback import PROTOCOL, Conversation
from devices.vhostrings import Rings
from devices.vhostwire import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FRONT,
    HEADER,
    NEED_REPLY,
    U64,
    Front,
    PeerError,
    Wire,
)
from devices.viornd import Viornd
from devices.vioscsi import Vioscsi
from tests.fuzz.run import run
from tools.viodriver import NoRoomError, make_memfd, open_driver

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from devices.device import Device, Timer

SIZE: Final = 1 << 18  # bytes of the file that memory, log and in-flight areas are in
GUARD: Final = 1 << 16  # bytes at its end that no region covers
HVA: Final = 0x7F00_0000_0000
ROWS: Final = tuple(FRONT)
KINDS: Final = 6  # of descriptors: memory, eventfd, other eventfd, socket, pipe, /dev/null


class FoundError(Exception):
    """The target did what no input may make it do."""


class Host:
    """A device's host that remembers nothing."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.timers: list[Any] = []
        self.rings: Rings | None = None
        self.talk: Conversation | None = None

    def call(self, index: int) -> None:
        if self.rings is not None:
            self.rings.bells.call(self.rings.rings[index])

    def schedule(self, index: int) -> None:
        if self.rings is not None:
            self.rings.bells.schedule(index)

    def checkpoint(self) -> None:
        """See Host."""

    def config_changed(self) -> None:
        if self.talk is not None:
            self.talk.config_changed()

    def tell(self, word: str) -> None:
        self.log(INFO, word)

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        self.loop.add(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        self.loop.remove(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.timers.append(self.loop.timer(callback))
        made: Timer = self.timers[-1]
        return made

    def log(self, level: int, text: str) -> None:
        if not text:
            raise FoundError("nothing to say")


class Lab:
    """One connection, from both ends."""

    def __init__(self, which: int) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.memory_fd = make_memfd(SIZE)
        self.memory = GuestMemory(self.memory_fd, [Region(0, SIZE, 0)])
        self.memory.write(SIZE - GUARD, b"\xa5" * GUARD)
        self.others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.pipe = os.pipe()
        for fd in self.pipe:
            os.set_blocking(fd, False)
        self.pair = socket.socketpair()
        self.null = os.open("/dev/null", os.O_RDWR)
        self.fds = (self.memory_fd, *self.others, self.pair[0].fileno(), self.pipe[1], self.null)
        self.features = F_VERSION_1 | (F_RING_PACKED if which & 2 else 0)
        self.driver = open_driver(self.memory, 16, 0x4000, self.features, arena_bytes=0x4000)
        self.host = host = Host()
        memory = GuestMemory()
        device: Device = Vioscsi(memory, host, None) if which & 1 else Viornd(memory, host, 0)
        host.rings = Rings(device, memory, host.loop, host.log)
        host.talk = Conversation(Wire(theirs, "front end"), host.rings, host.log)
        host.loop.add(theirs.fileno(), 1, host.talk.readable)
        self.device = device
        self.answers = 0  # about how many

    def turn(self) -> None:
        """Let the back end do what there is to do. Raises PeerError."""
        for _ in range(3):
            self.host.loop.call(self.host.loop.stop)
            self.host.loop.run()
        with contextlib.suppress(OSError):
            while data := self.ours.recv(1 << 16):
                self.answers += len(data) // HEADER.size

    def send(self, data: bytes, fds: list[int]) -> None:
        with contextlib.suppress(OSError):  # it has hung up, or does not take more
            socket.send_fds(self.ours, [data], fds)

    def close(self) -> None:
        host = self.host
        assert host.talk is not None
        self.device.close()
        host.talk.close()
        for timer in host.timers:
            timer.close()
        host.loop.close()
        self.ours.close()
        for end in self.pair:
            end.close()
        for fd in (self.memory_fd, *self.others, *self.pipe, self.null):
            os.close(fd)


def one_input(data: bytes) -> int:
    """Run one input; return how many answers there were, a measure of how far it went."""
    before = len(os.listdir("/proc/self/fd"))
    lab = Lab(data[0] if data else 0)
    try:
        with contextlib.suppress(PeerError):
            steps(lab, data[1:])
        if any(byte != 0xA5 for byte in lab.memory.read(SIZE - GUARD, GUARD)):
            raise FoundError("a write outside of all regions")
    finally:
        lab.close()
    answers = lab.answers
    del lab
    gc.collect()  # the lab is one cycle, and holds mappings
    left = len(os.listdir("/proc/self/fd")) - before
    if left:
        raise FoundError(f"{left} descriptors are left")
    return answers


def steps(lab: Lab, data: bytes) -> None:
    """Do the steps of an input. Raises PeerError when the connection is over."""
    while data:
        what, data = data[0], data[1:]
        if what < 200:
            number, flags, kinds, size = data[:4].ljust(4, b"\0")
            payload, data = data[4 : 4 + size], data[4 + size :]
            message = HEADER.pack(ROWS[number % len(ROWS)], flags & 0xF | 1, size) + payload
            places = (kinds & 7, kinds >> 3 & 7, kinds & 7)[: kinds >> 6]
            fds = [lab.fds[place % len(lab.fds)] for place in places]
            if what < 100:
                lab.send(message, fds)
            else:
                cut = max(1, what % len(message))
                lab.send(message[:cut], fds)
                lab.turn()
                lab.send(message[cut:], [])
        elif what < 220:
            os.eventfd_write(lab.others[0], 1)
        elif what < 240:
            with contextlib.suppress(NoRoomError):
                lab.driver.add([b"q" * (what % 3)] if what % 3 else [], [what])
        else:
            lab.send(data[: what - 239], [])
            data = data[what - 239 :]
        lab.turn()


# Inputs.


def encode(request: int, flags: int, kinds: int, payload: bytes) -> bytes:
    """Return the step that sends a message."""
    return bytes((0, ROWS.index(request), flags, kinds, len(payload))) + payload


def hello(lab_features: int, rng: Random) -> bytes:
    """The messages with which a connection begins, and a ring that works."""
    packed = bool(lab_features & F_RING_PACKED)
    desc, avail = 0x4000, 0x4000 + 256
    used = 0x4000 + 256 + (4 if packed else 6 + 32)
    used += -used % 64
    region = vhostwire.MEM_REGION.pack(0, SIZE - GUARD, HVA, 0)
    features = lab_features | F_PROTOCOL_FEATURES | (F_LOG_ALL if rng.random() < 0.3 else 0)
    ack = NEED_REPLY
    made = [
        encode(Front.SET_PROTOCOL_FEATURES, 0, 0, U64.pack(PROTOCOL & ~vhostwire.P_CONFIG)),
        encode(Front.SET_FEATURES, ack, 0, U64.pack(features)),
        encode(Front.SET_MEM_TABLE, ack, 1 << 6, vhostwire.MEM_TABLE.pack(1, 0) + region),
        encode(Front.SET_LOG_BASE, ack, 1 << 6, vhostwire.LOG.pack(4096, 0x20000)),
        encode(Front.GET_INFLIGHT_FD, 0, 0, vhostwire.INFLIGHT.pack(0, 0, 1, 16)),
        encode(Front.SET_VRING_NUM, ack, 0, vhostwire.VRING_STATE.pack(0, 16)),
        encode(
            Front.SET_VRING_ADDR,
            ack,
            0,
            vhostwire.VRING_ADDR.pack(0, 1, HVA + desc, HVA + used, HVA + avail, used),
        ),
        encode(Front.SET_VRING_CALL, ack, 2 | 1 << 6, U64.pack(0)),
        encode(Front.SET_VRING_KICK, ack, 1 | 1 << 6, U64.pack(0)),
        encode(Front.SET_VRING_ENABLE, ack, 0, vhostwire.VRING_STATE.pack(0, 1)),
    ]
    return b"".join(made)


def message(rng: Random) -> bytes:
    """A message whose numbers are near to right ones."""
    request = rng.choice(ROWS)
    shape = FRONT[request]
    size = rng.choice((shape.least, max(shape.least, shape.most)))
    words = (0, 1, 2, 16, 4096, HVA, HVA + 0x4000, SIZE, SIZE - GUARD, 1 << 32, (1 << 64) - 1)
    payload = b""
    while len(payload) < size:
        if rng.random() < 0.5:
            payload += rng.choice(words).to_bytes(8, "little")
        else:
            payload += rng.randrange(4).to_bytes(4, "little") * 2
    count = rng.choice((shape.fds[0], shape.fds[1], rng.randrange(4)))
    kinds = rng.randrange(KINDS) | rng.randrange(KINDS) << 3 | min(count, 3) << 6
    return encode(
        request, rng.choice((0, NEED_REPLY, NEED_REPLY, 4)), kinds, payload[: min(size, 255)]
    )


def make_up(rng: Random) -> bytes:
    """Return an input that goes far."""
    which = rng.randrange(4)
    features = F_VERSION_1 | (F_RING_PACKED if which & 2 else 0)
    parts = [bytes((which,)), hello(features, rng) if rng.random() < 0.9 else b""]
    for _ in range(rng.randrange(30)):
        step = bytes((rng.choice((200, rng.randrange(220, 240))),))
        parts += [message(rng), step] if rng.random() < 0.7 else [step]
    return b"".join(parts)


def mutate(data: bytes, rng: Random) -> bytes:
    """Return an input with some bytes changed, cut or doubled."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(changed) or 1)
        kind = rng.randrange(3)
        if kind == 0 and changed:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randrange(8)]
        else:
            changed[at:at] = changed[at : at + rng.randrange(40)]
    return bytes(changed)


if __name__ == "__main__":
    sys.exit(run("a vhost-user connection", one_input, make_up, mutate, "answers"))
