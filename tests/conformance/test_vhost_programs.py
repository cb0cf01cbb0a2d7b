"""Real back ends behind a device of ours, killed amid verified requests again and again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.blkreq import BLK_F_FLUSH, HEADER, S_OK, T_FLUSH, T_IN, T_OUT
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.spec import VHOST, VHOST_KINDS
from devices.vhostask import connect
from devices.viodev import ImsgType
from tests.backends import Programs
from tests.rng import seeded
from tools.viodriver import SplitDriver
from tools.viodriver.private import DEADLINE, DeviceHost
from vmm.peers import place

SIZE = 4 << 20
SECTOR = 512
DEPTH = 48
REQUESTS = 3000
KILLS = 6


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Return a place for programs."""
    programs = Programs(str(tmp_path))
    yield programs
    programs.close()


def start(programs: Programs, which: str, image: str) -> socket.socket:
    """Start a back end and return a connection to it."""
    if which == "disk":
        programs.disk(image)
    else:
        programs.ours("ours", image)
    return connect_to(programs.socket(which))


def connect_to(path: str) -> socket.socket:
    """Connect to a program that listens."""
    wire = connect(path)
    with socket.socket(fileno=os.dup(wire.fileno())) as sock:
        wire.close()
        return sock.dup()


def serves(host: DeviceHost, sock: socket.socket) -> bool:
    """Give the device a connection, and tell whether it is served then."""
    with sock:
        sock.setblocking(False)
        request = {"name": "peer", "value": None}
        assert host.ask(ImsgType.SETTING, request, fd=sock.fileno()) == {"value": True}
    while not host.told:
        assert host.listen(DEADLINE), host.said[-4:]
    return host.told.pop() == "peer-up"


@pytest.mark.parametrize("which", ["disk", "ours"])
@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nothing_done_twice(
    programs: Programs, tmp_path: Path, which: str
) -> None:
    """Sectors hold what was written last, whoever served it; each request comes back once."""
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    kind = place("dev", "/peer", VHOST_KINDS["blk"], 1, exact=True)
    rng = seeded(11)
    with ExitStack() as parts:
        rings = os.memfd_create("rings")
        parts.callback(os.close, rings)
        os.ftruncate(rings, 0x4000)
        with start(programs, which, str(image)) as sock:
            fds = {"peer": sock.fileno(), "rings": rings}
            host = parts.enter_context(
                DeviceHost(VHOST, kind.settings, fds=fds, queues=1, jail="best-effort")
            )
        [queue] = host.start(BLK_F_FLUSH | F_EVENT_IDX | F_INDIRECT_DESC)
        assert isinstance(queue, SplitDriver)
        model: dict[int, bytes] = {}
        busy: dict[int, tuple[int, bytes | None]] = {}  # token → sector, data of a write
        done = asked = 0
        kills = iter(range(REQUESTS // (KILLS + 1), REQUESTS, REQUESTS // (KILLS + 1)))
        next_kill = next(kills)
        while done < REQUESTS:
            while asked < REQUESTS and len(busy) < DEPTH:
                taken = {sector for sector, _ in busy.values()}
                sector = rng.randrange(SIZE // SECTOR)
                if sector in taken:
                    continue
                if rng.random() < 0.5:
                    data = rng.randbytes(SECTOR)
                    token = queue.add([HEADER.pack(T_OUT, 0, sector), data], [1])
                    busy[token] = sector, data
                else:
                    token = queue.add([HEADER.pack(T_IN, 0, sector)], [SECTOR, 1])
                    busy[token] = sector, None
                asked += 1
            host.kick(0)
            if done >= next_kill:
                next_kill = next(kills, REQUESTS)
                programs.kill(which)
                wait_told(host, "peer-lost")
                sock = start(programs, which, str(image))
                while not serves(host, sock):  # on a busy machine it may be too slow
                    sock = connect_to(programs.socket(which))
            if not queue.enable_calls():
                assert host.wait_call(0, DEADLINE), (host.said, len(busy))
            for used in queue.collect():
                sector, written = busy.pop(used.token)
                answer = queue.data(used.request)
                assert answer[-1] == S_OK
                if written is not None:
                    model[sector] = written
                else:
                    assert answer[:-1] == model.get(sector, bytes(SECTOR)), sector
                done += 1
        queue.enable_calls()
        queue.add([HEADER.pack(T_FLUSH, 0, 0)], [1])
        host.kick(0)
        while not queue.collect():
            assert host.wait_call(0, DEADLINE)
    content = image.read_bytes()
    for sector, data in model.items():
        assert content[sector * SECTOR :][:SECTOR] == data


def wait_told(host: DeviceHost, word: str) -> None:
    """Wait for a word of the device, and forget it."""
    while word not in host.told:
        assert host.listen(DEADLINE), (word, host.told, host.said[-4:])
    host.told.remove(word)
