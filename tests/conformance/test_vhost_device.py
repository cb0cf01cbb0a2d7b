"""A device that a vhost-user back end serves, from both of its sides: driver and back end.

Facts about the protocol are those of QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import pack

import pytest

from config.errors import HostError
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_RING_RESET, F_VERSION_1
from devices.nethdr import NET_F_CTRL_VQ, NET_F_MQ
from devices.spec import VHOST_KINDS, Block
from devices.vhostwire import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    NEED_REPLY,
    P_CONFIG,
    P_RESET_DEVICE,
    P_STATUS,
    REPLY,
    U64,
    Back,
    Front,
    Message,
)
from devices.viodev import CONFIG_CHANGE, ImsgType
from devices.virtio import CommonCfg
from tests.peerlab import KIND, PeerLab
from tests.vhostpeer import VhostPeer
from tools.viodriver import PackedDriver, SplitDriver
from tools.viodriver.private import DEADLINE
from tools.viodriver.registers import NEEDS_RESET, READY

RING = F_INDIRECT_DESC | F_EVENT_IDX


def peer_with(features: int = RING, protocol: int = 0) -> VhostPeer:
    """Return a back end that offers more."""
    peer = VhostPeer()
    peer.features |= features
    peer.protocol |= protocol
    return peer


@pytest.fixture(params=["relayed", "direct"])
def lab(request: pytest.FixtureRequest) -> Iterator[PeerLab]:
    """Return a device with a queue, with and without an in-flight area."""
    with PeerLab(peer_with(), books=request.param == "direct") as lab:
        yield lab


def answer(lab: PeerLab, index: int = 0) -> bytes:
    """Serve one request as the back end: its first byte, over all that is writable."""
    chain = lab.pop(index)
    fill = bytes(chain.readable[0][:1])
    for view in chain.writable:
        view[:] = fill * len(view)
    lab.back[index].push(chain.head, chain.writable_bytes)
    lab.call(index)
    return fill


def test_a_request_and_its_answer(lab: PeerLab) -> None:
    """A kick reaches the back end, a call the driver; data and length are what they were."""
    [queue] = lab.host.start(F_EVENT_IDX)
    lab.open(F_EVENT_IDX)
    for number in range(40):  # more than the ring has
        queue.enable_calls()
        queue.add([bytes([number])], [8])
        lab.host.kick(0)
        answer(lab)
        assert lab.host.wait_call(0, DEADLINE)
        [used] = queue.collect()
        assert (queue.data(used.request), used.written) == (bytes([number]) * 8, 8)


def test_what_is_told_when_the_driver_is_ready(lab: PeerLab) -> None:
    """Features, memory, queue, in this order; and the kick that starts the queue comes last."""
    [queue] = lab.host.start(F_EVENT_IDX)
    heard = [r for r in lab.peer.requests() if r not in (Front.GET_CONFIG, Front.GET_FEATURES)]
    start = heard.index(Front.SET_FEATURES)
    told = [request for request in heard[start:] if "INFLIGHT" not in request.name]
    assert told == [
        Front.SET_FEATURES,
        Front.SET_MEM_TABLE,
        Front.SET_VRING_ENABLE,
        Front.SET_VRING_NUM,
        Front.SET_VRING_BASE,
        Front.SET_VRING_ADDR,
        Front.SET_VRING_ERR,
        Front.SET_VRING_CALL,
        Front.SET_VRING_KICK,
    ]
    agreed = F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL_FEATURES
    assert lab.peer.payload(Front.SET_FEATURES) == U64.pack(agreed)
    assert lab.told(Front.SET_VRING_NUM, 0) == pack("<II", 0, queue.size)


def test_features_are_those_of_both() -> None:
    """What the back end has, and can be carried: no log, no packed ring, no other doorbells."""
    more = 1 << 3 | 1 << 50 | F_LOG_ALL | F_RING_PACKED | 1 << 33 | 1 << 36 | 1 << 38 | F_RING_RESET
    with PeerLab(peer_with(more | F_EVENT_IDX)) as lab:
        offered = 1 << 3 | 1 << 50 | F_EVENT_IDX | F_RING_RESET | F_VERSION_1
        assert lab.host.offered() == offered


@pytest.mark.parametrize("features", [F_PROTOCOL_FEATURES, 0])
def test_an_old_back_end_is_refused(features: int) -> None:
    """Without VERSION_1 the device process does not start, and says why."""
    peer = VhostPeer()
    peer.features = features
    with pytest.raises(HostError, match="does not speak virtio 1"):
        PeerLab(peer)


def test_too_few_queues() -> None:
    """Queues that vm.yaml asks for must be there; without its word, fewer are enough."""
    with pytest.raises(HostError, match="has 2 queues, not 3"):
        PeerLab(queues=3)
    with PeerLab(queues=3, exact=False, least=1) as lab:
        assert lab.host.read(CommonCfg.NUM_QUEUES, 2) == 2


def test_configuration(lab: PeerLab) -> None:
    """It is the back end's; a write goes there, and news from there are interrupts."""
    lab.host.start()
    assert lab.host.read_config(0, 4) == 0x03020100
    lab.host.write_config(8, 2, 0xBEEF)
    assert lab.host.read_config(8, 4) == 0x0B0ABEEF
    assert lab.peer.payload(Front.SET_CONFIG) == pack("<III", 8, 2, 0) + b"\xef\xbe"

    generation = lab.host.read(CommonCfg.CONFIG_GENERATION, 1)
    lab.peer.config = b"\xff" + lab.peer.config[1:]
    assert lab.peer.back is not None
    lab.peer.back.send(Message(Back.CONFIG_CHANGE, NEED_REPLY))
    assert lab.peer.back.wait(DEADLINE) == Message(Back.CONFIG_CHANGE, REPLY | 1, U64.pack(0))
    assert lab.host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert lab.host.isr() == 2
    assert lab.host.read_config(0, 1) == 0xFF
    assert lab.host.read(CommonCfg.CONFIG_GENERATION, 1) != generation


def test_a_write_that_is_refused(lab: PeerLab) -> None:
    """Read-only configuration stays what it was, and the connection stands."""
    lab.peer.answers[Front.SET_CONFIG] = lambda m: Message(m.request, REPLY, U64.pack(1))
    lab.host.write_config(8, 2, 0xBEEF)
    assert lab.host.read_config(8, 2) == 0x0908
    lab.host.wait_said("refuses SET_CONFIG")
    assert lab.host.told == []


def test_configuration_that_is_the_front_ends() -> None:
    """A network device's and a file system's are not asked for, and are made of vm.yaml."""
    peer = VhostPeer()
    peer.features |= 1 << 15 | 1 << 17 | 1 << 22
    peer.queues = 1  # pair
    own = {"lladdr": "fe:e1:bb:d1:00:01", "mtu": 1400, "in_order": True}
    with PeerLab(peer, kind=VHOST_KINDS["net"], own=own) as lab:
        found = lab.host.offered()
        # MRG_RXBUF is the back end's, MTU, MAC and STATUS ours; without a control queue, no MQ.
        assert found & 0xFFFFFF == 1 << 3 | 1 << 5 | 1 << 15 | 1 << 16
        data = bytes(lab.host.read_config(offset, 1) for offset in range(12))
        assert data == bytes.fromhex("fee1bbd10001") + pack("<HHH", 1, 1, 1400)
        assert Front.GET_CONFIG not in lab.peer.requests()
        assert lab.host.read(CommonCfg.NUM_QUEUES, 2) == 2
    with PeerLab(VhostPeer(), kind=VHOST_KINDS["fs"], own={"tag": "data"}) as lab:
        data = bytes(lab.host.read_config(offset, 1) for offset in range(40))
        assert data == b"data".ljust(36, b"\0") + pack("<I", 1)


def test_disks_have_no_more_queues_than_there_are() -> None:
    """num_queues of the configuration is what the driver finds."""
    peer = VhostPeer()
    peer.config = bytes(34) + pack("<H", 8) + bytes(24)
    with PeerLab(peer, kind=VHOST_KINDS["blk"]) as lab:
        assert lab.host.read_config(34, 2) == 1
    peer = VhostPeer()
    peer.queues = 5
    peer.config = pack("<I", 3) + bytes(60)
    with PeerLab(peer, kind=VHOST_KINDS["scsi"], queues=2) as lab:
        assert lab.host.read_config(0, 4) == 2
    peer = VhostPeer()
    peer.config = bytes(34) + pack("<H", 8)  # an old one, which has no more
    with PeerLab(peer, kind=VHOST_KINDS["blk"]) as lab:
        assert lab.host.read_config(34, 4) == 1


def test_no_configuration_space() -> None:
    """A device that needs one is not served by a back end without."""
    peer = VhostPeer()
    peer.answers[Front.GET_PROTOCOL_FEATURES] = lambda m: Message(
        m.request, REPLY, U64.pack(peer.protocol & ~P_CONFIG)
    )
    with pytest.raises(HostError, match="has no configuration space"):
        PeerLab(peer)


def test_reset(lab: PeerLab) -> None:
    """The driver's reset stops the queues before it is over; a new driver starts at 0."""
    [queue] = lab.host.start()
    lab.open()
    queue.add([b"a"], [1])
    lab.host.kick(0)
    answer(lab)
    lab.peer.bases[0] = 1
    lab.host.status = 0
    assert lab.host.status == 0
    assert lab.peer.requests()[-1] == Front.GET_VRING_BASE
    lab.host.start()
    assert lab.told(Front.SET_VRING_BASE, 0) == pack("<II", 0, 0)


@pytest.mark.parametrize(
    ("protocol", "last"),
    [
        (P_RESET_DEVICE, [Front.RESET_DEVICE]),
        (P_STATUS | P_RESET_DEVICE, [Front.RESET_DEVICE]),
        (P_STATUS, [Front.SET_STATUS]),
    ],
)
def test_reset_of_the_back_end(protocol: int, last: list[Front]) -> None:
    """Who can be told of a reset is, after the queues have been stopped."""
    with PeerLab(peer_with(protocol=protocol)) as lab:
        lab.host.start()
        if protocol & P_STATUS:
            assert lab.peer.payload(Front.SET_STATUS) == U64.pack(READY)
        lab.host.status = 0
        assert lab.host.status == 0
        assert lab.peer.requests()[-2:] == [Front.GET_VRING_BASE, *last]


def test_pause(lab: PeerLab) -> None:
    """While paused the back end has no queue; then it goes on where it was."""
    [queue] = lab.host.start()
    lab.open()
    queue.add([b"a"], [1])
    lab.host.kick(0)
    answer(lab)
    lab.peer.bases[0] = 1
    lab.host.ask(ImsgType.PAUSE)
    assert lab.peer.requests()[-1] == Front.GET_VRING_BASE
    assert [used.written for used in queue.collect()] == [1]
    queue.add([b"b"], [1])
    lab.host.kick(0)
    lab.host.ask(ImsgType.UNPAUSE)
    lab.open()
    assert answer(lab) == b"b"
    lab.peer.wait_for(lambda: True)
    while not (done := queue.collect()):
        assert lab.host.wait_call(0, DEADLINE)
    assert [used.written for used in done] == [1]


def test_reset_of_one_queue() -> None:
    """RING_RESET stops one queue and starts it anew, and the others go on."""
    with PeerLab(peer_with(F_RING_RESET), queues=2) as lab:
        queues = lab.host.start(F_RING_RESET)
        before = len(lab.peer.heard)
        lab.host.write(CommonCfg.QUEUE_SELECT, 2, 1)
        lab.host.write(CommonCfg.QUEUE_RESET, 2, 1)
        assert lab.host.read(CommonCfg.QUEUE_ENABLE, 2) == 0
        assert lab.host.enable(1, queues[1])
        told = lab.peer.heard[before:]
        assert told[0][:2] == (Front.GET_VRING_BASE, pack("<II", 1, 0))
        assert {payload[0] for _, payload, _ in told} == {1}
        assert told[-1][0] == Front.SET_VRING_KICK


def test_a_broken_queue(lab: PeerLab) -> None:
    """What the back end says of a broken queue is a driver that needs a reset."""
    lab.host.start()
    os.eventfd_write(lab.peer.fds[Front.SET_VRING_ERR, 0], 1)
    lab.host.wait_said("reports a broken queue")
    assert lab.host.status == READY | NEEDS_RESET
    assert lab.peer.requests()[-1] == Front.GET_VRING_BASE
    lab.host.start()
    assert lab.host.status == READY


def test_a_broken_ring_is_found_here() -> None:
    """Where queues are relayed, a chain that loops does not reach the back end."""
    with PeerLab(peer_with()) as lab:
        [queue] = lab.host.start()
        lab.open()
        assert isinstance(queue, SplitDriver)
        queue.desc(0, addr=0x10000, length=16, flags=1, next_=0)
        queue.offer(0)
        lab.host.kick(0)
        lab.host.wait_said("needs a reset")
        assert lab.back[0].pop() is None


# Several queue pairs.


@pytest.fixture
def pairs() -> Iterator[PeerLab]:
    """Return a network device with two pairs."""
    own = {"lladdr": "fe:e1:bb:d1:00:01", "mtu": 0, "in_order": True}
    with PeerLab(VhostPeer(), kind=VHOST_KINDS["net"], queues=2, own=own) as lab:
        yield lab


def enabled(lab: PeerLab) -> list[bool]:
    """Return which queues the back end may use."""
    latest = {
        payload[0]: payload[4] == 1
        for request, payload, _ in lab.peer.heard
        if request == Front.SET_VRING_ENABLE
    }
    return [on for _, on in sorted(latest.items())]


def test_pairs_are_chosen_on_the_control_queue(pairs: PeerLab) -> None:
    """All start, the first is enabled, the others by command; a new back end finds it so."""
    lab = pairs
    queues = lab.host.start(NET_F_CTRL_VQ | NET_F_MQ)
    assert len(queues) == 5
    assert lab.host.read_config(8, 2) == 2
    assert enabled(lab) == [True, True, False, False]
    control = queues[4]
    for count, ack, now in ((2, 0, [True] * 4), (3, 1, [True] * 4), (0, 1, [True] * 4)):
        assert command(lab, 4, control, count) == ack
        assert enabled(lab) == now
    lab.peer.hang_up()
    lab.wait_told("peer-lost")
    lab.peer.heard.clear()
    lab.connect()
    assert enabled(lab) == [True] * 4
    assert command(lab, 4, control, 1) == 0
    assert enabled(lab) == [True, True, False, False]
    lab.host.start(NET_F_CTRL_VQ | NET_F_MQ)
    assert enabled(lab) == [True, True, False, False]


def test_a_driver_that_knows_one_pair(pairs: PeerLab) -> None:
    """Without MQ the control queue is queue 2, and the back end has two queues (§5.1.2)."""
    lab = pairs
    queues = lab.host.start(NET_F_CTRL_VQ)
    assert enabled(lab) == [True, True]
    for _ in range(3):
        assert command(lab, 2, queues[2], 1) == 1  # not negotiated
    assert not lab.host.negotiate(F_VERSION_1 | NET_F_MQ)  # which needs a control queue


def command(lab: PeerLab, index: int, queue: SplitDriver | PackedDriver, count: int) -> int:
    """Choose `count` pairs; return the ack."""
    queue.enable_calls()
    queue.add([bytes([4, 0]) + pack("<H", count)], [1])
    lab.host.kick(index)
    while not (done := queue.collect()):
        assert lab.host.wait_call(index, DEADLINE), lab.host.said
    return queue.data(done[0].request)[0]


# Interrupts.


def test_calls_go_straight_to_the_driver_with_msix() -> None:
    """MSI-X on: the back end has the driver's eventfd. Off: calls pass here, for ISR's sake."""
    with PeerLab(peer_with(), books=True) as lab:
        [queue] = lab.host.start()
        lab.open()
        for on in (0, 1, 0):
            lab.host.write(Block.MSIX, 1, on)
            lab.host.isr()
            while lab.host.wait_call(0, 0):
                pass
            queue.add([b"a"], [1])
            lab.host.kick(0)
            answer(lab)
            assert lab.host.wait_call(0, DEADLINE)
            assert lab.host.isr() == 1 - on
            assert len(queue.collect()) == 1


def test_calls_by_message() -> None:
    """Where KVM carries no interrupts, they are messages to the VM process."""
    with PeerLab(peer_with(), books=True, irqfd=False) as lab:
        [queue] = lab.host.start()
        lab.host.write(Block.MSIX, 1, 1)
        lab.open()
        queue.add([b"a"], [1])
        lab.host.kick(0)
        answer(lab)
        assert lab.host.wait_call(0, DEADLINE)


def test_jailed() -> None:
    """All this is done in the jail: requests, reset, pause, another back end."""
    with PeerLab(peer_with(protocol=P_STATUS), books=True, jail="best-effort", kind=KIND) as lab:
        for _ in range(2):
            [queue] = lab.host.start()
            lab.open()
            queue.add([b"a"], [1])
            lab.host.kick(0)
            answer(lab)
            assert lab.host.wait_call(0, DEADLINE)
            lab.host.ask(ImsgType.PAUSE)
            lab.host.ask(ImsgType.UNPAUSE)
            lab.peer.hang_up()
            lab.wait_told("peer-lost")
            lab.connect()
            lab.host.status = 0
