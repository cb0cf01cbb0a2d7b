"""The AML writer, against the encodings of ACPI 6.3 §20.2 and §6.4."""

from __future__ import annotations

import pytest

from vmm import aml


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a 02"),
        (0xFF, "0a ff"),
        (0x100, "0b 00 01"),
        (0xFFFF, "0b ff ff"),
        (0x10000, "0c 00 00 01 00"),
        (0xFFFFFFFF, "0c ff ff ff ff"),
        (1 << 32, "0e 00 00 00 00 01 00 00 00"),
        ((1 << 64) - 1, "0e ff ff ff ff ff ff ff ff"),
    ],
)
def test_integers_are_as_short_as_possible(number: int, expected: str) -> None:
    """Zero and One have opcodes of their own; the rest takes 1, 2, 4 or 8 bytes."""
    assert aml.integer(number).hex(" ") == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("_CRS", b"_CRS"),
        ("RTC", b"RTC_"),
        ("\\_SB", b"\\_SB_"),
        ("^KBD", b"^KBD_"),
        ("\\", b"\\\0"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\_SB.PCI0.S01", b"\\\x2f\x03_SB_PCI0S01_"),
    ],
)
def test_names(path: str, expected: bytes) -> None:
    """Segments are padded to four characters; two or more take a prefix."""
    assert aml.name_string(path) == expected


@pytest.mark.parametrize("path", ["TOOLONG", "low", "1ST", "A..B", "A B", "_SB."])
def test_bad_names_are_refused(path: str) -> None:
    """A name that no interpreter would accept never reaches a table."""
    with pytest.raises(ValueError, match="is no ACPI name"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("body", "head"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "41 04"),
        (4093, "4f ff"),
        (4094, "81 00 01"),
        ((1 << 20) - 4, "8f ff ff"),
        ((1 << 20) - 3, "c1 00 00 01"),
    ],
)
def test_package_length_counts_itself(body: int, head: str) -> None:
    """PkgLength takes one to four bytes, itself included in the count."""
    encoded = aml.sized(bytes(body))

    assert encoded[: -body or None].hex(" ") == head
    length = encoded[0] >> 6
    value = encoded[0] & (0x0F if length else 0x3F)
    value |= int.from_bytes(encoded[1 : 1 + length], "little") << 4
    assert value == len(encoded)


def test_package_length_has_a_limit() -> None:
    """28 bits of length and no more."""
    with pytest.raises(ValueError, match="too long"):
        aml.sized(bytes((1 << 28) - 4))


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (aml.eisa_id("PNP0A03"), "0c 41 d0 0a 03"),
        (aml.string("AB"), "0d 41 42 00"),
        (aml.name("_UID", 3), "08 5f 55 49 44 0a 03"),
        (aml.name("_HID", "X"), "08 5f 48 49 44 0d 58 00"),
        (aml.package(5, "A", b"\x00"), "12 08 03 0a 05 0d 41 00 00"),
        (aml.buffer(b"\x01\x02"), "11 05 0a 02 01 02"),
        (aml.scope("\\_SB", b"\xa3"), "10 07 5c 5f 53 42 5f a3"),
        (aml.device("RTC", b"\xa3"), "5b 82 06 52 54 43 5f a3"),
        (aml.method("_STA", 0, aml.return_(15)), "14 09 5f 53 54 41 00 a4 0a 0f"),
        (aml.io(0x3F8, 8), "47 01 f8 03 f8 03 01 08"),
        (aml.irq(4), "22 10 00"),
        (aml.resources(aml.irq(1)), "11 08 0a 05 22 02 00 79 00"),
        (aml.bus_numbers(0, 255), "88 0d 00 02 0c 00 00 00 00 00 ff 00 00 00 00 01"),
        (aml.word_io(0xD00, 0xFFFF), "88 0d 00 01 0c 03 00 00 00 0d ff ff 00 00 00 f3"),
        (
            aml.dword_io(0x1000, 0x1FFF),
            "87 17 00 01 0c 03 00 00 00 00 00 10 00 00 ff 1f 00 00 00 00 00 00 00 10 00 00",
        ),
        (
            aml.dword_memory(0xF0000000, 0xFEBFFFFF),
            "87 17 00 00 0c 01 00 00 00 00 00 00 00 f0 ff ff bf fe 00 00 00 00 00 00 c0 0e",
        ),
    ],
)
def test_terms(term: bytes, expected: str) -> None:
    """Each term encodes as the specification says."""
    assert term.hex(" ") == expected
