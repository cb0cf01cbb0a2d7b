"""A compromised device process: whatever it does, only its own device is lost.

The VM process's end is real (vmm.channel, devices.viodev); the device's end is played here and
keeps to no rule. Two devices share one loop: the second must be served while the first attacks.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from config.errors import HostError
from devices import viodev
from devices.loop import Loop
from devices.viodev import FD_MARK, IMSG_MAX, Channel, ImsgType, MsgType, ViodevMsg
from vmm import channel
from vmm.channel import DeviceChannel
from vmm.plug import Devices

DEADLINE = 0.2  # seconds; what the VM process grants one of which nothing comes
LONG = 30.0  # seconds; what it grants one that answers, which may have to wait for its CPU
HEADER = struct.Struct("<IIII")


class Peer:
    """One device as the VM process sees it, and the raw ends of its channels."""

    def __init__(self, loop: Loop, name: str, deadline: float = DEADLINE) -> None:
        self.failures: list[str] = []
        self.channel = DeviceChannel(name, loop, self._failed)
        sync, self.sync = viodev.pair(name, deadline)
        async_, self.async_ = viodev.pair(name, deadline)
        self.channel.open(sync, async_)
        self._loop = loop

    def _failed(self, why: str) -> None:
        self.failures.append(why)
        self._loop.stop()

    def answer(self, reply: Callable[[ViodevMsg], bytes]) -> threading.Thread:
        """Answer register reads on a thread of the device's own, until the channel is closed."""
        ours = Channel(self.sync.dup(), "vm", LONG)

        def serve() -> None:
            try:
                while True:
                    self.sync.sendall(reply(ours.receive_msg()))
            except (viodev.ChannelError, OSError):
                return

        thread = threading.Thread(target=serve)
        thread.start()
        return thread


def frame(kind: int, data: bytes, *, length: int | None = None, mark: int = 0) -> bytes:
    """One imsg in its frame, with whatever length it pretends to have."""
    said = HEADER.size + len(data) if length is None else length
    body = HEADER.pack(kind, said | mark, 0, 1) + data
    return struct.pack("!i", len(body)) + body


def honest(message: ViodevMsg) -> bytes:
    """What a good device answers: the register's number."""
    reply = ViodevMsg(MsgType.IO_READ, message.reg, message.io_sz, data=message.reg, data_valid=1)
    return frame(ImsgType.DEVOP_MSG, reply.pack())


@pytest.fixture
def devices() -> Iterator[tuple[Loop, Peer, Peer]]:
    """A loop, an attacker and a good device."""
    loop = Loop()
    evil, good = Peer(loop, "evil"), Peer(loop, "good", LONG)
    thread = good.answer(honest)
    yield loop, evil, good
    for peer in (evil, good):
        peer.channel.close()
        peer.sync.close()
        peer.async_.close()
    thread.join()
    loop.close()


def lost(loop: Loop, evil: Peer) -> str:
    """Serve until the attacker is given up; return why."""
    loop.run()
    (why,) = evil.failures
    assert not evil.channel.alive
    assert evil.channel.read(0x14, 1) == (0xFF, 0)
    evil.channel.write(0x14, 1, 0)  # dropped, no exception
    return why


BAD_REPLIES = [
    pytest.param(frame(ImsgType.DEVOP_MSG, b"x" * 11), "11 bytes", id="short"),
    pytest.param(frame(ImsgType.DEVOP_MSG, b"x" * 14), "14 bytes", id="long"),
    pytest.param(frame(ImsgType.DEVOP_MSG, b""), "0 bytes", id="empty"),
    pytest.param(frame(99, ViodevMsg(MsgType.IO_READ).pack()), "of type 99", id="type"),
    pytest.param(
        frame(ImsgType.DEVOP_MSG, ViodevMsg(MsgType.IO_WRITE, data_valid=1).pack()),
        "answered a read with type 5",
        id="direction",
    ),
    pytest.param(
        frame(ImsgType.DEVOP_MSG, ViodevMsg(MsgType.IO_READ, data_valid=0).pack()),
        "answered a read",
        id="no-data",
    ),
    pytest.param(frame(ImsgType.DEVOP_MSG, b"x" * 12, length=9999), "and said 9999", id="lie"),
    pytest.param(struct.pack("!i", IMSG_MAX + 1), "bad message length", id="huge-frame"),
    pytest.param(struct.pack("!iQ", -1, 1 << 40), "bad message length", id="terabyte-frame"),
    pytest.param(struct.pack("!i", -7), "shorter than a header", id="negative-frame"),
    pytest.param(struct.pack("!i", 4) + b"abcd", "shorter than a header", id="no-header"),
    pytest.param(b"", "does not answer", id="silence"),
    pytest.param(struct.pack("!i", 28) + b"half", "does not answer", id="half-a-frame"),
    pytest.param(frame(ImsgType.DEVOP_MSG, b"x" * 12, mark=FD_MARK), "", id="promised-descriptor"),
]


@pytest.mark.parametrize(("reply", "words"), BAD_REPLIES)
def test_bad_reply(devices: tuple[Loop, Peer, Peer], reply: bytes, words: str) -> None:
    """A register read that is answered wrongly, or not at all, reads as all-ones; once."""
    loop, evil, good = devices
    evil.sync.sendall(reply)
    assert evil.channel.read(0x14, 4) == (0xFFFFFFFF, 0)
    assert words in lost(loop, evil)
    assert good.channel.read(0x14, 4) == (0x14, 0)


@pytest.mark.parametrize("reply", [case.values[0] for case in BAD_REPLIES if case.id != "silence"])
def test_bad_message_on_the_async_channel(devices: tuple[Loop, Peer, Peer], reply: bytes) -> None:
    """Nonsense on the channel of the loop ends that device, and never stalls the loop for long."""
    loop, evil, good = devices
    evil.async_.sendall(reply)
    lost(loop, evil)
    assert good.channel.read(0x20, 2) == (0x20, 0)


def test_exit(devices: tuple[Loop, Peer, Peer]) -> None:
    """A device process that ends is noticed by its channel."""
    loop, evil, good = devices
    evil.sync.close()
    evil.async_.close()
    assert "closed the channel" in lost(loop, evil)
    assert good.channel.read(1, 1) == (1, 0)


def test_ten_descriptors(devices: tuple[Loop, Peer, Peer]) -> None:
    """Descriptors that nobody asked for are closed, all of them, and the sender is lost."""
    loop, evil, good = devices
    before = set(os.listdir("/proc/self/fd"))
    fds = [os.eventfd(0) for _ in range(10)]
    evil.async_.sendall(frame(ImsgType.DEVOP_MSG, b"x" * 12, mark=FD_MARK))
    socket.send_fds(evil.async_, [b"F"], fds)
    for fd in fds:
        os.close(fd)
    lost(loop, evil)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert good.channel.read(2, 2) == (2, 0)


def test_flood(devices: tuple[Loop, Peer, Peer]) -> None:
    """A device that interrupts as fast as it can takes turns with everybody else."""
    loop, evil, good = devices
    kicks: list[int] = []
    evil.channel.on_kick = kicks.append
    evil.async_.setblocking(False)
    flood = frame(ImsgType.DEVOP_MSG, ViodevMsg(MsgType.KICK, state=1, data=7).pack())
    sent = 0
    while True:
        try:
            evil.async_.send(flood)
            sent += 1
        except BlockingIOError:
            break
    rounds: list[int] = []
    good.channel.on_kick = lambda queue: (rounds.append(len(kicks)), loop.stop())  # type: ignore[assignment, func-returns-value]
    good.async_.sendall(flood)
    loop.run()
    assert sent > 100
    assert rounds[0] < 3  # the good one did not wait for the flood to end
    assert evil.channel.alive
    assert set(kicks) == {7}


def test_a_device_whose_descriptor_is_a_large_number() -> None:
    """With many queues there are more than the 1024 that select(2) knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    taken: list[int] = []
    try:
        while not taken or taken[-1] < 1024:
            taken.append(os.dup(2))
        loop = Loop()
        far = Peer(loop, "far", LONG)
        far.async_.sendall(frame(ImsgType.PAUSE, b""))
        assert far.channel.call(ImsgType.PAUSE) == b""
        far.channel.close()
        for end in (far.sync, far.async_):
            end.close()
        loop.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_a_client_whose_value_is_too_long(devices: tuple[Loop, Peer, Peer]) -> None:
    """It is told so, and costs no device."""
    loop, _, good = devices
    plugged = Devices.__new__(Devices)
    row = SimpleNamespace(kind="vioblk")
    device = SimpleNamespace(channel=good.channel, row=row, lasting=None, process=None)
    plugged._devices = {"good": device}  # type: ignore[dict-item]
    with pytest.raises(HostError, match="no setting takes a value of 20031 bytes"):
        plugged.set("good", "resize", "x" * 20_000)
    assert good.channel.alive
    assert not good.failures
    assert good.channel.read(3, 1) == (3, 0)
    loop.stop()


def test_a_client_whose_descriptor_would_make_a_device_wait(
    devices: tuple[Loop, Peer, Peer],
) -> None:
    """A device has one thread, and who waits for a reader of a pipe serves no guest."""
    loop, _, good = devices
    plugged = Devices.__new__(Devices)
    row = SimpleNamespace(kind="vionet")
    device = SimpleNamespace(channel=good.channel, row=row, lasting=None, process=None)
    plugged._devices = {"good": device}  # type: ignore[dict-item]
    reader, writer = os.pipe()
    with pytest.raises(HostError, match="could make it wait"):
        plugged.set("good", "capture", {}, writer)
    os.set_blocking(writer, False)
    good.async_.sendall(frame(ImsgType.SETTING, b'{"value": 1}'))
    assert plugged.set("good", "capture", {}, writer) == 1
    for fd in (reader, writer):
        os.close(fd)
    loop.stop()


def test_a_message_that_was_taken_already(devices: tuple[Loop, Peer, Peer]) -> None:
    """A round of the loop can tell of one that an earlier callback of it has read."""
    _, _, good = devices
    good.channel._incoming(1)
    assert good.channel.alive
    assert good.failures == []


def test_a_slow_answer(devices: tuple[Loop, Peer, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that waits for its disk is not lost; late answers are nobody else's."""
    loop, slow, _ = devices
    monkeypatch.setattr(channel, "CALL_DEADLINE", DEADLINE)
    for value in (1, 2):
        with pytest.raises(viodev.ChannelError, match="is busy") as busy:
            slow.channel.call(ImsgType.SETTING, b"%d" % value)
        assert "slow disk" in busy.value.hint
    monkeypatch.setattr(channel, "CALL_DEADLINE", LONG)
    slow.async_.sendall(frame(ImsgType.SETTING, b"one") + frame(ImsgType.SETTING, b"two"))
    slow.async_.sendall(frame(ImsgType.PAUSE, b"three"))
    assert slow.channel.call(ImsgType.PAUSE) == b"three"
    slow.async_.sendall(frame(ImsgType.UNPAUSE, b"four"))
    assert slow.channel.call(ImsgType.UNPAUSE) == b"four"
    assert slow.channel.alive
    assert slow.failures == []

    slow.async_.sendall(frame(ImsgType.SETTING, b"unasked"))
    assert "of type" in lost(loop, slow)


def test_an_answer_that_never_comes(
    devices: tuple[Loop, Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end the device is given up; everything else was served meanwhile."""
    loop, evil, good = devices
    monkeypatch.setattr(channel, "CALL_DEADLINE", DEADLINE)
    monkeypatch.setattr(channel, "LATE_DEADLINE", DEADLINE)
    with pytest.raises(viodev.ChannelError, match="is busy"):
        evil.channel.call(ImsgType.PAUSE)
    assert evil.channel.alive
    assert good.channel.read(0x14, 1) == (0x14, 0)
    assert lost(loop, evil) == "evil: does not answer"
    with pytest.raises(viodev.ChannelError, match="has died"):
        evil.channel.call(ImsgType.UNPAUSE)


def test_a_register_behind_a_slow_disk(devices: tuple[Loop, Peer, Peer]) -> None:
    """A device that says it waits for the host gets more time, and answers late."""
    loop, slow, _ = devices
    turns: list[int] = []

    def busy() -> bool:
        turns.append(1)
        if len(turns) == 3:
            slow.sync.sendall(honest(ViodevMsg(MsgType.IO_READ, 0x14, 1)))
        return True

    slow.channel.is_busy = busy
    assert slow.channel.read(0x14, 1) == (0x14, 0)
    assert len(turns) == 3
    assert slow.channel.alive
    loop.stop()


def test_one_that_says_it_is_busy_for_ever(
    devices: tuple[Loop, Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end it is lost, as one that is silent without a reason."""
    loop, evil, good = devices
    monkeypatch.setattr(channel, "BUSY_DEADLINES", 3)
    evil.channel.is_busy = lambda: True
    assert evil.channel.read(0x14, 1) == (0xFF, 0)
    assert lost(loop, evil) == "evil: does not answer"
    assert good.channel.alive


def test_hang_up_in_mid_call(devices: tuple[Loop, Peer, Peer]) -> None:
    """A device that dies instead of answering a command fails that command."""
    loop, evil, good = devices
    evil.async_.close()
    with pytest.raises(viodev.ChannelError):
        evil.channel.call(ImsgType.PAUSE)
    assert evil.failures
    assert good.channel.read(3, 1) == (3, 0)
    loop.stop()


def test_log_flood_is_thinned(
    devices: tuple[Loop, Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device says in warnings goes through the log's limiter, under a key of its own."""
    from vmm import log

    said: list[tuple[str, str]] = []
    monkeypatch.setattr(log, "limited", lambda key, text, who: said.append((key, text)))
    loop, evil, _ = devices
    evil.async_.sendall(frame(ImsgType.LOG, b"\2\x1b[2Jboo\xff"))
    evil.async_.close()
    lost(loop, evil)
    assert said == [("evil says", "\x1b[2Jboo�")]  # the log itself escapes what is not text


def test_a_flood_of_notes_does_not_wash_the_log_away(
    devices: tuple[Loop, Peer, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of a bounded size are all there is, and they say what happened before."""
    from vmm import log

    loop, evil, _ = devices
    monkeypatch.setattr(log, "_limited", log.Limited())
    log.setup(str(tmp_path / "log"))
    try:
        for n in range(200):
            evil.async_.sendall(frame(ImsgType.LOG, b"\1note %d" % n))
        evil.async_.close()
        lost(loop, evil)
    finally:
        log.setup(stderr=True)
    lines = (tmp_path / "log").read_text().splitlines()
    notes = [line for line in lines if " info evil: note " in line]
    assert 0 < len(notes) == len(lines) < 10
