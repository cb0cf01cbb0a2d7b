"""What a driver asks of a SCSI host: layouts and numbers of virtio 1.2 §5.6, and addresses.

request    header, cdb_size bytes of CDB, data out     response, sense_size bytes of sense, data in
control    TMF or AN                                   one byte, or AN_ANSWER
event                                                  EVENT
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from devices.scsicd import LUN_0, OTHER_LUN, REPORT_LUNS_LUN

CONFIG: Final = Struct("<IIIIIIIHHI")
SENSE_SIZE: Final = 96
CDB_SIZE: Final = 32

HEADER: Final = Struct("<8sQBBB")  # lun, id, task_attr, prio, crn; then cdb
RESPONSE: Final = Struct("<IIHBB")  # sense_len, residual, status_qualifier, status, response; sense
TMF: Final = Struct("<II8sQ")  # type, subtype, lun, id
AN: Final = Struct("<I8sI")  # type, lun, event_requested
AN_ANSWER: Final = Struct("<IB")  # event_actual, response
EVENT: Final = Struct("<I8sI")  # event, lun, reason

S_OK: Final = 0
S_OVERRUN: Final = 1
S_BAD_TARGET: Final = 3
S_FAILURE: Final = 9
S_FUNCTION_COMPLETE: Final = 0
S_FUNCTION_REJECTED: Final = 11
S_INCORRECT_LUN: Final = 12

T_TMF: Final = 0
T_AN_QUERY: Final = 1
T_AN_SUBSCRIBE: Final = 2
TMF_ABORT_TASK: Final = 0
TMF_ABORT_TASK_SET: Final = 1
TMF_CLEAR_ACA: Final = 2
TMF_CLEAR_TASK_SET: Final = 3
TMF_I_T_NEXUS_RESET: Final = 4
TMF_LOGICAL_UNIT_RESET: Final = 5
TMF_QUERY_TASK: Final = 6
TMF_QUERY_TASK_SET: Final = 7

EVENTS_MISSED: Final = 0x80000000
T_NO_EVENT: Final = 0
T_ASYNC_NOTIFY: Final = 2
EVT_MEDIA_CHANGE: Final = 16

DRIVE_LUN: Final = b"\1" + bytes(7)
_W_LUN: Final = b"\xc1\1" + bytes(6)


def locate(lun: bytes) -> int | None:
    """Return which LUN of the drive's target an address means; None for another target (§5.6.6.1).

    LUN 0 may be written in peripheral or flat addressing, the well-known one with or without the
    target before it.
    """
    if lun == _W_LUN:
        return REPORT_LUNS_LUN
    if lun[0] != 1 or lun[1]:
        return None
    if any(lun[4:]):
        return OTHER_LUN
    return {b"\0\0": LUN_0, b"\x40\0": LUN_0, b"\xc1\1": REPORT_LUNS_LUN}.get(lun[2:4], OTHER_LUN)
