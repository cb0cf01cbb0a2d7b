"""Devices that other programs serve: which there are, and when to connect to them again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from config.errors import HostError
from config.load import load_text
from config.model import VmConfig
from devices.loop import Loop
from vmm.connector import Connector
from vmm.peers import Peer, Peers, places


def vm(text: str) -> VmConfig:
    """Return the VM of a vm.yaml with these keys."""
    return load_text(f"boot: {{kernel: /k}}\n{text}", "web.yaml").vms[0]


def test_places() -> None:
    """Each of vm.yaml's becomes a device with its queues, id and configuration space."""
    config = vm(
        "vcpus: 4\n"
        "rng: {vhost-user: /rng}\n"
        "interfaces: [{}, {vhost-user: /net, lladdr: 'fe:e1:bb:d1:00:01', mtu: 1400}]\n"
        "disks: [{path: a, format: raw}, {vhost-user: /disk, queues: 2}]\n"
        "vhost-user:\n"
        "- {type: fs, socket: /fs, tag: home}\n"
        "- {type: scsi, socket: /scsi, queues: 1, queue-size: 64}\n"
        "- {id: 40, socket: /any, queues: 3, config-size: 16}\n"
    )
    found = list(places(config))
    assert [(p.name, p.path, p.spec.virtio_id, p.spec.config_length) for p in found] == [
        ("viornd", "/rng", 4, 0),
        ("vionet1", "/net", 1, 12),
        ("vioblk1", "/disk", 2, 60),
        ("vhost0", "/fs", 26, 40),
        ("vhost1", "/scsi", 8, 36),
        ("vhost2", "/any", 40, 16),
    ]
    keys = ("queues", "least", "exact", "queue_size", "in_order")
    assert [tuple(p.settings[key] for key in keys) for p in found] == [
        (1, 1, True, 64, False),
        (2, 2, True, 256, True),
        (2, 1, True, 256, False),
        (5, 2, False, 128, False),
        (3, 3, True, 64, False),
        (3, 1, True, 256, False),
    ]
    assert found[1].settings["lladdr"] == "fe:e1:bb:d1:00:01"
    assert found[1].settings["mtu"] == 1400
    assert found[3].settings["tag"] == "home"


def test_a_network_device_without_an_address_gets_one() -> None:
    """The same at every start, as with those on taps."""
    (one,) = places(vm("interfaces: [{vhost-user: /net}]\n"))
    (other,) = places(vm("interfaces: [{vhost-user: /net}]\n"))
    assert one.settings["lladdr"] == other.settings["lladdr"]
    assert one.settings["lladdr"].startswith("fe:e1:bb:d1:")


@pytest.fixture(params=["off", "best-effort"])
def level(request: pytest.FixtureRequest) -> str:
    """Return how strict the jail is."""
    return str(request.param)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Return a loop."""
    loop = Loop()
    yield loop
    loop.close()


def test_connector(tmp_path: Path, loop: Loop, level: str) -> None:
    """It connects by number, again and again, and says why not; jailed or not."""
    path = str(tmp_path / "sock")
    connector = Connector("web", [path, "/" + "x" * 200], level)
    try:
        with pytest.raises(HostError, match=r"sock: cannot connect: No such file .*is the program"):
            connector.connect(0)
        with pytest.raises(HostError, match="File name too long"):
            connector.connect(1)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            with pytest.raises(HostError, match="refused"):
                connector.connect(0)
            listener.listen()
            for byte in (b"a", b"b"):
                with socket.socket(fileno=connector.connect(0)) as ours:
                    assert not os.get_blocking(ours.fileno())
                    ours.send(byte)
                    theirs, _ = listener.accept()
                    with theirs:
                        assert theirs.recv(1) == byte
    finally:
        connector.close(loop)


def test_connector_ends_with_its_vm_process(loop: Loop, level: str) -> None:
    """Hanging up is enough."""
    connector = Connector("web", ["/nowhere"], level)
    connector.close(loop)  # waits for it


class Clock:
    """Timers that fire when told to, and a clock that stands."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.armed: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def arm(self, seconds: float, every: float = 0.0) -> None:
        self.armed.append(seconds)

    def disarm(self) -> None:
        self.armed.append(-1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that vmm.peers sees."""
    clock = Clock()
    monkeypatch.setattr("vmm.peers.time.monotonic", clock.monotonic)
    return clock


def waits(peer: Peer, clock: Clock, first: float, longest: float, count: int) -> list[float]:
    """Return how long is waited for each of so many attempts, none of which helps."""
    found = []
    for _ in range(count):
        found.append(peer.next_wait(first, longest))
        clock.now += found[-1]
    return found


def test_waits_grow(clock: Clock) -> None:
    """Twice as long each time up to the longest; short again for one that has served for long."""
    (place,) = places(vm("rng: {vhost-user: /rng}\n"))
    peer = Peer(0, place)
    clock.now += 100
    assert waits(peer, clock, 0.1, 2.0, 7) == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    peer.note("connected")
    clock.now += 1.0  # less than the wait before
    assert waits(peer, clock, 0.1, 2.0, 1) == [2.0]
    peer.note("connected")
    clock.now += 10.0
    assert waits(peer, clock, 0.1, 2.0, 2) == [0.1, 0.2]
    assert waits(peer, clock, 1.0, 60.0, 7) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_words_become_attempts(
    tmp_path: Path, clock: Clock, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost: try, try again, hand the socket over. Clients hear of the first loss and the return."""
    path = str(tmp_path / "sock")
    events: list[tuple[str, dict[str, Any]]] = []
    handed: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(loop, "timer", lambda callback: _Armed(clock, callback))
    with ExitStack() as parts, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        found = Peers(vm(f"rng: {{vhost-user: {path}}}\n"), "off", parts, loop)
        found.announce = lambda event, data: events.append((event, data))

        def hand(name: str, setting: str, value: object, fd: int) -> None:
            handed.append((name, setting, os.get_blocking(fd)))
            loop.stop()

        found.hand = hand
        peer = found.get("viornd")
        assert set(peer.fds) == {"peer", "rings", "area"}
        found.begin()
        assert set(peer.fds) == {"rings", "area"}
        assert not found.said("vioblk0", "peer-lost")
        assert not found.said("viornd", "tray")

        clock.now += 100
        assert found.said("viornd", "peer-lost")
        assert clock.armed == [0.1]
        assert peer.facts["vhost_user"] == {"path": path, "state": "gone", "connections": 1}
        assert peer.timer is not None
        peer.timer.fire()  # type: ignore[attr-defined]
        loop.run()
        assert handed == [("viornd", "peer", False)]
        assert found.said("viornd", "peer-bad")
        assert peer.facts["vhost_user"]["state"] == "sent away"
        assert clock.armed == [0.1, 1.0]
        assert found.said("viornd", "peer-up")
        assert peer.facts["vhost_user"]["connections"] == 2
        assert events == [
            ("X_PYVMD_PEER_LOST", {"device": "viornd", "reason": "gone"}),
            ("X_PYVMD_PEER_BACK", {"device": "viornd"}),
        ]

        # Nobody listens: tried again, by itself.
        os.unlink(path)
        found.said("viornd", "peer-lost")
        tried = len(clock.armed)
        monkeypatch.setattr(clock, "arm", lambda seconds: loop.stop())
        peer.timer.fire()  # type: ignore[attr-defined]
        loop.run()
        assert len(clock.armed) == tried
        assert len(handed) == 1


class _Armed:
    """A timer."""

    def __init__(self, clock: Clock, callback: Any) -> None:
        self._clock, self.fire = clock, callback

    def arm(self, seconds: float) -> None:
        self._clock.arm(seconds)

    def close(self) -> None:
        pass
