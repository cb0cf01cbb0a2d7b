"""MSI-X as registers: the table of messages, the pending bits, the capability (PCI 3.0 §6.8.2).

    table   16 bytes per vector: message address (8), message data (4), vector control (4)
    PBA     one bit per vector, read-only: an interrupt is waiting for the vector to be unmasked
    control in configuration space: enable, function mask (all vectors at once), table size

A vector may send while MSI-X is enabled and neither mask covers it. This module knows when that
is; what is connected to a vector, and so what is pending, its owner knows (`interrupts`).

Locking: the owner's lock, passed in, guards the registers. `changed` and `pending` are called
with it held.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from vmm.irq import Message

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Lock

CAP_MSIX: Final = 0x11
MAX_VECTORS: Final = 2048
ENTRY: Final = 16  # bytes

CONTROL_ENABLE: Final = 1 << 15
CONTROL_FUNCTION_MASK: Final = 1 << 14
CONTROL: Final = 2  # offset of message control in the capability

ADDRESS_LOW, ADDRESS_HIGH, DATA, VECTOR_CONTROL = range(4)  # the dwords of an entry
MASKED: Final = 1  # vector control; set at power-on

# Message control, then offset and BAR (low 3 bits) of the table and of the PBA.
_BODY: Final = Struct("<HII")
_WRITABLE: Final = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_bytes(2, "little")

# What a guest can change in each dword. Bits 0-1 of the address are 0: a message is one dword.
_WRITABLE_BITS: Final = (0xFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFF, MASKED)


class Msix:
    """The registers of `nr_vectors` vectors, and the handler of the BAR they live in."""

    def __init__(
        self,
        nr_vectors: int,
        lock: Lock,
        changed: Callable[[int], None],
        pending: Callable[[int], bool],
    ) -> None:
        """`changed(vector)` follows a write to an entry; `pending(vector)` answers PBA reads."""
        if not 1 <= nr_vectors <= MAX_VECTORS:
            raise ValueError(f"{nr_vectors} MSI-X vectors; 1 to {MAX_VECTORS} are possible")
        self.nr_vectors = nr_vectors
        self._lock, self._changed, self._pending = lock, changed, pending
        self._table_size = nr_vectors * ENTRY
        # Table in the lower half, PBA in the upper: they never share a page once it matters.
        self.bar_size = max(4096, 1 << (2 * self._table_size - 1).bit_length())
        self._pba = self.bar_size // 2
        self._pba_end = self._pba + (nr_vectors + 63) // 64 * 8
        self.reset()

    def reset(self) -> None:
        """Return to power-on: disabled, every vector masked. The lock is the caller's business."""
        self.enabled = self.function_masked = False
        self._dwords = [0, 0, 0, MASKED] * self.nr_vectors

    def capability(self, bar: int) -> tuple[bytes, bytes]:
        """Return the capability's body, for BAR `bar`, and the mask of its writable bits."""
        return _BODY.pack(self.nr_vectors - 1, bar, self._pba | bar), _WRITABLE

    def set_control(self, value: int) -> None:
        """Take what the guest wrote to message control; the lock is held."""
        self.enabled = bool(value & CONTROL_ENABLE)
        self.function_masked = bool(value & CONTROL_FUNCTION_MASK)

    def message(self, vector: int) -> Message | None:
        """Return what `vector` sends, or None while it must keep silent; the lock is held.

        A message that would not reach a local APIC keeps silent too: a device can only interrupt
        here, not write to memory behind the driver's back.
        """
        low, high, data, control = self._dwords[4 * vector : 4 * vector + 4]
        if not self.enabled or self.function_masked or control & MASKED:
            return None
        message = Message(high << 32 | low, data)
        return message if message.interrupts else None

    def read(self, offset: int, size: int) -> int:
        """Answer aligned reads of 4 or 8 bytes; others, which PCI leaves undefined, all-ones."""
        if not _well_formed(offset, size):
            return (1 << 8 * size) - 1
        with self._lock:
            value = self._dword(offset)
            return value if size == 4 else value | self._dword(offset + 4) << 32

    def write(self, offset: int, size: int, value: int) -> None:
        """Take aligned writes of 4 or 8 bytes to the table; drop all others."""
        if not _well_formed(offset, size) or offset + size > self._table_size:
            return
        with self._lock:
            for index in range(offset // 4, (offset + size) // 4):
                self._dwords[index] = value & _WRITABLE_BITS[index % 4]
                value >>= 32
            # Once per write: half of a 64-bit store must not be acted upon.
            self._changed(offset // ENTRY)

    def _dword(self, offset: int) -> int:
        if offset < self._table_size:
            return self._dwords[offset // 4]
        if not self._pba <= offset < self._pba_end:
            return 0
        first = (offset - self._pba) * 8
        last = min(first + 32, self.nr_vectors)
        return sum(self._pending(vector) << vector - first for vector in range(first, last))


def _well_formed(offset: int, size: int) -> bool:
    return size in {4, 8} and offset % size == 0
