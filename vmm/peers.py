"""Devices that other programs serve, by vhost-user: what they are, and connections to them.

The protocol is spoken by the device process (devices/viovhost.py). Here is what that cannot do:
it has no way to a socket, so when its back end has gone it says a word, and gets a new connection
from here. How soon the next attempt is made depends on what happened:

    peer-lost     gone                        0.1 s, then twice as long each time, up to 2 s
    peer-bad      nonsense, or another one    1 s, then twice as long each time, up to 60 s
    (no answer)   nobody listens              as if lost

A back end that has served longer than the wait before it starts again with the shortest.
"""

from __future__ import annotations

import fcntl
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import PyvmError
from devices.spec import QUEUE_SIZE_MAX, VHOST_KINDS, VhostKind, vhost_spec
from vmm import log
from vmm.connector import Connector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from config.model import VhostConfig, VmConfig
    from devices.loop import Loop, Timer
    from devices.spec import DeviceSpec

_LOST: Final = (0.1, 2.0)  # seconds: first and longest wait
_BAD: Final = (1.0, 60.0)
#: Bytes per queue of what outlives a device process: rings (vhostshadow), in-flight area.
_FILES: Final = {"rings": 0x4000, "area": 0x10000}
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_QUEUE_SIZE: Final = 256
_UP, _GONE, _SENT_AWAY = "peer-up", "peer-lost", "peer-bad"
WORDS: Final = (_UP, _GONE, _SENT_AWAY)


class Place(NamedTuple):
    """One device of vm.yaml that another program serves."""

    name: str
    path: str
    spec: DeviceSpec
    settings: dict[str, Any]

    @property
    def queues(self) -> int:
        """How many the driver finds at most: those of the back end, and one for several pairs."""
        count: int = self.settings["queues"]
        return count + (self.spec.virtio_id == VHOST_KINDS["net"].virtio_id and count > 2)


class Peer:
    """One device's other end."""

    def __init__(self, number: int, place: Place) -> None:
        self.number, self.place, self.name = number, place, place.name
        self.fds: dict[str, int] = {}
        self.facts: dict[str, Any] = {
            "vhost_user": {"path": place.path, "state": "connected", "connections": 1}
        }
        self.timer: Timer | None = None
        self._wait, self._since = 0.0, time.monotonic()

    def note(self, state: str) -> None:
        """Have `status --json` say where it stands: connected, gone, or sent away."""
        self.facts["vhost_user"]["state"] = state
        if state == "connected":
            self._since = time.monotonic()
            self.facts["vhost_user"]["connections"] += 1

    def next_wait(self, first: float, longest: float) -> float:
        """Return after how many seconds to connect next."""
        if time.monotonic() - self._since > max(self._wait, first):
            self._wait = 0.0
        self._since = time.monotonic() + longest  # until it serves again
        self._wait = min(max(2 * self._wait, first), longest)
        return self._wait


class Peers:
    """All of a VM. For the loop's thread."""

    def __init__(self, config: VmConfig, level: str, parts: ExitStack, loop: Loop) -> None:
        """Fork the connector; with one thread only, and nothing open. Raises HostError."""
        self._peers = [Peer(number, place) for number, place in enumerate(places(config))]
        self._by_name = {peer.name: peer for peer in self._peers}
        self._connector = Connector(config.name, [p.place.path for p in self._peers], level)
        parts.callback(self._connector.close, loop)
        self._connector.on_answer = self._answered
        self._parts, self._loop = parts, loop
        #: Gives a device a connection, as Devices.set does.
        self.hand: Callable[[str, str, Any, int], Any] = lambda name, setting, value, fd: None
        #: Called with an event for clients, and its data.
        self.announce: Callable[[str, dict[str, Any]], None] = lambda event, data: None

    def get(self, name: str) -> Peer:
        """Return the one of a device, connected for the first time. Raises HostError."""
        peer = self._by_name[name]
        try:
            peer.fds["peer"] = self._connector.connect(peer.number)
        except PyvmError as err:
            err.device = name
            raise
        self._parts.callback(_close, peer.fds)
        peer.fds |= files(peer.place.settings["queues"])
        return peer

    def begin(self) -> None:
        """The device processes are there, and the loop is about to run."""
        for peer in self._peers:
            # The device process has a copy; this one must not keep the connection open.
            os.close(peer.fds.pop("peer"))
            peer.timer = self._loop.timer(partial(self._connector.ask, peer.number))
            self._parts.callback(peer.timer.close)
        self._connector.watch(self._loop)

    def said(self, name: str, word: str) -> bool:
        """Act on a word of a device; return whether it was one about its other end."""
        peer = self._by_name.get(name)
        if peer is None or word not in WORDS:
            return False
        if word == _UP:
            peer.note("connected")
            self.announce("X_PYVMD_PEER_BACK", {"device": name})
        else:
            was = peer.facts["vhost_user"]["state"]
            state = "gone" if word == _GONE else "sent away"
            peer.note(state)
            self._try_again(peer, *(_LOST if word == _GONE else _BAD))
            if was == "connected":
                self.announce("X_PYVMD_PEER_LOST", {"device": name, "reason": state})
        return True

    def _try_again(self, peer: Peer, first: float, longest: float) -> None:
        if peer.timer is not None:
            peer.timer.arm(peer.next_wait(first, longest))

    def _answered(self, number: int, fd: int, why: str) -> None:
        peer = self._peers[number]
        if fd < 0:
            log.debug(f"{peer.place.path}: {why}", peer.name)
            self._try_again(peer, *_LOST)
            return
        try:
            self.hand(peer.name, "peer", None, fd)
        except PyvmError as err:
            log.warning(f"cannot connect it again: {err}", peer.name)
            # A device that is lost needs none; one that has a connection, neither.
        finally:
            os.close(fd)


def files(queues: int) -> dict[str, int]:
    """Return what outlives a process for a device with so many queues. Raises OSError."""
    made: dict[str, int] = {}
    for name, size in _FILES.items():
        made[name] = fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size * queues)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return made


def _close(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def places(config: VmConfig) -> Iterator[Place]:
    """Yield what of vm.yaml other programs serve."""
    if config.rng.vhost_user:
        yield place("viornd", config.rng.vhost_user, VHOST_KINDS["rng"], 1, exact=True)
    for index, nic in enumerate(config.interfaces):
        if nic.vhost_user:
            from vmm.net.plan import guest_lladdr  # 3 ms, for those who have some

            lladdr = nic.lladdr or guest_lladdr(config.name, index)
            kind = VHOST_KINDS["net"]
            own = {"lladdr": lladdr, "mtu": nic.mtu, "in_order": True}
            yield place(f"vionet{index}", nic.vhost_user, kind, nic.queues, exact=True, **own)
    for index, disk in enumerate(config.disks):
        if disk.vhost_user:
            # One queue unless told otherwise, as with our own.
            kind = VHOST_KINDS["blk"]
            yield place(f"vioblk{index}", disk.vhost_user, kind, disk.queues, exact=True)
    for index, device in enumerate(config.vhost_user):
        yield _further(device, f"vhost{index}", config.vcpus)


def _further(device: VhostConfig, name: str, vcpus: int) -> Place:
    if device.type:
        kind = VHOST_KINDS[device.type]
    else:
        kind = VhostKind(device.id, 0xFF0000, _QUEUE_SIZE, 0, 1, device.config_size)
    if device.queue_size:
        kind = kind._replace(queue_size=device.queue_size)
    count = device.queues or (vcpus if kind.fixed else 1)
    return place(name, device.socket, kind, count, exact=bool(device.queues), tag=device.tag)


def place(name: str, path: str, kind: VhostKind, count: int, *, exact: bool, **own: Any) -> Place:
    """Return a device with `count` request queues; fewer are enough unless `exact`."""
    settings = {
        "path": path,
        "virtio_id": kind.virtio_id,
        "queues": kind.fixed + kind.each * count,
        "least": kind.fixed + kind.each,
        "exact": exact,
        "queue_size": min(kind.queue_size, QUEUE_SIZE_MAX),
        "config_length": kind.config_length,
        "in_order": False,
        **own,
    }
    return Place(name, path, vhost_spec(kind), settings)
