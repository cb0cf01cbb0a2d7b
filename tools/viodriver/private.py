"""A real device process without KVM: real spawner, real channels, shared memory, eventfds.

    with DeviceHost("viornd") as host:
        [queue] = host.start(F_EVENT_IDX)        # negotiates, sets the queues up, DRIVER_OK
        queue.add([], [64])
        host.kick(0)
        assert host.wait_call(0, 1.0)
        [used] = queue.collect()

`read` and `write` are register accesses as the VM process makes them, in the units of
`devices.spec.Block`; the rest of a driver's way to DRIVER_OK is in `tools.viodriver.registers`.
It is a `tools.viodriver.Transport`; what it knows of a guest is only memory.
Options: `irqfd=False` gives the device no call eventfds, so that it sends KICK messages;
`kicks=False` no kick eventfds, so that kicks are register writes.
"""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self

from devices.guestmem import GuestMemory, Region
from devices.spec import SPECS, Block
from devices.viodev import (
    CONFIG_CHANGE,
    Channel,
    ChannelError,
    Imsg,
    ImsgType,
    MsgType,
    ViodevMsg,
)
from tools.viodriver import make_memfd
from tools.viodriver.registers import VirtioDriver
from vmm.launch import Order, Spawner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from vmm.launch import DeviceProcess

DEADLINE: Final = 10.0  # seconds; what does not come by then never will


class DeviceHost(VirtioDriver):
    """Plays the VM process for one device process. Not for several threads."""

    transport = "private"

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any] | None = None,
        *,
        memory_size: int = 8 << 20,
        regions: Sequence[Region] = (),
        fds: Mapping[str, int] | None = None,
        queues: int = 0,
        irqfd: bool = True,
        kicks: bool = True,
        inflight: int | None = None,
        jail: str = "off",
        spawner: Spawner | None = None,
    ) -> None:
        """Launch a device and wait until it is ready. Raises HostError in its words.

        `queues` is their number (0: as in its spec), `fds` are the device's own descriptors,
        `inflight` is a memfd for its in-flight areas. A `spawner` given here is shared and stays.
        """
        self.kind = kind
        self.nr_queues = queues or len(SPECS[kind].queues)
        regions = tuple(regions) or (Region(0, memory_size, 0),)
        memory_fd = make_memfd(max(region.offset + region.size for region in regions))
        self.memory = GuestMemory(memory_fd, regions)
        self._own_spawner = spawner is None
        self.spawner = spawner or Spawner("test", jail)
        names = [*(f"call{n}" for n in range(self.nr_queues)), "callc", "resample"] if irqfd else []
        names += [f"kick{n}" for n in range(self.nr_queues)] if kicks else []
        #: The eventfds between VM and device, by the names the device knows.
        self.events = {name: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for name in names}
        given = {"memory": memory_fd, **self.events, **(fds or {})}
        if inflight is not None:
            given["inflight"] = inflight
        order = Order(kind, f"{kind}0", settings or {}, regions, given)
        #: LOG messages, "level text", and KICK messages that have arrived on the async channel.
        self.said: list[str] = []
        self.kicked: list[ViodevMsg] = []
        self.told: list[str] = []  # words of EVENT messages
        self._channels = _Channels()
        self._process: DeviceProcess | None = None
        try:
            self._process = self.spawner.launch(order, self._channels)()  # type: ignore[arg-type]
        finally:
            os.close(memory_fd)
            if self._process is None:
                self.close()
        self.sync, self.async_ = self._channels.sync, self._channels.async_

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask the process to leave, and end what of it, and of our own spawner, is left."""
        if self._process is not None:
            self._channels.shut_down()
            self._channels.close()
        if self._own_spawner:
            self.spawner.close(_NoLoop())  # type: ignore[arg-type]
        elif self._process is not None:
            self.wait_end()
        for fd in self.events.values():
            os.close(fd)
        self.events.clear()

    # Registers, as the VM process reads and writes them.

    def read(self, reg: int, size: int) -> int:
        """Read a device register."""
        return self.access(reg, size)[0]

    def access(self, reg: int, size: int) -> tuple[int, int]:
        """Read a device register: value, and the reply's interrupt state."""
        self.sync.send_msg(ViodevMsg(MsgType.IO_READ, reg, size))
        reply = self.sync.receive_msg()
        assert (reply.type, reply.reg, reply.data_valid) == (MsgType.IO_READ, reg, 1), reply
        return reply.data, reply.state

    def write(self, reg: int, size: int, value: int) -> None:
        """Write a device register; nothing answers."""
        self.sync.send_msg(ViodevMsg(MsgType.IO_WRITE, reg, size, data=value, data_valid=1))

    # Transport.

    def kick(self, queue: int) -> None:
        """Signal the queue's eventfd, as KVM does; or write the notify register."""
        fd = self.events.get(f"kick{queue}")
        if fd is None:
            self.write(Block.NOTIFY, 2, queue)
        else:
            os.eventfd_write(fd, 1)

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for a call of that queue (or of CONFIG_CHANGE), and take it."""
        if "callc" not in self.events:
            return self._wait_kick(queue, timeout)
        fd = self.events["callc" if queue == CONFIG_CHANGE else f"call{queue}"]
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1e3):
            return False
        os.eventfd_read(fd)
        return True

    def call_fd(self, queue: int) -> int:
        """Return the eventfd of a queue's calls; -1 without irqfd."""
        return self.events.get(f"call{queue}", -1)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return not self.process.ended and not self.process.wait(0.0)

    def facts(self) -> dict[str, Any]:
        """Return the process, and how kicks and calls reach it."""
        return {
            "kind": self.kind,
            "pid": self.process.pid,
            "irqfd": "callc" in self.events,
            "kicks": "kick0" in self.events,
        }

    # The async channel.

    def ask(self, kind: ImsgType, request: Any = None, fd: int | None = None) -> Any:
        """Send PAUSE, UNPAUSE or SETTING and return the answer, None if it is empty."""
        self.async_.send(kind, b"" if request is None else json.dumps(request).encode(), fd=fd)
        while _readable(self.async_, DEADLINE):  # syncs to a busy disk take their time
            if (imsg := self.async_.receive()).type == kind:
                return json.loads(imsg.data) if imsg.data else None
            self._take(imsg)
        raise TimeoutError(f"{self.process.name} does not answer")

    def listen(self, timeout: float = 0.0) -> bool:
        """Take one message off the async channel, into `said` or `kicked`; False if none came."""
        if not _readable(self.async_, timeout):
            return False
        self._take(self.async_.receive())
        return True

    def wait_said(self, words: str) -> str:
        """Wait for a LOG message that holds `words`, and return it."""
        deadline = time.monotonic() + DEADLINE
        while not (found := [line for line in self.said if words in line]):
            if not self.listen(max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"{words!r} was not said, but: {self.said}")
        return found[0]

    @property
    def process(self) -> DeviceProcess:
        """The device process."""
        assert self._process is not None
        return self._process

    def wait_end(self) -> str:
        """Wait for the end of the device process, and return how it ended, in words."""
        deadline = time.monotonic() + DEADLINE
        while not self.process.ended:
            if not _readable(self.spawner._channel, max(deadline - time.monotonic(), 0)):
                raise TimeoutError(f"{self.process.name} still runs")
            self.spawner._incoming(_NoLoop(), 0)  # type: ignore[arg-type]
        return self.process.ended

    def _wait_kick(self, source: int, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while source not in (message.data for message in self.kicked):
            if not self.listen(max(deadline - time.monotonic(), 0)):
                return False
        self.kicked = [message for message in self.kicked if message.data != source]
        return True

    def _take(self, imsg: Imsg) -> None:
        if imsg.type == ImsgType.LOG:
            self.said.append(f"{imsg.data[0]} {imsg.data[1:].decode()}")
        elif imsg.type == ImsgType.EVENT:
            self.told.append(imsg.data.decode())
        else:
            message = self.async_.decode(imsg)
            if message.type == MsgType.KICK:
                self.kicked.append(message)


def _readable(channel: Channel, timeout: float) -> bool:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1e3))


class _Channels:
    """Where vmm.launch wants a DeviceChannel: holds what that would hold, and does no more."""

    sync: Channel
    async_: Channel

    def open(self, sync: Channel, async_: Channel) -> None:
        """Take over the channels of a device that is ready."""
        self.sync, self.async_ = sync, async_

    def shut_down(self) -> None:
        """Ask the process to leave."""
        with suppress(ChannelError):  # it has left
            self.sync.send_msg(ViodevMsg(MsgType.SHUTDOWN))

    def close(self) -> None:
        """Hang up."""
        self.sync.close()
        self.async_.close()


class _NoLoop:
    """Where vmm.launch wants a loop, and this transport has none."""

    def remove(self, fd: int) -> None:
        """Nothing is watched."""


@contextmanager
def shared_spawner(jail: str = "off") -> Iterator[Spawner]:
    """Run a spawner for several DeviceHosts, one after another or at once."""
    spawner = Spawner("test", jail)
    try:
        yield spawner
    finally:
        spawner.close(_NoLoop())  # type: ignore[arg-type]


def facts(pid: int) -> dict[str, list[str]]:
    """Return what the kernel says of a process in /proc/PID/status, in words."""
    with open(f"/proc/{pid}/status") as file:
        return {name: words.split() for name, _, words in (line.partition(":") for line in file)}
