"""Virtio's vendor-specific capabilities: where in its BARs a device keeps which registers.

A modern driver finds no register at a fixed place. It walks the capability list and reads, per
block of registers, the BAR, the offset and the length (virtio 1.2 §4.1.4). One of the entries is
no block but a window: a driver that cannot reach the BARs yet, such as firmware, writes BAR,
offset and length into it and then reads or writes four bytes of configuration space instead.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm.bus import Handler
    from vmm.pcifunc import PciFunction

CAP_VENDOR: Final = 0x09

# cap_len, cfg_type, bar, id, two bytes of padding, offset, length: struct virtio_pci_cap after
# the two bytes every capability begins with.
_BODY: Final = Struct("<BBBBxxII")
_WINDOW_WRITABLE: Final = _BODY.pack(0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF) + b"\xff" * 4


class CfgType(IntEnum):
    """VIRTIO_PCI_CAP_*: which block of registers a capability points at."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


def _body(cfg_type: CfgType, bar: int, offset: int, length: int, extra: bytes) -> bytes:
    size = 2 + _BODY.size + len(extra)
    return _BODY.pack(size, cfg_type, bar, 0, offset, length) + extra


def add_block(
    function: PciFunction,
    cfg_type: CfgType,
    bar: int,
    offset: int,
    length: int,
    *,
    notify_multiplier: int | None = None,
) -> int:
    """Announce a block of registers at `offset` in BAR `bar`; returns the capability's offset.

    NOTIFY needs `notify_multiplier`: bytes between the doorbells of two queues, 0 for one
    doorbell for all (§4.1.4.4).
    """
    extra = b"" if notify_multiplier is None else notify_multiplier.to_bytes(4, "little")
    return function.add_capability(CAP_VENDOR, _body(cfg_type, bar, offset, length, extra))


class ConfigWindow:
    """VIRTIO_PCI_CAP_PCI_CFG: BAR accesses by way of configuration space (§4.1.4.9).

    Works while the BARs do not decode. A selection that no legal access matches reads as
    all-ones and swallows writes. The access happens with the bus's lock held, so the handlers
    behind a virtio function's BARs must never ask for configuration space.
    """

    def __init__(self, function: PciFunction) -> None:
        """Append the capability to `function`."""
        self._function = function
        self._at = function.add_capability(
            CAP_VENDOR, _body(CfgType.PCI, 0, 0, 0, bytes(4)), _WINDOW_WRITABLE
        )
        self._data = self._at + 2 + _BODY.size
        function.watch(self._data, 4, before_read=self._fetch, after_write=self._store)

    def _selected(self) -> tuple[Handler, int, int] | None:
        """Return handler, offset and length of the access the guest asks for, if it is legal."""
        read = self._function.read
        bar = self._function.bars.get(read(self._at + 4, 1))
        offset, length = read(self._at + 8, 4), read(self._at + 12, 4)
        if bar is None or length not in {1, 2, 4} or offset % length or offset + length > bar.size:
            return None
        return bar.handler, offset, length

    def _fetch(self) -> None:
        selected = self._selected()
        if selected is None:
            self._function.put(self._data, 4, 0xFFFFFFFF)
            return
        handler, offset, length = selected
        value = handler.read(offset, length) & ((1 << 8 * length) - 1)
        self._function.put(self._data, length, value)

    def _store(self) -> None:
        selected = self._selected()
        if selected is not None:
            handler, offset, length = selected
            handler.write(offset, length, self._function.read(self._data, length))
