"""DHCP messages as bytes: options in and out (RFC 2131 §2, RFC 2132, RFC 3396)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

COOKIE: Final = b"\x63\x82\x53\x63"
FIXED: Final = Struct("!BBBBIHH4s4s4s4s16s64s128s")  # up to the options
BOOTP_BYTES: Final = 300  # a BOOTP message, and what some clients want at least (RFC 1542 §2.1)
BOOTREQUEST, BOOTREPLY = 1, 2
BROADCAST_FLAG: Final = 0x8000

_MAX_OPTIONS: Final = 64  # different ones in a message
_FILE, _SNAME = 1, 2  # bits of option 52: the field holds options


class Type(IntEnum):
    """DHCP message types (RFC 2132 §9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Option(IntEnum):
    """Options that we read or write (RFC 2132 unless said)."""

    PAD = 0
    MASK = 1
    ROUTER = 3
    DNS = 6
    HOSTNAME = 12
    DOMAIN = 15
    MTU = 26
    BROADCAST = 28
    REQUESTED = 50
    LEASE = 51
    OVERLOAD = 52
    TYPE = 53
    SERVER = 54
    PARAMETERS = 55
    MESSAGE = 56
    MAX_SIZE = 57
    T1 = 58
    T2 = 59
    CLIENT_ID = 61
    RAPID_COMMIT = 80  # RFC 4039
    RELAY_AGENT = 82  # RFC 3046
    SEARCH = 119  # RFC 3397
    ROUTES = 121  # RFC 3442
    END = 255


class Message(NamedTuple):
    """A request."""

    htype: int
    hlen: int
    hops: int
    xid: int
    flags: int
    ciaddr: bytes
    giaddr: bytes
    chaddr: bytes  # 16
    file: bytes  # without trailing zeros; b"" if it holds options
    options: dict[int, bytes]  # {}: plain BOOTP, or options that make no sense


def parse(data: bytes) -> Message | None:
    """Read a BOOTREQUEST; None if it is none. Options split in several parts are joined."""
    if len(data) < FIXED.size:
        return None
    op, htype, hlen, hops, xid, _, flags, ciaddr, _, _, giaddr, chaddr, sname, file = (
        FIXED.unpack_from(data)
    )
    if op != BOOTREQUEST:
        return None
    options: dict[int, bytes] = {}
    if data[FIXED.size : FIXED.size + 4] == COOKIE:
        sound = _collect(data[FIXED.size + 4 :], options)
        overload = options.get(Option.OVERLOAD, b"\0")[:1] if sound else b"\0"
        if overload and overload[0] & _FILE:
            sound = _collect(file, options)
            file = b""
        if sound and overload and overload[0] & _SNAME:
            sound = _collect(sname, options)
        if not sound:
            options = {}
    name = file.rstrip(b"\0")
    return Message(htype, hlen, hops, xid, flags, ciaddr, giaddr, chaddr, name, options)


def _collect(area: bytes, options: dict[int, bytes]) -> bool:
    """Add the options of one area; return False where they make no sense."""
    at = 0
    while at < len(area) and area[at] != Option.END:
        if area[at] == Option.PAD:
            at += 1
            continue
        if at + 2 > len(area):
            return False
        code, end = area[at], at + 2 + area[at + 1]
        if end > len(area) or (code not in options and len(options) == _MAX_OPTIONS):
            return False
        options[code] = options.get(code, b"") + area[at + 2 : end]
        at = end
    return True


def build(
    to: Message,
    options: Sequence[tuple[int, bytes]],
    *,
    yiaddr: bytes = bytes(4),
    siaddr: bytes = bytes(4),
    ciaddr: bytes = bytes(4),
    flags: int | None = None,
    file: bytes = b"",
    room: int = 0,
) -> bytes:
    """Return the BOOTREPLY to `to`, at least BOOTP_BYTES long.

    `options`, of at most 255 bytes each, come in this order as far as they fit: into `room` bytes
    after the cookie, and then into unused `file` and `sname` fields unless it answers BOOTP, which
    knows no overload. What fits nowhere is left out. RELAY_AGENT, echoed, is given room first and
    comes last (RFC 3046).
    """
    relayed = to.options.get(Option.RELAY_AGENT, b"")
    tail = _encode(Option.RELAY_AGENT, relayed) if 0 < len(relayed) <= 255 else b""
    parts = [_encode(code, data) for code, data in options]
    space = room - len(tail) - 1
    main, rest = _fill(parts, space)
    sname = b""
    if rest and to.options:
        main, rest = _fill(parts, space - 3)
        overload = 0
        if not file:
            file, rest = _fill(rest, 127)
            overload, file = (_FILE, file + b"\xff") if file else (0, b"")
        sname, rest = _fill(rest, 63)
        if sname:
            overload, sname = overload | _SNAME, sname + b"\xff"
        if overload:
            main += bytes((Option.OVERLOAD, 1, overload))
    head = FIXED.pack(
        *(BOOTREPLY, to.htype, to.hlen, 0, to.xid, 0),
        to.flags if flags is None else flags,
        *(ciaddr, yiaddr, siaddr, to.giaddr, to.chaddr, sname, file),
    )
    return (head + COOKIE + main + tail + b"\xff").ljust(BOOTP_BYTES, b"\0")


def _encode(code: int, data: bytes) -> bytes:
    """Return an option of at most 255 bytes."""
    return bytes((code, len(data))) + data


def _fill(parts: Sequence[bytes], space: int) -> tuple[bytes, list[bytes]]:
    """Return what fits of `parts`, in order, and the others."""
    taken, rest = b"", []
    for part in parts:
        if len(taken) + len(part) <= space:
            taken += part
        else:
            rest.append(part)
    return taken, rest
