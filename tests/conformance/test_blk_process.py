"""Block device as it runs: jailed, in a process of its own, reached by eventfds and messages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from config.model import DiskConfig
from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    S_IOERR,
    S_OK,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.images import open_disk
from devices.spec import BUSY
from devices.viodev import CONFIG_CHANGE, ImsgType
from tools.viodriver.private import DEADLINE, DeviceHost
from vmm.counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tools.viodriver import Used

SIZE = 8 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., DeviceHost]]:
    """Return a function that launches a device on an image of PATTERN, as a VM would."""
    opened: list[DeviceHost] = []

    def launch_(**settings: Any) -> DeviceHost:
        path = tmp_path / "disk.img"
        path.write_bytes(PATTERN)
        disk = DiskConfig(path=str(path), format="raw", serial="serial-7", **settings)
        fd = open_disk(disk, "vioblk0")
        try:
            host = DeviceHost("vioblk", disk._asdict(), fds={"image": fd}, jail="best-effort")
        finally:
            os.close(fd)
        opened.append(host)
        return host

    yield launch_
    for host in opened:
        host.close()


def ask(host: DeviceHost, queue: Any, *parts: bytes, room: int = 0) -> tuple[int, int, bytes]:
    """Make one request and wait for it: status, used length, data."""
    queue.enable_calls()
    queue.add(parts, [*([room] if room else []), 1])
    host.kick(0)
    assert host.wait_call(0, DEADLINE), host.said
    [used] = queue.collect()
    data = queue.data(used.request)
    return data[-1], used.written, data[:-1]


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_every_request_in_the_jail(
    launch: Callable[..., DeviceHost], tmp_path: Path, cache: str
) -> None:
    """The jail lets everything through that the device needs, aligned or not."""
    host = launch(cache=cache)
    [queue] = host.start(BLK_F_FLUSH)

    def header(kind: int, sector: int = 0) -> bytes:
        return HEADER.pack(kind, 0, sector)

    assert ask(host, queue, header(T_IN, 8), room=4096) == (S_OK, 4097, PATTERN[4096:8192])
    assert ask(host, queue, header(T_IN, 3), room=512) == (S_OK, 513, PATTERN[1536:2048])
    assert ask(host, queue, header(T_OUT, 8), b"w" * 4096) == (S_OK, 1, b"")
    assert ask(host, queue, header(T_OUT, 3), b"w" * 512) == (S_OK, 1, b"")
    assert ask(host, queue, header(T_FLUSH)) == (S_OK, 1, b"")
    identity = b"serial-7".ljust(20, b"\0")
    assert ask(host, queue, header(T_GET_ID), room=20) == (S_OK, 21, identity)
    for kind, ranges in (
        (T_DISCARD, SEGMENT.pack(1024, 8, 0)),
        (T_WRITE_ZEROES, SEGMENT.pack(2048, 8, 0)),
        (T_WRITE_ZEROES, SEGMENT.pack(3072, 9, SEGMENT_F_UNMAP)),
    ):
        assert ask(host, queue, header(kind), ranges) == (S_OK, 1, b"")
    assert ask(host, queue, header(T_IN, SIZE // 512), room=512)[0] == S_IOERR

    expected = bytearray(PATTERN)
    expected[4096:8192], expected[1536:2048] = b"w" * 4096, b"w" * 512
    for sector, count in ((1024, 8), (2048, 8), (3072, 9)):
        expected[512 * sector : 512 * (sector + count)] = bytes(512 * count)
    assert (tmp_path / "disk.img").read_bytes() == expected


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_deep_queue(launch: Callable[..., DeviceHost], cache: str) -> None:
    """Everything that is asked comes back, with far fewer interrupts than requests."""
    host = launch(cache=cache)
    [queue] = host.start(BLK_F_FLUSH)
    requests = [queue.place([HEADER.pack(T_IN, 0, 80 * i)], [4096, 1]) for i in range(64)]
    found: list[Used] = []
    calls = 0

    for _ in range(20):
        queue.submit(*requests)
        host.kick(0)
        while queue.outstanding:
            if not queue.enable_calls():
                assert host.wait_call(0, DEADLINE), host.said
                calls += 1
            found += queue.collect()

    assert len(found) == 20 * 64
    assert all(used.written == 4097 for used in found)
    for i, request in enumerate(requests):
        assert queue.data(request, 4096) == PATTERN[40960 * i : 40960 * i + 4096]
    if cache == "writeback":
        assert calls <= len(found) // 4


def test_resize_and_pause(launch: Callable[..., DeviceHost]) -> None:
    """Settings and pauses arrive, and their answers say what came of them."""
    host = launch()
    [queue] = host.start(BLK_F_FLUSH)

    answer = host.ask(ImsgType.SETTING, {"name": "resize", "value": 2 * SIZE})
    assert answer == {"value": 2 * SIZE}
    assert host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert host.read_config(0, 8) == 2 * SIZE // 512
    answer = host.ask(ImsgType.SETTING, {"name": "resize", "value": SIZE})
    assert "already" in answer["error"]

    host.ask(ImsgType.PAUSE)
    queue.add([HEADER.pack(T_IN, 0, 0)], [512, 1])
    host.kick(0)
    host.ask(ImsgType.SETTING, {"name": "resize", "value": 0})  # a turn of its loop later
    assert queue.collect() == []
    host.ask(ImsgType.UNPAUSE)
    assert host.wait_call(0, DEADLINE)
    assert len(queue.collect()) == 1


def test_a_reset_under_load(launch: Callable[..., DeviceHost]) -> None:
    """However much is in flight, a reset ends it, and the next driver starts afresh."""
    host = launch(cache="none")
    for _ in range(10):
        [queue] = host.start(BLK_F_FLUSH)
        for i in range(32):
            queue.add([HEADER.pack(T_IN, 0, 100 * i)], [8192, 1])
        host.kick(0)
        host.status = 0
        assert host.status == 0
        before = host.memory.read(0x10000, 1 << 20)
        assert host.read_config(0, 8) == SIZE // 512  # a round trip later
        assert host.memory.read(0x10000, 1 << 20) == before


def test_requests_are_counted_where_the_vm_process_can_see_them(tmp_path: Path) -> None:
    """Reads, writes and others with their bytes, also after the process is gone; nobody can cut
    the page short.
    """
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    disk = DiskConfig(path=str(path), format="raw")
    fd, counters = open_disk(disk, "vioblk0"), Counters("vioblk")
    try:
        fds = {"image": fd, "counters": counters.fd}
        with DeviceHost("vioblk", disk._asdict(), fds=fds, jail="best-effort") as host:
            [queue] = host.start(BLK_F_FLUSH)
            for size in (4096, 512):
                assert ask(host, queue, HEADER.pack(T_IN, 0, 8), room=size)[0] == S_OK
            assert ask(host, queue, HEADER.pack(T_OUT, 0, 8), bytes(1024))[0] == S_OK
            assert ask(host, queue, HEADER.pack(T_FLUSH, 0, 0))[0] == S_OK
            expected = {
                "read_requests": 2,
                "read_bytes": 4608,
                "write_requests": 1,
                "write_bytes": 1024,
                "other_requests": 1,
            }
            assert counters.read() == expected
        assert counters.read() == expected
        assert not counters.busy()
        os.pwrite(counters.fd, b"\1", 8 * BUSY)
        assert counters.busy()
        with pytest.raises(PermissionError):
            os.ftruncate(counters.fd, 0)
    finally:
        counters.close()
        os.close(fd)
