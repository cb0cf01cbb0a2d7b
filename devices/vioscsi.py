"""virtio SCSI host (virtio 1.2 §5.6) with one target, a CD-ROM drive: target 0, LUN 0.

Queues: 0 controlq, 1 eventq, 2 requests. Configuration space (§5.6.4):

     0 u32 num_queues    12 u32 cmd_per_lun        24 u32 cdb_size, writable
     4 u32 seg_max       16 u32 event_info_size    28 u16 max_channel, 0
     8 u32 max_sectors   20 u32 sense_size, w.     30 u16 max_target    32 u32 max_lun

Features: none. INOUT and T10_PI are nothing for a drive that is only read, HOTPLUG is about drives
that come and go, and what CHANGE reports may not be reported of an MMC device (§5.6.6.3.2). A
driver hears of discs that come and go by asynchronous notification, if it subscribes to that, and
by asking the drive.

    chain ── header ──► scsicd.Drive ── views ──► disc.Disc        chain ── controlq ──► tray.Tray

Every command is done before the next one is looked at, so a task management function never finds
one to abort, and resets have nothing to wait for. What changes the drive is done once, whenever
the process is killed (`once.py`).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError, GuestError
from devices import spread
from devices.changer import ACTS, INSERT, Changer
from devices.device import WARNING, Device
from devices.disc import Disc
from devices.once import Once
from devices.scsi import CHECK_CONDITION, GOOD, LUN_RESET, NEXUS_LOST, POWER_ON, CheckError
from devices.scsi import OverrunError as Overrun
from devices.scsicd import LUN_0, OTHER_LUN
from devices.scsireq import (
    AN,
    AN_ANSWER,
    CDB_SIZE,
    CONFIG,
    DRIVE_LUN,
    EVENT,
    EVENTS_MISSED,
    EVT_MEDIA_CHANGE,
    HEADER,
    RESPONSE,
    S_BAD_TARGET,
    S_FAILURE,
    S_FUNCTION_COMPLETE,
    S_FUNCTION_REJECTED,
    S_INCORRECT_LUN,
    S_OK,
    S_OVERRUN,
    SENSE_SIZE,
    T_AN_QUERY,
    T_AN_SUBSCRIBE,
    T_ASYNC_NOTIFY,
    T_NO_EVENT,
    T_TMF,
    TMF,
    TMF_CLEAR_ACA,
    TMF_I_T_NEXUS_RESET,
    TMF_LOGICAL_UNIT_RESET,
    TMF_QUERY_TASK_SET,
    locate,
)
from devices.spec import BUSY, FIRST_DISC, SPECS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.chain import Chain
    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue

CONTROLQ, EVENTQ, REQUESTQ = range(3)
_REQUESTS, _BYTES = range(2)  # counters

BUDGET: Final = 4 << 20  # bytes per wake-up, about 1 ms from the page cache
REQUEST_COST: Final = 4096  # bytes: what a request counts for beside its own

_SENSE_SIZE_AT: Final = 20
_CDB_SIZE_AT: Final = 24
MAX_SENSE_SIZE: Final = 4096  # bytes; no sense data here has more than 18
MAX_CDB_SIZE: Final = 260  # bytes: the longest there is (SPC-4 §4.2.5.1)
MAX_SECTORS: Final = 2048  # of 512 bytes: a hint, as in vmd


def create(
    settings: Mapping[str, Any], fds: dict[str, int], memory: GuestMemory, host: Host
) -> Vioscsi:
    """Make the device, with the disc on the descriptor `disc1` or without any.

    Which one there is in a successor says `load`.
    """
    names = [name for name in fds if name.startswith("disc")]
    discs = {int(name.removeprefix("disc")): fds.pop(name) for name in names}
    fd = -1 if settings.get("resumes") else discs.pop(FIRST_DISC, -1)
    return Vioscsi(memory, host, Disc(fd, host) if fd >= 0 else None, discs)


class Vioscsi(Device):
    """Takes requests off its queues, has them done, and answers."""

    queue_sizes = SPECS["vioscsi"].queues
    in_order = True

    def __init__(
        self,
        memory: GuestMemory,
        host: Host,
        disc: Disc | None,
        others: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """See Changer."""
        super().__init__(memory, host)
        self._changer = Changer(self._event, host, disc, others)
        self.drive = self._changer.drive
        self._once = Once(self._state, host.checkpoint)
        self._sizes = {_SENSE_SIZE_AT: SENSE_SIZE, _CDB_SIZE_AT: CDB_SIZE}
        self._subscribed = 0  # EVT_* bits
        self._pending = 0  # EVT_* bits to be sent
        self._missed = False  # an event found no buffer
        self._recovered: dict[int, list[Chain]] = {}

    # Configuration space.

    def config(self) -> bytes:
        """See the file's head.

        max_target and max_lun are as in vmd, whose guests take one of them for a number.
        """
        sizes = self._sizes[_SENSE_SIZE_AT], self._sizes[_CDB_SIZE_AT]
        segments = self.queue_sizes[REQUESTQ] - 2
        return CONFIG.pack(1, segments, MAX_SECTORS, 32, EVENT.size, *sizes, 0, 1, 1)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take sense_size and cdb_size; they hold until a reset (§5.6.4.2)."""
        most = {_SENSE_SIZE_AT: MAX_SENSE_SIZE, _CDB_SIZE_AT: MAX_CDB_SIZE}.get(offset, -1)
        value = int.from_bytes(data, "little")
        if len(data) == 4 and value <= most:
            self._sizes[offset] = value
        else:
            self.host.log(WARNING, f"write of {value:#x} to {offset:#x} in configuration space")

    # Life of a driver.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Find what a killed predecessor left unfinished."""
        for index, queue in enumerate(queues):
            if queue is not None:
                self.start_queue(index, queue)

    def start_queue(self, index: int, queue: VirtQueue) -> None:
        """Find what a killed predecessor left unfinished in a queue."""
        self._recovered[index] = chains = queue.resubmit()
        self._once.found(index, chains)

    def stop_queue(self, index: int, queue: VirtQueue) -> None:
        """Finish what a predecessor left: a buffer for an event goes back without one."""
        for chain in self._recovered.pop(index, []):
            if index == EVENTQ:
                written = spread.fill(chain.writable, EVENT.pack(T_NO_EVENT, bytes(8), 0))
            else:
                written = (self._control if index == CONTROLQ else self._command)(chain)
            queue.push(chain.head, written)
        if queue.should_call():
            self.host.call(index)

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Serve what is there, as far as the budget goes."""
        if index == EVENTQ:
            return self._send_events(queue)
        serve = self._control if index == CONTROLQ else self._command
        left = BUDGET
        queue.disable_kicks()
        self.totals[BUSY] = 1  # a slow disc keeps registers waiting
        try:
            while left > 0:
                chain = self._next(index, queue)
                if chain is not None:
                    left -= self._once.do(index, queue, chain, serve) + REQUEST_COST
                    self.totals[_REQUESTS] += 1
                elif not queue.enable_kicks():
                    return False
        finally:
            self.totals[BUSY] = 0
            if queue.should_call():
                self.host.call(index)
        return True

    def reset_queue(self, index: int) -> None:
        """Nothing is ever in flight."""
        self._recovered.pop(index, None)
        self._once.drop(index)

    def reset(self) -> None:
        """Reset bus and drive; the disc stays where it is."""
        self.drive.reset(POWER_ON)
        self._sizes = {_SENSE_SIZE_AT: SENSE_SIZE, _CDB_SIZE_AT: CDB_SIZE}
        self._subscribed = self._pending = 0
        self._missed = False
        self._recovered.clear()
        self._once.clear()

    def _next(self, index: int, queue: VirtQueue) -> Chain | None:
        recovered = self._recovered.get(index)
        return recovered.pop(0) if recovered else queue.pop()

    # Requests.

    def _command(self, chain: Chain) -> int:
        """Do one command; return how many bytes of the chain were written. Raises GuestError."""
        sense_size, cdb_size = self._sizes[_SENSE_SIZE_AT], self._sizes[_CDB_SIZE_AT]
        header_size, response_size = HEADER.size + cdb_size, RESPONSE.size + sense_size
        out = chain.readable_bytes - header_size
        room = chain.writable_bytes - response_size
        if out < 0 or room < 0:
            what = f"{chain.readable_bytes} bytes to read and {chain.writable_bytes} to write"
            raise GuestError(f"SCSI request of {what}: no room for header and response")
        header = spread.gather(chain.readable, header_size)
        lun = locate(header[:8])
        status, response, sense, done = GOOD, S_OK, b"", 0
        if out and room:
            response = S_FAILURE  # needs VIRTIO_SCSI_F_INOUT
        elif lun is None:
            response = S_BAD_TARGET
        else:
            views = spread.after(chain.writable, response_size)
            try:
                done = self.drive.execute(lun, header[HEADER.size :], views, room)
            except Overrun:
                response = S_OVERRUN
            except CheckError as err:
                status, done = CHECK_CONDITION, err.transferred
                sense = err.sense.fixed()[:sense_size]
        self.totals[_BYTES] += done
        answer = RESPONSE.pack(len(sense), out + room - done, 0, status, response)
        spread.fill(chain.writable, answer + sense.ljust(sense_size, b"\0"))
        return response_size + done

    # Control.

    def _control(self, chain: Chain) -> int:
        """Answer one request of controlq; return how many bytes were written. Raises GuestError."""
        data = spread.gather(chain.readable, TMF.size)
        kind = int.from_bytes(data[:4], "little") if len(data) >= 4 else -1
        if kind == T_TMF and len(data) >= TMF.size:
            _, subtype, lun, _ = TMF.unpack(data)
            answer = bytes((self._manage(subtype, lun),))
        elif kind in (T_AN_QUERY, T_AN_SUBSCRIBE) and len(data) >= AN.size:
            _, lun, wanted = AN.unpack_from(data)
            answer = self._notify(kind, lun, wanted)
        elif kind > T_AN_SUBSCRIBE:
            answer = bytes((S_FAILURE,))
        else:
            raise GuestError(f"SCSI control request of {chain.readable_bytes} bytes is cut short")
        if chain.writable_bytes < len(answer):
            raise GuestError(f"SCSI control request with {chain.writable_bytes} bytes to write")
        return spread.fill(chain.writable, answer)

    def _manage(self, subtype: int, address: bytes) -> int:
        """Do a task management function (SAM-5 §7); return its response."""
        lun = locate(address)
        if lun is None:
            return S_BAD_TARGET
        if subtype == TMF_I_T_NEXUS_RESET:
            self.drive.reset(NEXUS_LOST)
            return S_FUNCTION_COMPLETE
        if lun == OTHER_LUN:
            return S_INCORRECT_LUN
        if subtype == TMF_CLEAR_ACA or subtype > TMF_QUERY_TASK_SET:
            return S_FUNCTION_REJECTED
        if subtype == TMF_LOGICAL_UNIT_RESET and lun == LUN_0:
            self.drive.reset(LUN_RESET)
        return S_FUNCTION_COMPLETE  # aborted, or not there: there is no such task any more

    def _notify(self, kind: int, address: bytes, wanted: int) -> bytes:
        """Answer an asynchronous notification query or subscription."""
        lun = locate(address)
        if lun is None:
            return AN_ANSWER.pack(0, S_BAD_TARGET)
        if lun != LUN_0:
            return AN_ANSWER.pack(0, S_INCORRECT_LUN)
        actual = wanted & EVT_MEDIA_CHANGE
        if kind == T_AN_SUBSCRIBE:
            self._subscribed = actual
        return AN_ANSWER.pack(actual, S_OK)

    # Events.

    def _event(self, _event: int) -> None:
        """Something has happened to the disc: any media event."""
        if self._subscribed & EVT_MEDIA_CHANGE:
            self._pending |= EVT_MEDIA_CHANGE
            self.host.schedule(EVENTQ)

    def _send_events(self, queue: VirtQueue) -> bool:
        """Send what is pending, or remember that it was missed; then tell that, when possible."""
        for _ in range(queue.size):
            if not (self._pending or self._missed or self._once.owes(EVENTQ)):
                break
            chain = self._next(EVENTQ, queue)
            if chain is None:
                if self._pending:
                    self._missed, self._pending = True, 0
                    self.host.checkpoint()
                if queue.enable_kicks():
                    continue
                break
            self._once.do(EVENTQ, queue, chain, self._report)
        if queue.should_call():  # perhaps for what a predecessor sent
            self.host.call(EVENTQ)
        return False

    def _report(self, chain: Chain) -> int:
        """Put what is pending into a buffer. Raises GuestError."""
        if chain.readable:
            raise GuestError("SCSI event buffer that cannot be written to")
        event, reason = T_ASYNC_NOTIFY if self._pending else T_NO_EVENT, self._pending
        if chain.writable_bytes < EVENT.size:  # too short to say anything
            event = T_NO_EVENT
        else:
            self._pending = 0
        event |= EVENTS_MISSED * self._missed
        self._missed = self._missed and chain.writable_bytes < EVENT.size
        lun = DRIVE_LUN if event & T_ASYNC_NOTIFY else bytes(8)
        return spread.fill(chain.writable, EVENT.pack(event, lun, reason))

    # Life of the process.

    def setting(self, name: str, value: Any) -> Any:
        """`eject`, `load`: see Changer.act. Raises PyvmError."""
        return self._changer.act(name, value) if name in ACTS else super().setting(name, value)

    def take(self, name: str, value: Any, fd: int) -> Any:
        """`insert`: likewise."""
        if name != INSERT:
            return super().take(name, value, fd)
        return self._changer.act(name, value, fd)

    def save(self) -> dict[str, Any]:
        """Return what the driver has set, and what it has not been told yet."""
        return {
            "sizes": list(self._sizes.values()),
            "subscribed": self._subscribed,
            "missed": self._missed or bool(self._pending),
            "drive": self.drive.save(),
        }

    def remember(self) -> dict[str, Any]:
        """Return the disc, too, and what has been done."""
        return {
            **self.save(),
            "missed": self._missed,
            "pending": self._pending,
            "once": self._once.save(),
            "changer": self._changer.save(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take that over."""
        sense_size, cdb_size = map(int, state["sizes"])
        if not (0 <= sense_size <= MAX_SENSE_SIZE and 0 <= cdb_size <= MAX_CDB_SIZE):
            raise ConfigError(f"sense_size {sense_size} and cdb_size {cdb_size} cannot be")
        self._sizes = {_SENSE_SIZE_AT: sense_size, _CDB_SIZE_AT: cdb_size}
        self._subscribed = state["subscribed"] & EVT_MEDIA_CHANGE
        self._missed = bool(state["missed"])
        self.drive.restore(state["drive"])
        if "changer" in state:
            self._pending = state["pending"] & EVT_MEDIA_CHANGE
            self._once.load(state["once"])
            self._changer.load(state["changer"])
        self._changer.announce()

    def _state(self) -> tuple[object, ...]:
        """All that requests change."""
        return self.drive.state, self._subscribed, self._pending, self._missed
