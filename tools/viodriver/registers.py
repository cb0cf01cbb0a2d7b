"""The way to a device by its registers, however those are reached (virtio 1.2 §4.1.4, §4.1.5).

Offsets are those of `devices.spec.Block`. For hostile tests every step can be taken alone, and
`read` and `write` take any register, width and value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.spec import Block, Legacy
from devices.virtio import CommonCfg
from tools.viodriver.transport import (
    ACKNOWLEDGE,
    ARENA_BYTES,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    READY,
    Transport,
)

if TYPE_CHECKING:
    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver

__all__ = [
    "ACKNOWLEDGE",
    "DRIVER",
    "DRIVER_OK",
    "FAILED",
    "FEATURES_OK",
    "NEEDS_RESET",
    "READY",
    "VirtioDriver",
]


class VirtioDriver(Transport):
    """Drives one device; who inherits brings the way to its registers and the memory."""

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

    def queue_size(self, index: int) -> int:
        """Read how many entries a queue may have."""
        self.write(CommonCfg.QUEUE_SELECT, 2, index)
        return self.read(CommonCfg.QUEUE_SIZE, 2)

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

    def disable(self, index: int) -> bool:
        """Reset one queue (§4.1.4.3.2); False if the device goes on with it."""
        self.write(CommonCfg.QUEUE_SELECT, 2, index)
        self.write(CommonCfg.QUEUE_RESET, 2, 1)
        return self.read(CommonCfg.QUEUE_ENABLE, 2) == 0

    def start_legacy(
        self, features: int = 0, *, arena_bytes: int = ARENA_BYTES, driver_ok: bool = True
    ) -> list[SplitDriver | PackedDriver]:
        """Do as `start` through the legacy registers; perhaps not quite to DRIVER_OK."""
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

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of configuration space."""
        if size == 8:
            return self.read_config(offset, 4) | self.read_config(offset + 4, 4) << 32
        return self.read(Block.DEVICE + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of it."""
        self.write(Block.DEVICE + offset, size, value)
