"""What a VM process may know about each kind of device: its PCI face and its queues.

A row here and a module of the same name are all it takes to add a device. Ids and classes are
virtio 1.2 §4.1.2.1 and the PCI class list; vmd's layout of the I/O BAR is in `Block`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

VIRTIO_VENDOR: Final = 0x1AF4
VMD_VENDOR: Final = 0x0B5D
MODERN_DEVICE: Final = 0x1040  # + virtio device id
QUEUE_SIZE_MAX: Final = 1024  # what a driver may raise no queue above, as in vmd
COUNTERS_SIZE: Final = 4096  # bytes of a device's page of counters, each a u64
BUSY: Final = COUNTERS_SIZE // 8 - 1  # the last of them: 1 while the device waits for the host
COUNTERS_STRIDE: Final = 32  # of them for each process of a device that has several
INFLIGHT_STRIDE: Final = 0x9000  # bytes per queue in a device's in-flight memfd: any queue fits
JOURNAL_HALF: Final = 512 << 10  # bytes of each half of a device's journal
EPOCH_AT: Final = INFLIGHT_STRIDE - 8  # behind all queues: a u64 that says which life of one it is


class Block(IntEnum):
    """Where each virtio structure sits in a device's 4 KiB I/O BAR (vmd, reference §d.3)."""

    COMMON = 0x000
    NOTIFY = 0x100
    ISR = 0x200
    ISR_PEEK = 0x201  # ISR without clearing it; for the VM process, which shows it to no guest
    MSIX = 0x202  # written by the VM process: whether MSI-X is on; no guest's to write
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


FIRST_DISC: Final = 1  # the number of the disc that is in a CD-ROM drive at the start

#: What a CD-ROM drive says of its tray: whether it is open, and whether the guest has locked it.
#: The number of the disc in it follows.
TRAY_WORDS: Final = {
    (False, False): "closed",
    (False, True): "locked",
    (True, False): "open",
    (True, True): "open, locked",
}

VHOST: Final = "viovhost"

#: What a spawner imports beside the kinds, for a VM process; the second costs 1 ms of a start.
LASTING: Final = ("devices.lasting",)
QUEUE_PAIRS: Final = ("devices.netleader", "devices.netpair")

COMMON_LENGTH: Final = 64  # virtio 1.2 §4.1.4.3, up to and with queue_reset


class DeviceSpec(NamedTuple):
    """One kind of device."""

    kind: str  # also the name of the module in devices/
    virtio_id: int  # virtio 1.2 §5
    transitional_id: int  # PCI device id of the 0.9 interface
    pci_class: int  # class, subclass, programming interface
    queues: tuple[int, ...]  # sizes of the queues every instance has
    config_length: int  # bytes of device configuration space
    descriptors: int = 0  # how many it has room for that come while it runs, with settings
    vendor: int = VIRTIO_VENDOR
    legacy_only: bool = False  # 0.9 registers and INTx, nothing newer; the ids are the legacy ones
    counters: tuple[str, ...] = ()  # what it counts, in the order of its page of counters
    hands_over: bool = False  # guest memory and queues go to another program

    @property
    def pci_device(self) -> int:
        """The PCI device id of a modern device."""
        return MODERN_DEVICE + self.virtio_id


_DISK: Final = ("read_requests", "read_bytes", "write_requests", "write_bytes", "other_requests")

_NET: Final = (
    "rx_frames",
    "rx_bytes",
    "tx_frames",
    "tx_bytes",
    # Frames that went no further, by the reason.
    "rx_filtered",
    "rx_no_buffers",
    "rx_too_long",
    "rx_short",
    "rx_stale_offload",
    "tx_filtered",
    "tx_malformed",
    "tx_too_long",
    "tx_short",
    "tx_link_down",
    "tx_refused",
    "tx_no_memory",
    "tx_port_failed",
)

SPECS: Final = {
    spec.kind: spec
    for spec in (
        # Descriptors for a capture, and for the connection to the process of another pair. The
        # queues are those of one pair, and the control queue.
        DeviceSpec("vionet", 1, 0x1000, 0x020000, (256, 256, 64), 17, descriptors=2, counters=_NET),
        DeviceSpec("vioblk", 2, 0x1001, 0x010000, (256,), 60, counters=_DISK),
        DeviceSpec(
            "viornd", 4, 0x1005, 0xFF0000, (64,), 0, counters=("read_requests", "read_bytes")
        ),
        # Two descriptors: the disc in the drive, and the one that takes its place.
        DeviceSpec(
            "vioscsi",
            8,
            0x1004,
            0x010000,
            (128, 128, 128),
            36,
            descriptors=2,
            counters=("requests", "read_bytes"),
        ),
        # Not virtio's but vmd's; the same registers (reference §d.1, §e.6).
        DeviceSpec("vmmci", 0xFFFF, 0x0777, 0x078000, (), 20, vendor=VMD_VENDOR, legacy_only=True),
        # Any device, served by another program; `vhost_spec` says which. The descriptors are a
        # connection, the ends of its second channel, the in-flight area, and two to spare.
        DeviceSpec(
            VHOST, 0, 0, 0xFF0000, (), 0, descriptors=6, counters=("connections",), hands_over=True
        ),
    )
}


class VhostKind(NamedTuple):
    """A virtio device that another program can serve, as far as its driver needs a front end."""

    virtio_id: int
    pci_class: int
    queue_size: int
    fixed: int  # queues that it always has
    each: int  # queues for each request queue, or pair, that vm.yaml gives it
    config_length: int = 0  # bytes


VHOST_KINDS: Final = {
    "net": VhostKind(1, 0x020000, 256, 0, 2, 12),
    "blk": VhostKind(2, 0x010000, 256, 0, 1, 60),
    "rng": VhostKind(4, 0xFF0000, 64, 0, 1),
    "scsi": VhostKind(8, 0x010000, 128, 2, 1, 36),
    "fs": VhostKind(26, 0x018000, 128, 1, 1, 40),
}


def vhost_spec(kind: VhostKind) -> DeviceSpec:
    """Return the spec of a device that another program serves. None is transitional."""
    return SPECS[VHOST]._replace(
        virtio_id=kind.virtio_id, pci_class=kind.pci_class, config_length=kind.config_length
    )
