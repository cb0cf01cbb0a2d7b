"""Refcount blocks: one cluster of counters, 1 to 64 bits wide, big-endian.

Of counters narrower than a byte, the first is in the lowest bits.
"""

from __future__ import annotations

import re
from array import array
from typing import Final

_FIELDS_OF_ZERO: Final = {
    bits: re.compile(
        b"["
        + b"".join(
            b"\\x%02x" % byte
            for byte in range(256)
            if any(not byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits))
        )
        + b"]"
    )
    for bits in (1, 2, 4)
}

_TYPES: Final = {8: "B", 16: "H", 32: "I", 64: "Q"}


class Block:
    """One refcount block in memory; `data` is what is in the file."""

    __slots__ = ("bits", "data", "entries", "most")

    def __init__(self, data: bytearray, bits: int) -> None:
        self.data, self.bits = data, bits
        self.entries = len(data) * 8 // bits
        self.most = (1 << bits) - 1

    def get(self, index: int) -> int:
        """Return a counter."""
        bits = self.bits
        if bits >= 8:
            width = bits >> 3
            return int.from_bytes(self.data[index * width : (index + 1) * width], "big")
        at = index * bits
        return self.data[at >> 3] >> (at & 7) & self.most

    def values(self) -> array[int]:
        """Return all counters."""
        bits = self.bits
        if bits >= 8:
            found = array(_TYPES[bits], bytes(self.data))
            found.byteswap()
            return found
        shifts = range(0, 8, bits)
        split = [bytes(byte >> shift & self.most for shift in shifts) for byte in range(256)]
        return array("B", b"".join([split[byte] for byte in self.data]))

    def patch(self, index: int, count: int, value: int) -> tuple[int, bytes]:
        """Return where in `data` what must be so that `count` counters are `value`."""
        bits = self.bits
        if bits >= 8:
            width = bits >> 3
            return index * width, value.to_bytes(width, "big") * count
        first, last = index * bits >> 3, ((index + count) * bits - 1) >> 3
        number = int.from_bytes(self.data[first : last + 1], "little")
        shift = index * bits & 7
        for _ in range(count):
            number = number & ~(self.most << shift) | value << shift
            shift += bits
        return first, number.to_bytes(last - first + 1, "little")

    def set(self, index: int, count: int, value: int) -> None:
        """Set `count` counters."""
        at, data = self.patch(index, count, value)
        self.data[at : at + len(data)] = data

    def set_all(self, values: array[int]) -> None:
        """Set every counter; none of `values` is more than `most`."""
        if self.bits >= 8:
            words = array(_TYPES[self.bits], values)
            words.byteswap()
            self.data[:] = words.tobytes()
            return
        for index, value in enumerate(values):
            if value:
                self.set(index, 1, value)

    def find_free(self, start: int, most: int) -> tuple[int, int]:
        """Return the first counter from `start` that is 0, and how many are, at most `most`.

        Counts 0 if none is.
        """
        first = self._find_zero(start)
        if first < 0:
            return 0, 0
        stop = min(first + most, self.entries)
        if self.bits >= 8:
            width = self.bits >> 3
            piece = self.data[first * width : stop * width]
            return first, (len(piece) - len(piece.lstrip(b"\0"))) // width
        last = first
        while last < stop and not self.get(last):
            last += 1
        return first, last - first

    def _find_zero(self, start: int) -> int:
        if self.bits < 8:
            per_byte = 8 // self.bits
            while start < self.entries:
                found = _FIELDS_OF_ZERO[self.bits].search(self.data, start // per_byte)
                if found is None:
                    return -1
                for index in range(max(start, found.start() * per_byte), found.end() * per_byte):
                    if not self.get(index):
                        return index
                start = found.end() * per_byte
            return -1
        width = self.bits >> 3
        zero, at = bytes(width), start * width
        while (at := self.data.find(zero, at)) >= 0 and at % width:
            at += width - at % width
        return at // width if at >= 0 else -1
