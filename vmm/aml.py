"""ACPI Machine Language, written by composing bytes (ACPI 6.3 §20.2; resources §6.4).

Each function returns the encoding of one term, so a namespace is nested calls that look like
ASL. Where a term takes a value, an int becomes an integer, a str a string, and bytes are AML
already. Only what our tables use is here. Wrong arguments raise.
"""

from __future__ import annotations

from struct import pack
from typing import Final

_DEVICE: Final = b"\x5b\x82"
_NAME_CHARS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")

# Flags of an address space descriptor: this device passes the range on (producer), both ends fixed.
_WINDOW: Final = 0x0C
_MEMORY, _IO, _BUS = 0, 1, 2  # resource types
_READ_WRITE: Final = 0x01  # type flags of memory: writable, not cacheable
_ENTIRE_RANGE: Final = 0x03  # type flags of I/O: ISA and other addresses alike

Value = int | str | bytes


def integer(value: int) -> bytes:
    """Encode an unsigned integer of up to 64 bits, as short as it goes."""
    if value in {0, 1}:
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit an AML integer")


def string(text: str) -> bytes:
    """Encode a string of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a plug-and-play id such as PNP0A03: three letters, four hexadecimal digits."""
    vendor = 0
    for letter in text[:3].encode("ascii"):
        vendor = vendor << 5 | letter - 0x40
    return pack("<B", 0x0C) + pack(">HH", vendor, int(text[3:], 16))


def name_string(path: str) -> bytes:
    r"""Encode a name such as `_CRS` or `\_SB.PCI0`; segments have one to four characters."""
    bare = path.lstrip("\\^")
    prefix = path[: len(path) - len(bare)].encode("ascii")
    if not bare:
        return prefix + b"\0"
    parts = bare.split(".")
    for part in parts:
        if not 1 <= len(part) <= 4 or part[0].isdigit() or not _NAME_CHARS.issuperset(part):
            raise ValueError(f"{path!r} is no ACPI name")
    segments = "".join(part.ljust(4, "_") for part in parts).encode("ascii")
    if len(parts) > 2:
        prefix += bytes((0x2F, len(parts)))
    elif len(parts) == 2:
        prefix += b"\x2e"
    return prefix + segments


def sized(body: bytes) -> bytes:
    """Put PkgLength, which counts itself, before `body`."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << 4 + 8 * more:
            return (
                bytes((more << 6 | length & 0x0F,)) + (length >> 4).to_bytes(more, "little") + body
            )
    raise ValueError(f"an AML package of {len(body)} bytes is too long")


def value(item: Value) -> bytes:
    """Encode what stands where a value is expected."""
    if isinstance(item, bytes):
        return item
    return integer(item) if isinstance(item, int) else string(item)


def buffer(data: bytes) -> bytes:
    """Buffer () {data}."""
    return b"\x11" + sized(integer(len(data)) + data)


def package(*items: Value) -> bytes:
    """Package () {items}; at most 255."""
    return b"\x12" + sized(bytes((len(items),)) + b"".join(map(value, items)))


def name(path: str, item: Value) -> bytes:
    """Name (path, item)."""
    return b"\x08" + name_string(path) + value(item)


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    return b"\x10" + sized(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    return _DEVICE + sized(name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Method (path, arguments, NotSerialized) {terms}; at most 7 arguments."""
    return b"\x14" + sized(name_string(path) + bytes((arguments & 7,)) + b"".join(terms))


def return_(item: Value) -> bytes:
    """Return (item)."""
    return b"\xa4" + value(item)


# Resource descriptors, for resources()


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}, closed with an end tag whose checksum is not used."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(port: int, length: int) -> bytes:
    """IO (Decode16, ...): fixed ports."""
    return pack("<BBHHBB", 0x47, 1, port, port, 1, length)


def irq(number: int) -> bytes:
    """IRQNoFlags (): an ISA interrupt, edge-triggered and active-high."""
    return pack("<BH", 0x22, 1 << number)


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (): buses behind a host bridge."""
    return _address_space("H", _BUS, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    """WordIO (): ports a bridge passes on."""
    return _address_space("H", _IO, _ENTIRE_RANGE, first, last)


def dword_io(first: int, last: int) -> bytes:
    """DWordIO (): as word_io() with 32-bit fields."""
    return _address_space("I", _IO, _ENTIRE_RANGE, first, last)


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory (): writable, uncacheable addresses a bridge passes on."""
    return _address_space("I", _MEMORY, _READ_WRITE, first, last)


def _address_space(width: str, kind: int, kind_flags: int, first: int, last: int) -> bytes:
    """Encode a window: granularity 0, no translation, both ends fixed."""
    body = pack(f"<BBB5{width}", kind, _WINDOW, kind_flags, 0, first, last, 0, last - first + 1)
    return pack("<BH", 0x88 if width == "H" else 0x87, len(body)) + body
