"""Ranges, widths and the rule for accesses nobody claims."""

from __future__ import annotations

import pytest

from vmm.bus import Bus


class Ram:
    """A handler that stores bytes and notes every access."""

    def __init__(self) -> None:
        self.bytes = bytearray(64)
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unclaimed_reads_are_all_ones(size: int) -> None:
    """An address with nothing behind it reads as all-ones and swallows writes."""
    bus = Bus("port")
    bus.write(0x80, size, 0)
    assert bus.read(0x80, size) == (1 << 8 * size) - 1


def test_offsets_count_from_the_base() -> None:
    """A handler sees offsets, never addresses, and exactly the widths it takes."""
    bus, ram = Bus("port"), Ram()
    bus.claim(0x100, 16, ram, "ram")
    bus.write(0x104, 4, 0x11223344)
    assert bus.read(0x106, 2) == 0x1122
    assert ram.accesses == [("write", 4, 4), ("read", 6, 2)]


def test_wide_accesses_are_split_low_byte_first() -> None:
    """A byte-wide chip gets bytes in address order, as on an ISA bus."""
    bus, ram = Bus("port"), Ram()
    bus.claim(0x100, 16, ram, "ram", width=1)
    bus.write(0x100, 4, 0x44332211)
    assert ram.bytes[:4] == bytes([0x11, 0x22, 0x33, 0x44])
    assert [offset for _, offset, _ in ram.accesses] == [0, 1, 2, 3]
    assert bus.read(0x100, 4) == 0x44332211


def test_access_across_the_end_is_split() -> None:
    """What lies behind a range's end is somebody else's, or nobody's."""
    bus, ram = Bus("port"), Ram()
    bus.claim(0x100, 2, ram, "ram")
    ram.bytes[1] = 0x5A
    assert bus.read(0x101, 2) == 0xFF5A
    bus.write(0x101, 2, 0x1234)
    assert ram.bytes[1] == 0x34


def test_claims_do_not_overlap() -> None:
    """Two chips never answer the same address; the error names both."""
    bus = Bus("port")
    bus.claim(0x100, 16, Ram(), "first")
    for base, length in ((0x10F, 1), (0xF8, 16), (0x100, 16), (0xF0, 64)):
        with pytest.raises(ValueError, match=r"second.*first has it"):
            bus.claim(base, length, Ram(), "second")
    bus.claim(0x110, 16, Ram(), "next")


def test_released_range_is_nobodys() -> None:
    """After release the range is free for others; releasing twice is harmless."""
    bus, ram = Bus("port"), Ram()
    bus.claim(0x100, 16, ram, "ram")
    bus.release(0x100)
    bus.release(0x100)
    assert bus.read(0x100, 1) == 0xFF
    bus.claim(0x108, 16, ram, "other")
    assert bus.find(0x100) is None
    assert bus.find(0x108) is not None
