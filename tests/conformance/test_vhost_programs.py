"""Real back ends behind a device of ours, killed amid verified requests again and again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.blkreq import BLK_F_FLUSH, HEADER, T_FLUSH
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.spec import VHOST, VHOST_KINDS
from devices.vhostask import connect
from devices.viodev import ImsgType
from tests.backends import Programs
from tests.sectors import SIZE, Sectors
from tools.viodriver import SplitDriver
from tools.viodriver.private import DEADLINE, DeviceHost
from vmm.peers import files, place

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
    with ExitStack() as parts:
        kept = files(1)
        for fd in kept.values():
            parts.callback(os.close, fd)
        with start(programs, which, str(image)) as sock:
            fds = {"peer": sock.fileno(), **kept}
            host = parts.enter_context(
                DeviceHost(VHOST, kind.settings, fds=fds, queues=1, jail="best-effort")
            )
        [queue] = host.start(BLK_F_FLUSH | F_EVENT_IDX | F_INDIRECT_DESC)
        assert isinstance(queue, SplitDriver)
        sectors = Sectors(queue, REQUESTS)
        kills = iter(range(REQUESTS // (KILLS + 1), REQUESTS, REQUESTS // (KILLS + 1)))
        next_kill = next(kills)
        while not sectors.over:
            sectors.ask()
            host.kick(0)
            if sectors.done >= next_kill:
                next_kill = next(kills, REQUESTS)
                programs.kill(which)
                wait_told(host, "peer-lost")
                sock = start(programs, which, str(image))
                while not serves(host, sock):  # on a busy machine it may be too slow
                    sock = connect_to(programs.socket(which))
            if not queue.enable_calls():
                assert host.wait_call(0, DEADLINE), host.said
            sectors.take()
        queue.enable_calls()
        queue.add([HEADER.pack(T_FLUSH, 0, 0)], [1])
        host.kick(0)
        while not queue.collect():
            assert host.wait_call(0, DEADLINE)
    sectors.compare(image)


def wait_told(host: DeviceHost, word: str) -> None:
    """Wait for a word of the device, and forget it."""
    while word not in host.told:
        assert host.listen(DEADLINE), (word, host.told, host.said[-4:])
    host.told.remove(word)
