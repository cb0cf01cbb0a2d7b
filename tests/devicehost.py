"""A real device process without KVM: real spawner, real channels, shared memory, eventfds.

    with DeviceHost("viornd") as host:
        [queue] = host.start(F_EVENT_IDX)        # negotiates, sets the queues up, DRIVER_OK
        queue.add([], [64])
        host.kick(0)
        assert host.wait_call(0, 1.0)
        [used] = queue.collect()

`read` and `write` are register accesses as the VM process makes them, in the units of
`devices.spec.Block`. It is a `tests.driver.Transport`; what it knows of a guest is only memory.
Options: `irqfd=False` gives the device no call eventfds, so that it sends KICK messages;
`kicks=False` no kick eventfds, so that kicks are register writes.
"""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from devices.features import F_VERSION_1
from devices.guestmem import GuestMemory, Region
from devices.spec import SPECS, Block, Legacy
from devices.viodev import (
    CONFIG_CHANGE,
    Channel,
    ChannelError,
    Imsg,
    ImsgType,
    MsgType,
    ViodevMsg,
)
from devices.virtio import CommonCfg
from tests.driver import PackedDriver, SplitDriver, make_memfd, open_driver
from vmm.launch import Order, Spawner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from vmm.launch import DeviceProcess

RING_BASE: Final = 0x10000  # where start() puts the first queue
DEADLINE: Final = 10.0  # seconds; what does not come by then never will

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80


class DeviceHost:
    """Plays the VM process for one device process. Not for several threads."""

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
        #: LOG messages, "level text", and KICK sources that have arrived on the async channel.
        self.said: list[str] = []
        self.kicked: list[int] = []
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
        if self._own_spawner:
            self.spawner.close(_NoLoop())  # type: ignore[arg-type]
        elif self._process is not None:
            self._channels.shut_down()
            self._channels.close()
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

    @property
    def status(self) -> int:
        """device_status."""
        return self.read(CommonCfg.DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(CommonCfg.DEVICE_STATUS, 1, value)

    def isr(self, *, peek: bool = False) -> int:
        """Read ISR, which clears it; or only look."""
        return self.read(Block.ISR_PEEK if peek else Block.ISR, 1)

    # A driver's way to DRIVER_OK.

    def offered(self) -> int:
        """Read the features that the device offers, 128 bits of them."""
        features = 0
        for window in range(4):
            self.write(CommonCfg.DEVICE_FEATURE_SELECT, 4, window)
            features |= self.read(CommonCfg.DEVICE_FEATURE, 4) << 32 * window
        return features

    def accept(self, features: int) -> None:
        """Write driver features, all 128 bits."""
        for window in range(4):
            self.write(CommonCfg.DRIVER_FEATURE_SELECT, 4, window)
            self.write(CommonCfg.DRIVER_FEATURE, 4, features >> 32 * window & 0xFFFF_FFFF)

    def negotiate(self, features: int) -> bool:
        """Reset, accept `features` as they are, and set FEATURES_OK; False if it is refused."""
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        self.accept(features)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    def place(self, index: int, queue: SplitDriver | PackedDriver) -> None:
        """Write the registers of a queue, but do not enable it."""
        self.write(CommonCfg.QUEUE_SELECT, 2, index)
        self.write(CommonCfg.QUEUE_SIZE, 2, queue.size)
        for reg, gpa in (
            (CommonCfg.QUEUE_DESC, queue.desc_gpa),
            (CommonCfg.QUEUE_DRIVER, queue.avail_gpa),
            (CommonCfg.QUEUE_DEVICE, queue.used_gpa),
        ):
            self.write(reg, 4, gpa & 0xFFFF_FFFF)
            self.write(reg + 4, 4, gpa >> 32)

    def enable(self, index: int, queue: SplitDriver | PackedDriver) -> bool:
        """Place and enable a queue; False if the device refused it."""
        self.place(index, queue)
        self.write(CommonCfg.QUEUE_ENABLE, 2, 1)
        return self.read(CommonCfg.QUEUE_ENABLE, 2) == 1

    def start(
        self, features: int = 0, *, size: int = 0, arena_bytes: int = 1 << 19
    ) -> list[SplitDriver | PackedDriver]:
        """Drive the device to DRIVER_OK with VERSION_1 and `features`; return its queues.

        Each queue has `size` entries (0: what the device says), its ring and buffers one after
        another from RING_BASE on.
        """
        features |= F_VERSION_1
        assert self.negotiate(features), f"{features:#x} refused, offered {self.offered():#x}"
        queues = self.drivers(features, size=size, arena_bytes=arena_bytes)
        for index, queue in enumerate(queues):
            assert self.enable(index, queue), f"queue {index} refused"
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        assert self.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        return queues

    def start_legacy(
        self, features: int = 0, *, arena_bytes: int = 1 << 19
    ) -> list[SplitDriver | PackedDriver]:
        """The same through the legacy registers."""
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.write(Block.LEGACY + Legacy.DEVICE_STATUS, 1, status)
        self.write(Block.LEGACY + 4, 4, features)
        queues = self.drivers(features, align=4096, arena_bytes=arena_bytes)
        for index, queue in enumerate(queues):
            self.write(Block.LEGACY + Legacy.QUEUE_SELECT, 2, index)
            self.write(Block.LEGACY + 8, 4, queue.desc_gpa // 4096)
            assert self.read(Block.LEGACY + 8, 4) == queue.desc_gpa // 4096
        self.write(Block.LEGACY + Legacy.DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)
        return queues

    def drivers(
        self, features: int, *, size: int = 0, align: int = 64, arena_bytes: int = 1 << 19
    ) -> list[SplitDriver | PackedDriver]:
        """Make the driver's side of every queue in guest memory; no register is written."""
        queues: list[SplitDriver | PackedDriver] = []
        base = RING_BASE
        for index in range(self.nr_queues):
            self.write(CommonCfg.QUEUE_SELECT, 2, index)
            entries = size or self.read(CommonCfg.QUEUE_SIZE, 2)
            queues.append(
                open_driver(
                    self.memory, entries, base, features, align=align, arena_bytes=arena_bytes
                )
            )
            room = 64 * entries + 3 * 4096 + arena_bytes
            base += -(-room // 4096) * 4096
        return queues

    # tests.driver.Transport.

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

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of configuration space."""
        if size == 8:
            return self.read_config(offset, 4) | self.read_config(offset + 4, 4) << 32
        return self.read(Block.DEVICE + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of it."""
        self.write(Block.DEVICE + offset, size, value)

    # The async channel.

    def ask(self, kind: ImsgType, request: Any = None) -> Any:
        """Send PAUSE, UNPAUSE or SETTING and return the answer, None if it is empty."""
        self.async_.send(kind, b"" if request is None else json.dumps(request).encode())
        while (imsg := self._receive(DEADLINE)).type != kind:
            self._take(imsg)
        return json.loads(imsg.data) if imsg.data else None

    def listen(self, timeout: float = 0.0) -> None:
        """Take what has arrived on the async channel: into `said` and `kicked`."""
        while _readable(self.async_, timeout):
            self._take(self.async_.receive())
            timeout = 0.0

    def wait_said(self, words: str) -> str:
        """Wait for a LOG message that holds `words`, and return it."""
        deadline = time.monotonic() + DEADLINE
        while True:
            self.listen()
            for line in self.said:
                if words in line:
                    return line
            left = deadline - time.monotonic()
            if not _readable(self.async_, max(left, 0)):
                raise TimeoutError(f"{words!r} was not said, but: {self.said}")

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
        while True:
            self.listen()
            if source in self.kicked:
                self.kicked.remove(source)
                return True
            if not _readable(self.async_, max(deadline - time.monotonic(), 0)):
                return False

    def _take(self, imsg: Imsg) -> None:
        if imsg.type == ImsgType.LOG:
            self.said.append(f"{imsg.data[0]} {imsg.data[1:].decode()}")
        else:
            message = self.async_.decode(imsg)
            if message.type == MsgType.KICK:
                self.kicked.append(message.data)

    def _receive(self, timeout: float) -> Imsg:
        if not _readable(self.async_, timeout):
            raise TimeoutError("nothing on the async channel")
        return self.async_.receive()


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
