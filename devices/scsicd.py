"""A CD-ROM drive: what each SCSI command does, and what moves the tray.

`COMMANDS` has a row per operation code; there is no other way in. An unknown code has no length
and no meaning (ILLEGAL REQUEST), and a row says how long its CDB is, where its allocation length
is, and whether it is for a drive without a disc or with a unit attention pending. Commands: SPC-4
and MMC-5.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING, Final, NamedTuple

from devices import scsidata, spread
from devices.disc import BLOCK
from devices.scsi import (
    INCOMPATIBLE_FORMAT,
    INVALID_FIELD,
    INVALID_OPCODE,
    NO_SAVED_PARAMETERS,
    NO_SUCH_LUN,
    NOTHING,
    OUT_OF_RANGE,
    REMOVAL_PREVENTED,
    UNREADABLE,
    CheckError,
    OverrunError,
    Sense,
    invalid_field,
)
from devices.tray import Tray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_TRANSFER: Final = 64 << 20  # bytes of one read: it bounds how long others have to wait

LUN_0: Final = 0
REPORT_LUNS_LUN: Final = -1  # the well-known one
OTHER_LUN: Final = -2  # there is none

#: Bytes of a CDB, by the first three bits of its operation code (SPC-4 §4.2.5.1).
_LENGTHS: Final = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}
_NACA: Final = 4  # in the last byte: auto contingent allegiance, which is not offered


class Command(NamedTuple):
    """One operation code."""

    run: Callable[[Drive, bytes], bytes]  # returns the data
    allocation: tuple[int, int] = (0, 0)  # first byte and size of the allocation length
    medium: bool = False  # needs a disc
    attention: bool = True  # is refused once while there is a unit attention


class Drive(Tray):
    """One drive. Knows no virtqueue; for one thread."""

    def execute(self, lun: int, cdb: bytes, views: Sequence[memoryview], room: int) -> int:
        """Do one command; its data goes to `views`, which have `room` bytes.

        Returns how many bytes were transferred. Raises CheckError, OverrunError.
        """
        code = cdb[0] if cdb else -1
        row = COMMANDS.get(code)
        if lun == LUN_0 and self.attentions and (row is None or row.attention):
            raise CheckError(self.next_attention())
        if lun != LUN_0:
            row = self._row_elsewhere(lun, code, row)
        if row is None:
            raise CheckError(INVALID_OPCODE._replace(field=0))
        length = _LENGTHS[code >> 5]
        if len(cdb) < length:
            raise CheckError(INVALID_FIELD)
        if cdb[length - 1] & _NACA:
            raise invalid_field(length - 1)
        if row.medium and self.loaded is None:
            raise CheckError(self.not_ready())
        if code in _READS:
            return self._read(cdb, views, room)
        at, size = row.allocation
        allocation = int.from_bytes(cdb[at : at + size], "big")
        if allocation > room:
            raise OverrunError
        data = row.run(self, cdb)
        if lun == OTHER_LUN and code == 0x12:
            data = bytes((scsidata.NO_LUN,)) + data[1:]
        if not size and len(data) > room:
            raise OverrunError
        return spread.fill(views, data[:allocation] if size else data)

    def _row_elsewhere(self, lun: int, code: int, row: Command | None) -> Command | None:
        """Return what a LUN does that is not the drive's; None if it does not know the code."""
        if code == 0x03:
            sense = NOTHING if lun == REPORT_LUNS_LUN else NO_SUCH_LUN
            return Command(lambda _, cdb: _sense_data(sense, cdb), (4, 1))
        if code in (0x12, 0xA0):
            if lun == REPORT_LUNS_LUN and code == 0x12:
                return Command(lambda _, cdb: _inquiry(scsidata.WELL_KNOWN_LUN, cdb), (3, 2))
            return row
        if lun == OTHER_LUN:
            raise CheckError(NO_SUCH_LUN)
        return Command(lambda *_: b"") if code == 0x00 else None

    def _read(self, cdb: bytes, views: Sequence[memoryview], room: int) -> int:
        """Do any of the READ commands. Raises CheckError, OverrunError."""
        (at, size), (count_at, count_size) = _READS[cdb[0]]
        lba = int.from_bytes(cdb[at : at + size], "big")
        count = int.from_bytes(cdb[count_at : count_at + count_size], "big")
        if cdb[0] == 0x08:
            lba, count = lba & 0x1FFFFF, count or 256
        elif cdb[1] & 0xE0:
            raise invalid_field(1)  # RDPROTECT: there is no protection information
        if lba + count > self.blocks:
            raise CheckError(OUT_OF_RANGE._replace(information=lba))
        length = count * BLOCK
        if length > MAX_TRANSFER:
            raise invalid_field(count_at)
        if length > room:
            raise OverrunError
        disc = self.loaded
        got = disc.read(spread.first(views, length), lba, count) if disc and count else 0
        if got < length:
            raise CheckError(UNREADABLE._replace(information=lba + got // BLOCK), got)
        return got

    def request_sense(self, cdb: bytes) -> bytes:
        """REQUEST SENSE: what the next command would be refused for, if anything."""
        if self.attentions:
            sense = self.next_attention()
        else:
            sense = NOTHING if self.loaded else self.not_ready()
        return _sense_data(sense, cdb)

    def read_capacity(self, _cdb: bytes) -> bytes:
        """READ CAPACITY(10)."""
        return pack(">II", min(self.blocks - 1, 0xFFFFFFFF), BLOCK)

    def service_action_in(self, cdb: bytes) -> bytes:
        """READ CAPACITY(16), which is one of several service actions."""
        if cdb[1] & 0x1F != 0x10:
            raise invalid_field(1)
        return pack(">QI20x", self.blocks - 1, BLOCK)

    def read_toc(self, cdb: bytes) -> bytes:
        """READ TOC/PMA/ATIP: formats 0 and 1."""
        # Before MMC the format was in the last byte.
        form, msf = cdb[2] & 0x0F or cdb[9] >> 6, bool(cdb[1] & 2)
        if form == 1:
            return scsidata.sessions(msf)
        if form:
            raise invalid_field(2)
        data = scsidata.contents(self.blocks, cdb[6], msf)
        if data is None:
            raise invalid_field(6)
        return data

    def mode_sense(self, cdb: bytes) -> bytes:
        """MODE SENSE(6) and (10): pages 01h, 2Ah, 3Fh."""
        control, code, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            raise CheckError(NO_SAVED_PARAMETERS)
        pages = scsidata.mode_pages(code, self.locked)
        if pages is None:
            raise invalid_field(2)
        if subpage not in (0, 0xFF if code == 0x3F else 0):
            raise invalid_field(3)
        if control == 1:  # nothing can be changed
            pages = [page[:2] + bytes(len(page) - 2) for page in pages]
        body = b"".join(pages)
        if cdb[0] == 0x1A:
            return pack(">B3x", 3 + len(body)) + body
        return pack(">H6x", 6 + len(body)) + body

    def get_configuration(self, cdb: bytes) -> bytes:
        """GET CONFIGURATION."""
        if cdb[1] & 3 == 3:
            raise invalid_field(1)
        return scsidata.configuration(self.blocks, cdb[1] & 3, int.from_bytes(cdb[2:4], "big"))

    def event_status(self, cdb: bytes) -> bytes:
        """GET EVENT STATUS NOTIFICATION: the media class, by polling only."""
        if not cdb[1] & 1:
            raise invalid_field(1)
        classes, allocation = cdb[4], int.from_bytes(cdb[7:9], "big")
        told = classes >> scsidata.MEDIA_CLASS & 1 and allocation > 4
        event = self.next_event() if told else 0
        return scsidata.event_status(classes, event, self.tray_open, bool(self.loaded))

    def disc_information(self, cdb: bytes) -> bytes:
        """READ DISC INFORMATION."""
        if cdb[1] & 7:
            raise invalid_field(1)
        return scsidata.disc_information()

    def disc_structure(self, cdb: bytes) -> bytes:
        """READ DISC STRUCTURE: of DVDs."""
        if cdb[1] & 0x0F:
            raise invalid_field(1)
        if scsidata.profile(self.blocks) != scsidata.PROFILE_DVD_ROM:
            raise CheckError(INCOMPATIBLE_FORMAT)
        data = scsidata.disc_structure(self.blocks, cdb[7])
        if data is None:
            raise invalid_field(7)
        return data

    def report_luns(self, cdb: bytes) -> bytes:
        """REPORT LUNS."""
        data = scsidata.luns(cdb[2])
        if data is None:
            raise invalid_field(2)
        if int.from_bytes(cdb[6:10], "big") < 16:
            raise invalid_field(6)
        return data

    def start_stop(self, cdb: bytes) -> bytes:
        """START STOP UNIT: load and eject; the disc always turns."""
        if cdb[4] >> 4 or not cdb[4] & 2:
            return b""
        if cdb[4] & 1:
            self._close_tray()
        elif self.locked:
            raise CheckError(REMOVAL_PREVENTED)
        else:
            self._open_tray()
        return b""

    def prevent_allow(self, cdb: bytes) -> bytes:
        """PREVENT ALLOW MEDIUM REMOVAL; not the persistent kind."""
        if cdb[4] & 2:
            raise invalid_field(4)
        self.lock(bool(cdb[4] & 1))
        return b""


def _inquiry(kind: int, cdb: bytes) -> bytes:
    """INQUIRY, standard data and vital product data, of a peripheral device type."""
    if cdb[1] & 1:
        page = scsidata.vital_page(kind, cdb[2])
        if page is None:
            raise invalid_field(2)
        return page
    if cdb[1] & 2:
        raise invalid_field(1)
    if cdb[2]:
        raise invalid_field(2)
    return scsidata.inquiry(kind)


def _sense_data(sense: Sense, cdb: bytes) -> bytes:
    return sense.descriptor() if cdb[1] & 1 else sense.fixed()


def _nothing(_drive: Drive, _cdb: bytes) -> bytes:
    return b""


#: Operation code of a read → first byte and size of its block address, and of its count.
_READS: Final = {
    0x08: ((1, 3), (4, 1)),
    0x28: ((2, 4), (7, 2)),
    0x88: ((2, 8), (10, 4)),
    0xA8: ((2, 4), (6, 4)),
}

COMMANDS: Final[dict[int, Command]] = {
    0x00: Command(_nothing, medium=True),  # TEST UNIT READY
    0x03: Command(Drive.request_sense, (4, 1), attention=False),
    0x12: Command(lambda _, cdb: _inquiry(scsidata.MMC_DEVICE, cdb), (3, 2), attention=False),
    0x1A: Command(Drive.mode_sense, (4, 1)),
    0x1B: Command(Drive.start_stop),
    0x1E: Command(Drive.prevent_allow),
    0x25: Command(Drive.read_capacity, medium=True),
    0x35: Command(_nothing),  # SYNCHRONIZE CACHE: nothing was written
    0x43: Command(Drive.read_toc, (7, 2), medium=True),
    0x46: Command(Drive.get_configuration, (7, 2), attention=False),
    0x4A: Command(Drive.event_status, (7, 2), attention=False),
    0x51: Command(Drive.disc_information, (7, 2), medium=True),
    0x5A: Command(Drive.mode_sense, (7, 2)),
    0x9E: Command(Drive.service_action_in, (10, 4), medium=True),
    0xA0: Command(Drive.report_luns, (6, 4), attention=False),
    0xAD: Command(Drive.disc_structure, (8, 2), medium=True),
    0xBD: Command(lambda drive, _: scsidata.mechanism_status(drive.tray_open), (8, 2)),
    **{code: Command(_nothing, medium=True) for code in _READS},
}
