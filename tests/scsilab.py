"""A CD-ROM drive in this process: its driver, its image, and a host that only remembers.

with ScsiLab(tmp_path, b"disc" * 2048) as lab:
    lab.start()
    answer = lab.ask(bytes((0x28, ...)), room=2048)
    assert (answer.status, answer.data) == (0, ...)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from devices.device import WARNING
from devices.disc import Disc
from devices.scsireq import AN, CDB_SIZE, DRIVE_LUN, HEADER, RESPONSE, SENSE_SIZE, TMF
from devices.vioscsi import CONTROLQ, REQUESTQ, Vioscsi
from devices.virtio import Registers
from tools.viodriver import make_memory
from tools.viodriver.registers import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from devices.guestmem import GuestMemory
    from tools.viodriver import PackedDriver, SplitDriver

MEMORY: Final = 16 << 20
UNWRITTEN: Final = 0xEE  # what is in buffers before the device writes there


class Answer(NamedTuple):
    """What became of a command."""

    response: int  # 0xEE if the device did not write it
    status: int
    sense: bytes  # as long as the device says
    residual: int
    data: bytes  # what it transferred
    written: int  # used length
    rest: bytes  # of the data buffer, beyond that

    @property
    def key(self) -> tuple[int, int, int]:
        """Sense key, additional sense code and qualifier."""
        return self.sense[2] & 0xF, self.sense[12], self.sense[13]


GOOD: Final = (0, 0, b"")


class ScsiLab(VirtioDriver):
    """Host, door and driver of one vioscsi."""

    nr_queues = 3

    def __init__(
        self,
        directory: Path,
        content: bytes | None = None,
        *,
        packed: bool = False,
        attention: bool = False,
        memory: GuestMemory | None = None,
        inflight: Sequence[memoryview | None] = (),
    ) -> None:
        """Make a drive with a disc of `content`, or an empty one.

        Its unit attention after power-on is gone, unless `attention` says so. `memory` and
        `inflight` are those of a predecessor to take over from.
        """
        self.image = directory / "disc.iso"
        self.memory = memory or make_memory(MEMORY)
        self.attention = attention
        self.interrupts: list[int] = []
        self.scheduled: list[int] = []
        self.said: list[str] = []
        self.told: list[str] = []  # the VM process
        self.timers: list[FakeTimer] = []
        disc = None if content is None else Disc(self.burn(content), self)
        self.device = Vioscsi(self.memory, self, disc)
        self.registers = Registers(
            self.device, self.memory, self, packed=packed, inflight=inflight or ()
        )
        self.queues: list[SplitDriver | PackedDriver] = []
        self.sense_size, self.cdb_size = SENSE_SIZE, CDB_SIZE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.device.reset()
        if self.device.drive.disc is not None:
            self.device.drive.disc.close()

    def burn(self, content: bytes, name: str = "disc.iso") -> int:
        """Return a descriptor of a new image of `content`."""
        path = self.image.with_name(name)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def insert(self, content: bytes, *, force: bool = False) -> Any:
        """Put in a disc of `content`, as the VM process does."""
        fd = self.burn(content, "next.iso")
        try:
            return self.device.take("insert", [force, 0], fd)
        except BaseException:
            os.close(fd)
            raise

    # The driver.

    def read(self, reg: int, size: int) -> int:
        return self.registers.read(reg, size)[0]

    def write(self, reg: int, size: int, value: int) -> None:
        self.registers.write(reg, size, value)

    def start(
        self, features: int = 0, *, size: int = 0, arena_bytes: int = 1 << 21
    ) -> list[SplitDriver | PackedDriver]:
        self.queues = super().start(features, size=size, arena_bytes=arena_bytes)
        if not self.attention:
            self.device.drive.attentions = ()
        return self.queues

    def ask(
        self,
        cdb: bytes,
        room: int = 0,
        *,
        lun: bytes = DRIVE_LUN,
        out: bytes = b"",
        pieces: Sequence[int] = (),
    ) -> Answer:
        """Do one command as drivers do, its data buffer in `pieces` if that matters."""
        header = HEADER.pack(lun, 7, 0, 0, 0) + cdb[: self.cdb_size].ljust(self.cdb_size, b"\0")
        readable = [header, *([out] if out else [])]
        buffers = list(pieces) or ([room] if room else [])
        written, data = self.ask_raw(readable, [RESPONSE.size + self.sense_size, *buffers])
        sense_len, residual, qualifier, status, response = RESPONSE.unpack_from(data)
        assert qualifier == 0
        assert sense_len <= self.sense_size
        start = RESPONSE.size + self.sense_size
        sense = data[RESPONSE.size : start]
        assert not any(sense[sense_len:])
        return Answer(
            response,
            status,
            sense[:sense_len],
            residual,
            data[start:written],
            written,
            data[max(written, start) :],
        )

    def manage(self, subtype: int, lun: bytes = DRIVE_LUN) -> int:
        """Do a task management function; return its response."""
        written, data = self.ask_raw([TMF.pack(0, subtype, lun, 7)], [1], queue=CONTROLQ)
        assert written == 1
        return data[0]

    def notify(self, kind: int, wanted: int, lun: bytes = DRIVE_LUN) -> tuple[int, int]:
        """Query (1) or subscribe to (2) events; return those there are, and the response."""
        written, data = self.ask_raw([AN.pack(kind, lun, wanted)], [5], queue=CONTROLQ)
        assert written == 5
        return int.from_bytes(data[:4], "little"), data[4]

    def ask_raw(
        self, readable: Sequence[bytes], writable: Sequence[int], *, queue: int = REQUESTQ
    ) -> tuple[int, bytes]:
        """Make one request of these descriptors: used length, and all that is in the buffers."""
        self.offer(readable, writable, queue=queue)
        self.schedule(queue)
        self.serve()
        [used] = self.queues[queue].collect()
        return used.written, self.queues[queue].data(used.request)

    def offer(self, readable: Sequence[bytes], writable: Sequence[int], *, queue: int) -> int:
        """Make one request available, without a kick; return its token."""
        driver = self.queues[queue]
        request = driver.place(readable, writable)
        request.owned = True  # freed when it is collected
        for segment in request.segments:
            if segment.writable:
                self.memory.write(segment.gpa, bytes((UNWRITTEN,)) * segment.length)
        driver.submit(request)
        return request.token

    # Its host.

    def serve(self) -> None:
        """Serve every scheduled queue, as the process would."""
        while self.scheduled:
            index = self.scheduled.pop(0)
            queue = self.registers.transport.live[index]
            if queue is None:
                self.registers.transport.early_kick(index)
            elif self.device.kick(index, queue):
                self.scheduled.append(index)

    def interrupt(self, source: int) -> None:
        self.interrupts.append(source)

    def schedule(self, index: int) -> None:
        self.scheduled.append(index)

    def tell(self, word: str) -> None:
        self.told.append(word)

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

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        raise NotImplementedError

    def unwatch(self, fd: int) -> None:
        raise NotImplementedError

    def timer(self, callback: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(callback))
        return self.timers[-1]


class FakeTimer:
    """A timer that fires when a test says so."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.armed = False

    def arm(self, seconds: float, every: float = 0.0) -> None:
        self.armed = True

    def disarm(self) -> None:
        self.armed = False

    def fire(self) -> None:
        """Be over, if it is armed."""
        if self.armed:
            self.armed = False
            self._callback()
