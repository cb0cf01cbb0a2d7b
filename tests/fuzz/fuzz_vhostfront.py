"""Fuzz target of the vhost-user front end: whatever a back end answers, and asks.

    python -m tests.fuzz.fuzz_vhostfront --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_vhostfront --atheris [atheris options] [corpus directory]

An input is cut into messages, which are on their way before anything is asked: a byte says how many
descriptors come along and on which of the two sockets, two how long the piece is. Nothing may be
raised but PeerError, and no descriptor may be left.
"""

from __future__ import annotations

import os
import socket
import sys
from struct import pack
from typing import TYPE_CHECKING, Any, Final

from devices.vhostask import BackChannel
from devices.vhostfront import PROTOCOL, FrontEnd, MemoryRegion, Ring
from devices.vhostlook import Face
from devices.vhostwire import HEADER, REPLY, U64, VERSION, Front, PeerError, Wire
from tests.fuzz.run import FoundError, mutate, run

if TYPE_CHECKING:
    from random import Random

SETTINGS: Final[dict[str, Any]] = {
    "virtio_id": 2,
    "queues": 2,
    "least": 1,
    "exact": False,
    "config_length": 60,
    "tag": "",
}
_PIECE: Final = 3  # bytes before each piece


def one_input(data: bytes) -> int:
    """Run one input; return 1 if the conversation began."""
    before = os.listdir("/proc/self/fd")
    (ours, theirs), (back, back_theirs) = socket.socketpair(), socket.socketpair()
    front = FrontEnd(Wire(ours, "peer"), 0.05)
    memory = os.memfd_create("memory")
    try:
        _send(data, (theirs, back_theirs))
        front.back = BackChannel(Wire(back, "peer"), PROTOCOL)
        return _talk(front, memory)
    finally:
        front.close()
        for sock in (theirs, back_theirs):
            sock.close()
        os.close(memory)
        if os.listdir("/proc/self/fd") != before:
            raise FoundError(f"descriptors: {before}, {os.listdir('/proc/self/fd')}")


def _send(data: bytes, sockets: tuple[socket.socket, socket.socket]) -> None:
    at = 0
    while at + _PIECE <= len(data):
        length = int.from_bytes(data[at + 1 : at + 3], "little") & 0x3FF
        sock, fds = sockets[data[at] >> 7], [1] * (data[at] & 0xF)
        piece = data[at + _PIECE : at + _PIECE + length]
        if piece:
            socket.send_fds(sock, [piece], fds)
        at += _PIECE + length
    for sock in sockets:
        sock.shutdown(socket.SHUT_WR)


def _talk(front: FrontEnd, memory: int) -> int:
    """Say everything there is to say, as far as it goes."""
    far = 0
    face = Face(SETTINGS)
    try:
        front.negotiate()
        far = 1
        face.meet(front)
        front.accept(face.features)
        front.share([MemoryRegion(0, 0x1000, 0, 0, memory)])
        area = front.get_inflight(face.queues, 128)
        os.close(area.fd)
        front.start_queue(0, Ring(128, 0, 0, 0x800, 0xC00))
        front.enable_queue(0)
        front.stop_queue(0)
        front.reset_device()
        while front.back is not None:
            front.back.receive()
            front.unasked()
    except PeerError:
        pass
    return far


_ANSWERS: Final = (
    (Front.GET_FEATURES, U64.pack(1 << 32 | 1 << 30)),
    (Front.GET_PROTOCOL_FEATURES, U64.pack(PROTOCOL)),
    (Front.SET_OWNER, bytes(8)),
    (Front.GET_QUEUE_NUM, U64.pack(2)),
    (Front.GET_CONFIG, pack("<III", 0, 60, 0) + bytes(60)),
    (Front.SET_FEATURES, bytes(8)),
    (Front.SET_MEM_TABLE, bytes(8)),
    (Front.GET_INFLIGHT_FD, pack("<QQHH4x", 0x1000, 0, 2, 128)),
    (Front.SET_VRING_NUM, bytes(8)),
    (Front.SET_VRING_BASE, bytes(8)),
    (Front.SET_VRING_ADDR, bytes(8)),
    (Front.SET_VRING_ERR, bytes(8)),
    (Front.SET_VRING_CALL, bytes(8)),
    (Front.SET_VRING_KICK, bytes(8)),
    (Front.SET_VRING_ENABLE, bytes(8)),
    (Front.GET_VRING_BASE, bytes(8)),
    (Front.RESET_DEVICE, bytes(8)),
)


def make_up(rng: Random) -> bytes:
    """Return an input that is nearly a conversation."""
    data = b""
    for request, payload in _ANSWERS:
        body = payload
        if rng.random() < 0.03:
            body = rng.randbytes(rng.choice((0, 8, len(payload), rng.randrange(300))))
        fds = 1 if request == Front.GET_INFLIGHT_FD else 0
        if rng.random() < 0.02:
            fds = rng.randrange(16)
        flags = REPLY | VERSION if rng.random() > 0.02 else rng.randrange(16)
        data += _piece(fds, HEADER.pack(request, flags, len(body)) + body)
        if rng.random() < 0.1:
            asked = HEADER.pack(rng.choice((2, 2, 1, 3, 4, 99)), rng.choice((1, 9, 5)), 0)
            data += _piece(0x80 | rng.choice((0, 0, 0, 1)), asked)
    return data


def _piece(kind: int, message: bytes) -> bytes:
    return bytes([kind]) + len(message).to_bytes(2, "little") + message


if __name__ == "__main__":
    sys.exit(
        run(
            "the front end of vhost-user",
            one_input,
            make_up,
            mutate,
            "of them answered",
            keep_from=1,
        )
    )
