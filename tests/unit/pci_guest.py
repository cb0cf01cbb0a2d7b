"""A guest's view of the PCI bus in tests: ports and addresses, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.bus import Bus
from vmm.pci import PciBus
from vmm.pcifunc import BAR_IO, PciFunction

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND, STATUS, BAR0, CAPABILITIES = 0x04, 0x06, 0x10, 0x34


class Registers:
    """A handler that remembers writes and answers with what it was told to."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []
        self.answer = 0x11223344

    def read(self, offset: int, size: int) -> int:
        """Answer a read."""
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write."""
        self.writes.append((offset, size, value))


class Guest:
    """Both buses with a PciBus on them, and configuration accesses as a driver makes them."""

    def __init__(self) -> None:
        self.pio, self.mmio = Bus("port"), Bus("address")
        self.reset_control = Registers()
        self.bus = PciBus(self.pio, self.mmio, self.reset_control)

    def select(self, slot: int, offset: int) -> int:
        """Write the address register; returns the port of the byte."""
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        return 0xCFC + (offset & 3)

    def read(self, slot: int, offset: int, size: int = 4) -> int:
        """Read configuration space."""
        return self.pio.read(self.select(slot, offset), size)

    def write(self, slot: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.pio.write(self.select(slot, offset), size, value)

    def capabilities(self, slot: int) -> list[tuple[int, int]]:
        """Walk the list; returns (id, offset) in order."""
        found: list[tuple[int, int]] = []
        at = self.read(slot, CAPABILITIES, 1)
        while at and len(found) < 64:
            found.append((self.read(slot, at, 1), at))
            at = self.read(slot, at + 1, 1)
        return found

    def dump(self, slot: int) -> str:
        """Return configuration space as lines of sixteen bytes."""
        lines = []
        for row in range(0, 256, 16):
            words = [self.read(slot, row + at) for at in range(0, 16, 4)]
            data = b"".join(word.to_bytes(4, "little") for word in words)
            if any(data):
                lines.append(f"  {row:02x}: {data.hex(' ')}")
        return "\n".join(lines)


def card(name: str = "card") -> PciFunction:
    """Return a bare function with a disk's ids."""
    return PciFunction(name, 0x1AF4, 0x1042, 0x010000, revision=1, subsystem=(0xB5D, 2))


class Card:
    """A function with an I/O BAR and a memory BAR, plugged into `slot`."""

    def __init__(self, guest: Guest, name: str = "card", slot: int | None = None) -> None:
        self.io, self.memory = Registers(), Registers()
        self.moves: list[tuple[str, int | None]] = []
        self.function = card(name)
        self.function.add_bar(0, 0x1000, self.io, flags=BAR_IO, on_change=self._mover("io"))
        self.function.add_bar(1, 0x1000, self.memory, on_change=self._mover("memory"))
        self.slot = guest.bus.add(self.function, slot)

    def _mover(self, which: str) -> Callable[[int | None], None]:
        return lambda address: self.moves.append((which, address))
