"""vmmci in this process, and its driver: registers, what the VM process is told, a clock."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from devices.guestmem import GuestMemory
from devices.spec import Block, Legacy
from devices.virtio import Registers
from devices.vmmci import Vmmci
from tools.viodriver import make_memfd
from tools.viodriver.registers import ACKNOWLEDGE, DRIVER, DRIVER_OK

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Timer

FEATURES: Final = Block.LEGACY + 0
DRIVER_FEATURES: Final = Block.LEGACY + 4
STATUS: Final = Block.LEGACY + Legacy.DEVICE_STATUS
ISR: Final = Block.LEGACY + Legacy.ISR
CONFIG: Final = Block.LEGACY + Legacy.DEVICE
COMMAND: Final = CONFIG
SECONDS, SECONDS_HIGH = CONFIG + 4, CONFIG + 8
MICROSECONDS, MICROSECONDS_HIGH = CONFIG + 12, CONFIG + 16

NONE, SHUTDOWN, REBOOT, SYNCRTC = range(4)
ALL: Final = 7
NOW: Final = 1_790_000_000_123_456_789  # nanoseconds


class VmmciLab:
    """Host of the device, door of its registers, and a driver."""

    def __init__(self) -> None:
        self.now = NOW
        self.told: list[str] = []
        self.said: list[str] = []
        self.interrupts = 0
        self.watched: dict[int, Callable[[int], None]] = {}
        fd = make_memfd(4096)
        memory = GuestMemory(fd, [])
        os.close(fd)
        self.device = Vmmci(memory, self, lambda: self.now)
        self.registers = Registers(self.device, memory, self)

    def read(self, reg: int, size: int = 4) -> int:
        return self.registers.read(reg, size)[0]

    def write(self, reg: int, value: int, size: int = 4) -> None:
        self.registers.write(reg, size, value)

    def start(self, features: int = ALL) -> None:
        """Drive it to DRIVER_OK, as legacy drivers do."""
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.write(STATUS, status, 1)
        self.write(DRIVER_FEATURES, features)
        self.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK, 1)

    def ask(self, word: str) -> str:
        """Ask as the VM process does."""
        answer: str = self.device.setting("command", word)
        return answer

    # Door and Host.

    def interrupt(self, _source: int) -> None:
        self.interrupts += 1

    def checkpoint(self) -> None:
        """See Host."""

    def config_changed(self) -> None:
        self.registers.transport.config_changed()

    def tell(self, word: str) -> None:
        self.told.append(word)

    def log(self, level: int, text: str) -> None:
        self.said.append(f"{level} {text}")

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        assert events == 1
        self.watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        raise NotImplementedError

    def call(self, index: int) -> None:
        raise NotImplementedError

    def schedule(self, index: int) -> None:
        raise NotImplementedError

    def timer(self, callback: Callable[[], None]) -> Timer:
        raise NotImplementedError
