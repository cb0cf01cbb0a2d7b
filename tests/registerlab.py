"""The registers of an invented device in this process: the state machine without a process.

`Lab` drives it as `VirtioDriver` says. The device has three queues, 16 bytes of configuration,
and gives every chain back as it came; what its process would be told is in lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from devices.device import Device
from devices.spec import INFLIGHT_STRIDE
from devices.virtio import Registers
from tools.viodriver import make_memory
from tools.viodriver.registers import VirtioDriver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from config.errors import PyvmError
    from devices.device import Timer
    from devices.guestmem import GuestMemory, Region
    from devices.virtqueue import VirtQueue

F_PLAIN: Final = 1 << 0
F_BASE: Final = 1 << 5
F_NEEDS_BASE: Final = 1 << 6
F_HIGH: Final = 1 << 41

SIZES: Final = (16, 8, 64)


class FakeDevice(Device):
    """Gives chains back unread."""

    features = F_PLAIN | F_BASE | F_NEEDS_BASE | F_HIGH
    dependencies = ((F_NEEDS_BASE, F_BASE),)
    queue_sizes = SIZES

    def __init__(self, memory: GuestMemory, host: Lab) -> None:
        super().__init__(memory, host)
        self.space = bytearray(range(1, 17))
        self.active = 0  # features, while active
        self.queues: Sequence[VirtQueue | None] = ()
        self.events: list[str] = []
        self.error: PyvmError | None = None  # what the next activate() raises

    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset < 8:  # the rest is read-only
            self.space[offset : offset + len(data)] = data

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        self.events.append("activate")
        if self.error is not None:
            raise self.error
        self.active, self.queues = features, queues
        for queue in queues:
            if queue is not None:
                queue.push_batch([(chain.head, 0) for chain in queue.resubmit()])

    def kick(self, index: int, queue: VirtQueue) -> bool:
        while (chain := queue.pop()) is not None:
            queue.push(chain.head, 0)
        if queue.should_call():
            self.host.call(index)
        return False

    def reset_queue(self, index: int) -> None:
        self.events.append(f"reset queue {index}")

    def reset(self) -> None:
        self.events.append("reset")
        self.active = 0

    def save(self) -> dict[str, Any]:
        return {"space": self.space.hex()}

    def load(self, state: dict[str, Any]) -> None:
        self.space[:] = bytes.fromhex(state["space"])


class Lab(VirtioDriver):
    """Host of the device, door of its registers, and their driver."""

    def __init__(
        self, *, packed: bool = False, regions: Sequence[Region] = (), memory_size: int = 8 << 20
    ) -> None:
        self.memory = make_memory(memory_size, regions)
        self.nr_queues = len(SIZES)
        self._packed = packed
        self._areas = [memoryview(bytearray(INFLIGHT_STRIDE)) for _ in SIZES]
        self.interrupts: list[int] = []
        self.scheduled: list[int] = []
        self.said: list[str] = []
        self.revive(None)

    def revive(self, state: dict[str, Any] | None) -> None:
        """Make a new device, as in a new process, and have it load `state` if there is any."""
        self.interrupts.clear()
        self.scheduled.clear()
        self.device = FakeDevice(self.memory, self)
        self.registers = Registers(
            self.device, self.memory, self, packed=self._packed, inflight=self._areas
        )
        if state is not None:
            self.registers.load(state)

    def read(self, reg: int, size: int) -> int:
        return self.registers.read(reg, size)[0]

    def write(self, reg: int, size: int, value: int) -> None:
        self.registers.write(reg, size, value)

    def serve(self) -> None:
        """Serve every scheduled queue, as the process would."""
        while self.scheduled:
            index = self.scheduled.pop(0)
            queue = self.registers.transport.live[index]
            if queue is None:
                self.registers.transport.early_kick(index)
            else:
                self.device.kick(index, queue)

    # Door and Host.

    def interrupt(self, source: int) -> None:
        self.interrupts.append(source)

    def schedule(self, index: int) -> None:
        self.scheduled.append(index)

    def log(self, _level: int, text: str) -> None:
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
        raise NotImplementedError

    def unwatch(self, fd: int) -> None:
        raise NotImplementedError

    def timer(self, callback: Callable[[], None]) -> Timer:
        raise NotImplementedError
