"""A SCSI host's driver (virtio 1.2 §5.6): commands and task management, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from devices.scsireq import CDB_SIZE, DRIVE_LUN, HEADER, RESPONSE, SENSE_SIZE, TMF
from tools.viodriver.errors import DriverError

if TYPE_CHECKING:
    from tools.viodriver.device import VirtioDevice

CONTROLQ, EVENTQ, REQUESTQ = range(3)
_UNWRITTEN: Final = 0xEE


class ScsiAnswer(NamedTuple):
    """What became of a command."""

    response: int  # of the host; 0 is OK (§5.6.6.1)
    status: int  # of the target, SAM's
    sense: bytes
    residual: int  # bytes that were not transferred
    data: bytes  # what the device wrote

    @property
    def good(self) -> bool:
        """Whether it was done."""
        return not self.response and not self.status

    @property
    def key(self) -> tuple[int, int, int]:
        """Sense key, additional sense code and qualifier; zeroes if there is no sense."""
        sense = self.sense.ljust(14, b"\0")
        return sense[2] & 0xF, sense[12], sense[13]


class Scsi:
    """Asks targets behind one device. Every call raises DriverError."""

    def __init__(self, device: VirtioDevice, *, timeout: float = 10.0) -> None:
        """Acquire control and request queue of a started device."""
        self.device, self.timeout = device, timeout
        self.control, self.requests = device.acquire(CONTROLQ), device.acquire(REQUESTQ)

    def command(
        self, cdb: bytes, room: int = 0, *, out: bytes = b"", lun: bytes = DRIVE_LUN
    ) -> ScsiAnswer:
        """Do one command, with `out` as its data or `room` bytes for what it returns."""
        if len(cdb) > CDB_SIZE:
            raise DriverError(f"a CDB of {len(cdb)} bytes")
        queue, memory = self.requests, self.requests.ring.memory
        head = HEADER.pack(lun, id(self) & 0xFFFF_FFFF, 0, 0, 0) + cdb.ljust(CDB_SIZE, b"\0")
        answer_bytes = RESPONSE.size + SENSE_SIZE
        header = queue.take(head)
        answer = queue.take(bytes((_UNWRITTEN,)) * answer_bytes)
        body = queue.take(out or room) if out or room else 0
        queue.start(self, 4)
        queue.add([(header, len(head)), *([(body, len(out))] if out else [])])
        queue.add([(answer, answer_bytes), *([(body, room)] if room else [])], writable=True)
        [done] = queue.wait(timeout=self.timeout)
        told = memory.read(answer, answer_bytes)
        sense_len, residual, _, status, response = RESPONSE.unpack_from(told)
        data = memory.read(body, max(min(done.written - answer_bytes, room), 0)) if room else b""
        for gpa, length in ((header, len(head)), (answer, answer_bytes), (body, len(out) or room)):
            if length:
                queue.give(gpa, length)
        sense = told[RESPONSE.size : RESPONSE.size + min(sense_len, SENSE_SIZE)]
        return ScsiAnswer(response, status, sense, residual, data)

    def manage(self, subtype: int, *, tag: int = 0, lun: bytes = DRIVE_LUN) -> int:
        """Do a task management function; return its response (§5.6.6.2)."""
        queue = self.control
        request, answer = queue.take(TMF.pack(0, subtype, lun, tag)), queue.take(b"\xee")
        queue.start(self, 2)
        queue.add([(request, TMF.size)])
        queue.add([(answer, 1)], writable=True)
        queue.wait(timeout=self.timeout)
        [response] = queue.ring.memory.read(answer, 1)
        queue.give(request, TMF.size)
        queue.give(answer, 1)
        return response
