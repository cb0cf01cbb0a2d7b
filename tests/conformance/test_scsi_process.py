"""The CD-ROM drive as it runs: jailed, in a process of its own, its discs changed by descriptor."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.disc import BLOCK
from devices.images import open_disc
from devices.scsireq import AN, AN_ANSWER, DRIVE_LUN, EVENT, HEADER, RESPONSE
from devices.viodev import ImsgType
from tools.viodriver.private import DEADLINE, DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONTROLQ, EVENTQ, REQUESTQ = range(3)
BLOCKS = 64
CLOSED = {"tray_open": False, "locked": False}


def content(seed: int, blocks: int = BLOCKS) -> bytes:
    """A disc's bytes: every block says which it is."""
    return b"".join(bytes((seed, block % 251)) * (BLOCK // 2) for block in range(blocks))


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., DeviceHost]]:
    """Return a function that launches a drive, with a disc in it if it gets one's bytes."""
    opened: list[DeviceHost] = []

    def launch_(data: bytes | None = None) -> DeviceHost:
        fds = {}
        if data is not None:
            (tmp_path / "first.iso").write_bytes(data)
            fds["disc1"] = open_disc(str(tmp_path / "first.iso"))
        host = DeviceHost("vioscsi", {}, fds=fds, jail="best-effort")
        for fd in fds.values():
            os.close(fd)
        opened.append(host)
        return host

    yield launch_
    for host in opened:
        host.close()


def ask(host: DeviceHost, queues: Any, cdb: bytes, room: int = 0) -> tuple[int, int, bytes, bytes]:
    """Do one command: response, status, sense, data."""
    queue = queues[REQUESTQ]
    queue.enable_calls()
    header = HEADER.pack(DRIVE_LUN, 1, 0, 0, 0) + cdb.ljust(32, b"\0")
    queue.add([header], [108, *([room] if room else [])])
    host.kick(REQUESTQ)
    assert host.wait_call(REQUESTQ, DEADLINE), host.said
    [used] = queue.collect()
    data = queue.data(used.request, used.written)
    sense_len, _, _, status, response = RESPONSE.unpack_from(data)
    return response, status, data[12 : 12 + sense_len], data[108:]


def read(host: DeviceHost, queues: Any, lba: int, count: int) -> bytes:
    """READ(10); b"" if it fails."""
    cdb = b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big")
    response, status, _, data = ask(host, queues, cdb, count * BLOCK)
    return data if (response, status) == (0, 0) else b""


def sense(host: DeviceHost, queues: Any) -> tuple[int, int, int]:
    """TEST UNIT READY: sense key, additional code and qualifier; zeroes if it is ready."""
    _, status, data, _ = ask(host, queues, bytes(6))
    return (data[2], data[12], data[13]) if status else (0, 0, 0)


def insert(
    host: DeviceHost, path: Path, data: bytes, *, force: bool = False, number: int = 0
) -> Any:
    """Have a disc put in; return the answer."""
    path.write_bytes(data)
    fd = open_disc(str(path))
    try:
        return host.ask(ImsgType.SETTING, {"name": "insert", "value": [force, number]}, fd)
    finally:
        os.close(fd)


def test_a_disc_is_read_in_the_jail(launch: Callable[..., DeviceHost]) -> None:
    """Power-on attention, then every block, in large reads and small ones."""
    data = content(1)
    host = launch(data)
    queues = host.start()
    assert sense(host, queues) == (6, 0x29, 0)
    assert sense(host, queues) == (0, 0, 0)
    assert read(host, queues, 0, BLOCKS) == data
    assert [read(host, queues, lba, 1) for lba in (0, 7, BLOCKS - 1)] == [
        data[lba * BLOCK : (lba + 1) * BLOCK] for lba in (0, 7, BLOCKS - 1)
    ]
    assert read(host, queues, BLOCKS, 1) == b""


def test_discs_come_and_go(launch: Callable[..., DeviceHost], tmp_path: Path) -> None:
    """An empty drive gets disc after disc; each is told once, and the last one is what is read."""
    host = launch()
    queues = host.start()
    assert sense(host, queues) == (6, 0x29, 0)
    assert sense(host, queues) == (2, 0x3A, 1)
    for seed in range(2, 8):
        data = content(seed, seed)
        answer = insert(host, tmp_path / f"{seed}.iso", data, number=seed)
        assert answer == {"value": {**CLOSED, "blocks": seed, "disc": seed}}
        assert sense(host, queues) == (6, 0x28, 0)
        assert sense(host, queues) == (0, 0, 0)
        assert read(host, queues, 0, seed) == data
    answer = host.ask(ImsgType.SETTING, {"name": "eject", "value": [False, 0]})
    assert answer["value"] == {"tray_open": True, "locked": False, "blocks": 0, "disc": 0}
    assert sense(host, queues) == (2, 0x3A, 2)
    assert "setting" in host.ask(ImsgType.SETTING, {"name": "spin", "value": 0})["error"]


def test_what_is_no_disc_is_refused(launch: Callable[..., DeviceHost], tmp_path: Path) -> None:
    """Whatever descriptor comes: the disc that was there stays, and there is room for the next."""
    data = content(1)
    host = launch(data)
    queues = host.start()
    sense(host, queues)
    reading, writing = os.pipe()
    (tmp_path / "empty").touch()
    wrong = [reading, os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "empty", os.O_RDONLY)]
    wrong += [os.open(tmp_path / "empty", os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)]
    for _ in range(3):
        for fd in wrong:
            answer = host.ask(ImsgType.SETTING, {"name": "insert", "value": [True, 0]}, fd)
            assert answer.keys() == {"error"}
            answer = host.ask(ImsgType.SETTING, {"name": "colour", "value": True}, fd)
            assert "takes a descriptor" in answer["error"]
    for fd in (*wrong, writing):
        os.close(fd)
    assert read(host, queues, 0, BLOCKS) == data
    assert "value" in insert(host, tmp_path / "next.iso", content(9))


def test_a_locked_tray_needs_force(launch: Callable[..., DeviceHost], tmp_path: Path) -> None:
    """PREVENT holds the disc in, and the VM process knows; force takes it all the same."""
    data = content(1)
    host = launch(data)
    queues = host.start()
    sense(host, queues)
    assert ask(host, queues, bytes((0x1E, 0, 0, 0, 1, 0)))[:2] == (0, 0)
    while not host.told:
        assert host.listen(DEADLINE)
    assert host.told == ["locked 1"]
    for name in ("eject", "insert"):
        if name == "eject":
            answer = host.ask(ImsgType.SETTING, {"name": "eject", "value": [False, 0]})
        else:
            answer = insert(host, tmp_path / "next.iso", content(2))
        assert "the guest has locked the tray" in answer["error"]
        assert read(host, queues, 0, BLOCKS) == data
    assert "value" in insert(host, tmp_path / "next.iso", content(2), force=True)
    assert sense(host, queues) == (6, 0x28, 0)
    assert read(host, queues, 0, BLOCKS) == content(2)


def test_a_subscriber_gets_an_event(launch: Callable[..., DeviceHost], tmp_path: Path) -> None:
    """The event queue interrupts when a disc has come."""
    host = launch()
    queues = host.start()
    queues[CONTROLQ].add([AN.pack(2, DRIVE_LUN, 16)], [AN_ANSWER.size])
    host.kick(CONTROLQ)
    assert host.wait_call(CONTROLQ, DEADLINE)
    [used] = queues[CONTROLQ].collect()
    assert AN_ANSWER.unpack(queues[CONTROLQ].data(used.request)) == (16, 0)
    queues[EVENTQ].add([], [EVENT.size])
    host.kick(EVENTQ)
    insert(host, tmp_path / "next.iso", content(3))
    assert host.wait_call(EVENTQ, DEADLINE)
    [used] = queues[EVENTQ].collect()
    assert EVENT.unpack(queues[EVENTQ].data(used.request)) == (2, DRIVE_LUN, 16)


def test_an_image_that_shrinks_is_an_unreadable_place(
    launch: Callable[..., DeviceHost], tmp_path: Path
) -> None:
    """MEDIUM ERROR where the bytes have gone; the process lives, and reads what is left."""
    data = content(1)
    host = launch(data)
    queues = host.start()
    sense(host, queues)
    os.truncate(tmp_path / "first.iso", 10 * BLOCK)
    response, status, told, got = ask(host, queues, b"\x28\0\0\0\0\x08\0\0\x04\0", 4 * BLOCK)
    assert (response, status) == (0, 2)
    assert (told[0], told[2], told[12]) == (0xF0, 3, 0x11)
    assert int.from_bytes(told[3:7], "big") == 10
    assert got == data[8 * BLOCK : 10 * BLOCK]
    assert "shrunk" in host.wait_said("shrunk")
    os.unlink(tmp_path / "first.iso")
    assert read(host, queues, 0, 10) == data[: 10 * BLOCK]
