"""Runs code inside real device processes, jailed by the real spawner.

    with Prison("viornd") as prison:
        prison.attempt("open_passwd")          # "killed by signal 31"
        prison.system_call(2, 0, 0, 0)

The device is the real one, built by its own module; only its setting() is replaced, before the
spawner is forked, so that a message has it run an attempt.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from config.model import DiskConfig
from devices.spec import SPECS, VHOST, VhostKind
from devices.viodev import ChannelError, ImsgType
from tests import escape
from tests.vhostpeer import VhostPeer
from tests.vionetlab import SETTINGS as NET_SETTINGS
from tools.viodriver.private import DeviceHost, shared_spawner
from vmm.peers import files, place

if TYPE_CHECKING:
    from types import TracebackType

    import pytest

    from devices.device import Device

_libc = ctypes.CDLL(None)

KILLED: Final = "killed by signal 31"  # SIGSYS
SECONDS: Final = 5.0  # for one attempt


class Outside(NamedTuple):
    """What there is to attack."""

    vm_pid: int
    spawner_pid: int
    sibling_pid: int
    socket: str  # path of a listening Unix socket, as control.sock is one
    abstract: str
    port: int  # of a TCP server on 127.0.0.1
    file: str


class Prison:
    """A spawner, a device process to attack from, and one to attack."""

    def __init__(
        self, kind: str, patch: pytest.MonkeyPatch, directory: str, level: str = "required"
    ) -> None:
        self.kind, self._patch, self._directory, self._level = kind, patch, directory, level
        self._parts = ExitStack()
        self._host: DeviceHost | None = None

    def __enter__(self) -> Self:
        module = __import__(f"devices.{self.kind}", fromlist=["create"])
        real = module.create

        def create(*args: Any) -> Device:
            device: Device = real(*args)
            device.setting = run  # type: ignore[method-assign]
            device.take = keep  # type: ignore[method-assign]
            return device

        self._patch.setattr(module, "create", create)
        try:
            self.spawner = self._parts.enter_context(shared_spawner(self._level))
            self.sibling = self._parts.enter_context(self._launch())
            self.outside = self._make_outside()
        except BaseException:
            self._parts.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._host is not None:
            self._host.close()
        self._parts.close()

    @property
    def host(self) -> DeviceHost:
        """The device process to attack from; a new one if the last has ended."""
        if self._host is None:
            self._host = self._launch()
            self._host.async_.set_deadline(SECONDS)
            self._fill_room(self._host)
        return self._host

    def attempt(self, name: str) -> str:
        """Run an attempt in a device process of its own, and say how it ended."""
        ended = self._ask("attempt", [name, self.outside])
        if self._host is not None:
            self._host.close()  # what the attempt has done must not help the next one
            self._host = None
        return ended

    def system_call(self, number: int, *args: int) -> str:
        """Make one system call, and say how it ended: "returned", or how the process did."""
        return self._ask("call", [number, *args])

    def _ask(self, name: str, value: Any) -> str:
        host = self.host
        try:
            answer = host.ask(ImsgType.SETTING, {"name": name, "value": value})
        except ChannelError:
            ended = host.wait_end()
            host.close()
            self._host = None
            return ended
        return str(answer.get("value", answer))

    def _fill_room(self, host: DeviceHost) -> None:
        """Give it the descriptors that there is room for: what then fits is too many."""
        for _ in range(SPECS[self.kind].descriptors):
            with open(os.devnull) as null:
                host.ask(ImsgType.SETTING, {"name": "", "value": 0}, null.fileno())

    def _launch(self) -> DeviceHost:
        if self.kind == "vionet":
            mine, theirs = socket.socketpair()
            self._parts.enter_context(mine)
            with theirs:
                settings = {**NET_SETTINGS, "backend": "stream"}
                fds = {"stream0": theirs.fileno()}
                return DeviceHost(
                    "vionet", settings, spawner=self.spawner, memory_size=1 << 20, fds=fds
                )
        if self.kind == VHOST:
            return self._launch_served()
        if self.kind != "vioblk":
            return DeviceHost(self.kind, spawner=self.spawner, memory_size=1 << 20)
        path = os.path.join(self._directory, "disk.img")
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, 1 << 20)
            settings = DiskConfig(path=path, format="raw")._asdict()
            return DeviceHost(
                "vioblk", settings, spawner=self.spawner, memory_size=1 << 20, fds={"image": fd}
            )
        finally:
            os.close(fd)

    def _launch_served(self) -> DeviceHost:
        """Launch a device with a back end behind it."""
        settings = place("dev", "/peer", VhostKind(40, 0xFF0000, 16, 0, 1), 1, exact=True).settings
        mine, theirs = socket.socketpair()
        peer = VhostPeer()
        peer.serve(theirs)
        self._parts.callback(peer.close)
        kept = files(1)
        try:
            fds = {"peer": mine.fileno(), **kept}
            return DeviceHost(
                VHOST, settings, spawner=self.spawner, memory_size=1 << 20, fds=fds, queues=1
            )
        finally:
            for fd in kept.values():
                os.close(fd)
            mine.close()

    def _make_outside(self) -> Outside:
        listen = self._parts.enter_context
        path, abstract = os.path.join(self._directory, "control.sock"), f"\0pyvmd-{os.getpid()}"
        for address in (path, abstract):
            unix = listen(socket.socket(socket.AF_UNIX))
            unix.bind(address)
            unix.listen()
        tcp = listen(socket.socket())
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        port = tcp.getsockname()[1]
        pids = os.getpid(), self.spawner.pid, self.sibling.process.pid
        return Outside(*pids, path, abstract, port, __file__)


def without_filters(patch: pytest.MonkeyPatch) -> None:
    """Have jails made without seccomp, to see what else there is."""
    patch.setattr("devices.seccomp.install", lambda _code: None)
    patch.setattr("tests.jaillab.use_up_room", _use_up_room)


def use_up_room() -> None:
    """Where there are filters, they refuse all that would take a descriptor."""


def _use_up_room() -> None:
    """Fill the room of kinds that are passed descriptors at run time: the limit is behind it."""
    with suppress(OSError):
        while True:
            os.dup(0)


def keep(name: str, value: Any, fd: int) -> None:
    """Stand in for Device.take: it stays open."""


def run(name: str, value: Any) -> str:
    """Do as the test says; inside the jail, in the place of Device.setting."""
    try:
        if name == "attempt":
            use_up_room()
            escape.ATTEMPTS[value[0]].run(Outside(*value[1]))
        else:
            _libc.syscall(*(ctypes.c_long(word) for word in value))
    except OSError as err:
        return f"refused: {errno.errorcode.get(err.errno or 0, err)}"
    except MemoryError:
        return "refused: no memory"
    return "returned"
