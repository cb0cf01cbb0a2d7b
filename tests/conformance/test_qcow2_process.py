"""qcow2 images in the device as it runs: jailed, killed, with overlap, out of space."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any, Final

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
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.viodev import ImsgType
from tests.qcow2lab import content, needs_qemu, qemu_check, qemu_img
from tests.rng import seeded
from tools.viodriver.private import DEADLINE, DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = needs_qemu
BASE_BYTES: Final = 3 << 20
SIZE: Final = 8 << 20
MODES: Final = pytest.mark.parametrize("cache", ["writeback", "none"])


@pytest.fixture
def base(tmp_path: Path) -> bytes:
    """A raw base, shorter than the disk that stands on it."""
    data = seeded(3).randbytes(BASE_BYTES)
    (tmp_path / "base.img").write_bytes(data)
    words = "backing_file=base.img,backing_fmt=raw"
    qemu_img("create", "-f", "qcow2", "-o", words, "a.qcow2", str(SIZE), cwd=tmp_path)
    return data


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., DeviceHost]]:
    """Return a function that launches a device on the overlay."""
    hosts: list[DeviceHost] = []

    def launch_(jail: str = "best-effort", **settings: Any) -> DeviceHost:
        disk = DiskConfig(path="", format="qcow2", **settings)
        direct = os.O_DIRECT * (disk.cache == "none")
        fds = {
            "image": os.open(tmp_path / "a.qcow2", os.O_RDWR | direct),
            "base0": os.open(tmp_path / "base.img", os.O_RDONLY | direct),
        }
        try:
            wanted = {**disk._asdict(), "bases": ["raw"]}
            hosts.append(DeviceHost("vioblk", wanted, fds=fds, jail=jail))
        finally:
            for fd in fds.values():
                os.close(fd)
        return hosts[-1]

    yield launch_
    for host in hosts:
        if host.events:  # it is open
            host.close()


def ask(
    host: DeviceHost, queue: Any, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 0
) -> tuple[int, bytes]:
    """Make one request and wait for it: status, data."""
    queue.enable_calls()
    parts = [HEADER.pack(kind, 0, sector), *([data] if data else [])]
    queue.add(parts, [*([room] if room else []), 1])
    host.kick(0)
    while not (found := queue.collect()):
        if queue.enable_calls():
            assert host.wait_call(0, DEADLINE), host.said
    answer = queue.data(found[0].request)
    return answer[-1], answer[:-1]


@MODES
def test_every_request_in_the_jail(
    launch: Callable[..., DeviceHost], base: bytes, tmp_path: Path, cache: str
) -> None:
    """Reads through to the base, copy on write, discard, zeroes, resize; closed without a leak."""
    model = bytearray(base.ljust(SIZE, b"\0"))
    host = launch(cache=cache)
    [queue] = host.start(BLK_F_FLUSH)
    assert ask(host, queue, T_IN, 8, room=4096) == (S_OK, bytes(model[4096:8192]))
    assert (
        ask(host, queue, T_IN, BASE_BYTES // 512 - 4, room=4096)[1]
        == model[BASE_BYTES - 2048 :][:4096]
    )
    for sector, length in (
        (1, 512),
        (8, 4096),
        (127, 1024),
        (6000, 70000 // 512 * 512),
        (16383, 512),
    ):
        data = seeded(sector).randbytes(length)
        assert ask(host, queue, T_OUT, sector, data) == (S_OK, b"")
        model[512 * sector : 512 * sector + length] = data
    for kind, sector, count, flags in (
        (T_WRITE_ZEROES, 100, 400, 0),
        (T_WRITE_ZEROES, 1024, 256, SEGMENT_F_UNMAP),
        (T_DISCARD, 6000, 512, 0),
    ):
        assert ask(host, queue, kind, 0, SEGMENT.pack(sector, count, flags)) == (S_OK, b"")
        part = slice(512 * sector, 512 * (sector + count))
        model[part] = bytes(512 * count)
        if kind == T_DISCARD:
            model[part] = ask(host, queue, T_IN, sector, room=512 * count)[1]
    assert ask(host, queue, T_FLUSH) == (S_OK, b"")
    grown = host.ask(ImsgType.SETTING, {"name": "resize", "value": SIZE + (1 << 20)})
    assert grown == {"value": SIZE + (1 << 20)}
    assert ask(host, queue, T_OUT, SIZE // 512, b"e" * 512) == (S_OK, b"")
    model += b"e" * 512 + bytes((1 << 20) - 512)
    for sector in range(0, len(model) // 512, 256):
        part = slice(512 * sector, 512 * (sector + 256))
        assert ask(host, queue, T_IN, sector, room=len(model[part])) == (S_OK, bytes(model[part]))

    host.close()
    assert qemu_check(tmp_path / "a.qcow2") == (0, 0)
    assert content(tmp_path / "a.qcow2") == model
    assert (tmp_path / "base.img").read_bytes() == base


@MODES
def test_what_was_reported_survives_a_kill(
    launch: Callable[..., DeviceHost], base: bytes, tmp_path: Path, cache: str
) -> None:
    """Without any flush: a write that was answered is there for the next process."""
    model = bytearray(base.ljust(SIZE, b"\0"))
    for turn in range(3):
        host = launch(cache=cache)
        [queue] = host.start(BLK_F_FLUSH)
        for number in range(20):
            sector = (turn * 5077 + number * 811) % (SIZE // 512 - 8)
            data = bytes([turn * 20 + number + 1]) * 4096
            assert ask(host, queue, T_OUT, sector, data) == (S_OK, b"")
            model[512 * sector : 512 * sector + 4096] = data
        host.process.kill()
        host.wait_end()

        assert qemu_check(tmp_path / "a.qcow2")[0] == 0
        assert content(tmp_path / "a.qcow2") == model


@MODES
def test_a_deep_queue_of_new_clusters(
    launch: Callable[..., DeviceHost], base: bytes, tmp_path: Path, cache: str
) -> None:
    """Many writes at once, of which some go to new clusters and some in place."""
    host = launch(cache=cache)
    [queue] = host.start(BLK_F_FLUSH)
    model = bytearray(base.ljust(SIZE, b"\0"))
    for turn in range(3):
        for number in range(64):
            sector = number * 250 // (turn + 1)
            data = bytes([turn * 64 + number + 1]) * 4096
            queue.add([HEADER.pack(T_OUT, 0, sector), data], [1])
            model[512 * sector : 512 * sector + 4096] = data
            if number % 8 == 7 or turn:  # overlapping ones may come in any order: one at a time
                host.kick(0)
                while queue.outstanding:
                    for used in queue.collect():
                        assert queue.data(used.request)[-1] == S_OK
                    if queue.outstanding and queue.enable_calls():
                        assert host.wait_call(0, DEADLINE), host.said
    host.close()
    assert qemu_check(tmp_path / "a.qcow2") == (0, 0)
    assert content(tmp_path / "a.qcow2") == model


@MODES
def test_a_host_that_is_out_of_space(
    launch: Callable[..., DeviceHost], base: bytes, tmp_path: Path, cache: str
) -> None:
    """Writes that find no room end in IOERR, and with room again all goes on."""
    model = bytearray(base.ljust(SIZE, b"\0"))
    host = launch("off", cache=cache)  # its limits can be changed from outside
    [queue] = host.start(BLK_F_FLUSH)
    pid = host.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    statuses = []
    for sector in range(0, SIZE // 512, 128):
        data = bytes([sector // 128 + 1]) * 4096
        statuses.append(ask(host, queue, T_OUT, sector, data)[0])
        if statuses[-1] == S_OK:
            model[512 * sector : 512 * sector + 4096] = data
    assert set(statuses) == {S_OK, S_IOERR}
    for sector in range(0, SIZE // 512, 128):
        assert ask(host, queue, T_IN, sector, room=4096) == (
            S_OK,
            bytes(model[512 * sector : 512 * sector + 4096]),
        )
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert ask(host, queue, T_OUT, 16000, b"again" * 1024) == (S_OK, b"")
    model[512 * 16000 : 512 * 16010] = b"again" * 1024
    host.close()
    assert qemu_check(tmp_path / "a.qcow2") == (0, 0)
    assert content(tmp_path / "a.qcow2") == model
