"""The front end of vhost-user: what it asks, in which order, and what it makes of the answers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack

import pytest

from devices import vhostwire
from devices.vhostask import RefusedError, connect
from devices.vhostfront import PROTOCOL, FrontEnd, InflightArea, MemoryRegion, Ring
from devices.vhostwire import (
    F_PROTOCOL_FEATURES,
    NEED_REPLY,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INBAND_NOTIFICATIONS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    P_STATUS,
    REPLY,
    U64,
    Back,
    Front,
    Message,
    PeerError,
    Wire,
)
from tests.descriptors import count_before
from tests.vhostpeer import VhostPeer


@pytest.fixture
def peer() -> Iterator[VhostPeer]:
    """Return a back end."""
    peer = VhostPeer()
    yield peer
    peer.close()


@pytest.fixture
def front(peer: VhostPeer) -> Iterator[FrontEnd]:
    """Return a front end that is connected to it, and has said nothing."""
    ours, theirs = socket.socketpair()
    peer.serve(theirs)
    front = FrontEnd(Wire(ours, "peer"), 30.0)
    yield front
    front.close()


@pytest.fixture
def memory() -> Iterator[int]:
    """Return a file of memory."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def nr_open() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))


def settle(front: FrontEnd) -> None:
    """Have everything that was sent taken, acknowledged or not."""
    front.ask_u64(Front.GET_FEATURES)


def test_negotiation(front: FrontEnd, peer: VhostPeer) -> None:
    """Features, protocol features, owner; what either side does not know is not agreed on."""
    peer.protocol = P_MQ | P_REPLY_ACK | 1 << 40
    front.negotiate()
    assert front.features == 1 << 32
    assert front.protocol == P_MQ | P_REPLY_ACK
    front.accept(1 << 32)
    assert peer.requests() == [
        Front.GET_FEATURES,
        Front.GET_PROTOCOL_FEATURES,
        Front.SET_PROTOCOL_FEATURES,
        Front.SET_OWNER,
        Front.SET_FEATURES,
    ]
    assert peer.agreed == P_MQ | P_REPLY_ACK
    assert peer.payload(Front.SET_FEATURES) == U64.pack(1 << 32 | F_PROTOCOL_FEATURES)
    assert front.queue_count() == 2


def test_old_back_end(front: FrontEnd, peer: VhostPeer) -> None:
    """Without protocol features none is spoken of, and queues need not be enabled."""
    peer.features = 1 << 32
    front.negotiate()
    front.accept(1 << 32)
    front.enable_queue(0)
    settle(front)
    assert Front.GET_PROTOCOL_FEATURES not in peer.requests()
    assert Front.SET_VRING_ENABLE not in peer.requests()
    assert peer.payload(Front.SET_FEATURES) == U64.pack(1 << 32)
    with pytest.raises(PeerError, match="cannot send GET_QUEUE_NUM"):
        front.queue_count()


@pytest.mark.parametrize("acknowledges", [True, False])
def test_acknowledged_wherever_possible(
    front: FrontEnd, peer: VhostPeer, memory: int, acknowledges: bool
) -> None:
    """Each request without an answer of its own wants one if that is agreed on, and only then."""
    peer.protocol = P_REPLY_ACK if acknowledges else P_MQ
    flags: list[int] = []

    def note(message: Message) -> Message | None:
        flags.append(message.flags & NEED_REPLY)
        return peer._answer(message)

    told = (Front.SET_FEATURES, Front.SET_MEM_TABLE, Front.SET_VRING_NUM, Front.SET_VRING_KICK)
    peer.answers.update(dict.fromkeys(told, note))
    front.negotiate()
    front.accept(0)
    front.share([MemoryRegion(0, 1 << 20, 0, 0, memory)])
    front.start_queue(0, Ring(4, 0, 0, 0x1000, 0x2000))
    settle(front)
    assert flags == [NEED_REPLY * acknowledges] * 4


def test_refusal(front: FrontEnd, peer: VhostPeer) -> None:
    """A back end that says no has said so to the request it is about, and goes on."""
    front.negotiate()
    peer.answers[Front.SET_FEATURES] = lambda m: Message(m.request, REPLY, U64.pack(1))
    with pytest.raises(RefusedError, match="refuses SET_FEATURES"):
        front.accept(1)
    assert front.queue_count() == 2


def test_memory_table(front: FrontEnd, peer: VhostPeer, memory: int) -> None:
    """Regions go in one table, each with its file."""
    front.negotiate()
    front.share(
        [
            MemoryRegion(0, 0x8000, 0x10000000, 0, memory),
            MemoryRegion(1 << 32, 0x8000, 0x20000000, 0x8000, memory),
        ]
    )
    assert peer.payload(Front.SET_MEM_TABLE) == pack(
        "<II4Q4Q", 2, 0, 0, 0x8000, 0x10000000, 0, 1 << 32, 0x8000, 0x20000000, 0x8000
    )
    assert peer.heard[-1][2] == 2
    assert os.path.sameopenfile(peer.fds[Front.SET_MEM_TABLE, 1], memory)


def test_more_regions_than_a_table_has(front: FrontEnd, peer: VhostPeer, memory: int) -> None:
    """More than eight are added one by one, if the back end can."""
    regions = [MemoryRegion(n << 12, 1 << 12, n << 12, n << 12, memory) for n in range(9)]
    peer.protocol = P_REPLY_ACK
    front.negotiate()
    with pytest.raises(PeerError, match="cannot send GET_MAX_MEM_SLOTS"):
        front.share(regions)
    peer.protocol |= P_CONFIGURE_MEM_SLOTS
    front.negotiate()
    front.share(regions)
    assert peer.requests().count(Front.ADD_MEM_REG) == 9
    assert peer.payload(Front.ADD_MEM_REG) == pack("<Q4Q", 0, 8 << 12, 1 << 12, 8 << 12, 8 << 12)
    front.remove_region(regions[8])
    assert peer.payload(Front.REM_MEM_REG) == peer.payload(Front.ADD_MEM_REG)
    peer.answers[Front.GET_MAX_MEM_SLOTS] = lambda m: Message(m.request, REPLY, U64.pack(8))
    with pytest.raises(RefusedError, match="takes 8 memory regions, not 9"):
        front.share(regions)


def test_queue(front: FrontEnd, peer: VhostPeer) -> None:
    """A queue starts with its kick, which comes last; stopping tells where it stands."""
    front.negotiate()
    kick, call, err = (os.eventfd(0) for _ in range(3))
    ring = Ring(256, 7, 0x1000, 0x2000, 0x3000, log=0x4000)
    front.start_queue(1, ring, kick=kick, call=call, err=err)
    front.enable_queue(1)
    assert peer.requests()[-7:] == [
        Front.SET_VRING_NUM,
        Front.SET_VRING_BASE,
        Front.SET_VRING_ADDR,
        Front.SET_VRING_ERR,
        Front.SET_VRING_CALL,
        Front.SET_VRING_KICK,
        Front.SET_VRING_ENABLE,
    ]
    assert peer.payload(Front.SET_VRING_NUM) == pack("<II", 1, 256)
    assert peer.payload(Front.SET_VRING_BASE) == pack("<II", 1, 7)
    address = pack("<IIQQQQ", 1, 1, 0x1000, 0x3000, 0x2000, 0x4000)
    assert peer.payload(Front.SET_VRING_ADDR) == address
    assert peer.payload(Front.SET_VRING_ENABLE) == pack("<II", 1, 1)
    for request, fd in (("KICK", kick), ("CALL", call), ("ERR", err)):
        os.eventfd_write(peer.fds[Front[f"SET_VRING_{request}"], 1], 3)
        assert os.eventfd_read(fd) == 3
        os.close(fd)
    peer.bases[1] = 4711
    assert front.stop_queue(1) == 4711


def test_queue_without_eventfds(front: FrontEnd, peer: VhostPeer) -> None:
    """That there is no eventfd is said, and none goes along."""
    front.negotiate()
    front.start_queue(2, Ring(4, 0, 0x1000, 0x2000, 0x3000))
    assert peer.heard[-1] == (Front.SET_VRING_KICK, U64.pack(2 | 1 << 8), 0)
    with pytest.raises(ValueError, match="queue 256"):
        front.set_fd(Front.SET_VRING_KICK, 256, -1)


def test_configuration(front: FrontEnd, peer: VhostPeer) -> None:
    """Configuration space is read and written; what is not there is refused."""
    peer.protocol |= P_CONFIG
    front.negotiate()
    assert front.get_config(8) == bytes(range(8))
    assert front.get_config(4, 60) == bytes(range(60, 64))
    front.set_config(2, b"\xaa\xbb")
    assert front.get_config(4) == b"\x00\x01\xaa\xbb"
    with pytest.raises(RefusedError, match="no 65 bytes"):
        front.get_config(65)
    for size in (0, 257):
        with pytest.raises(ValueError, match="configuration of"):
            front.get_config(size)


def test_status_and_reset(front: FrontEnd, peer: VhostPeer) -> None:
    """Status is told and asked; a reset, and giving up, are requests of their own."""
    peer.protocol |= P_STATUS | P_RESET_DEVICE
    front.negotiate()
    front.set_status(3)
    assert peer.payload(Front.SET_STATUS) == U64.pack(3)
    peer.answers[Front.GET_STATUS] = lambda m: Message(m.request, REPLY, U64.pack(3))
    assert front.status() == 3
    front.reset_device()
    front.disown()
    assert peer.requests()[-2:] == [Front.RESET_DEVICE, Front.RESET_OWNER]


def test_log(front: FrontEnd, peer: VhostPeer, memory: int) -> None:
    """The dirty log is a file, a size and an offset; it may have an eventfd."""
    peer.protocol |= P_LOG_SHMFD
    front.negotiate()
    front.set_log(memory, 0x1000, 0x2000)
    assert peer.payload(Front.SET_LOG_BASE) == pack("<QQ", 0x1000, 0x2000)
    front.set_log_fd(memory)
    assert peer.heard[-1] == (Front.SET_LOG_FD, b"", 1)


def test_inflight_area(front: FrontEnd, peer: VhostPeer, memory: int) -> None:
    """The area that one back end made is given back as it came."""
    peer.protocol |= P_INFLIGHT_SHMFD
    made = pack("<QQHH4x", 0x1000, 0x3000, 2, 128)
    peer.answers[Front.GET_INFLIGHT_FD] = lambda m: Message(m.request, REPLY, made, (memory,))
    front.negotiate()
    area = front.get_inflight(2, 128)
    assert peer.payload(Front.GET_INFLIGHT_FD) == pack("<QQHH4x", 0, 0, 2, 128)
    assert area[1:] == (0x1000, 0x3000, 2, 128)
    assert os.path.sameopenfile(area.fd, memory)
    front.set_inflight(area)
    assert peer.heard[-1] == (Front.SET_INFLIGHT_FD, made, 1)
    os.close(area.fd)


def test_inflight_area_without_padding(front: FrontEnd, peer: VhostPeer, memory: int) -> None:
    """Some back ends leave out the four bytes at the end of its description."""
    peer.protocol |= P_INFLIGHT_SHMFD
    made = pack("<QQHH", 0x1000, 0, 1, 64)
    peer.answers[Front.GET_INFLIGHT_FD] = lambda m: Message(m.request, REPLY, made, (memory,))
    front.negotiate()
    area = front.get_inflight(1, 64)
    assert area[1:] == (0x1000, 0, 1, 64)
    os.close(area.fd)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (1 << 40, 0), (0x1000, 1 << 63)])
def test_inflight_area_that_cannot_be(
    front: FrontEnd, peer: VhostPeer, memory: int, size: int, offset: int
) -> None:
    """An area of nothing, or of everything, is refused and its descriptor closed."""
    peer.protocol |= P_INFLIGHT_SHMFD
    made = pack("<QQHH4x", size, offset, 1, 128)
    peer.answers[Front.GET_INFLIGHT_FD] = lambda m: Message(m.request, REPLY, made, (memory,))
    front.negotiate()
    before = count_before()
    with pytest.raises(PeerError, match="in-flight area"):
        front.get_inflight(1, 128)
    assert nr_open() == before


def test_in_band_kick(front: FrontEnd, peer: VhostPeer) -> None:
    """Kicks by message need three features, and are not agreed on unasked."""
    peer.protocol |= P_INBAND_NOTIFICATIONS | P_BACKEND_REQ
    front.negotiate()
    with pytest.raises(PeerError, match="cannot send VRING_KICK"):
        front.kick(0)
    front.negotiate(PROTOCOL | P_INBAND_NOTIFICATIONS)
    front.kick(1)
    assert peer.payload(Front.VRING_KICK) == pack("<II", 1, 0)
    peer.protocol &= ~P_BACKEND_REQ
    front.negotiate(PROTOCOL | P_INBAND_NOTIFICATIONS)
    assert not front.protocol & P_INBAND_NOTIFICATIONS


def test_back_channel(front: FrontEnd, peer: VhostPeer) -> None:
    """What the back end asks arrives, and is answered if it wants that."""
    peer.protocol |= P_BACKEND_REQ | P_CONFIG
    front.negotiate()
    back = front.open_back_channel()
    theirs = peer.back
    assert theirs is not None
    assert back.receive() is None
    theirs.send(Message(Back.CONFIG_CHANGE, 0))
    message = back.receive()
    assert message is not None
    assert message.request == Back.CONFIG_CHANGE
    assert theirs.receive() is None
    theirs.send(Message(Back.CONFIG_CHANGE, NEED_REPLY))
    assert back.receive() is not None
    assert theirs.wait(30) == Message(Back.CONFIG_CHANGE, REPLY | 1, U64.pack(0))


def test_back_channel_while_an_answer_is_waited_for(front: FrontEnd, peer: VhostPeer) -> None:
    """A back end that needs our answer before it gives its own gets it."""
    peer.protocol |= P_BACKEND_REQ | P_CONFIG
    front.negotiate()
    front.open_back_channel()
    heard: list[int] = []
    front.on_request = lambda message: heard.append(message.request)

    def asks_first(message: Message) -> Message | None:
        assert peer.back is not None
        peer.back.send(Message(Back.CONFIG_CHANGE, NEED_REPLY))
        assert peer.back.wait(30).payload == U64.pack(0)
        return peer._answer(message)

    peer.answers[Front.SET_FEATURES] = asks_first
    front.accept(1)
    assert heard == [Back.CONFIG_CHANGE]


@pytest.mark.parametrize(
    "message",
    [
        Message(Back.CONFIG_CHANGE, 0, b"x"),
        Message(Back.CONFIG_CHANGE, REPLY),
        Message(Back.VRING_CALL, 0, bytes(8)),  # not agreed on
        Message(1, 0, bytes(32)),  # an IOTLB miss
        Message(3, 0, bytes(24)),
        Message(99, 0),
    ],
)
def test_nonsense_on_the_back_channel(
    front: FrontEnd, peer: VhostPeer, memory: int, message: Message
) -> None:
    """What may not come there is an error, with the descriptors closed that came along."""
    peer.protocol |= P_BACKEND_REQ | P_CONFIG
    front.negotiate()
    back = front.open_back_channel()
    assert peer.back is not None
    for fds in ((), (memory,)):
        before = count_before()
        peer.back.send(message._replace(fds=fds))
        with pytest.raises(PeerError, match=r"request \d+"):
            back.receive()
        assert nr_open() == before


Liar = Callable[[Message], Message | None]
_FD = 1  # any that is open


@pytest.mark.parametrize(
    ("request_", "lie"),
    [
        (Front.GET_FEATURES, lambda m: Message(Front.GET_QUEUE_NUM, REPLY, bytes(8))),
        (Front.GET_FEATURES, lambda m: Message(m.request, 0, bytes(8))),
        (Front.GET_FEATURES, lambda m: Message(m.request, REPLY, bytes(7))),
        (Front.GET_FEATURES, lambda m: Message(m.request, REPLY, bytes(8), (_FD,))),
        (Front.GET_FEATURES, lambda m: Message(m.request, REPLY, bytes(8), (_FD,) * 9)),
        (Front.GET_FEATURES, lambda m: Message(m.request, REPLY | 2, bytes(8))),
        (Front.SET_FEATURES, lambda m: Message(m.request, REPLY, bytes(4))),
        (Front.SET_FEATURES, lambda m: Message(Front.SET_OWNER, REPLY, bytes(8))),
        (Front.GET_VRING_BASE, lambda m: Message(m.request, REPLY, pack("<II", 1, 0))),
        (Front.GET_VRING_BASE, lambda m: Message(m.request, REPLY, bytes(12))),
        (Front.GET_CONFIG, lambda m: Message(m.request, REPLY, pack("<III", 0, 4, 0) + bytes(5))),
        (Front.GET_CONFIG, lambda m: Message(m.request, REPLY, pack("<III", 1, 8, 0) + bytes(8))),
        (Front.GET_CONFIG, lambda m: Message(m.request, REPLY, bytes(4096))),
        (Front.GET_INFLIGHT_FD, lambda m: Message(m.request, REPLY, pack("<QQHH4x", 1, 0, 1, 1))),
        (
            Front.GET_INFLIGHT_FD,
            lambda m: Message(m.request, REPLY, pack("<QQHH4x", 1, 0, 1, 1), (_FD, _FD)),
        ),
        (Front.GET_INFLIGHT_FD, lambda m: Message(m.request, REPLY, b"", (_FD,))),
        (
            Front.GET_INFLIGHT_FD,
            lambda m: Message(m.request, REPLY, pack("<QQHH5x", 1, 0, 1, 1), (_FD,)),
        ),
    ],
)
def test_lies(front: FrontEnd, peer: VhostPeer, request_: Front, lie: Liar) -> None:
    """An answer to another question, too short, too long, or with descriptors is an error."""
    peer.protocol |= P_CONFIG | P_INFLIGHT_SHMFD
    front.negotiate()
    before = count_before()
    peer.answers[request_] = lie
    ask: dict[Front, Callable[[], object]] = {
        Front.GET_FEATURES: front.negotiate,
        Front.SET_FEATURES: lambda: front.accept(0),
        Front.GET_VRING_BASE: lambda: front.stop_queue(0),
        Front.GET_CONFIG: lambda: front.get_config(8),
        Front.GET_INFLIGHT_FD: lambda: front.get_inflight(1, 128),
    }
    with pytest.raises(PeerError, match="peer: ") as error:
        ask[request_]()
    assert not isinstance(error.value, RefusedError)
    assert nr_open() == before


def test_silence(front: FrontEnd, peer: VhostPeer) -> None:
    """A back end that does not answer is an error, in time."""
    peer.answers[Front.GET_FEATURES] = lambda m: None
    front.deadline = 0.05
    with pytest.raises(PeerError, match="does not answer"):
        front.negotiate()


def test_questions_without_end(front: FrontEnd, peer: VhostPeer) -> None:
    """A back end that asks and asks, instead of answering, does not hold anybody for ever."""
    peer.protocol |= P_BACKEND_REQ | P_CONFIG
    front.negotiate()
    front.open_back_channel()
    stop = threading.Event()

    def ask_on(_: Message) -> None:
        assert peer.back is not None
        try:
            while not stop.is_set():
                peer.back.send(Message(Back.CONFIG_CHANGE, 0))
        except PeerError:  # they are not read as fast as that
            pass

    peer.answers[Front.SET_FEATURES] = ask_on
    front.deadline = 0.2
    with pytest.raises(PeerError, match="does not answer"):
        front.accept(0)
    stop.set()


def test_death(front: FrontEnd, peer: VhostPeer) -> None:
    """A back end that dies instead of answering is an error at once."""
    front.negotiate()
    peer.answers[Front.GET_QUEUE_NUM] = lambda m: (_ for _ in ()).throw(PeerError("dies"))
    with pytest.raises(PeerError, match=r"hung up|reset"):
        front.queue_count()


def test_connect(tmp_path: Path) -> None:
    """A path leads to its listener; if there is none, the error says so and where."""
    path = str(tmp_path / "sock")
    with pytest.raises(PeerError, match=r"sock: cannot connect: No such file"):
        connect(path)
    with pytest.raises(PeerError, match="path too long"):
        connect("/" + "x" * 200)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        with pytest.raises(PeerError, match="refused"):
            connect(path)
        listener.listen(0)
        wires = [connect(path)]
        with pytest.raises(PeerError, match="unavailable"):  # full; it would have to wait
            wires += [connect(path) for _ in range(20)]
        for wire in wires:
            wire.close()


def test_shapes_hold_for_what_is_sent(front: FrontEnd) -> None:
    """No request leaves that its row does not allow."""
    front.negotiate()
    with pytest.raises(PeerError, match=r"cannot send SET_VRING_NUM: .* 3 bytes"):
        front.tell(Front.SET_VRING_NUM, b"abc")
    with pytest.raises(PeerError, match="cannot send SET_INFLIGHT_FD"):
        front.set_inflight(InflightArea(vhostwire.VERSION, 1, 0, 1, 1))
