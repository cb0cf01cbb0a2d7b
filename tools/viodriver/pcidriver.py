"""The way to a device on a PCI bus, as a guest's driver finds it (virtio 1.2 §4.1).

Nothing is known beforehand but the slot: BARs, blocks of registers, doorbells and vectors are
what configuration space says. With MSI-X each queue has a vector of its own, and vector 0 is for
configuration changes; without it there is the line, and the ISR register says what it is about.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self

from devices.spec import COMMON_LENGTH, VIRTIO_VENDOR, Block
from devices.viodev import CONFIG_CHANGE
from devices.virtio import CommonCfg
from tools.viodriver.errors import DriverError
from tools.viodriver.registers import VirtioDriver

if TYPE_CHECKING:
    from types import TracebackType

    from devices.guestmem import GuestMemory
    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC  # ports of mechanism 1
CAP_VENDOR, CAP_MSIX = 0x09, 0x11
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4  # cfg_type of a vendor capability (§4.1.4)
COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_OFF = 1, 2, 4, 1 << 10
MSIX_ENABLE, MSIX_MASK_ALL = 1 << 15, 1 << 14
MESSAGE_ADDRESS: Final = 0xFEE00000  # the local APIC of CPU 0
MESSAGE_DATA: Final = 0x40  # of vector 0; vector n has n more
NO_VECTOR: Final = 0xFFFF
ALL_ONES: Final = 0xFFFFFFFF


class Board(Protocol):
    """What a driver has of a machine: `pcihost.PciHost`, or whatever else has ports."""

    memory: GuestMemory

    def port_read(self, port: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of a port."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write them."""

    def memory_read(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of a device's memory."""

    def memory_write(self, address: int, size: int, value: int) -> None:
        """Write them."""

    def wait(self, timeout: float) -> None:
        """Return when something has happened, or after `timeout` seconds."""

    def take_message(self, data: int) -> bool:
        """Take the interrupt messages of this data that have come; False if there are none."""

    def line(self, gsi: int) -> bool:
        """Whether an interrupt line is high."""

    def end_interrupt(self, gsi: int) -> None:
        """Write EOI for a line."""

    @property
    def alive(self) -> bool:
        """Whether there is somebody behind the device."""

    def close(self) -> None:
        """Free the machine."""


class PciBar(NamedTuple):
    """A base address register that is there."""

    number: int
    address: int
    size: int  # bytes
    is_io: bool


class Span(NamedTuple):
    """A block of registers in a BAR."""

    bar: int
    offset: int
    length: int


class ConfigSpace:
    """Configuration space of one slot, by mechanism 1 (PCI 3.0 §3.2.2.3.2)."""

    def __init__(self, board: Board, slot: int) -> None:
        self._board, self._slot = board, slot

    def read(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes."""
        return self._board.port_read(self._select(offset), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write them."""
        self._board.port_write(self._select(offset), size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """Walk the list: id and offset of each. Raises DriverError if it does not end."""
        found: list[tuple[int, int]] = []
        at = self.read(0x34, 1) & 0xFC if self.read(0x06, 2) & 0x10 else 0
        while at:
            if len(found) == 48 or at < 0x40:
                raise DriverError(f"slot {self._slot}: broken list of capabilities")
            found.append((self.read(at, 1), at))
            at = self.read(at + 1, 1) & 0xFC
        return found

    def bars(self) -> dict[int, PciBar]:
        """Find the BARs, their sizes by writing all-ones; nothing may decode meanwhile."""
        found: dict[int, PciBar] = {}
        index = 0
        while index < 6:
            at = 0x10 + 4 * index
            value = self.read(at, 4)
            self.write(at, 4, ALL_ONES)
            mask = self.read(at, 4)
            self.write(at, 4, value)
            is_io = bool(value & 1)
            low_bits = 3 if is_io else 15
            wide = not is_io and value & 6 == 4
            if mask & ~low_bits:
                address = value & ~low_bits
                if wide:
                    address |= self.read(at + 4, 4) << 32
                size = -(mask & ~low_bits | ~0xFFFFFFFF)
                found[index] = PciBar(index, address, size, is_io)
            index += 2 if wide else 1
        return found

    def _select(self, offset: int) -> int:
        self._board.port_write(CONFIG_ADDRESS, 4, 1 << 31 | self._slot << 11 | offset & 0xFC)
        return CONFIG_DATA + (offset & 3)


class PciDriver(VirtioDriver):
    """Drives the virtio device in one slot."""

    transport = "pci"

    def __init__(self, board: Board, slot: int, *, msix: bool = True) -> None:
        """Find the device's registers, and take over the board. Raises DriverError."""
        self.board, self.slot, self.memory = board, slot, board.memory
        self.config = space = ConfigSpace(board, slot)
        if space.read(0, 2) != VIRTIO_VENDOR:
            raise DriverError(f"slot {slot}: vendor {space.read(0, 2):#x} is not virtio's")
        space.write(0x04, 2, 0)  # nothing decodes while BARs are sized
        self.bars = space.bars()
        self.blocks: dict[int, Span] = {}
        self._notify_step = self._msix_at = 0
        for kind, at in space.capabilities():
            if kind == CAP_VENDOR:
                self._add_block(at)
            elif kind == CAP_MSIX:
                self._msix_at = at
        if missing := {COMMON, NOTIFY, ISR} - self.blocks.keys():
            raise DriverError(f"slot {slot}: lacks capabilities {sorted(missing)}")
        command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER
        self.msix = msix and bool(self._msix_at)
        space.write(0x04, 2, command | COMMAND_INTX_OFF * self.msix)
        self.gsi = space.read(0x3C, 1)
        if self.msix:
            self._set_up_vectors()
        self._isr = 0  # bits that were read for somebody else
        self._notify_at: dict[int, int] = {}
        self.nr_queues = self.read(CommonCfg.NUM_QUEUES, 2)

    def _add_block(self, at: int) -> None:
        cfg_type, bar = self.config.read(at + 3, 1), self.config.read(at + 4, 1)
        span = Span(bar, self.config.read(at + 8, 4), self.config.read(at + 12, 4))
        # Of several of a type the first is the device's favourite (§4.1.4.1).
        if cfg_type not in (COMMON, NOTIFY, ISR, DEVICE) or cfg_type in self.blocks:
            return
        if bar not in self.bars or span.offset + span.length > self.bars[bar].size:
            raise DriverError(f"slot {self.slot}: a block at {span} is in no BAR")
        self.blocks[cfg_type] = span
        if cfg_type == NOTIFY:
            self._notify_step = self.config.read(at + 16, 4)

    def _set_up_vectors(self) -> None:
        at = self._msix_at
        self.config.write(at + 2, 2, MSIX_ENABLE | MSIX_MASK_ALL)
        self.nr_vectors = (self.config.read(at + 2, 2) & 0x7FF) + 1
        where = self.config.read(at + 4, 4)
        table = self.bars[where & 7].address + (where & ~7)
        for vector in range(self.nr_vectors):
            for dword, value in enumerate((MESSAGE_ADDRESS, 0, MESSAGE_DATA + vector, 0)):
                self.board.memory_write(table + 16 * vector + 4 * dword, 4, value)
        self.config.write(at + 2, 2, MSIX_ENABLE)

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
        """Free the board."""
        self.board.close()

    # Registers: offsets of devices.spec.Block, wherever this device has them.

    def read(self, reg: int, size: int) -> int:
        """Read a device register."""
        bar, address = self._find(reg, size)
        if bar.is_io:
            return self.board.port_read(address, size)
        return self.board.memory_read(address, size)

    def write(self, reg: int, size: int, value: int) -> None:
        """Write a device register."""
        bar, address = self._find(reg, size)
        if bar.is_io:
            self.board.port_write(address, size, value)
        else:
            self.board.memory_write(address, size, value)

    def _find(self, reg: int, size: int) -> tuple[PciBar, int]:
        if reg < COMMON_LENGTH:
            kind, offset = COMMON, reg
        elif reg < Block.ISR:
            kind, offset = NOTIFY, reg - Block.NOTIFY
        elif reg < Block.DEVICE:
            kind, offset = ISR, reg - Block.ISR
        else:
            kind, offset = DEVICE, reg - Block.DEVICE
        span = self.blocks.get(kind)
        if span is None or offset < 0 or offset + size > span.length:
            raise DriverError(f"slot {self.slot}: has no register {reg:#x} of {size} bytes")
        bar = self.bars[span.bar]
        return bar, bar.address + span.offset + offset

    def accept(self, features: int) -> None:
        """Write driver features; and vector 0 for configuration changes, which a reset took."""
        super().accept(features)
        if self.msix:
            self._give_vector(CommonCfg.CONFIG_MSIX_VECTOR, 0)

    def enable(self, index: int, queue: SplitDriver | PackedDriver) -> bool:
        """Place a queue, give it a vector, and enable it; False if the device refused."""
        self.place(index, queue)
        if self.msix:
            self._give_vector(CommonCfg.QUEUE_MSIX_VECTOR, index + 1)
        self._notify_at[index] = self.read(CommonCfg.QUEUE_NOTIFY_OFF, 2) * self._notify_step
        self.write(CommonCfg.QUEUE_ENABLE, 2, 1)
        return self.read(CommonCfg.QUEUE_ENABLE, 2) == 1

    def _give_vector(self, reg: int, vector: int) -> None:
        self.write(reg, 2, vector)
        if self.read(reg, 2) != vector:  # NO_VECTOR: refused (§4.1.5.1.2.1)
            raise DriverError(f"slot {self.slot}: refuses vector {vector}")

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes; all-ones where the device has none."""
        length = self.blocks[DEVICE].length if DEVICE in self.blocks else 0
        if offset + size > length:
            return (1 << 8 * size) - 1
        return super().read_config(offset, size)

    # Kicks and calls.

    def kick(self, queue: int) -> None:
        """Write the queue's doorbell."""
        self.write(Block.NOTIFY + self._notify_at.get(queue, 0), 2, queue)

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for the queue's vector (or CONFIG_CHANGE's), or for the line and its ISR bit.

        A line does not tell queues apart.
        """
        end = time.monotonic() + timeout
        while not self._called(queue):
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.board.wait(left)
        return True

    def _called(self, queue: int) -> bool:
        if self.msix:
            vector = 0 if queue == CONFIG_CHANGE else queue + 1
            return self.board.take_message(MESSAGE_DATA + vector)
        if self.board.line(self.gsi):
            self._isr |= self.isr()
            self.board.end_interrupt(self.gsi)
        bit = 2 if queue == CONFIG_CHANGE else 1
        called = bool(self._isr & bit)
        self._isr &= ~bit
        return called

    def call_fd(self, queue: int) -> int:
        """Return -1: an interrupt is not a descriptor."""
        return -1

    @property
    def alive(self) -> bool:
        """Whether there is somebody behind the device."""
        return self.board.alive

    def facts(self) -> dict[str, Any]:
        """Return where in the machine the device is."""
        return {
            "slot": self.slot,
            "device_id": self.config.read(2, 2),
            "bars": [list(bar) for bar in self.bars.values()],
            "msix": self.msix,
            "gsi": self.gsi,
        }
