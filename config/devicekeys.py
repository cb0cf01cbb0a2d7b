"""Keys of vm.yaml about virtio devices, but for networks: disks, entropy, what others serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.kinds import BlockSize, Bool, Choice, Int, Path, Rate, Size, Text
from config.model import DiskConfig, RngConfig, VhostConfig
from config.tables import Key, Table

if TYPE_CHECKING:
    from collections.abc import Iterator


def _check_disk(disk: DiskConfig) -> Iterator[tuple[str, str]]:
    """Compare the sizes: the guest is told the others in logical blocks (virtio 1.2 §5.2.4)."""
    if disk.physical_block_size and disk.physical_block_size < disk.block_size:
        yield "physical-block-size", f"is smaller than block-size ({disk.block_size})"
    for key, size in (("min-io-size", disk.min_io_size), ("opt-io-size", disk.opt_io_size)):
        if size % disk.block_size:
            yield key, f"is no multiple of block-size ({disk.block_size})"
    if disk.opt_io_size and disk.opt_io_size < disk.min_io_size:
        yield "opt-io-size", f"is smaller than min-io-size ({disk.min_io_size})"


DISK: Final = Table(
    "disk",
    (
        Key(
            "path",
            Path(),
            "The image or block device. `pyvmctl create` makes images; see "
            "[Disk images](disk-images.md).",
            needs="format",
            excludes="vhost-user",
        ),
        Key(
            "format",
            Choice("raw", "qcow2"),
            "The image's format. It is never guessed: a guest that owns a raw image could write "
            "a qcow2 header into it that names any file of the host. What a qcow2 image stands on "
            "is opened as well, read-only and with the rights of the VM's owner.",
            needs="path",
        ),
        Key(
            "vhost-user",
            Path(),
            "The socket of a program that serves the disk instead, as qemu-storage-daemon can; see "
            "[vhost-user.md](vhost-user.md). Beside it there is only `queues`.",
        ),
        Key(
            "readonly",
            Bool(),
            "Refuse the guest's writes and open the image without them.",
            needs="path",
        ),
        Key(
            "cache",
            Choice("writeback", "none"),
            "`writeback` goes through the host's page cache, `none` past it (O_DIRECT). "
            "A flush by the guest reaches the disk either way.",
            needs="path",
        ),
        Key(
            "serial",
            Text("a serial number of at most 20 bytes", 20),
            "The serial number that the guest reads.",
            needs="path",
            absent="none",
        ),
        Key("queues", Int(1, 32), "Request queues; more than one helps a guest with many CPUs."),
        Key(
            "block-size",
            BlockSize(512, 4096),
            "Logical block size that the guest sees.",
            needs="path",
        ),
        Key(
            "physical-block-size",
            BlockSize(512, 64 << 10),
            "Block size below which the guest should not write.",
            needs="path",
            absent="as block-size",
        ),
        Key(
            "min-io-size",
            Size(512, 16 << 20, 512),
            "Smallest request that the storage handles well.",
            needs="path",
            absent="not told",
        ),
        Key(
            "opt-io-size",
            Size(512, 1 << 30, 512),
            "Request size that the storage handles best.",
            needs="path",
            absent="not told",
        ),
    ),
    DiskConfig,
    one_of=("path", "vhost-user"),
    check=_check_disk,
)

RNG: Final = Table(
    "rng",
    (
        Key(
            "rate",
            Rate(),
            "The most entropy that the guest may draw, as `1M/s`.",
            absent="no limit",
        ),
        Key(
            "vhost-user",
            Path(),
            "The socket of a program that has the entropy; see [vhost-user.md](vhost-user.md).",
            excludes="rate",
            absent="the host's kernel has it",
        ),
    ),
    RngConfig,
)


_FS: Final = 26  # virtio 1.2 §5.11


def _check_vhost(device: VhostConfig) -> Iterator[tuple[str, str]]:
    if device.type and device.id:
        yield "id", "not allowed beside 'type', which has its own"
    if device.type == "fs" and not device.tag:
        yield "type", "a file system needs the key 'tag' beside it"
    if device.type != "fs" and device.tag:
        yield "tag", "is for 'type: fs'"
    if device.type == "rng" and device.queues > 1:
        yield "queues", "must be 1 with 'type: rng'"
    if device.id == _FS:
        yield "id", "has a place of its own: 'type: fs'"
    if device.id and not device.queues:
        yield "id", "needs the key 'queues' beside it"


VHOST_DEVICE: Final = Table(
    "vhost-device",
    (
        Key("socket", Path(), "The socket at which the program that serves it listens."),
        Key(
            "type",
            Choice("fs", "rng", "scsi"),
            "What it is: a file system (virtiofsd), entropy, or a SCSI host adapter.",
            absent="that of `id`",
        ),
        Key(
            "id",
            Int(3, 63),
            "What it is, as a number of virtio's list of devices (§5).",
            absent="that of `type`",
        ),
        Key(
            "tag",
            Text("a name of at most 36 bytes", 36),
            "The name by which the guest mounts a file system.",
            absent="none",
        ),
        Key(
            "queues",
            Int(1, 32),
            "Request queues; with `id`, all queues.",
            absent="one per vCPU, or as many as the program has",
        ),
        Key(
            "queue-size",
            BlockSize(2, 1024),
            "Entries of each queue.",
            absent="as usual for this type, or 256",
        ),
        Key(
            "config-size",
            Int(1, 256),
            "Bytes of configuration space, with `id`.",
            needs="id",
            absent="none",
        ),
    ),
    VhostConfig,
    one_of=("type", "id"),
    check=_check_vhost,
)
