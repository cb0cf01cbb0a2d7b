"""What a VM process may know about each kind of device: its PCI face and its queues.

A row here and a module of the same name are all it takes to add a device. Ids and classes are
virtio 1.2 §4.1.2.1 and the PCI class list; vmd's layout of the I/O BAR is in `Block`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

VIRTIO_VENDOR: Final = 0x1AF4
MODERN_DEVICE: Final = 0x1040  # + virtio device id
QUEUE_SIZE_MAX: Final = 1024  # what a driver may raise no queue above, as in vmd
INFLIGHT_STRIDE: Final = 0x9000  # bytes per queue in a device's in-flight memfd: any queue fits


class Block(IntEnum):
    """Where each virtio structure sits in a device's 4 KiB I/O BAR (vmd, reference §d.3)."""

    COMMON = 0x000
    NOTIFY = 0x100
    ISR = 0x200
    ISR_PEEK = 0x201  # ISR without clearing it; for the VM process, which shows it to no guest
    DEVICE = 0x300
    LEGACY = 0x1000  # not in the BAR: how a viodev_msg names the legacy 0.9 registers


class Common(IntEnum):
    """struct virtio_pci_common_cfg, where both processes need it (virtio 1.2 §4.1.4.3)."""

    MSIX_CONFIG = 0x10
    DEVICE_STATUS = 0x14
    QUEUE_SELECT = 0x16
    QUEUE_MSIX_VECTOR = 0x1A


class Legacy(IntEnum):
    """The legacy register block, without its two vector registers (virtio 1.2 §4.1.4.10)."""

    QUEUE_SELECT = 0x0E
    QUEUE_NOTIFY = 0x10
    DEVICE_STATUS = 0x12
    ISR = 0x13
    DEVICE = 0x14


COMMON_LENGTH: Final = 64  # virtio 1.2 §4.1.4.3, up to and with queue_reset


class DeviceSpec(NamedTuple):
    """One kind of device."""

    kind: str  # also the name of the module in devices/
    virtio_id: int  # virtio 1.2 §5
    transitional_id: int  # PCI device id of the 0.9 interface
    pci_class: int  # class, subclass, programming interface
    queues: tuple[int, ...]  # sizes of the queues every instance has
    config_length: int  # bytes of device configuration space

    @property
    def pci_device(self) -> int:
        """The PCI device id of a modern device."""
        return MODERN_DEVICE + self.virtio_id


SPECS: Final = {
    spec.kind: spec
    for spec in (
        DeviceSpec("vioblk", 2, 0x1001, 0x010000, (256,), 60),
        DeviceSpec("viornd", 4, 0x1005, 0xFF0000, (64,), 0),
    )
}
