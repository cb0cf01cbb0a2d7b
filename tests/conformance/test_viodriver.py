"""The driver library drives every kind of device of ours over every transport, in both layouts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from devices.features import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
)
from devices.nethdr import NET_F_MAC, NET_F_MRG_RXBUF, NET_F_STATUS
from devices.scsireq import DRIVE_LUN, S_BAD_TARGET, TMF_LOGICAL_UNIT_RESET
from tests.drivenlab import DISC, IMAGE_BYTES, KINDS, SERIAL, TRANSPORTS, Driven
from tests.vionetlab import OWN, frame_of
from tools.viodriver.blk import Blk, BlkError
from tools.viodriver.errors import DeviceGoneError, DriverError, NoAnswerError, NoRoomError
from tools.viodriver.net import Net
from tools.viodriver.rng import read_random
from tools.viodriver.scsi import Scsi

if TYPE_CHECKING:
    from pathlib import Path

ALL = F_EVENT_IDX | F_INDIRECT_DESC | F_RING_RESET | 0x7E40  # and what disks have of their own
LAYOUTS = ("split", "packed", "direct", "in-order")
OTHERS = [  # where one queue can be reset
    way for way in TRANSPORTS if way != "vhost-user"
]


def open_device(kind: str, way: str, directory: Path, layout: str = "split") -> Driven:
    """Start a device, its queues in a certain layout."""
    driven = Driven(kind, way, directory, packed=layout == "packed")
    required = {"packed": F_RING_PACKED, "in-order": F_IN_ORDER}.get(layout, 0)
    wanted = ALL & ~F_INDIRECT_DESC if layout == "direct" else ALL
    if kind == "vionet":
        wanted |= NET_F_MAC | NET_F_MRG_RXBUF | NET_F_STATUS
    driven.device.start(wanted, required=required)
    return driven


# Every kind of device.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_disk(way: str, layout: str, tmp_path: Path) -> None:
    """Everything that a disk can be asked, and how it refuses."""
    with open_device("vioblk", way, tmp_path, layout) as driven:
        disk = Blk(driven.device, driven.device.acquire(0))
        assert disk.nr_sectors == IMAGE_BYTES // 512
        assert (disk.block_size, disk.readonly, disk.get_id()) == (512, False, SERIAL)
        data = bytes(range(256)) * 32
        disk.write(8, data)
        disk.flush()
        assert disk.read(8, 16) == data
        assert driven.image.read_bytes()[4096:12288] == data
        disk.write_zeroes(8, 1)
        assert disk.read(8, 2) == bytes(512) + data[512:1024]
        disk.discard(16, 8)
        with pytest.raises(BlkError, match="status 1"):
            disk.read(disk.nr_sectors, 1)
        with pytest.raises(BlkError) as caught:
            disk.ask(99)
        assert caught.value.unsupported
        for _ in range(300):  # more than once around the ring
            assert disk.read(15, 1) == data[:512]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", TRANSPORTS)
def test_entropy(way: str, layout: str, tmp_path: Path) -> None:
    """Each answer is another, and as long as it says."""
    with open_device("viornd", way, tmp_path, layout) as driven:
        queue = driven.device.acquire(0)
        answers = {read_random(queue, 64) for _ in range(100)}
        assert len(answers) == 100
        assert {len(answer) for answer in answers} == {64}


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_drive(way: str, layout: str, tmp_path: Path) -> None:
    """INQUIRY, reading, sense of what is wrong, a target that is not there, management."""
    with open_device("vioscsi", way, tmp_path, layout) as driven:
        scsi = Scsi(driven.device)
        inquiry = scsi.command(bytes((0x12, 0, 0, 0, 36, 0)), 36)
        assert inquiry.good
        assert inquiry.data[0] & 0x1F == 5
        assert scsi.command(bytes(6)).key[0] == 6  # a new disc: unit attention, once
        capacity = scsi.command(bytes((0x25, *bytes(9))), 8)
        assert int.from_bytes(capacity.data[:4]) == len(DISC) // 2048 - 1
        read = scsi.command(bytes((0x28, 0, 0, 0, 0, 1, 0, 0, 2, 0)), 4096)
        assert read.data == bytes(range(256)) * 16
        past = scsi.command(bytes((0x28, 0, 0, 1, 0, 1, 0, 0, 2, 0)), 4096)
        assert (past.status, past.key) == (2, (5, 0x21, 0))
        absent = scsi.command(bytes(6), lun=b"\1\5" + DRIVE_LUN[2:])
        assert absent.response == S_BAD_TARGET
        assert scsi.manage(TMF_LOGICAL_UNIT_RESET) == 0


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_network(way: str, layout: str, tmp_path: Path) -> None:
    """Frames in both directions, one of them longer than a buffer; the address and the link."""
    with open_device("vionet", way, tmp_path, layout) as driven:
        net = Net(driven.device)
        assert (net.mac, net.link) == (OWN, True)
        sent = [frame_of(100, 1), frame_of(1400, 2)]
        for frame in sent:
            net.send(frame)
            assert driven.receive() == frame
        net.give(8, 512)
        for frame in sent:
            driven.send(frame)
        assert [frame.data for frame in net.receive(2)] == sent
        assert net.poll() == []
        with pytest.raises(NoAnswerError):
            net.receive(timeout=0.1)


# The life of a device.


@pytest.mark.parametrize("way", TRANSPORTS)
def test_life_cycle(way: str, tmp_path: Path) -> None:
    """Start, acquire, release, stop, and start again, with what is refused in each state."""
    with Driven("viornd", way, tmp_path) as driven:
        device = driven.device
        with pytest.raises(DriverError, match="has no queue 0 started"):
            device.acquire(0)
        features = device.start(ALL)
        assert device.has_feature(F_VERSION_1)
        assert features == device.features
        assert device.nr_queues == 1
        queue = device.find_and_acquire()
        assert device.is_acquired(0)
        with pytest.raises(DriverError, match="is somebody's already"):
            device.acquire(0)
        with pytest.raises(DriverError, match="no queue is free from 0 on"):
            device.find_and_acquire()
        device.release(queue)
        with pytest.raises(DriverError, match="is not acquired"):
            device.release(queue)
        assert len(read_random(device.acquire(0), 8)) == 8
        device.stop()
        assert device.status == 0
        assert device.nr_queues == 0
        device.start(ALL)
        assert len(read_random(device.acquire(0), 8)) == 8


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_feature_that_is_not_offered(way: str, tmp_path: Path) -> None:
    """What is wanted is dropped, what is required is an error, and the device is left FAILED."""
    with Driven("viornd", way, tmp_path) as driven:
        assert not driven.device.start(1 << 60) & 1 << 60
        with pytest.raises(DriverError, match="does not offer 60"):
            driven.device.start(required=1 << 60)
        assert driven.device.dump()["status"] == ["FAILED"]
        driven.device.start()


@pytest.mark.parametrize("way", OTHERS)
def test_reset_of_one_queue(way: str, tmp_path: Path) -> None:
    """The queue is new and the same, and requests that were out are the driver's again."""
    with open_device("vioscsi", way, tmp_path) as driven:
        events = driven.device.acquire(1)  # the device keeps these buffers until there is news
        for cookie in "ab":
            events.start(cookie, 1)
            events.add([(events.take(16), 16)], writable=True)
        events.flush()
        assert driven.device.reset_queue(events) == ["a", "b"]
        assert events.outstanding == 0
        driven.device.release(events)
        assert Scsi(driven.device).command(bytes((0x12, 0, 0, 0, 36, 0)), 36).good


# Requests.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_requests_in_pieces(layout: str, tmp_path: Path) -> None:
    """Started, added to, aborted, flushed together; polled a few at a time."""
    with open_device("viornd", "private", tmp_path, layout) as driven:
        queue = driven.device.acquire(0)
        buffers = [queue.take(16) for _ in range(8)]
        queue.start("aborted", 2)
        queue.add([(buffers[0], 16)], writable=True)
        assert queue.abort() == "aborted"
        with pytest.raises(DriverError, match="no request was started"):
            queue.abort()
        with pytest.raises(DriverError, match="no request was started"):
            queue.add([(buffers[0], 16)])
        assert queue.flush() == 0
        for number in range(4):
            queue.start(number, 2)
            queue.add([(buffers[2 * number], 16)], writable=True)
            queue.add([(buffers[2 * number + 1], 16)], writable=True)
        assert queue.outstanding == 0
        assert queue.flush() == 4
        done = queue.wait(4)
        assert sorted(item.cookie for item in done) == [0, 1, 2, 3]
        assert {item.written for item in done} == {32}
        for number in range(3):
            queue.start(number, 1)
            queue.add([(buffers[number], 16)], writable=True)
        queue.wait(3)
        assert queue.poll() == []


def test_poll_takes_no_more_than_asked(tmp_path: Path) -> None:
    """What is left comes with the next poll, and is not lost in a wait."""
    with open_device("viornd", "private", tmp_path) as driven:
        queue = driven.device.acquire(0)
        for number in range(3):
            queue.start(number, 1)
            queue.add([(queue.take(16), 16)], writable=True)
        queue.flush()
        first: list[Any] = []
        while not first:  # until the device has begun
            first = queue.poll(1)
        assert [done.cookie for done in first] == [0]
        assert [done.cookie for done in queue.wait()] == [1, 2]


def test_what_a_request_may_not_be(tmp_path: Path) -> None:
    """Too many pieces, none, the wrong order, more than there is room for."""
    with open_device("viornd", "private", tmp_path, "direct") as driven:
        queue = driven.device.acquire(0)
        size = queue.ring.size
        for pieces in (0, size + 1):
            with pytest.raises(DriverError, match=f"a request of {pieces} pieces"):
                queue.start("x", pieces)
        buffer = queue.take(16)
        queue.start("x", 1)
        with pytest.raises(DriverError, match="without pieces"):
            queue.flush()
        with pytest.raises(DriverError, match="more than the 1 pieces"):
            queue.add([(buffer, 8), (buffer, 8)])
        queue.abort()
        queue.start("x", 2)
        queue.add([(buffer, 8)], writable=True)
        with pytest.raises(DriverError, match="a readable piece after a writable one"):
            queue.add([(buffer, 8)])
        with pytest.raises(NoRoomError, match=f"no room for {size} pieces"):
            queue.start("y", size)
        with pytest.raises(DriverError, match="2 wanted, 1 on their way"):
            queue.wait(2)
        queue.wait()


# A device that ends, or does not answer.


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_dead_device(way: str, tmp_path: Path) -> None:
    """Whoever waits is told, gets the cookies, and the dump still works."""
    with open_device("viornd", way, tmp_path) as driven:
        queue = driven.device.acquire(0)
        driven.halt()
        queue.start("lost", 1)
        queue.add([(queue.take(16), 16)], writable=True)
        queue.flush()
        driven.kill()
        with pytest.raises(DeviceGoneError):
            queue.wait(timeout=60)
        assert not driven.device.alive
        assert queue.abandon() == ["lost"]
        dump = driven.device.dump()
        assert (dump["alive"], dump["status"], dump["config"]) == (False, None, None)
        assert dump["queues"][0]["outstanding"] == 1
        with pytest.raises(DeviceGoneError):
            driven.device.start()


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_silent_device(way: str, tmp_path: Path) -> None:
    """That is no death: the request is out, and comes back once the device goes on."""
    with open_device("viornd", way, tmp_path) as driven:
        queue = driven.device.acquire(0)
        driven.halt()
        try:
            queue.start("late", 1)
            queue.add([(queue.take(16), 16)], writable=True)
            with pytest.raises(NoAnswerError, match="1 requests do not come back"):
                queue.wait(timeout=0.1)
            with pytest.raises(DriverError, match="1 requests are out"):
                driven.device.release(queue)
        finally:
            driven.halt(on=False)
        assert [done.cookie for done in queue.wait(timeout=60)] == ["late"]
        driven.device.release(queue)


# The dump.

DEVICE_SCHEMA: dict[str, Any] = {
    "name": str,
    "transport": str,
    "alive": bool,
    "status": list,
    "offered": list,
    "features": list,
    "config": str,
    "queues": list,
    "facts": dict,
}
QUEUE_SCHEMA: dict[str, Any] = {
    "index": int,
    "size": int,
    "layout": str,
    "desc": int,
    "driver": int,
    "device": int,
    "next_avail": int,
    "next_used": int,
    "free": int,
    "outstanding": int,
    "unflushed": int,
    "event_idx": bool,
    "indirect": bool,
    "in_order": bool,
    "acquired": bool,
}


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("way", TRANSPORTS)
def test_dump(way: str, layout: str, tmp_path: Path) -> None:
    """Plain JSON, the same keys everywhere, and true."""
    with open_device("vioblk", way, tmp_path, layout) as driven:
        queue = driven.device.acquire(0)
        Blk(driven.device, queue).read(0, 1)
        queue.start("x", 1)
        dump = driven.device.dump()
        assert json.loads(json.dumps(dump)) == dump
        assert {key: type(value) for key, value in dump.items()} == DEVICE_SCHEMA
        assert dump["transport"] == way.partition(":")[0]
        assert dump["status"] == ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"]
        assert set(dump["features"]) <= set(dump["offered"])
        assert bytes.fromhex(dump["config"])[:8] == (IMAGE_BYTES // 512).to_bytes(8, "little")
        [shown] = dump["queues"]
        assert {key: type(value) for key, value in shown.items()} == QUEUE_SCHEMA
        wrap = 1 << 15 if layout == "packed" else 0
        assert (shown["next_avail"], shown["next_used"]) == (wrap | 1, wrap | 1)
        assert (shown["layout"], shown["acquired"], shown["unflushed"]) == (layout, True, 1)
        assert (shown["free"], shown["outstanding"]) == (shown["size"], 0)


def test_no_kind_of_back_end_is_forgotten() -> None:
    """A kind that learns to speak vhost-user is to be driven here that way, too."""
    from devices import backendcli

    assert set(backendcli._OPEN) == set(KINDS)
