"""What vm.yaml says, checked and complete: immutable records that the rest of pyvmd works from.

The defaults stand here and nowhere else: the decoder, the JSON Schema and the manual take them
from these classes. Paths are absolute. Whether a file exists is for its opener to find out.
"""

# No `from __future__ import annotations` here: NamedTuple compiles an annotation that is a string,
# which costs 1 ms of every start.
from typing import NamedTuple


class BootConfig(NamedTuple):
    """How a VM starts: a kernel loaded directly, or firmware. Exactly one of the two is set."""

    kernel: str = ""  # absolute path, or "" when firmware boots
    initrd: str = ""  # absolute path, or "" for none
    cmdline: str = ""  # the kernel's, without control characters
    firmware: str = ""  # "seabios", an absolute path, or "" when a kernel is loaded directly
    order: tuple[str, ...] = ()  # of "disk", "cdrom", "net"; () leaves it to the firmware


class DebugConfig(NamedTuple):
    """Devices that only tests and bring-up want."""

    console: bool = False  # port 0x402: each byte written goes to the log
    exit: bool = False  # port 0xf4: a write ends the VM with status (value << 1) | 1
    eventfds: bool = True  # kicks and interrupts by KVM's eventfds; else by way of the VM process


class DiskConfig(NamedTuple):
    """One virtio block device. Sizes in bytes."""

    path: str  # absolute
    format: str  # "raw" or "qcow2"; never guessed, since a guest could forge the other's header
    readonly: bool = False
    cache: str = "writeback"  # or "none": past the page cache (O_DIRECT)
    serial: str = ""  # at most 20 bytes, what the guest's GET_ID returns
    queues: int = 1
    block_size: int = 512  # logical block, a power of two
    physical_block_size: int = 0  # 0: as block_size
    min_io_size: int = 0  # 0: not told to the guest
    opt_io_size: int = 0  # 0: not told to the guest


class RngConfig(NamedTuple):
    """The virtio entropy device."""

    rate: int = 0  # bytes per second; 0: no limit


class VmConfig(NamedTuple):
    """One virtual machine."""

    name: str
    boot: BootConfig
    vcpus: int = 1
    memory: int = 512 << 20  # bytes, a multiple of 4 KiB
    debug: DebugConfig = DebugConfig()
    enable: bool = True  # part of `start` when no VM is named
    owner: str = ""  # "user", "user:group", ":group", numbers allowed; "": whoever starts it
    disks: tuple[DiskConfig, ...] = ()
    rng: RngConfig = RngConfig()
    jail: str = ""  # "required", "best-effort", "off"; "": required for root, else best-effort
    transitional: bool = False  # virtio devices also serve drivers older than virtio 1.0
    packed: bool = False  # offer the packed virtqueue layout


class Config(NamedTuple):
    """A whole file."""

    vms: tuple[VmConfig, ...]  # in the file's order, names unique
    warnings: tuple[str, ...] = ()  # lines of the form file:line:column: key.path: text
