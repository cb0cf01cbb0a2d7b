"""The registers of virtio 0.9, for drivers older than virtio 1.0 (virtio 1.2 §4.1.4.10, §2.7.2).

     0  4  device features, bits 0 to 31        14  2  queue select
     4  4  driver features                      16  2  queue notify
     8  4  queue address in 4096-byte pages     18  1  device status
    12  2  queue size, read-only                19  1  ISR, cleared by reading
    20 on  device configuration

Offsets are without the two vector registers that MSI-X inserts before the configuration: the VM
process takes them out. Everything is in the guest's byte order, which on this machine is little
endian. A queue has the size the device says, and its three parts lie at fixed places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.device import WARNING
from devices.spec import Legacy

if TYPE_CHECKING:
    from devices.transport import Door, Transport

DEVICE_FEATURES: Final = 0
DRIVER_FEATURES: Final = 4
QUEUE_PFN: Final = 8
QUEUE_SIZE: Final = 12

PAGE: Final = 4096  # also the alignment of the used ring

_WIDTHS: Final = {
    DEVICE_FEATURES: 4,
    DRIVER_FEATURES: 4,
    QUEUE_PFN: 4,
    QUEUE_SIZE: 2,
    int(Legacy.QUEUE_SELECT): 2,
    int(Legacy.QUEUE_NOTIFY): 2,
    int(Legacy.DEVICE_STATUS): 1,
    int(Legacy.ISR): 1,
}


class LegacyRegisters:
    """The legacy register block. Nothing a driver does here raises, but see `transport`."""

    def __init__(self, transport: Transport, door: Door) -> None:
        self._transport, self._door = transport, door
        self.queue = 0  # queue select

    def read(self, offset: int, size: int) -> tuple[int, int]:
        """Read 1, 2 or 4 bytes: (value, what happens to the interrupt line)."""
        transport = self._transport
        if offset >= Legacy.DEVICE:
            return transport.read_config(offset - Legacy.DEVICE, size), 0
        if _WIDTHS.get(offset) != size:
            self._refuse("read", offset, size)
            return 0, 0
        queue = transport.registers[self.queue] if self._there() else None
        match offset:
            case 0:  # device features
                return transport.legacy_offered, 0
            case 4:  # driver features
                return transport.accepted & 0xFFFF_FFFF, 0
            case 8:  # queue address
                return (queue.desc_gpa // PAGE & 0xFFFF_FFFF if queue is not None else 0), 0
            case 12:  # queue size
                return (queue.default_size if queue is not None else 0), 0
            case Legacy.QUEUE_SELECT:
                return self.queue, 0
            case Legacy.DEVICE_STATUS:
                return transport.status, 0
            case Legacy.ISR:
                return transport.take_isr(), -1
        return 0, 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes."""
        transport = self._transport
        if offset >= Legacy.DEVICE:
            transport.write_config(offset - Legacy.DEVICE, size, value)
        elif _WIDTHS.get(offset) != size:
            self._refuse("write", offset, size)
        elif offset == DRIVER_FEATURES:
            transport.accept(0, value & transport.legacy_offered)
        elif offset == QUEUE_PFN:
            self._place_queue(value)
        elif offset == Legacy.QUEUE_SELECT:
            self.queue = value
        elif offset == Legacy.QUEUE_NOTIFY:
            transport.notify(value)
        elif offset == Legacy.DEVICE_STATUS:
            transport.write_status(value, legacy=True)
            if value == 0:
                self.queue = 0
        else:
            self._refuse("write", offset, size)

    def _place_queue(self, page: int) -> None:
        """Enable the selected queue at a page, or let go of it with page 0 (§2.7.2)."""
        transport = self._transport
        if not self._there():
            self._door.log(WARNING, f"address for queue {self.queue}, which is not there")
            return
        registers = transport.registers[self.queue]
        if not page:
            transport.reset_queue(self.queue)
        elif registers.queue is not None:
            self._door.log(WARNING, f"address for queue {self.queue}, which is enabled")
        elif not transport.legacy:
            self._door.log(WARNING, f"legacy address for queue {self.queue} of a modern driver")
        else:
            registers.size = registers.default_size
            registers.desc_gpa = page * PAGE
            registers.avail_gpa = registers.desc_gpa + 16 * registers.size
            end = registers.avail_gpa + 6 + 2 * registers.size
            registers.used_gpa = -(-end // PAGE) * PAGE
            if not transport.enable_queue(self.queue):
                registers.clear()

    def _there(self) -> bool:
        return self.queue < len(self._transport.registers)

    def _refuse(self, what: str, offset: int, size: int) -> None:
        self._door.log(WARNING, f"legacy {what} of {size} bytes at {offset}: no such access")
