"""SCSI's words: status, sense data, and the two ways in which a command does not end well.

Numbers are those of SPC-4 (sense keys §4.5.6, sense data §4.5.2 and §4.5.3, additional sense codes
in its annex) and SAM-5 (status §5.3).
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

GOOD: Final = 0x00
CHECK_CONDITION: Final = 0x02

NO_SENSE: Final = 0x0
NOT_READY: Final = 0x2
MEDIUM_ERROR: Final = 0x3
ILLEGAL_REQUEST: Final = 0x5
UNIT_ATTENTION: Final = 0x6

_FIXED: Final = Struct(">BxBIB4xBBxBH")  # §4.5.3: 18 bytes
_DESCRIPTOR: Final = Struct(">BBBB3xB")  # §4.5.2: the header, 8 bytes
_VALID: Final = 0x80  # INFORMATION means something
_IN_CDB: Final = 0xC0  # the sense key specific bytes point at a byte of the CDB (§4.5.2.4.2)


class Sense(NamedTuple):
    """What a target has to say."""

    key: int
    asc: int = 0  # additional sense code
    ascq: int = 0  # its qualifier
    information: int = -1  # a block's address, -1 for none
    field: int = -1  # which byte of the CDB is wrong, -1 for none

    def fixed(self) -> bytes:
        """Return fixed format sense data, 18 bytes."""
        valid = 0 <= self.information <= 0xFFFFFFFF
        return _FIXED.pack(
            0x70 | _VALID * valid,
            self.key,
            self.information if valid else 0,
            10,  # bytes that follow
            self.asc,
            self.ascq,
            _IN_CDB if self.field >= 0 else 0,
            max(self.field, 0),
        )

    def descriptor(self) -> bytes:
        """Return descriptor format sense data without any descriptor, 8 bytes."""
        return _DESCRIPTOR.pack(0x72, self.key, self.asc, self.ascq, 0)


NOTHING: Final = Sense(NO_SENSE)
NO_MEDIUM_TRAY_CLOSED: Final = Sense(NOT_READY, 0x3A, 0x01)
NO_MEDIUM_TRAY_OPEN: Final = Sense(NOT_READY, 0x3A, 0x02)
INVALID_OPCODE: Final = Sense(ILLEGAL_REQUEST, 0x20, 0x00)
OUT_OF_RANGE: Final = Sense(ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD: Final = Sense(ILLEGAL_REQUEST, 0x24, 0x00)
NO_SUCH_LUN: Final = Sense(ILLEGAL_REQUEST, 0x25, 0x00)
INCOMPATIBLE_FORMAT: Final = Sense(ILLEGAL_REQUEST, 0x30, 0x02)
NO_SAVED_PARAMETERS: Final = Sense(ILLEGAL_REQUEST, 0x39, 0x00)
REMOVAL_PREVENTED: Final = Sense(ILLEGAL_REQUEST, 0x53, 0x02)
MEDIUM_CHANGED: Final = Sense(UNIT_ATTENTION, 0x28, 0x00)
POWER_ON: Final = Sense(UNIT_ATTENTION, 0x29, 0x00)
LUN_RESET: Final = Sense(UNIT_ATTENTION, 0x29, 0x03)
NEXUS_LOST: Final = Sense(UNIT_ATTENTION, 0x29, 0x07)
UNREADABLE: Final = Sense(MEDIUM_ERROR, 0x11, 0x00)


class CheckError(Exception):
    """CHECK CONDITION; `transferred` bytes of the data are there all the same."""

    def __init__(self, sense: Sense, transferred: int = 0) -> None:
        super().__init__(sense)
        self.sense, self.transferred = sense, transferred


class OverrunError(Exception):
    """A command asks for more data than its buffer can take."""


def invalid_field(byte: int) -> CheckError:
    """Return the error for a CDB whose byte number `byte` says what it may not."""
    return CheckError(INVALID_FIELD._replace(field=byte))
