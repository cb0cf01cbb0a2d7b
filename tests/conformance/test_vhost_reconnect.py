"""Back ends that go, come back, lie and dawdle; the driver of their device only waits."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from struct import pack, pack_into

import pytest

from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.spec import Block
from devices.vhostshadow import USED_AT, Shadow
from devices.vhostwire import (
    INFLIGHT,
    NEED_REPLY,
    P_INFLIGHT_SHMFD,
    REPLY,
    U64,
    Back,
    Front,
    Message,
    PeerError,
)
from devices.viodev import ImsgType
from tests.peerlab import PeerLab
from tests.rng import seeded
from tests.vhostpeer import VhostPeer
from tools.viodriver import SplitDriver
from tools.viodriver.private import DEADLINE, facts
from tools.viodriver.registers import READY

RING = F_INDIRECT_DESC | F_EVENT_IDX


@pytest.fixture(params=["relayed", "direct"])
def lab(request: pytest.FixtureRequest) -> Iterator[PeerLab]:
    """Return a device with a queue, with and without an in-flight area."""
    peer = VhostPeer()
    peer.features |= RING
    with PeerLab(peer, books=request.param == "direct") as lab:
        yield lab


def collect(lab: PeerLab, queue: SplitDriver, count: int) -> list[bytes]:
    """Wait for `count` requests to come back; return what was written into each."""
    found: list[bytes] = []
    while len(found) < count:
        assert lab.host.wait_call(0, DEADLINE), (found, lab.host.said)
        found += [queue.data(used.request) for used in queue.collect()]
    assert len(found) == count
    return found


def start(lab: PeerLab, features: int = 0) -> SplitDriver:
    """Return the driver's side of the queue, which the back end serves."""
    [queue] = lab.host.start(features)
    assert isinstance(queue, SplitDriver)
    lab.open(features)
    return queue


def test_what_was_in_flight_is_served_by_the_next(lab: PeerLab) -> None:
    """Out of order: the second of three is done when the back end goes; the others come again."""
    queue = start(lab)
    for byte in b"abc":
        queue.add([bytes([byte])], [1])
    lab.host.kick(0)
    chains = [lab.pop(0) for _ in range(3)]
    if lab.peer.agreed & P_INFLIGHT_SHMFD:
        # Such a one keeps its own books: the area, which is the same for its successor.
        area = lab.peer.payload(Front.SET_INFLIGHT_FD)
        chains[1].writable[0][:] = b"B"
        lab.back[0].push(chains[1].head, 1)
        lab.peer.hang_up()
        lab.wait_told("peer-lost")
        lab.back[0].push(chains[2].head, 1)  # one that is just ending may still finish something
        lab.connect()
        assert lab.peer.payload(Front.SET_INFLIGHT_FD) == area == INFLIGHT.pack(0x1000, 0, 1, 16)
        assert lab.peer.requests().count(Front.GET_INFLIGHT_FD) == 1
        assert os.path.sameopenfile(lab.peer.fds[Front.SET_INFLIGHT_FD, 0], lab.kept["area"])
        assert lab.told(Front.SET_VRING_BASE, 0) == pack("<II", 0, 2)  # the used index
        return
    chains[1].writable[0][:] = b"B"
    lab.back[0].push(chains[1].head, 1)  # and no call any more
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    assert collect(lab, queue, 1) == [b"B"]
    lab.connect()
    assert lab.told(Front.SET_VRING_BASE, 0) == pack("<II", 0, 0)
    lab.open()
    again = [lab.pop(0) for _ in range(2)]
    assert [bytes(chain.readable[0]) for chain in again] == [b"a", b"c"]
    assert lab.back[0].pop() is None
    for chain in again:
        lab.back[0].push(chain.head, 0)
    lab.call(0)
    assert len(collect(lab, queue, 2)) == 2


def test_kicks_while_nobody_is_there(lab: PeerLab) -> None:
    """What the driver offers meanwhile waits in its ring, and its registers answer."""
    queue = start(lab)
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    queue.add([b"x"], [1])
    lab.host.kick(0)
    assert lab.host.status == READY
    assert lab.host.read_config(0, 1) == 0
    lab.connect()
    lab.open()
    chain = lab.pop(0)
    chain.writable[0][:] = b"y"
    lab.back[0].push(chain.head, 1)
    lab.call(0)
    assert collect(lab, queue, 1) == [b"y"]


def test_a_driver_that_starts_while_nobody_is_there(lab: PeerLab) -> None:
    """DRIVER_OK, a reset, DRIVER_OK again: the next back end finds the driver that there is."""
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    lab.host.start()
    lab.host.status = 0
    queue = lab.host.start(F_EVENT_IDX)[0]
    queue.add([b"x"], [1])
    lab.host.kick(0)
    lab.connect()
    lab.open(F_EVENT_IDX)
    assert bytes(lab.pop(0).readable[0]) == b"x"


def test_configuration_as_written(lab: PeerLab) -> None:
    """What the driver has written is written again; what is new is told to the driver."""
    lab.host.start()
    lab.host.write_config(4, 1, 0xAA)
    assert lab.host.read_config(4, 1) == 0xAA
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    lab.host.write_config(5, 1, 0xBB)
    lab.peer.config = bytes(range(64))
    lab.connect()
    assert lab.peer.config[4:6] == b"\xaa\xbb"
    assert lab.host.read_config(4, 2) == 0xBBAA


def test_ended_while_paused(lab: PeerLab) -> None:
    """That is noticed when the VM goes on; what was in flight is in flight."""
    queue = start(lab)
    queue.add([b"x"], [1])
    lab.host.kick(0)
    lab.pop(0)
    lab.host.ask(ImsgType.PAUSE)
    lab.peer.hang_up()
    lab.host.ask(ImsgType.UNPAUSE)
    lab.wait_told("peer-lost")
    lab.connect()
    lab.open()
    if not lab.peer.agreed & P_INFLIGHT_SHMFD:
        assert bytes(lab.pop(0).readable[0]) == b"x"


def lose_features(peer: VhostPeer) -> None:
    peer.features &= ~F_EVENT_IDX


def lose_queues(peer: VhostPeer) -> None:
    peer.queues = 0


def lose_configuration(peer: VhostPeer) -> None:
    peer.config = b""


def lose_books(peer: VhostPeer) -> None:
    peer.protocol &= ~P_INFLIGHT_SHMFD


@pytest.mark.parametrize("less", [lose_features, lose_queues, lose_configuration, lose_books])
def test_one_that_has_less_is_sent_away(lab: PeerLab, less: Callable[[VhostPeer], None]) -> None:
    """Who cannot take its predecessor's place is told apart from who is gone."""
    if less is lose_books and not lab.peer.agreed & P_INFLIGHT_SHMFD:
        pytest.skip("it had none")
    start(lab)
    kept = lab.peer.features, lab.peer.queues, lab.peer.config, lab.peer.protocol
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    less(lab.peer)
    lab.connect("peer-bad")
    assert lab.host.status == READY
    lab.peer.features, lab.peer.queues, lab.peer.config, lab.peer.protocol = kept
    lab.connect()


Lie = Callable[[PeerLab], None]


def answer_unasked(lab: PeerLab) -> None:
    assert lab.peer.wire is not None
    lab.peer.wire.send(Message(Front.GET_FEATURES, REPLY, bytes(8)))


def send_descriptors(lab: PeerLab) -> None:
    assert lab.peer.wire is not None
    lab.peer.wire.send(Message(Front.GET_FEATURES, REPLY, bytes(8), (1,) * 8))


def ask_nonsense(lab: PeerLab) -> None:
    assert lab.peer.back is not None
    lab.peer.back.send(Message(3, 0, bytes(24), (1,)))


def use_what_it_was_not_given(lab: PeerLab) -> None:
    used = lab.back[0]
    used._used16[1] = 1  # type: ignore[attr-defined]
    lab.call(0)


def use_far_too_much(lab: PeerLab) -> None:
    used = lab.back[0]
    used._used16[1] = 0x8000  # type: ignore[attr-defined]
    lab.call(0)


@pytest.mark.parametrize("lie", [answer_unasked, send_descriptors, ask_nonsense])
def test_nonsense(lab: PeerLab, lie: Lie) -> None:
    """Whatever comes, the device process lives, tells, keeps nothing, and serves with the next."""
    queue = start(lab)
    pid = lab.host.process.pid
    before = nr_open(pid)
    for _ in range(3):
        lie(lab)
        lab.wait_told("peer-bad")
        lab.connect()
        assert nr_open(pid) == before
    lab.open()
    queue.add([b"x"], [1])
    lab.host.kick(0)
    assert bytes(lab.pop(0).readable[0]) == b"x"


def test_eventfds_that_block_and_are_full(lab: PeerLab) -> None:
    """Who shares an eventfd can make it wait for others; nobody here waits."""
    queue = start(lab)
    lab.host.write(Block.MSIX, 1, 1)
    assert lab.host.status == READY
    shared = [fd for (what, _), fd in lab.peer.fds.items() if "VRING" in Front(what).name]
    assert len(shared) == 3
    for fd in shared:
        os.set_blocking(fd, True)
        os.eventfd_write(fd, (1 << 64) - 2 - os.eventfd_read(fd) if readable(fd) else (1 << 64) - 2)
    lab.host.write(Block.MSIX, 1, 0)
    queue.add([b"x"], [1])
    if not lab.peer.agreed & P_INFLIGHT_SHMFD:
        lab.host.kick(0)
    lab.host.wait_said("reports a broken queue")
    lab.host.ask(ImsgType.PAUSE)
    lab.host.ask(ImsgType.UNPAUSE)
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    lab.host.status = 0
    lab.connect()
    assert lab.host.start()
    assert lab.host.status & READY == READY


def readable(fd: int) -> bool:
    """Whether an eventfd is not 0."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


@pytest.mark.parametrize("lie", [use_what_it_was_not_given, use_far_too_much])
def test_nonsense_in_a_relayed_ring(lie: Lie) -> None:
    """Used entries of chains that are not the back end's never reach the driver."""
    with PeerLab() as lab:
        queue = start(lab)
        lie(lab)
        lab.wait_told("peer-bad")
        assert queue.collect() == []
        lab.connect()
        lab.open()
        queue.add([b"x"], [1])
        lab.host.kick(0)
        chain = lab.pop(0)
        lab.back[0].push(chain.head, 0x7FFF_FFFF)  # more than there is room for
        lab.call(0)
        while not (done := queue.collect()):
            assert lab.host.wait_call(0, DEADLINE)
        assert [used.written for used in done] == [1]


STEPS = [
    Front.GET_FEATURES,
    Front.GET_PROTOCOL_FEATURES,
    Front.SET_OWNER,
    Front.GET_QUEUE_NUM,
    Front.GET_CONFIG,
    Front.SET_BACKEND_REQ_FD,
    Front.SET_FEATURES,
    Front.SET_MEM_TABLE,
    Front.SET_VRING_KICK,
    Front.SET_VRING_ENABLE,
]


@pytest.mark.parametrize("how", ["ends", "lies", "refuses"])
def test_trouble_at_every_step(lab: PeerLab, how: str) -> None:
    """A back end may go, lie or refuse at any question of a new connection; the next one serves."""
    queue = start(lab)
    queue.add([b"x"], [1])
    lab.peer.hang_up()
    lab.wait_told("peer-lost")

    def trouble(message: Message) -> Message:
        if how == "ends":
            raise PeerError("dies")
        if how == "lies":
            return Message(Front.GET_STATUS, REPLY, bytes(3))
        return Message(message.request, REPLY, U64.pack(1))

    # Asked for a number, a back end cannot refuse.
    numbers = {Front.GET_FEATURES, Front.GET_PROTOCOL_FEATURES, Front.GET_QUEUE_NUM}
    for step in STEPS:
        if how != "refuses" or step not in numbers:
            lab.peer.answers[step] = trouble
            lab.connect("peer-lost" if how == "ends" else "peer-bad")
            lab.peer.answers.pop(step)
            assert lab.host.status == READY
    lab.connect()
    lab.open()
    lab.host.kick(0)
    assert bytes(lab.pop(0).readable[0]) == b"x"


def test_silence_has_an_end(lab: PeerLab) -> None:
    """One that does not answer is sent away, and before the VM process gives up on the device."""
    start(lab)
    lab.peer.answers[Front.GET_VRING_BASE] = lambda m: None
    lab.host.ask(ImsgType.PAUSE)  # the VM process waits 2 s
    lab.wait_told("peer-bad")
    lab.host.ask(ImsgType.UNPAUSE)
    lab.peer.answers.clear()
    lab.connect()
    # Patience is used up, and comes back slowly.
    lab.peer.answers[Front.SET_CONFIG] = lambda m: None
    for offset in range(8):
        lab.host.write_config(offset, 1, 0xFF)
    assert lab.host.status == READY
    lab.wait_told("peer-bad")


def test_a_second_connection_is_not_wanted(lab: PeerLab) -> None:
    """Who has a back end takes no other, and closes what it does not take."""
    pid = lab.host.process.pid
    lab.host.start()
    before = nr_open(pid)
    with open(os.devnull) as null:
        request, fd = {"name": "peer", "value": None}, null.fileno()
        assert lab.host.ask(ImsgType.SETTING, request, fd=fd) == {"error": "has a back end"}
        lab.peer.hang_up()
        lab.wait_told("peer-lost")
        assert lab.host.ask(ImsgType.SETTING, request, fd=fd) == {"error": "peer: is no socket"}
    lab.connect()
    assert nr_open(pid) == before


def test_nothing_is_left_of_many_connections(lab: PeerLab) -> None:
    """Descriptors and memory of the device process are what they were, a hundred back ends on."""
    start(lab)
    pid = lab.host.process.pid
    before = nr_open(pid)
    for count in range(100):
        lab.peer.hang_up()
        lab.wait_told("peer-lost")
        lab.connect()
        if count == 20:
            size = int(facts(pid)["VmRSS"][0])
    assert nr_open(pid) == before
    assert int(facts(pid)["VmRSS"][0]) <= size + 512  # KiB


def test_configuration_changes_on_and_on(lab: PeerLab) -> None:
    """A back end that has news all the time keeps nobody from its registers."""
    lab.host.start()
    back = lab.peer.back
    assert back is not None
    for count in range(200):
        lab.peer.config = bytes([count]) + lab.peer.config[1:]
        back.send(Message(Back.CONFIG_CHANGE, NEED_REPLY))
        back.wait(DEADLINE)
        assert lab.host.status & READY == READY


def nr_open(pid: int) -> int:
    """Count the descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


# The rings themselves.


def test_shadow_keeps_the_books() -> None:
    """Random use by a back end that is now and then another: every head comes back once."""
    rng = seeded(7)
    area = memoryview(bytearray(0x4000))
    shadow = Shadow(area, "peer")
    shadow.begin(8, event_idx=True)
    free, given = list(range(8)), 0
    back_avail = 0
    avail, used16 = area[:22].cast("H"), area[USED_AT : USED_AT + 70].cast("H")
    used32 = area[USED_AT : USED_AT + 68].cast("I")
    has: list[int] = []
    done = 0
    while done < 2000:
        action = rng.random()
        if action < 0.4 and free:
            batch = free[: rng.randint(1, len(free))]
            del free[: len(batch)]
            shadow.offer(dict.fromkeys(batch, 4))
            given += len(batch)
        elif action < 0.6:
            while back_avail != avail[1]:
                has.append(avail[2 + (back_avail & 7)])
                back_avail = (back_avail + 1) & 0xFFFF
            rng.shuffle(has)
        elif action < 0.98 and has:
            slot = 1 + 2 * (used16[1] & 7)
            used32[slot], used32[slot + 1] = has.pop(), 4
            used16[1] = (used16[1] + 1) & 0xFFFF
        elif action >= 0.98:
            heads = [head for head, _ in shadow.take()]
            free += heads
            done += len(heads)
            shadow.begin(8, event_idx=True)
            has, back_avail = [], 0
        if rng.random() < 0.3:
            heads = [head for head, written in shadow.take() if written == 4]
            free += heads
            done += len(heads)
        assert sorted([*free, *shadow.outstanding]) == list(range(8))
        assert given == done + len(shadow.outstanding)


@pytest.mark.parametrize("event_idx", [False, True])
def test_shadow_asks_for_kicks_as_the_back_end_wants(event_idx: bool) -> None:
    """By the flag, or by the index of an entry."""
    area = memoryview(bytearray(0x4000))
    shadow = Shadow(area, "peer")
    shadow.begin(4, event_idx=event_idx)
    assert shadow.offer({0: 1})
    if event_idx:
        pack_into("<H", area, USED_AT + 4 + 8 * 4, 2)  # when entry 2 is there
    else:
        pack_into("<H", area, USED_AT, 1)  # never
    assert not shadow.offer({1: 1})
    assert shadow.offer({2: 1}) == event_idx
    assert not shadow.offer({3: 1})


def test_shadow_refuses_what_is_used_twice() -> None:
    """A head that is back cannot come back again."""
    area = memoryview(bytearray(0x4000))
    shadow = Shadow(area, "peer")
    shadow.begin(4, event_idx=False)
    shadow.offer({1: 8, 2: 8})
    pack_into("<HHIIII", area, USED_AT, 0, 2, 1, 8, 1, 8)
    with pytest.raises(PeerError, match="uses chain 1, which it does not have"):
        shadow.take()
