"""Virtio registers: what a viodev_msg's register number and width mean (virtio 1.2 §4.1.4).

    0x0000  common configuration   table below     0x0200  ISR, cleared by reading; 0x201 peeks
                                                   0x0202  from the VM process: MSI-X is on
    0x0100  notify                 a queue index   0x0300  device configuration, any width
    0x1000  legacy registers       legacy.py

Each field may be read with its own width or a narrower one, and a 64-bit one as two halves; it is
written with its own width, or as two halves (§4.1.3.1). Any other access is dropped and logged,
and reads 0. Vector registers belong to the VM process and never arrive here.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from devices.device import WARNING
from devices.features import F_RING_PACKED, F_RING_RESET
from devices.legacy import LegacyRegisters
from devices.queueregs import QueueRegisters
from devices.spec import COMMON_LENGTH, Block
from devices.transport import FEATURE_WINDOWS, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.device import Device
    from devices.guestmem import GuestMemory
    from devices.transport import Door

NO_VECTOR: Final = 0xFFFF


class CommonCfg(IntEnum):
    """Offsets in struct virtio_pci_common_cfg, little-endian (virtio 1.2 §4.1.4.3)."""

    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_MSIX_VECTOR = 0x10
    NUM_QUEUES = 0x12
    DEVICE_STATUS = 0x14
    CONFIG_GENERATION = 0x15
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_MSIX_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC = 0x20  # 64 bits, like the next two: GPAs
    QUEUE_DRIVER = 0x28
    QUEUE_DEVICE = 0x30
    QUEUE_NOTIFY_DATA = 0x38
    QUEUE_RESET = 0x3A


_END: Final = CommonCfg.QUEUE_RESET + 2
_STARTS: Final = (*CommonCfg, _END)
# Offset in the block → (first byte of its field, width of the field).
_FIELD_AT: Final = [
    (start, end - start) for start, end in pairwise(_STARTS) for _ in range(start, end)
]
# Registers of the selected queue that can be written while it is not enabled.
_QUEUE_FIELDS: Final = frozenset(
    (
        CommonCfg.QUEUE_SIZE,
        CommonCfg.QUEUE_ENABLE,
        CommonCfg.QUEUE_DESC,
        CommonCfg.QUEUE_DRIVER,
        CommonCfg.QUEUE_DEVICE,
    )
)
_NO_QUEUE: Final = QueueRegisters(0)  # what a queue_select out of range shows; never written


class Registers:
    """All registers of one device. Nothing a driver does here raises, but see `transport`."""

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        door: Door,
        *,
        packed: bool = False,
        inflight: Sequence[memoryview | None] = (),
    ) -> None:
        """See Transport."""
        self.transport = Transport(device, memory, door, packed=packed, inflight=inflight)
        self._legacy = LegacyRegisters(self.transport, door)
        self._door = door
        self._device_window = self._driver_window = self._queue = 0

    def read(self, reg: int, size: int) -> tuple[int, int]:
        """Read 1, 2 or 4 bytes: (value, what happens to the interrupt line)."""
        if reg >= Block.LEGACY:
            return self._legacy.read(reg - Block.LEGACY, size)
        if reg >= Block.DEVICE:
            return self.transport.read_config(reg - Block.DEVICE, size), 0
        if reg < COMMON_LENGTH:
            return self._read_common(reg, size), 0
        if reg == Block.ISR and size == 1:
            return self.transport.take_isr(), -1
        if reg == Block.ISR_PEEK and size == 1:
            return self.transport.isr, 0
        self._refuse("read", reg, size)
        return 0, 0

    def write(self, reg: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes."""
        value &= (1 << 8 * size) - 1
        if reg >= Block.LEGACY:
            self._legacy.write(reg - Block.LEGACY, size, value)
        elif reg >= Block.DEVICE:
            self.transport.write_config(reg - Block.DEVICE, size, value)
        elif reg < COMMON_LENGTH:
            self._write_common(reg, size, value)
        elif reg == Block.NOTIFY and size == 2:
            self.transport.notify(value)
        elif reg == Block.MSIX and size == 1:
            self.transport.device.msix(bool(value))
        else:
            self._refuse("write", reg, size)

    # The common configuration block.

    def _read_common(self, reg: int, size: int) -> int:
        field, width = _FIELD_AT[reg] if reg < _END else (reg, 0)
        shift = reg - field
        if shift + size > width:
            self._refuse("read", reg, size)
            return 0
        return self._get(field) >> 8 * shift & ((1 << 8 * size) - 1)

    def _get(self, field: int) -> int:
        """Return the whole of one field; reading changes nothing."""
        transport, queue = self.transport, self._selected()
        match field:
            case CommonCfg.DEVICE_FEATURE_SELECT:
                return self._device_window
            case CommonCfg.DEVICE_FEATURE:
                return _window(transport.offered, self._device_window)
            case CommonCfg.DRIVER_FEATURE_SELECT:
                return self._driver_window
            case CommonCfg.DRIVER_FEATURE:
                return _window(transport.accepted, self._driver_window)
            case CommonCfg.CONFIG_MSIX_VECTOR | CommonCfg.QUEUE_MSIX_VECTOR:
                return NO_VECTOR
            case CommonCfg.NUM_QUEUES:
                return len(transport.registers)
            case CommonCfg.DEVICE_STATUS:
                return transport.status
            case CommonCfg.CONFIG_GENERATION:
                return transport.generation
            case CommonCfg.QUEUE_SELECT:
                return self._queue
            case CommonCfg.QUEUE_SIZE:
                return queue.size
            case CommonCfg.QUEUE_ENABLE:
                return int(queue.queue is not None)
            case CommonCfg.QUEUE_DESC:
                return queue.desc_gpa
            case CommonCfg.QUEUE_DRIVER:
                return queue.avail_gpa
            case CommonCfg.QUEUE_DEVICE:
                return queue.used_gpa
        # queue_notify_off: all doorbells are one register. queue_notify_data: not offered.
        # queue_reset: a reset is over before the driver can ask (§4.1.4.3.1).
        return 0

    def _write_common(self, reg: int, size: int, value: int) -> None:
        field, width = _FIELD_AT[reg] if reg < _END else (reg, 0)
        shift = reg - field
        if not (size == width and not shift) and not (width == 8 and size == 4 and shift in {0, 4}):
            self._refuse("write", reg, size)
            return
        transport = self.transport
        match field:
            case CommonCfg.DEVICE_FEATURE_SELECT:
                self._device_window = value
            case CommonCfg.DRIVER_FEATURE_SELECT:
                self._driver_window = value
            case CommonCfg.DRIVER_FEATURE:
                transport.accept(self._driver_window, value)
            case CommonCfg.DEVICE_STATUS:
                transport.write_status(value)
                if value == 0:
                    self._queue = 0
            case CommonCfg.QUEUE_SELECT:
                self._queue = value
            case CommonCfg.QUEUE_RESET:
                self._reset_queue(value)
            case _ if field not in _QUEUE_FIELDS:
                self._refuse("write", reg, size)
            case _ if self._writable_queue(reg):
                self._write_queue(field, shift, value)

    def _write_queue(self, field: int, shift: int, value: int) -> None:
        """Write a register of the selected queue, which is not enabled."""
        queue, bits = self._selected(), 8 * shift
        match field:
            case CommonCfg.QUEUE_SIZE:
                queue.resize(value, packed=bool(self.transport.features & F_RING_PACKED))
            case CommonCfg.QUEUE_ENABLE if value == 1:  # a driver must not write 0 (§4.1.4.3.2)
                self.transport.enable_queue(self._queue)
            case CommonCfg.QUEUE_DESC:
                queue.desc_gpa = queue.desc_gpa & ~(0xFFFF_FFFF << bits) | value << bits
            case CommonCfg.QUEUE_DRIVER:
                queue.avail_gpa = queue.avail_gpa & ~(0xFFFF_FFFF << bits) | value << bits
            case CommonCfg.QUEUE_DEVICE:
                queue.used_gpa = queue.used_gpa & ~(0xFFFF_FFFF << bits) | value << bits

    def _writable_queue(self, reg: int) -> bool:
        queue = self._selected()
        if queue is _NO_QUEUE:
            self._door.log(WARNING, f"write to register {reg:#x} of queue {self._queue}, not there")
        elif queue.queue is not None:
            # A ring that moves under the device would be a hole: frozen until reset (§4.1.4.3.2).
            self._door.log(WARNING, f"write to register {reg:#x} of queue {self._queue}, enabled")
        else:
            return True
        return False

    def _reset_queue(self, value: int) -> None:
        if value != 1 or not self.transport.features & F_RING_RESET:
            self._refuse("write", CommonCfg.QUEUE_RESET, 2)
        elif self._queue < len(self.transport.registers):
            self.transport.reset_queue(self._queue)

    def _selected(self) -> QueueRegisters:
        registers = self.transport.registers
        return registers[self._queue] if self._queue < len(registers) else _NO_QUEUE

    def _refuse(self, what: str, reg: int, size: int) -> None:
        self._door.log(WARNING, f"{what} of {size} bytes at register {reg:#x}: no such access")

    # Saving.

    def save(self, *, killed: bool = False) -> dict[str, Any]:
        """Return everything as plain JSON values; see Transport.save."""
        selects = [self._device_window, self._driver_window, self._queue]
        state = self.transport.save(killed=killed)
        return {**state, "selects": selects, "legacy_queue": self._legacy.queue}

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described. Raises GuestError, PyvmError."""
        self._device_window, self._driver_window, self._queue = state["selects"]
        self._legacy.queue = state["legacy_queue"]
        self.transport.load(state)


def _window(features: int, window: int) -> int:
    return features >> 32 * window & 0xFFFF_FFFF if window < FEATURE_WINDOWS else 0
