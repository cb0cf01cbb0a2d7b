"""Each vhost-user message: used right, with a wrong size, with descriptors that do not belong.

A message that fails is answered so, if an answer is wanted; if not, the connection ends. Neither
leaves a descriptor behind.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from devices.vhostback import PROTOCOL
from devices.vhostwire import (
    CONFIG,
    FRONT,
    INFLIGHT,
    LOG,
    MEM_REGION,
    MEM_SLOT,
    MEM_TABLE,
    NEED_REPLY,
    P_INBAND_NOTIFICATIONS,
    P_MQ,
    P_REPLY_ACK,
    U64,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    Front,
)
from tests.vhostlab import HVA, Child
from tools.viodriver import make_memfd

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 1 << 20
REGION = MEM_REGION.pack(0, SIZE, HVA, 0)
OTHER = MEM_REGION.pack(SIZE, SIZE, HVA + SIZE, 0)
FEATURES = 1 << 32 | 1 << 30
ADDRESS = VRING_ADDR.pack(0, 0, HVA + 0x1000, HVA + 0x2000, HVA + 0x3000, 0)

# Each message with a payload that is right after `prepared`, and what its descriptors are.
GOOD: dict[Front, tuple[bytes, str]] = {
    Front.GET_FEATURES: (b"", ""),
    Front.SET_FEATURES: (U64.pack(FEATURES), ""),
    Front.SET_OWNER: (b"", ""),
    Front.RESET_OWNER: (b"", ""),
    Front.SET_MEM_TABLE: (MEM_TABLE.pack(1, 0) + REGION, "m"),
    Front.SET_LOG_BASE: (LOG.pack(4096, 0), "m"),
    Front.SET_LOG_FD: (b"", "e"),
    Front.SET_VRING_NUM: (VRING_STATE.pack(0, 64), ""),
    Front.SET_VRING_ADDR: (ADDRESS, ""),
    Front.SET_VRING_BASE: (VRING_STATE.pack(0, 0), ""),
    Front.GET_VRING_BASE: (VRING_STATE.pack(0, 0), ""),
    Front.SET_VRING_KICK: (U64.pack(0), "e"),
    Front.SET_VRING_CALL: (U64.pack(0), "e"),
    Front.SET_VRING_ERR: (U64.pack(0), "e"),
    Front.GET_PROTOCOL_FEATURES: (b"", ""),
    Front.SET_PROTOCOL_FEATURES: (U64.pack(PROTOCOL), ""),
    Front.GET_QUEUE_NUM: (b"", ""),
    Front.SET_VRING_ENABLE: (VRING_STATE.pack(0, 1), ""),
    Front.SET_BACKEND_REQ_FD: (b"", "s"),
    Front.GET_CONFIG: (CONFIG.pack(0, 8, 0) + bytes(8), ""),
    Front.SET_CONFIG: (CONFIG.pack(20, 4, 0) + (64).to_bytes(4, "little"), ""),
    Front.GET_INFLIGHT_FD: (INFLIGHT.pack(0, 0, 1, 64), ""),
    Front.SET_INFLIGHT_FD: (INFLIGHT.pack(1 << 16, 0, 1, 64), "m"),
    Front.RESET_DEVICE: (b"", ""),
    Front.VRING_KICK: (VRING_STATE.pack(0, 0), ""),
    Front.GET_MAX_MEM_SLOTS: (b"", ""),
    Front.ADD_MEM_REG: (MEM_SLOT.pack(0) + OTHER, "m"),
    Front.REM_MEM_REG: (MEM_SLOT.pack(0) + REGION, ""),
    Front.SET_STATUS: (U64.pack(3), ""),
    Front.GET_STATUS: (b"", ""),
}
#: Those that a program for these devices does not know: nobody may send them.
UNKNOWN = {
    Front.SEND_RARP: U64.pack(0),
    Front.NET_SET_MTU: U64.pack(1500),
    Front.SET_DEVICE_STATE_FD: bytes(8),
    Front.CHECK_DEVICE_STATE: b"",
}


class Things:
    """Descriptors to send."""

    def __init__(self) -> None:
        self.memory, self.event = make_memfd(SIZE), os.eventfd(0, os.EFD_NONBLOCK)
        self.socket, self._other = socket.socketpair()

    def take(self, letters: str) -> list[int]:
        found = {"m": self.memory, "e": self.event, "s": self.socket.fileno()}
        return [found[letter] for letter in letters]

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.event)
        self.socket.close()
        self._other.close()


@pytest.fixture
def things() -> Iterator[Things]:
    made = Things()
    yield made
    made.close()


@pytest.fixture
def child() -> Iterator[Child]:
    """A CD-ROM drive: three rings, and a configuration that can be written to."""
    with Child("vioscsi") as made:
        yield made


def prepare(child: Child, things: Things) -> None:
    """Negotiate everything, and share memory."""
    child.negotiate(PROTOCOL)
    table, fds = GOOD[Front.SET_MEM_TABLE]
    assert child.accepts(Front.SET_MEM_TABLE, table, things.take(fds))


def test_the_table_has_every_message() -> None:
    """What is not here is not tested."""
    assert GOOD.keys() | UNKNOWN.keys() == set(Front) == FRONT.keys()


@pytest.mark.parametrize("request_", GOOD, ids=lambda request: request.name)
def test_right_use(child: Child, things: Things, request_: Front) -> None:
    """It is answered, with 0 if it has no answer of its own; ten times are as good as one."""
    prepare(child, things)
    payload, letters = GOOD[request_]
    before = 0
    for turn in range(10):
        if turn and request_ in (Front.ADD_MEM_REG, Front.REM_MEM_REG):
            break
        reply = child.ask(request_, payload, things.take(letters))
        assert reply.request == request_
        if not FRONT[request_].replies or request_ == Front.SET_LOG_BASE:
            assert reply.payload == U64.pack(0)
        for fd in reply.fds:
            os.close(fd)
        before = child.nr_fds() if turn == 0 else before
    assert child.nr_fds() == before


@pytest.mark.parametrize("request_", GOOD, ids=lambda request: request.name)
def test_wrong_sizes(child: Child, things: Things, request_: Front) -> None:
    """A payload that is too short or too long is refused, and changes nothing."""
    prepare(child, things)
    payload, letters = GOOD[request_]
    shape, before = FRONT[request_], child.nr_fds()
    most = max(shape.least, shape.most)
    for wrong in (payload[: shape.least - 1], payload.ljust(most + 1, b"\0"), bytes(4000)):
        if not shape.least <= len(wrong) <= most:
            assert not child.accepts(request_, wrong, things.take(letters)), len(wrong)
    assert child.nr_fds() == before


@pytest.mark.parametrize("request_", GOOD, ids=lambda request: request.name)
def test_wrong_numbers_of_descriptors(child: Child, things: Things, request_: Front) -> None:
    """One too many, or one too few, is refused; all that came are closed."""
    prepare(child, things)
    payload, letters = GOOD[request_]
    before = child.nr_fds()
    if request_ == Front.REM_MEM_REG:  # one is taken, for the sake of some front ends
        letters = "m"
    for wrong in {letters + "m", letters + "mmmm", letters[1:]} - {letters, GOOD[request_][1]}:
        assert not child.accepts(request_, payload, things.take(wrong)), wrong
    assert child.nr_fds() == before


@pytest.mark.parametrize("request_", GOOD, ids=lambda request: request.name)
def test_what_is_wrong_ends_a_connection_that_wants_no_answer(
    child: Child, things: Things, request_: Front
) -> None:
    """The front end would go on in the belief that all is well. One line tells."""
    prepare(child, things)
    payload, letters = GOOD[request_]
    child.send(request_, payload + bytes(4000 - len(payload)), things.take(letters))
    assert child.hangs_up()
    assert child.wait_end() == 0
    assert [line for line in child.said if request_.name in line] == child.said[-1:]


@pytest.mark.parametrize("request_", [*UNKNOWN, 0, 22, 33, 41, 99, 0xFFFF_FFFF])
def test_unknown_messages(child: Child, things: Things, request_: int) -> None:
    """What nobody has agreed on is refused."""
    prepare(child, things)
    assert not child.accepts(
        request_, UNKNOWN.get(Front(request_), b"") if request_ in UNKNOWN else b""
    )
    assert not child.hangs_up()


@pytest.mark.parametrize("request_", [r for r in GOOD if FRONT[r].needs], ids=lambda r: r.name)
def test_protocol_features_come_first(child: Child, things: Things, request_: Front) -> None:
    """A message of a protocol feature that is not agreed on is refused."""
    child.negotiate(PROTOCOL & ~FRONT[request_].needs & ~P_INBAND_NOTIFICATIONS)
    payload, letters = GOOD[request_]
    assert not child.accepts(request_, payload, things.take(letters))


def test_an_answer_that_nobody_has_asked_for(child: Child) -> None:
    """A message with the reply flag is no request."""
    child.negotiate(PROTOCOL)
    child.send(Front.GET_FEATURES, flags=4 | NEED_REPLY)
    assert U64.unpack(child.wire.wait(20).payload) == (1,)


def test_no_answer_without_reply_ack(child: Child) -> None:
    """The flag means nothing before REPLY_ACK is agreed on."""
    child.send(Front.SET_OWNER, flags=NEED_REPLY)
    child.send(Front.SET_PROTOCOL_FEATURES, U64.pack(P_MQ), flags=NEED_REPLY)
    child.send(Front.SET_VRING_CALL, U64.pack(VRING_NO_FD), flags=NEED_REPLY)
    child.send(Front.GET_QUEUE_NUM)
    reply = child.wire.wait(20)
    assert (reply.request, reply.payload) == (Front.GET_QUEUE_NUM, U64.pack(3))


@pytest.mark.parametrize(
    ("request_", "payload", "letters"),
    [
        (Front.SET_FEATURES, U64.pack(FEATURES | 1 << 50), ""),
        (Front.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL | 1 << 40), ""),
        (Front.SET_VRING_NUM, VRING_STATE.pack(3, 64), ""),
        (Front.SET_VRING_NUM, VRING_STATE.pack(0, 0), ""),
        (Front.SET_VRING_NUM, VRING_STATE.pack(0, 32769), ""),
        (Front.SET_VRING_BASE, VRING_STATE.pack(3, 0), ""),
        (Front.GET_VRING_BASE, VRING_STATE.pack(0xFFFF_FFFF, 0), ""),
        (Front.SET_VRING_ENABLE, VRING_STATE.pack(3, 1), ""),
        (Front.SET_VRING_ENABLE, VRING_STATE.pack(0, 2), ""),
        (Front.SET_VRING_ADDR, VRING_ADDR.pack(3, 0, HVA, HVA, HVA, 0), ""),
        (Front.SET_VRING_ADDR, VRING_ADDR.pack(0, 2, HVA, HVA, HVA, 0), ""),
        (Front.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, 0, HVA, HVA, 0), ""),
        (Front.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, HVA, HVA + SIZE, HVA, 0), ""),
        (Front.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, HVA, HVA, (1 << 64) - 1, 0), ""),
        (Front.SET_VRING_KICK, U64.pack(3), "e"),
        (Front.SET_VRING_KICK, U64.pack(VRING_NO_FD), "e"),
        (Front.SET_VRING_KICK, U64.pack(0), ""),
        (Front.SET_VRING_KICK, U64.pack(1 << 9), "e"),
        (Front.SET_VRING_KICK, U64.pack(0), "m"),  # nothing that can be waited for
        (Front.SET_VRING_CALL, U64.pack(0xFF), "e"),
        (Front.SET_VRING_ERR, U64.pack(1 << 63), "e"),
        (Front.SET_BACKEND_REQ_FD, b"", "e"),
        (Front.SET_CONFIG, CONFIG.pack(20, 2, 0) + bytes(4), ""),
        (Front.SET_CONFIG, CONFIG.pack(0, 4, 0) + bytes(4), ""),  # read-only
        (Front.SET_CONFIG, CONFIG.pack(36, 4, 0) + bytes(4), ""),  # behind its end
        (Front.SET_CONFIG, CONFIG.pack(0xFFFF_FFFF, 4, 0) + bytes(4), ""),
        (Front.SET_CONFIG, CONFIG.pack(20, 4, 2) + bytes(4), ""),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 4, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 0, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 1, 0), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 0, 1, 0xFFFF), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(4096, 0, 3, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(SIZE + 1, 0, 1, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, (1 << 64) - 4096, 1, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack((1 << 64) - 1, 4096, 1, 64), "m"),
        (Front.SET_INFLIGHT_FD, INFLIGHT.pack(1 << 16, 4, 1, 64), "m"),
        (Front.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 4, 64), ""),
        (Front.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, 1, 0), ""),
        (Front.SET_LOG_BASE, LOG.pack(0, 0), "m"),
        (Front.SET_LOG_BASE, LOG.pack(SIZE, 4096), "m"),
        (Front.SET_LOG_BASE, LOG.pack(4096, (1 << 64) - 4096), "m"),
        (Front.SET_LOG_BASE, LOG.pack((1 << 64) - 1, 2), "m"),
        (Front.SET_LOG_BASE, LOG.pack(4096, 0), "e"),
        (Front.SET_LOG_BASE, LOG.pack(31, 0), "m"),  # less than memory
        (Front.SET_STATUS, U64.pack(0x100), ""),
        (Front.VRING_KICK, VRING_STATE.pack(3, 0), ""),
        (Front.VRING_KICK, VRING_STATE.pack(0, 1), ""),
        (Front.ADD_MEM_REG, MEM_SLOT.pack(0) + MEM_REGION.pack(0, SIZE, HVA + SIZE, 0), "m"),
        (Front.REM_MEM_REG, MEM_SLOT.pack(0) + OTHER, ""),  # not there
    ],
)
def test_wrong_values(
    child: Child, things: Things, request_: Front, payload: bytes, letters: str
) -> None:
    """What cannot be is refused, and leaves neither descriptor nor mapping."""
    prepare(child, things)
    before, maps = child.nr_fds(), child.nr_maps()
    for _ in range(3):
        assert not child.accepts(request_, payload, things.take(letters))
    assert (child.nr_fds(), child.nr_maps()) == (before, maps)


def test_configuration_that_is_not_there(child: Child) -> None:
    """A payload of length 0 tells of an error; what lies behind the end reads as zeroes."""
    child.negotiate(PROTOCOL)
    for offset, size in ((0, 257), (250, 7), (0xFFFF_FFFF, 4)):
        reply = child.ask(Front.GET_CONFIG, CONFIG.pack(offset, size, 0) + bytes(min(size, 256)))
        assert reply.payload == b""
    head = CONFIG.pack(32, 12, 0)
    reply = child.ask(Front.GET_CONFIG, head + bytes(12))
    assert reply.payload == head + bytes((1, 0, 0, 0)) + bytes(8)


def test_in_band_notifications_need_company(child: Child) -> None:
    """Without BACKEND_REQ and REPLY_ACK they are the end, as the specification says."""
    child.send(Front.SET_PROTOCOL_FEATURES, U64.pack(1 << 14 | P_REPLY_ACK))
    assert child.hangs_up()
