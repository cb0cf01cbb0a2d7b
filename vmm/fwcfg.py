"""fw_cfg: what the machine tells its firmware, by port or by DMA (QEMU docs/specs/fw_cfg.rst).

    0x510  selector   16-bit write: choose an item, start at its first byte
    0x511  data       8-bit reads: its bytes one by one, then zeros
    0x514  DMA address, high half   big-endian, as is all that DMA moves about
    0x518  DMA address, low half    this write starts the transfer

A DMA descriptor in guest RAM is control, length, address: the guest asks for bytes of an item to
be copied, or skipped. The old items have fixed numbers; everything new is a file, and item 0x19
is the directory of files. Nothing here can be written: a guest that tries gets the error bit.

The guest is hostile. A descriptor is read once and its addresses go through GuestMemory; one
transfer is at most TRANSFER_MAX bytes, since the vCPU's thread holds Python's lock meanwhile.
"""

from __future__ import annotations

from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.guestmem import GuestMemory

PORTS: Final = 0x510
NR_PORTS: Final = 12
SELECTOR: Final = 0  # offsets from PORTS
DATA: Final = 1
DMA_HIGH: Final = 4
DMA_LOW: Final = 8

SIGNATURE: Final = 0x0000
ID: Final = 0x0001
DIRECTORY: Final = 0x0019
FIRST_FILE: Final = 0x0020
NOTHING: Final = 0xFFFF  # no item has this number

ID_TRADITIONAL: Final = 1 << 0
ID_DMA: Final = 1 << 1

DMA_ERROR: Final = 1 << 0
DMA_READ: Final = 1 << 1
DMA_SKIP: Final = 1 << 2
DMA_SELECT: Final = 1 << 3  # the item is in bits 16–31
DMA_WRITE: Final = 1 << 4
DMA_SIGNATURE: Final = b"QEMU CFG"  # what the address register reads as

TRANSFER_MAX: Final = 1 << 20  # bytes; the largest item has some thousand

_DESCRIPTOR: Final = Struct(">IIQ")  # control, length, GPA
_CONTROL: Final = Struct(">I")
_FILE: Final = Struct(">IHH56s")  # size, item, reserved, name
_NAME_MAX: Final = 55  # bytes, since a NUL follows


class FwCfg:
    """The device. Any thread may call; items change only while no vCPU runs."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._lock = Lock()
        self._items: dict[int, bytes] = {}
        self._power_on()

    def load(self, items: Mapping[int, bytes], files: Mapping[str, bytes]) -> None:
        """Return to power-on and show these: old items by number, files by name.

        Raises ValueError for a name that does not fit its field.
        """
        directory = [len(files).to_bytes(4, "big")]
        known = {
            SIGNATURE: b"QEMU",
            ID: (ID_TRADITIONAL | ID_DMA).to_bytes(4, "little"),
            **items,
        }
        for item, (name, data) in enumerate(sorted(files.items()), FIRST_FILE):
            if len(name.encode()) > _NAME_MAX:
                raise ValueError(f"fw_cfg file name {name!r} is longer than {_NAME_MAX} bytes")
            directory.append(_FILE.pack(len(data), item, 0, name.encode()))
            known[item] = data
        known[DIRECTORY] = b"".join(directory)
        with self._lock:
            self._items = known
            self._power_on()

    def _power_on(self) -> None:
        self._selected, self._at = NOTHING, 0
        self._dma_high = 0

    def read(self, offset: int, size: int) -> int:
        """Read the next data byte, or the sign that there is DMA; all else is all-ones."""
        if (offset, size) == (DATA, 1):
            with self._lock:
                return self._take(1)[0]
        if offset in (DMA_HIGH, DMA_LOW) and size == 4:
            return int.from_bytes(DMA_SIGNATURE[offset - DMA_HIGH :][:4], "little")
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item or start a transfer; all else is dropped."""
        with self._lock:
            if (offset, size) == (SELECTOR, 2):
                self._select(value)
            elif (offset, size) == (DMA_HIGH, 4):
                self._dma_high = _swapped(value)
            elif (offset, size) == (DMA_LOW, 4):
                gpa = self._dma_high << 32 | _swapped(value)
                self._dma_high = 0
                try:
                    self._transfer(gpa)
                except GuestError as err:
                    log.limited("fw_cfg", f"DMA descriptor: {err}", "fw_cfg")

    # Under the lock.

    def _select(self, item: int) -> None:
        self._selected, self._at = item, 0

    def _take(self, length: int) -> bytes:
        """Return the next `length` bytes of the item; past its end, and of no item, zeros."""
        data = self._items.get(self._selected, b"")[self._at :][:length]
        self._at += len(data)
        return data + bytes(length - len(data))

    def _transfer(self, gpa: int) -> None:
        """Carry out the descriptor at `gpa`. Raises GuestError if it is not in RAM."""
        control, length, address = _DESCRIPTOR.unpack(self._memory.read(gpa, _DESCRIPTOR.size))
        if control & DMA_SELECT:
            self._select(control >> 16)
        failed = False
        if control & DMA_READ:
            failed = not self._copy(address, length)
        elif control & DMA_WRITE:
            failed = True
        elif control & DMA_SKIP:
            self._at += length
        self._memory.write(gpa, _CONTROL.pack(DMA_ERROR if failed else 0))

    def _copy(self, address: int, length: int) -> bool:
        """Copy the item's next bytes to guest RAM; False, nothing taken, if that cannot be."""
        if length > TRANSFER_MAX:
            log.limited("fw_cfg", f"DMA of {length} bytes, over {TRANSFER_MAX}", "fw_cfg")
            return False
        try:
            views = self._memory.views(address, length)
        except GuestError as err:
            log.limited("fw_cfg", f"DMA: {err}", "fw_cfg")
            return False
        for view in views:
            view[:] = self._take(len(view))
        return True


def _swapped(value: int) -> int:
    """Return the 32-bit number that a guest means by a big-endian `value`."""
    return int.from_bytes(value.to_bytes(4, "little"), "big")
