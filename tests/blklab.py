"""A block device in this process: its driver, its image, and a host that only remembers.

with BlkLab(tmp_path, 1 << 20) as lab:
    lab.start(BLK_F_FLUSH)
    answer = lab.ask(T_IN, sector=8, room=512)
    assert (answer.status, answer.written) == (S_OK, 513)
"""

from __future__ import annotations

import os
import select
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from config.model import DiskConfig
from devices import uring
from devices.blkreq import HEADER
from devices.blkring import OverlappingServer
from devices.device import WARNING
from devices.raw import Raw
from devices.uringmake import DEPTH, make
from devices.vioblk import Vioblk
from devices.virtio import Registers
from tools.viodriver import make_memory
from tools.viodriver.registers import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    import pytest

    from devices.device import Timer
    from devices.guestmem import GuestMemory, Region
    from devices.raw import Disk
    from tools.viodriver import PackedDriver, SplitDriver, Used

DEADLINE: Final = 10.0  # seconds for what io_uring has in flight
MEMORY: Final = 16 << 20


class Answer(NamedTuple):
    """What became of a request."""

    status: int  # 0xEE if the device did not write it
    written: int  # used length
    data: bytes  # what the driver can read, without the status


class BlkLab(VirtioDriver):
    """Host, door and driver of one vioblk."""

    def __init__(
        self,
        directory: Path,
        size: int = 1 << 20,
        *,
        regions: Sequence[Region] = (),
        packed: bool = False,
        content: bytes = b"",
        memory: GuestMemory | None = None,
        inflight: memoryview | None = None,
        make_disk: Callable[[int], Disk] = Raw,
        **settings: Any,
    ) -> None:
        """Make an image of `size` bytes that begins with `content`, and a device on it.

        `memory` and `inflight` are those of a predecessor to take over from; `make_disk` opens the
        image, if its format is not raw.
        """
        self.image = directory / "disk.img"
        self.image.write_bytes(content)
        os.truncate(self.image, size)
        disk = DiskConfig(path=str(self.image), format="raw", **settings)
        flags = os.O_RDONLY if disk.readonly else os.O_RDWR
        self._fd = os.open(self.image, flags | os.O_DIRECT * (disk.cache == "none"))
        self.memory = memory or make_memory(MEMORY, regions)
        self.interrupts: list[int] = []
        self.scheduled: list[int] = []
        self.said: list[str] = []
        self.watched: dict[int, Callable[[int], None]] = {}
        self.nr_queues = disk.queues
        self.disk: Any = make_disk(self._fd)
        ring = uring.Ring(*make(DEPTH)) if disk.cache == "none" else None
        self.device = Vioblk(self.memory, self, self.disk, disk._asdict(), ring)
        self.registers = Registers(
            self.device,
            self.memory,
            self,
            packed=packed,
            inflight=[inflight] if inflight is not None else (),
        )
        self.queues: list[SplitDriver | PackedDriver] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.device.reset()  # nothing may be in flight when the memory goes
        if isinstance(self.device._server, OverlappingServer):
            self.device._server._ring.close()
        self.disk.finish()
        os.close(self._fd)

    # The driver.

    def read(self, reg: int, size: int) -> int:
        return self.registers.read(reg, size)[0]

    def write(self, reg: int, size: int, value: int) -> None:
        self.registers.write(reg, size, value)

    def start(
        self, features: int = 0, *, size: int = 0, arena_bytes: int = 1 << 19
    ) -> list[SplitDriver | PackedDriver]:
        self.queues = super().start(features, size=size, arena_bytes=arena_bytes)
        return self.queues

    def start_legacy(
        self, features: int = 0, *, arena_bytes: int = 1 << 19, driver_ok: bool = True
    ) -> list[SplitDriver | PackedDriver]:
        self.queues = super().start_legacy(features, arena_bytes=arena_bytes, driver_ok=driver_ok)
        return self.queues

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 0) -> Answer:
        """Make one request as drivers do, and wait for it."""
        parts = [HEADER.pack(kind, 0, sector), *([data] if data else [])]
        return self.ask_raw(parts, [*([room] if room else []), 1])

    def ask_raw(self, readable: Sequence[bytes | int], writable: Sequence[int]) -> Answer:
        """Make one request of these descriptors, and wait for it."""
        self.offer(readable, writable)
        [answer] = self.answers()
        return answer

    def offer(
        self, readable: Sequence[bytes | int], writable: Sequence[int], *, queue: int = 0
    ) -> int:
        """Make one request available, without a kick; return its token."""
        driver = self.queues[queue]
        request = driver.place(readable, writable)
        request.owned = True  # freed when it is collected
        for segment in request.segments:
            if segment.writable:
                self.memory.write(segment.gpa, b"\xee" * segment.length)
        driver.submit(request)
        return request.token

    def answers(self, queue: int = 0) -> list[Answer]:
        """Kick, wait until the device has given everything back, and collect it."""
        return [self._answer(queue, used) for used in self.collect(queue)]

    def collect(self, queue: int = 0) -> list[Used]:
        """The same, as the driver sees it."""
        driver, found = self.queues[queue], []
        self.schedule(queue)
        while self.serve() or driver.outstanding:
            found += driver.collect()
            if driver.outstanding and not self.scheduled and not self._wait():
                break
        return found + driver.collect()

    def _answer(self, queue: int, used: Used) -> Answer:
        data = self.queues[queue].data(used.request)
        return Answer(data[-1], used.written, data[:-1])

    # Its host.

    def serve(self) -> bool:
        """Serve every scheduled queue, as the process would; tell whether there was one."""
        served = bool(self.scheduled)
        while self.scheduled:
            index = self.scheduled.pop(0)
            queue = self.registers.transport.live[index]
            if queue is None:
                self.registers.transport.early_kick(index)
            elif self.device.kick(index, queue):
                self.scheduled.append(index)
        return served

    def _wait(self) -> bool:
        """Wait for what the device watches, and let it see that; False if nothing came."""
        poll = select.poll()
        for fd in self.watched:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(DEADLINE * 1e3) if self.watched else []
        for fd, events in ready:
            self.watched[fd](events)
        return bool(ready)

    def interrupt(self, source: int) -> None:
        self.interrupts.append(source)

    def schedule(self, index: int) -> None:
        self.scheduled.append(index)

    def log(self, level: int, text: str) -> None:
        if level >= WARNING:
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
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def timer(self, callback: Callable[[], None]) -> Timer:
        raise NotImplementedError


def record_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Return a list that gets the name of every call of these functions of `os` from now on."""
    calls: list[str] = []
    for name in names:
        monkeypatch.setattr(os, name, partial(_recorded, calls, name, getattr(os, name)))
    return calls


def _recorded(calls: list[str], name: str, real: Callable[..., Any], *args: Any) -> Any:
    calls.append(name)
    return real(*args)
