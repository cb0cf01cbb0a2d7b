"""What a device has to do, it can do in its jail: its work, and telling what it dies of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from config.model import DiskConfig
from devices import viornd
from devices.blkreq import HEADER
from devices.features import F_RING_RESET
from devices.viodev import ImsgType
from tests.jailhost import as_is, as_user, in_child, needs_root
from tools.viodriver.private import DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from devices.device import Device

WHO = [pytest.param(as_is, id="as-is"), pytest.param(as_user, id="user", marks=needs_root)]


@pytest.mark.parametrize("who", WHO)
def test_entropy_is_served_in_the_jail(who: Callable[[], None]) -> None:
    """The whole way: negotiation, requests, a rate limit with its timer, reset, pause."""

    def scene() -> int:
        who()
        with DeviceHost("viornd", {"rate": 1 << 20}, jail="required") as host:
            [queue] = host.start(F_RING_RESET)
            queue.add([], [4096])
            host.kick(0)
            assert host.wait_call(0, 5)
            host.ask(ImsgType.PAUSE)
            host.ask(ImsgType.UNPAUSE)
            host.status = 0
            return sum(used.written for used in queue.collect())

    assert in_child(scene) == 4096


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("who", WHO)
def test_a_disk_is_served_in_the_jail(who: Callable[[], None], cache: str, tmp_path: Path) -> None:
    """Every type of request, aligned and not, and a resize: none needs a call it may not make."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if cache == "none" else 0))
    settings = DiskConfig(path=str(path), format="raw", cache=cache)._asdict()

    def scene() -> list[int]:
        who()
        statuses = []
        with DeviceHost("vioblk", settings, jail="required", fds={"image": fd}) as host:
            [queue] = host.start()
            zeroes = (8).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4)
            for kind, data, room in (
                (1, b"x" * 4096, 0),  # OUT
                (0, b"", 4096),  # IN
                (0, b"", 512),  # shorter than a block of the host's
                (4, b"", 0),  # FLUSH
                (11, zeroes, 0),  # DISCARD
                (13, zeroes, 0),  # WRITE_ZEROES
                (8, b"", 20),  # GET_ID
            ):
                readable = [HEADER.pack(kind, 0, 0), *([data] if data else [])]
                queue.add(readable, [*([room] if room else []), 1])
                host.kick(0)
                assert host.wait_call(0, 5), f"request {kind} is not answered"
                [used] = queue.collect()
                statuses.append(queue.data(used.request)[-1])
            answer = host.ask(ImsgType.SETTING, {"name": "resize", "value": 2 << 20})
            assert "error" not in answer, answer
        return statuses

    try:
        assert in_child(scene) == [0] * 7
    finally:
        os.close(fd)
    assert path.stat().st_size == 2 << 20


def _fail(name: str, _value: object) -> object:
    """Stand in for Device.setting: fail in one of several ways, inside the jail."""
    if name == "os":
        return os.read(-1, 1)
    if name == "unicode":
        raise RuntimeError("\udcff\N{SNOWMAN}")
    if name == "guest":
        raise GuestError("broken")
    if name == "chained":
        try:
            return 1 // 0
        except ZeroDivisionError as err:
            raise RuntimeError("second") from err
    return 1 // 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero", "ZeroDivisionError"),
        ("os", "Bad file descriptor"),
        ("unicode", "RuntimeError"),
        ("chained", "RuntimeError: second"),
    ],
)
def test_last_words_leave_the_jail(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """What a device process dies of is told, though it can load nothing any more to tell it."""
    real = viornd.create

    def create(*args: Any) -> Device:
        made = real(*args)
        made.setting = _fail  # type: ignore[method-assign,assignment]
        return made

    monkeypatch.setattr(viornd, "create", create)
    with DeviceHost("viornd", jail="required") as host:
        host.async_.send(ImsgType.SETTING, b'{"name": "%s", "value": 0}' % name.encode())
        assert words in host.wait_said(words)
        assert host.wait_end() == "exit status 1"


class _Complains:
    def __del__(self) -> None:
        raise ValueError("from a destructor")


def test_an_error_nobody_can_catch_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints it with the line of source, which cannot be opened: it must not try."""
    real = viornd.create

    def create(*args: Any) -> Device:
        made = real(*args)
        made.setting = lambda name, value: bool(_Complains())  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(viornd, "create", create)
    with DeviceHost("viornd", jail="required") as host:
        assert host.ask(ImsgType.SETTING, {"name": "x", "value": 0}) == {"value": True}
