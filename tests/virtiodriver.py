"""What a virtio driver does with registers, over any way to reach them (virtio 1.2 §3.1).

    queues = device.start(F_EVENT_IDX)      # negotiates, sets every queue up, DRIVER_OK
    device.status = 0                       # a reset

Offsets are those of `devices.spec.Block`. For hostile tests every step can be taken alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.features import F_VERSION_1
from devices.spec import Block, Legacy
from devices.virtio import CommonCfg
from tests.driver import open_driver

if TYPE_CHECKING:
    from devices.guestmem import GuestMemory
    from tests.driver import PackedDriver, SplitDriver

RING_BASE: Final = 0x10000  # where start() puts the first queue

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
READY: Final = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class VirtioDriver:
    """Drives one device; who inherits brings the way to its registers and the memory."""

    memory: GuestMemory
    nr_queues: int

    def read(self, reg: int, size: int) -> int:
        """Read a device register."""
        raise NotImplementedError

    def write(self, reg: int, size: int, value: int) -> None:
        """Write a device register."""
        raise NotImplementedError

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
        self.status = READY
        assert self.status == READY
        return queues

    def start_legacy(
        self, features: int = 0, *, arena_bytes: int = 1 << 19, driver_ok: bool = True
    ) -> list[SplitDriver | PackedDriver]:
        """The same through the legacy registers; perhaps not quite to DRIVER_OK."""
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.write(Block.LEGACY + Legacy.DEVICE_STATUS, 1, status)
        self.write(Block.LEGACY + 4, 4, features)
        queues = self.drivers(features, align=4096, arena_bytes=arena_bytes)
        for index, queue in enumerate(queues):
            self.write(Block.LEGACY + Legacy.QUEUE_SELECT, 2, index)
            self.write(Block.LEGACY + 8, 4, queue.desc_gpa // 4096)
            assert self.read(Block.LEGACY + 8, 4) == queue.desc_gpa // 4096
        if driver_ok:
            status = ACKNOWLEDGE | DRIVER | DRIVER_OK
            self.write(Block.LEGACY + Legacy.DEVICE_STATUS, 1, status)
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

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of configuration space."""
        if size == 8:
            return self.read_config(offset, 4) | self.read_config(offset + 4, 4) << 32
        return self.read(Block.DEVICE + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of it."""
        self.write(Block.DEVICE + offset, size, value)
