"""Rings behind a vhost-user socket: starting, stopping, disabling; kicks, calls and errors."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from itertools import permutations
from typing import TYPE_CHECKING

import pytest

from config.errors import PyvmError
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1
from devices.vhostask import RefusedError
from devices.vhostfront import PROTOCOL as USUAL
from devices.vhostwire import (
    HEADER,
    P_INBAND_NOTIFICATIONS,
    VRING_ADDR,
    VRING_STATE,
    Back,
    Front,
    Message,
    PeerError,
)
from tests.vhostlab import DEADLINE, FIRST_BASE, Program, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUTS = [F_INDIRECT_DESC, F_EVENT_IDX, F_RING_PACKED, F_RING_PACKED | F_EVENT_IDX]


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with Program("viornd") as made:
        yield made


@pytest.fixture
def session(program: Program) -> Iterator[Session]:
    with Session(program.connect()) as made:
        yield made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_goes_on_where_it_was_stopped(session: Session, layout: int) -> None:
    """GET_VRING_BASE is where SET_VRING_BASE begins, over the end of the ring and of the index."""
    session.begin(layout, size=8)
    base = FIRST_BASE[layout & F_RING_PACKED]
    for turn in range(40):
        for _ in range(turn % 5):
            assert session.ask(0, room=(16,))[0] == 16
        base = session.front.stop_queue(0)
        # What is offered while it is stopped waits, and needs no further kick.
        token = session.queues[0].add([], [16])
        session.queues[0].enable_calls()
        session.kick(0)
        session.start(0, base)
        assert [used.token for used in session.wait_used(0)] == [token]
    if not layout & F_RING_PACKED:
        assert base == sum(turn % 5 for turn in range(40)) + 39


def test_a_split_base_wraps_around(session: Session) -> None:
    """An index has 16 bits."""
    session.begin()
    session.front.stop_queue(0)
    queue = session.queues[0]
    for gpa in (queue.avail_gpa + 2, queue.used_gpa + 2):
        session.memory.write(gpa, b"\xff\xff")
    queue._next_avail = queue._next_used = queue._asked_at = 0xFFFF  # type: ignore[union-attr]
    session.start(0, 0xFFFF)
    for _ in range(3):
        assert session.ask(0, room=(16,))[0] == 16
    assert session.front.stop_queue(0) == 2


@pytest.mark.parametrize("reset", ["status", "device"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reset_leaves_the_position(session: Session, layout: int, reset: str) -> None:
    """QEMU 7.2 writes status 0 before it asks for bases, when it stops or migrates a guest."""
    session.begin(layout, size=8)
    for _ in range(13):
        assert session.ask(0, room=(16,))[0] == 16
    session.front.set_status(7)
    if reset == "status":
        session.front.set_status(0)
    else:
        session.front.reset_device()
    base = session.front.stop_queue(0)
    session.resume([base])
    for _ in range(13):
        assert session.ask(0, room=(16,))[0] == 16


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_a_ring_starts_when_all_is_there(session: Session, order: tuple[int, ...]) -> None:
    """Whatever comes last: its size, the kick's descriptor, being enabled, or the features."""
    front = session.front
    front.negotiate()
    session.make_queues(F_VERSION_1, 1, 128)
    session.queues[0].add([], [16])
    session.queues[0].enable_calls()
    front.share([session.region])
    ring, number = session.ring(0, 0), Front.SET_VRING_NUM
    address = (0, 0, ring.desc, ring.used, ring.avail, 0)
    front.tell(Front.SET_VRING_ADDR, VRING_ADDR.pack(*address))
    front.set_fd(Front.SET_VRING_CALL, 0, session.calls[0])
    steps = [
        lambda: front.tell(number, VRING_STATE.pack(0, ring.size)),
        lambda: front.set_fd(Front.SET_VRING_KICK, 0, session.kicks[0]),
        lambda: front.enable_queue(0),
        lambda: front.accept(F_VERSION_1),
    ]
    for step in order:
        assert not session.queues[0].collect()
        steps[step]()
    assert len(session.wait_used(0)) == 1


def test_a_disabled_ring_is_left_alone(session: Session) -> None:
    """Until it is enabled; then what has waited is done without a kick."""
    session.begin()
    session.front.enable_queue(0, on=False)
    session.queues[0].add([], [16])
    session.kick(0)
    session.front.status()
    assert not session.queues[0].collect()
    session.front.enable_queue(0)
    assert len(session.wait_used(0)) == 1


def test_without_protocol_features_a_ring_is_enabled_from_the_start(session: Session) -> None:
    """An old front end knows no SET_VRING_ENABLE."""
    session.front.negotiate()
    session.make_queues(F_VERSION_1, 1, 128)
    session.front._has_protocol = False
    session.resume()
    assert session.ask(0, room=(16,))[0] == 16


def test_what_is_running_cannot_be_changed(session: Session) -> None:
    """Size, base, place, features, in-flight area: refused while the ring is started."""
    session.begin()
    front, ring = session.front, session.ring(0, 0)
    moved = VRING_ADDR.pack(0, 0, ring.desc + 4096, ring.used, ring.avail, 0)
    for request, payload in (
        (Front.SET_VRING_NUM, VRING_STATE.pack(0, 64)),
        (Front.SET_VRING_BASE, VRING_STATE.pack(0, 1)),
        (Front.SET_VRING_ADDR, moved),
    ):
        with pytest.raises(RefusedError):
            front.tell(request, payload)
    with pytest.raises(RefusedError):
        front.accept(F_VERSION_1 | F_EVENT_IDX)
    with pytest.raises(PyvmError):
        front.get_inflight(1, 128)
    assert session.front is not None


def test_the_same_again_is_no_change(session: Session) -> None:
    """Monitors repeat features for every pair of queues, and swap eventfds as they like."""
    session.begin()
    for _ in range(5):
        session.front.accept(session.features)
        session.front.set_fd(Front.SET_VRING_CALL, 0, session.calls[0])
        session.front.set_fd(Front.SET_VRING_KICK, 0, session.kicks[0])
        assert session.ask(0, room=(16,))[0] == 16


def test_a_call_that_nobody_could_be_told_of(session: Session) -> None:
    """It is made up for when there is somebody."""
    session.begin()
    session.front.set_fd(Front.SET_VRING_CALL, 0, -1)
    session.queues[0].add([], [16])
    session.queues[0].enable_calls()
    session.kick(0)
    while not session.queues[0].collect():
        session.front.status()
    session.front.set_fd(Front.SET_VRING_CALL, 0, session.calls[0])
    assert session.wait_call(0, DEADLINE)


def test_a_call_that_went_to_a_descriptor_before(session: Session) -> None:
    """It is made again: QEMU sets the one at which it looks after it has started the ring."""
    session.begin()
    with open(os.eventfd(0, os.EFD_CLOEXEC), "wb") as other:
        session.front.set_fd(Front.SET_VRING_CALL, 0, other.fileno())
        session.front.status()  # it has been taken
    session.wait_call(0, 0)  # of the start
    session.queues[0].add([], [16])
    session.queues[0].enable_calls()
    session.kick(0)
    while not session.queues[0].collect():
        session.front.status()
    assert not session.wait_call(0, 0)
    session.front.set_fd(Front.SET_VRING_CALL, 0, session.calls[0])
    assert session.wait_call(0, DEADLINE)


def test_polling(session: Session) -> None:
    """Without a descriptor for kicks nobody kicks."""
    session.begin()
    session.front.stop_queue(0)
    session.front.start_queue(0, session.ring(0, 0), kick=-1, call=session.calls[0])
    session.queues[0].enable_calls()
    session.queues[0].add([], [16])
    assert len(session.wait_used(0)) == 1


def test_in_band_notifications(session: Session) -> None:
    """Kicks and calls are messages, and eventfds are preferred where there are any."""
    front = session.front
    front.negotiate(USUAL | P_INBAND_NOTIFICATIONS)
    back = front.open_back_channel()
    session.make_queues(F_VERSION_1, 1, 128)
    front.accept(session.features)
    front.share([session.region])
    ring = session.ring(0, 0)
    front.tell(Front.SET_VRING_NUM, VRING_STATE.pack(0, ring.size))
    front.tell(Front.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, ring.desc, ring.used, ring.avail, 0))
    front.enable_queue(0)
    heard: list[Message] = []
    front.on_request = heard.append
    session.queues[0].add([], [16])
    session.queues[0].enable_calls()
    front.kick(0)
    while not heard:
        if (message := back.receive()) is not None:
            heard.append(message)
    assert heard[0].request == Back.VRING_CALL
    assert VRING_STATE.unpack(heard[0].payload) == (0, 0)
    assert len(session.queues[0].collect()) == 1


@pytest.mark.parametrize("layout", [0, F_RING_PACKED])
def test_a_driver_that_breaks_a_rule(session: Session, layout: int) -> None:
    """The ring's error eventfd and the status tell; nothing is served until a reset."""
    session.begin(layout)
    queue = session.queues[0]
    queue.add([b"readable"], [16])  # entropy needs no question
    session.kick(0)
    assert session.wait(session.errs[0], DEADLINE)
    assert session.front.status() & 0x40
    queue.add([], [16])
    session.kick(0)
    session.front.status()
    assert not queue.collect()
    # Stopping every ring is a reset, too: a monitor that knows no RESET_DEVICE has no other.
    session.front.stop_queue(0)
    assert not session.front.status() & 0x40


def test_eventfds_that_are_none(session: Session) -> None:
    """What is written to a pipe that nobody reads, or to a closed one, hurts nobody."""
    session.begin()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    session.front.set_fd(Front.SET_VRING_CALL, 0, write_end)
    for _ in range(200):
        session.queues[0].add([], [16])
        session.queues[0].enable_calls()
        session.kick(0)
        while not session.queues[0].collect():
            session.front.status()
    os.close(read_end)
    session.queues[0].add([], [16])
    session.kick(0)
    while not session.queues[0].collect():
        session.front.status()
    os.close(write_end)


def test_kicks_by_pipe(session: Session) -> None:
    """What QEMU does where there are no eventfds."""
    session.begin()
    read_end, write_end = os.pipe()
    session.front.set_fd(Front.SET_VRING_KICK, 0, read_end)
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        for _ in range(20_000):
            os.write(write_end, b"8 bytes.")
    session.front.status()
    for _ in range(20):
        session.queues[0].enable_calls()
        session.queues[0].add([], [16])
        os.write(write_end, b"8 bytes.")
        assert len(session.wait_used(0)) == 1
    os.close(read_end)
    os.close(write_end)
    assert session.front.status() == 0


def test_a_peer_that_does_not_read(program: Program) -> None:
    """Answers that nobody takes end the connection, and the next one is served."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.connect(program.path)
    message = HEADER.pack(Front.GET_FEATURES, 1, 0)
    with suppress(ConnectionError):
        while True:
            ours.sendall(message * 1000)
    ours.close()
    with Session(program.connect()) as session:
        session.begin()
        assert session.ask(0, room=(16,))[0] == 16


def test_a_call_that_would_block_for_ever(program: Program) -> None:
    """A full eventfd that waits: the process hangs, and goes with its front end."""
    with Session(program.connect()) as session:
        session.begin()
        full = os.eventfd(0xFFFF_FFFF, 0)
        os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE - 0xFFFF_FFFF)
        session.front.deadline = 1.0
        with pytest.raises(PeerError, match="does not answer"):
            session.front.set_fd(Front.SET_VRING_CALL, 0, full)
    program.wait_said("did not end with its connection")
    with Session(program.connect()) as session:
        session.begin()
        assert session.ask(0, room=(16,))[0] == 16
    os.close(full)
