"""A network device in this process: its driver, a tap or a stream, and a host that only remembers.

with TapLab() as tap, NetLab(tap) as lab:
    lab.start(NET_F_MRG_RXBUF)
    lab.transmit(b"frame")
    [sent] = tap.receive(1)
    lab.give(16, 2048)
    tap.send(b"frame")
    [received] = lab.received()
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from devices.device import INFO
from devices.netdevice import Vionet
from devices.nethdr import HEADER_BYTES, NET_F_MRG_RXBUF, OLD_HEADER_BYTES
from devices.stream import Stream
from devices.tap import Tap
from devices.virtio import Registers
from tools.viodriver import make_memory
from tools.viodriver.registers import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from devices.device import Timer
    from devices.guestmem import GuestMemory, Region
    from tests.taplab import TapLab
    from tools.viodriver import PackedDriver, SplitDriver

MEMORY: Final = 64 << 20
LLADDR: Final = "fe:e1:bb:d1:00:01"
OWN: Final = bytes.fromhex(LLADDR.replace(":", ""))
PEER: Final = bytes.fromhex("fee1bad10001")
ARENA: Final = 8 << 20

SETTINGS: Final = {
    "lladdr": LLADDR,
    "locked": False,
    "mtu": 0,
    "queues": 1,
    "link": True,
    "rx_rate": 0,
    "tx_rate": 0,
    "rx_pps": 0,
    "tx_pps": 0,
    "local": None,
    "backend": "tap",
}


class Received(NamedTuple):
    """A frame as the driver sees it."""

    header: bytes
    data: bytes
    buffers: int  # how many chains it came in


class FakeTimer:
    """Remembers what it was armed for; fires when the lab says so."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.seconds: float | None = None

    def arm(self, seconds: float, every: float = 0.0) -> None:
        self.seconds = seconds

    def disarm(self) -> None:
        self.seconds = None

    def fire(self) -> None:
        self.seconds = None
        self._callback()


class NetLab(VirtioDriver):
    """Host, door and driver of one vionet."""

    def __init__(
        self,
        tap: TapLab | None = None,
        *,
        stream: int = -1,
        regions: Sequence[Region] = (),
        packed: bool = False,
        memory: GuestMemory | None = None,
        inflight: Sequence[memoryview | None] = (),
        **settings: Any,
    ) -> None:
        """Make a device on a tap's queues, or on a stream's descriptor, which it takes over."""
        self.memory = memory or make_memory(MEMORY, regions)
        self.interrupts: list[int] = []
        self.scheduled: list[int] = []
        self.said: list[str] = []
        self.watched: dict[int, Callable[[int], None]] = {}
        self._epoll = select.epoll()
        self.timers: list[FakeTimer] = []
        pairs = len(tap.fds) if tap else 1
        self.nr_queues = 2 * pairs + 1
        self.fds = tap.dup() if tap else [stream]
        self.backend = Tap(self.fds) if tap else Stream(stream)
        made = {**SETTINGS, "queues": pairs, **settings}
        self.device = Vionet(self.memory, self, self.backend, made)
        self.registers = Registers(
            self.device, self.memory, self, packed=packed, inflight=list(inflight)
        )
        self.queues: list[SplitDriver | PackedDriver] = []
        self.header_bytes = HEADER_BYTES

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.device.reset()
        self._epoll.close()
        for fd in self.fds:
            os.close(fd)

    # The driver.

    def read(self, reg: int, size: int) -> int:
        return self.registers.read(reg, size)[0]

    def write(self, reg: int, size: int, value: int) -> None:
        self.registers.write(reg, size, value)

    def start(
        self, features: int = 0, *, size: int = 0, arena_bytes: int = ARENA
    ) -> list[SplitDriver | PackedDriver]:
        self.queues = super().start(features, size=size, arena_bytes=arena_bytes)
        self.header_bytes = HEADER_BYTES
        return self.queues

    def start_legacy(
        self, features: int = 0, *, arena_bytes: int = ARENA, driver_ok: bool = True
    ) -> list[SplitDriver | PackedDriver]:
        self.queues = super().start_legacy(features, arena_bytes=arena_bytes, driver_ok=driver_ok)
        self.header_bytes = HEADER_BYTES if features & NET_F_MRG_RXBUF else OLD_HEADER_BYTES
        return self.queues

    def transmit(
        self, *frames: bytes, header: bytes = b"", cuts: Sequence[int] = (), pair: int = 0
    ) -> None:
        """Send frames, and wait until the device is done; `cuts` are lengths of descriptors."""
        for frame in frames:
            self.offer(frame, header=header, cuts=cuts, pair=pair)
        self.serve_queue(2 * pair + 1)

    def offer(
        self, frame: bytes, *, header: bytes = b"", cuts: Sequence[int] = (), pair: int = 0
    ) -> int:
        """Make a frame available, without a kick; return its token."""
        whole = header.ljust(self.header_bytes, b"\0") + frame
        parts, at = [], 0
        for cut in cuts:
            parts.append(whole[at : at + cut])
            at += cut
        token: int = self.queues[2 * pair + 1].add([*parts, whole[at:]])
        return token

    def serve_queue(self, index: int) -> None:
        """Kick a queue, serve until nothing is to be done, and collect it."""
        self.schedule(index)
        self.serve()
        for used in self.queues[index].collect():
            assert used.written == 0

    def give(self, count: int, *lengths: int, pair: int = 0) -> None:
        """Give the device `count` receive buffers, each of descriptors of these lengths."""
        queue = self.queues[2 * pair]
        for _ in range(count):
            request = queue.place([], lengths)
            request.owned = True
            queue.submit(request)
        self.schedule(2 * pair)

    def received(self, pair: int = 0) -> list[Received]:
        """Let the device receive all there is, and take it."""
        self.serve()
        return self.collect(pair)

    def collect(self, pair: int = 0) -> list[Received]:
        """Take the frames that were received."""
        found: list[Received] = []
        queue = self.queues[2 * pair]
        parts = [(used, queue.data(used.request, used.written)) for used in queue.collect()]
        while parts:
            header = parts[0][1][: self.header_bytes]
            assert len(header) == self.header_bytes
            numbered = len(header) == HEADER_BYTES
            count = int.from_bytes(header[10:12], "little") if numbered else 1
            mine, parts = parts[:count], parts[count:]
            assert len(mine) == count, "num_buffers promises more than there is"
            for used, _ in mine[:-1]:
                assert used.written == used.request.writable_bytes, "a gap"
            data = b"".join(data for _, data in mine)
            found.append(Received(header, data[self.header_bytes :], count))
        return found

    def command(self, kind: int, command: int, data: bytes = b"") -> int:
        """Make a control command; return its ack, or -1 if none was written."""
        index = self.device._control_index
        queue = self.queues[index]
        request = queue.place([bytes([kind, command]), *([data] if data else [])], [1])
        self.memory.write(request.segments[-1].gpa, b"\xee")
        request.owned = True
        queue.submit(request)
        self.schedule(index)
        self.serve()
        [used] = queue.collect()
        assert used.written == 1
        [ack] = queue.data(request)
        return int(ack)

    # Its host.

    def serve(self) -> int:
        """Serve what is scheduled or readable until there is nothing; return how many turns."""
        turns = 0
        while True:
            ready = self._ready()
            if not self.scheduled and not ready:
                return turns
            turns += 1
            assert turns < 20_000, "the device spins"
            for fd, events in ready:
                if fd in self.watched:
                    self.watched[fd](events)
            if self.scheduled:
                self.turn()

    def turn(self) -> None:
        """Serve the queue that was scheduled first, as the process would."""
        index = self.scheduled.pop(0)
        queue = self.registers.transport.live[index]
        if queue is None:
            self.registers.transport.early_kick(index)
        elif self.device.kick(index, queue):
            self.scheduled.append(index)

    def _ready(self) -> list[tuple[int, int]]:
        return self._epoll.poll(0) if self.watched else []

    def interrupt(self, source: int) -> None:
        self.interrupts.append(source)

    def schedule(self, index: int) -> None:
        if index not in self.scheduled:
            self.scheduled.append(index)

    def notice(self, facts: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def log(self, level: int, text: str) -> None:
        if level >= INFO:
            self.said.append(text)

    def call(self, index: int) -> None:
        self.registers.transport.isr |= 1
        self.interrupt(index)

    def checkpoint(self) -> None:
        """See Host."""

    def config_changed(self) -> None:
        self.registers.transport.config_changed()

    def tell(self, word: str) -> None:
        raise NotImplementedError

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        assert fd not in self.watched, "watched twice"
        self.watched[fd] = callback
        self._epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        if self.watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        self.timers.append(FakeTimer(callback))
        return self.timers[-1]


def frame_of(length: int, seed: int = 0, *, to: bytes = PEER, source: bytes = OWN) -> bytes:
    """Return a frame of a protocol nobody speaks, its bytes different for every seed."""
    body = (seed.to_bytes(4, "big") + bytes((seed + i) & 0xFF for i in range(251))) * (
        length // 255 + 1
    )
    return (to + source + b"\x88\xb5" + body)[:length]
