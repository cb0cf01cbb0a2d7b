"""A block device's driver (virtio 1.2 §5.2): one request at a time, waited for.

disk = Blk(device, device.acquire(0))
disk.write(8, b"x" * 4096); disk.flush(); disk.read(8, 8)     # sectors of 512 bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.blkreq import (
    BLK_F_BLK_SIZE,
    BLK_F_RO,
    HEADER,
    ID_BYTES,
    S_OK,
    S_UNSUPP,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from tools.viodriver.errors import DriverError

if TYPE_CHECKING:
    from tools.viodriver.device import VirtioDevice
    from tools.viodriver.requests import RequestQueue

SECTOR: Final = 512
_UNWRITTEN: Final = 0xEE  # a status that no device writes


class BlkError(DriverError):
    """The device answered a request with an error."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: status {status}")
        self.status = status  #: as virtio 1.2 §5.2.6 has it

    @property
    def unsupported(self) -> bool:
        """Whether the device does not know this kind of request."""
        return self.status == S_UNSUPP


class Blk:
    """Asks one device on one queue. Every request raises BlkError, DriverError."""

    def __init__(self, device: VirtioDevice, queue: RequestQueue, *, timeout: float = 10.0) -> None:
        """Take a started device; `timeout` is in seconds, for each request."""
        self.device, self.queue, self.timeout = device, queue, timeout

    @property
    def nr_sectors(self) -> int:
        """The capacity, in sectors."""
        return self.device.read_config(0, 8)

    @property
    def block_size(self) -> int:
        """Bytes that are best read and written together."""
        return self.device.read_config(20, 4) if self.device.has_feature(BLK_F_BLK_SIZE) else SECTOR

    @property
    def readonly(self) -> bool:
        """Whether the device takes no writes."""
        return self.device.has_feature(BLK_F_RO)

    def read(self, sector: int, nr_sectors: int) -> bytes:
        """Read sectors."""
        return self.ask(T_IN, sector, room=nr_sectors * SECTOR)

    def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors."""
        self.ask(T_OUT, sector, data)

    def flush(self) -> None:
        """Have all that was written brought to the medium."""
        self.ask(T_FLUSH)

    def get_id(self) -> str:
        """Return the serial number."""
        return self.ask(T_GET_ID, room=ID_BYTES).partition(b"\0")[0].decode("ascii", "replace")

    def discard(self, sector: int, nr_sectors: int) -> None:
        """Say that sectors are not needed any more."""
        self.ask(T_DISCARD, data=SEGMENT.pack(sector, nr_sectors, 0))

    def write_zeroes(self, sector: int, nr_sectors: int, *, unmap: bool = False) -> None:
        """Make sectors read as zeroes, with `unmap` by freeing them if the device can."""
        flags = SEGMENT_F_UNMAP * unmap
        self.ask(T_WRITE_ZEROES, data=SEGMENT.pack(sector, nr_sectors, flags))

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 0) -> bytes:
        """Make one request of any kind; return what was written into `room` bytes."""
        queue, memory = self.queue, self.queue.ring.memory
        header, status = queue.take(HEADER.pack(kind, 0, sector)), queue.take(bytes((_UNWRITTEN,)))
        body = queue.take(data or room) if data or room else 0
        queue.start(self, 3)
        queue.add([(header, HEADER.size), *([(body, len(data))] if data else [])])
        queue.add([*([(body, room)] if room else []), (status, 1)], writable=True)
        queue.wait(timeout=self.timeout)
        [result], found = memory.read(status, 1), memory.read(body, room) if room else b""
        for gpa, length in ((header, HEADER.size), (status, 1), (body, len(data) or room)):
            if length:
                queue.give(gpa, length)
        if result != S_OK:
            raise BlkError(f"request {kind} at sector {sector}", result)
        return found
