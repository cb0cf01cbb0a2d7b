"""An address space of the machine: ranges → handlers, for ports and for MMIO alike.

The one rule for accesses nobody claims: reads give all-ones, writes are dropped, as on an
ISA bus with nothing on it. An access wider than a handler takes is split, low byte first.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple, Protocol


class Handler(Protocol):
    """Something behind a range. Called on vCPU threads: a handler locks its own state."""

    def read(self, offset: int, size: int) -> int:
        """Return the register at `offset` from the range's base; `size` is 1, 2, 4 or 8."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `value` (unsigned, fits `size`) to the register at `offset`."""


class Claim(NamedTuple):
    """One claimed range: [base, end) belongs to `handler`, at most `width` bytes at a time."""

    base: int
    end: int
    width: int
    name: str
    handler: Handler


class Bus:
    """Finds the owner of an address. Claims change rarely, look-ups happen on every exit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bases: list[int] = []
        self._claims: dict[int, Claim] = {}

    def claim(self, base: int, length: int, handler: Handler, name: str, width: int = 4) -> None:
        """Give [base, base + length) to `handler`. Raises ValueError if part of it is taken."""
        end = base + length
        for other in self._claims.values():
            if base < other.end and other.base < end:
                what = f"{self.name} {base:#x}-{end - 1:#x} for {name}"
                raise ValueError(f"{what}: {other.name} has it")
        # The look-up reads _claims after _bases, so the claim must be there first.
        self._claims[base] = Claim(base, end, width, name, handler)
        bases = self._bases.copy()
        insort(bases, base)
        self._bases = bases

    def release(self, base: int) -> None:
        """Take back the claim that starts at `base`; unknown bases are no error."""
        self._bases = [other for other in self._bases if other != base]
        self._claims.pop(base, None)

    def find(self, address: int) -> Claim | None:
        """Return the claim that covers `address`."""
        bases = self._bases
        at = bisect_right(bases, address)
        claim = self._claims.get(bases[at - 1]) if at else None
        return claim if claim is not None and address < claim.end else None

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes; what nobody claims reads as all-ones."""
        claim = self.find(address)
        if claim is None:
            return (1 << 8 * size) - 1
        if size <= claim.width and address + size <= claim.end:
            return claim.handler.read(address - claim.base, size) & ((1 << 8 * size) - 1)
        half = size // 2
        if not half:  # a handler of width 0 would recurse for ever
            return 0xFF
        return self.read(address, half) | self.read(address + half, half) << 8 * half

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes; what nobody claims is dropped."""
        claim = self.find(address)
        if claim is None:
            return
        if size <= claim.width and address + size <= claim.end:
            claim.handler.write(address - claim.base, size, value)
            return
        half = size // 2
        if half:
            self.write(address, half, value & ((1 << 8 * half) - 1))
            self.write(address + half, half, value >> 8 * half)
