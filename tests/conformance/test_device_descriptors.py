"""Descriptors that a device process is given while it runs, in its jail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.viodev import ImsgType
from tests.odddevice import open_odd

if TYPE_CHECKING:
    from tools.viodriver.private import DeviceHost

ROOM = 2


def give(host: DeviceHost, text: str, name: str, value: Any) -> Any:
    """Send a setting with the reading end of a pipe that holds `text`; return the answer."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    try:
        return host.ask(ImsgType.SETTING, {"name": name, "value": value}, reading)
    finally:
        os.close(reading)


def test_a_device_takes_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes with a setting; giving one up makes room for the next, as often as one likes."""
    with open_odd(monkeypatch, descriptors=ROOM) as host:
        for n in range(3 * ROOM):
            assert give(host, f"pipe {n}", "keep", ROOM - 1) == {"value": f"pipe {n}"}


def test_what_it_refuses_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it refuses, or never sees since the setting is nonsense, there is room left."""
    with open_odd(monkeypatch, descriptors=ROOM) as host:
        for _ in range(3 * ROOM):
            assert "takes a descriptor" in give(host, "", "colour", 1)["error"]
        for _ in range(3 * ROOM):
            reading, writing = os.pipe()
            host.async_.send(ImsgType.SETTING, b"{", fd=reading)
            os.close(reading)
            assert b"error" in host.async_.receive().data
            with pytest.raises(BrokenPipeError):
                os.write(writing, b"nobody reads this")
            os.close(writing)
        assert give(host, "last", "keep", 1) == {"value": "last"}


def test_there_is_room_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is exact: the jail refuses the next one, and that is the end of the process."""
    with open_odd(monkeypatch, descriptors=ROOM) as host:
        for n in range(ROOM):
            assert give(host, f"{n}", "keep", ROOM) == {"value": f"{n}"}
        reading, writing = os.pipe()
        host.async_.send(ImsgType.SETTING, b'{"name": "keep", "value": 9}', fd=reading)
        assert host.wait_said("no descriptor where it said one follows")
        assert host.wait_end() == "exit status 1"
        os.close(reading)
        os.close(writing)


def test_only_settings_bring_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another message it is against the protocol: exit 1, and the reason in the log."""
    with open_odd(monkeypatch, descriptors=ROOM) as host:
        host.async_.send(ImsgType.PAUSE, fd=host.async_.fileno())
        assert host.wait_said("descriptor nobody asked for")
        assert host.wait_end() == "exit status 1"
