"""What a CD-ROM drive says of itself and of its disc, byte for byte. No state, no I/O.

INQUIRY and its pages, REPORT LUNS: SPC-4. Everything else: MMC-5, by command. Numbers on the wire
are big-endian.
"""

from __future__ import annotations

from struct import pack
from typing import Final

VENDOR: Final = b"PYVMD   "
PRODUCT: Final = b"CD-ROM          "
REVISION: Final = b"1   "
SERIAL: Final = b"0"

MMC_DEVICE: Final = 0x05  # peripheral device types (SPC-4 §6.6.2)
WELL_KNOWN_LUN: Final = 0x1E
NO_LUN: Final = 0x7F  # no peripheral device can be at this LUN

CD_BLOCKS: Final = 80 * 60 * 75  # more than this is no CD, but a DVD
PROFILE_CD_ROM: Final = 0x0008
PROFILE_DVD_ROM: Final = 0x0010

_DATA_TRACK: Final = 0x14  # ADR 1, control 4: a data track, recorded uninterrupted
_LEAD_OUT: Final = 0xAA
_PREGAP: Final = 150  # frames between 00:00.00 and block 0
_LUN_0: Final = bytes(8)
_REPORT_LUNS_LUN: Final = b"\xc1\x01" + bytes(6)

# GET EVENT STATUS NOTIFICATION: the media class, and what may have happened (MMC-5 §6.7.2).
MEDIA_CLASS: Final = 4
EJECT_REQUEST: Final = 1
NEW_MEDIA: Final = 2
MEDIA_REMOVAL: Final = 3
_NO_EVENT: Final = 0x80


def inquiry(kind: int) -> bytes:
    """Return standard INQUIRY data of a peripheral device type (SPC-4 §6.6.2)."""
    removable = 0x80 * (kind == MMC_DEVICE)
    # Version 5: SPC-3; response data format 2; CMDQUE.
    return bytes((kind, removable, 5, 2, 31, 0, 0, 2)) + VENDOR + PRODUCT + REVISION


def vital_page(kind: int, page: int) -> bytes | None:
    """Return a page of vital product data, None if there is no such page (SPC-4 §7.8)."""
    if page == 0x00:
        body = b"\x00\x80\x83"
    elif page == 0x80:
        body = SERIAL
    elif page == 0x83:
        name = VENDOR + PRODUCT + SERIAL
        body = pack(">BBxB", 2, 1, len(name)) + name  # ASCII; a T10 vendor ID; of the LUN
    else:
        return None
    return pack(">BBH", kind, page, len(body)) + body


def luns(select: int) -> bytes | None:
    """Return REPORT LUNS data, None if `select` is not one of its words (SPC-4 §6.33)."""
    found = {0: _LUN_0, 1: _REPORT_LUNS_LUN, 2: _LUN_0 + _REPORT_LUNS_LUN}.get(select)
    return None if found is None else pack(">I4x", len(found)) + found


def _address(lba: int, msf: bool) -> bytes:
    """Return a block's address, by number or by minute, second and frame."""
    if not msf:
        return pack(">I", min(lba, 0xFFFFFFFF))
    seconds, frame = divmod(lba + _PREGAP, 75)
    minute, second = divmod(seconds, 60)
    return bytes((0, minute, second, frame) if minute <= 99 else (0, 99, 59, 74))


def contents(blocks: int, start: int, msf: bool) -> bytes | None:
    """Return READ TOC/PMA/ATIP data, format 0, from track `start` on; None if it is not there."""
    if 1 < start != _LEAD_OUT:
        return None
    tracks = b"" if start == _LEAD_OUT else b"\0\x14\1\0" + _address(0, msf)
    tracks += bytes((0, _DATA_TRACK, _LEAD_OUT, 0)) + _address(blocks, msf)
    return pack(">HBB", 2 + len(tracks), 1, 1) + tracks


def sessions(msf: bool) -> bytes:
    """Return READ TOC/PMA/ATIP data, format 1: one session, which begins with track 1."""
    return pack(">HBBxBBx", 10, 1, 1, _DATA_TRACK, 1) + _address(0, msf)


def mode_pages(code: int, locked: bool) -> list[bytes] | None:
    """Return the mode pages of a code, None if there are none (MMC-5 §7)."""
    recovery = bytes((0x01, 10, 0, 5)) + bytes(8)  # 5 retries
    # Reads CD-R, CD-RW, DVD-ROM, DVD-R; forms 1 and 2 of mode 2, sessions. Locks, ejects, has a
    # tray. 0x1B80: 40 times the speed of a CD, as far as that means something.
    capabilities = bytes((0x2A, 30, 0x1B, 0, 0x70, 0, 0x29 | 2 * locked, 0))
    capabilities += pack(">HHHH", 0x1B80, 0, 128, 0x1B80) + bytes(16)
    pages = {0x01: recovery, 0x2A: capabilities}
    if code == 0x3F:
        return list(pages.values())
    return [pages[code]] if code in pages else None


def _feature(code: int, version: int, flags: int, data: bytes) -> tuple[int, bool, bytes]:
    """Return a feature descriptor with its code, and whether it is current (MMC-5 §5.2)."""
    return code, bool(flags & 1), pack(">HBB", code, version << 2 | flags, len(data)) + data


def profile(blocks: int) -> int:
    """Return what a disc of so many blocks is; 0 is no disc."""
    return 0 if not blocks else PROFILE_CD_ROM if blocks <= CD_BLOCKS else PROFILE_DVD_ROM


def configuration(blocks: int, request: int, start: int) -> bytes:
    """Return GET CONFIGURATION data for request type 0, 1 or 2 (MMC-5 §6.6)."""
    current = profile(blocks)
    persistent = 2 | 1  # always current
    profiles = b"".join(
        pack(">HBx", number, number == current) for number in (PROFILE_DVD_ROM, PROFILE_CD_ROM)
    )
    features = (
        _feature(0x0000, 0, persistent, profiles),
        _feature(0x0001, 2, persistent, pack(">I4x", 1)),  # core: SCSI
        _feature(0x0002, 1, persistent, bytes(4)),  # morphing: events are polled for
        _feature(0x0003, 0, persistent, b"\x29\0\0\0"),  # removable medium: tray, eject, lock
        _feature(0x0010, 0, bool(blocks), pack(">IHBx", 2048, 1, 1)),  # random readable
        _feature(0x001E, 0, current == PROFILE_CD_ROM, bytes(4)),  # CD read
        _feature(0x001F, 0, current == PROFILE_DVD_ROM, bytes(0)),  # DVD read
    )
    found = b"".join(
        data
        for code, is_current, data in features
        if (code == start if request == 2 else code >= start and (is_current or not request))
    )
    return pack(">IxxH", 4 + len(found), current) + found


def event_status(classes: int, event: int, tray_open: bool, loaded: bool) -> bytes:
    """Return GET EVENT STATUS NOTIFICATION data for the first of `classes` that there is."""
    supported = 1 << MEDIA_CLASS
    if not classes & supported:
        return bytes((0, 2, _NO_EVENT, supported))
    return bytes((0, 6, MEDIA_CLASS, supported, event, tray_open | loaded << 1, 0, 0))


def disc_information() -> bytes:
    """Return READ DISC INFORMATION data: complete, one session, one track (MMC-5 §6.22.3.1)."""
    return pack(">HBBBBBB8xII", 32, 0x0E, 1, 1, 1, 1, 0x20, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(10)


def mechanism_status(tray_open: bool) -> bytes:
    """Return MECHANISM STATUS data: idle, no changer (MMC-5 §6.11)."""
    return pack(">BB6x", 0, 0x10 * tray_open)


def disc_structure(blocks: int, code: int) -> bytes | None:
    """Return READ DISC STRUCTURE data of a DVD; None if there is no such (MMC-5 §6.23)."""
    if code == 0x00:  # physical format: a DVD-ROM of one layer
        first = 0x030000
        last = min(first + blocks - 1, 0xFFFFFF)
        data = pack(">BBBBIII", 0x01, 0x0F, 0x01, 0, first, last, 0) + bytes(2032)
    elif code == 0x01:  # copyright: none
        data = bytes(4)
    elif code == 0xFF:  # which of them there are, readable
        data = b"".join(
            pack(">BBH", number, 0x40, 4 + size)
            for number, size in ((0x00, 2048), (0x01, 4), (0xFF, 12))
        )
    else:
        return None
    return pack(">Hxx", 2 + len(data)) + data
