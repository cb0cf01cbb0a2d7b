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

    path: str = ""  # absolute; "" for one that another program serves
    format: str = ""  # "raw", "qcow2"; never guessed, since a guest could forge the other's header
    vhost_user: str = ""  # socket of the program that serves it, and then little else is set
    readonly: bool = False
    cache: str = "writeback"  # or "none": past the page cache (O_DIRECT)
    serial: str = ""  # at most 20 bytes, what the guest's GET_ID returns
    queues: int = 1
    block_size: int = 512  # logical block, a power of two
    physical_block_size: int = 0  # 0: as block_size
    min_io_size: int = 0  # 0: not told to the guest
    opt_io_size: int = 0  # 0: not told to the guest


class PortConfig(NamedTuple):
    """A port of the host that leads to a guest."""

    address: str  # the host's, IPv4; "": any of them
    port: int
    guest_port: int
    protocol: str  # "tcp" or "udp"


class NicConfig(NamedTuple):
    """One virtio network device."""

    type: str = "tap"  # or "user": through passt, without any rights
    switch: str = ""  # the name of a switch of the file; "": none
    local: bool = False  # a link to the host alone, with addresses from it
    tap: str = ""  # host interface, or "fd:5"; "": named after VM and interface
    lladdr: str = ""  # MAC address, lower case; "": made from host, VM and interface
    locked: bool = False  # only frames with its own address
    mtu: int = 0  # bytes; 0: the switch's, else the host interface's own
    queues: int = 1  # pairs
    link: bool = True  # whether the guest has carrier when it starts
    up: bool = True  # whether the host interface is up
    group: int = 0  # of host interfaces, for firewalls; 0: none
    rx_rate: int = 0  # bytes per second to the guest; 0: no limit
    tx_rate: int = 0  # from the guest
    rx_pps: int = 0  # frames per second; 0: no limit
    tx_pps: int = 0
    nat: bool = False  # the host translates the guest's addresses to its own
    ports: tuple[PortConfig, ...] = ()
    vhost_user: str = ""  # socket of the program that serves it; then there is no tap


class VhostConfig(NamedTuple):
    """A virtio device of any kind that another program serves. One of type and id is set."""

    socket: str  # absolute path
    type: str = ""  # "fs", "rng", "scsi"
    id: int = 0  # of virtio 1.2 §5
    tag: str = ""  # of a file system: what the guest mounts
    queues: int = 0  # for requests; with an id, all; 0: one per vCPU if there are as many
    queue_size: int = 0  # a power of two; 0: as usual for this type
    config_size: int = 0  # bytes of configuration space, with an id


class SwitchConfig(NamedTuple):
    """A virtual switch: a bridge of the host."""

    name: str
    bridge: str = ""  # one that is there, left as it is; "": made for as long as it is used
    locked: bool = False  # for all of its interfaces
    mtu: int = 0  # bytes, for interfaces without one; 0: the bridge's
    up: bool = True
    group: int = 0  # for interfaces without one


class RngConfig(NamedTuple):
    """The virtio entropy device."""

    rate: int = 0  # bytes per second; 0: no limit
    vhost_user: str = ""  # socket of the program that serves it


class VmmciConfig(NamedTuple):
    """The control device, and how long a guest may take to do as it is asked. In seconds."""

    enabled: bool = True  # whether the device is there; the times hold without it, too
    ack_timeout: float = 3.0  # until the guest takes a request
    shutdown_timeout: float = 120.0  # from then until it is down


class LimitsConfig(NamedTuple):
    """What the processes of a VM may use together; 0: no limit."""

    cpu: int = 0  # per cent of one CPU
    memory: int = 0  # bytes, the guest's included


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
    cdrom: str = ""  # absolute path of an ISO image, "empty", or "" for no drive
    interfaces: tuple[NicConfig, ...] = ()
    switches: tuple[SwitchConfig, ...] = ()  # all of the file
    local_prefix: str = "100.64.0.0/10"  # IPv4 pool of local interfaces
    local_inet6: str = ""  # IPv6 pool, "auto" for one of this host, "" for none
    rng: RngConfig = RngConfig()
    vhost_user: tuple[VhostConfig, ...] = ()
    vmmci: VmmciConfig = VmmciConfig()
    jail: str = ""  # "required", "best-effort", "off"; "": required for root, else best-effort
    limits: LimitsConfig = LimitsConfig()
    transitional: bool = False  # virtio devices also serve drivers older than virtio 1.0
    packed: bool = False  # offer the packed virtqueue layout
    instance: str = ""  # the VM it was made from
    allow: tuple[str, ...] | None = None  # what instances of it may change; None: everything


class StaggerConfig(NamedTuple):
    """How the VMs of a file are started."""

    parallel: int = 0  # VMs at a time; 0: one per CPU
    delay: float = 30.0  # seconds until the next ones


class FileConfig(NamedTuple):
    """What a file of several VMs says."""

    vms: tuple[VmConfig, ...]  # in the file's order, names unique
    switches: tuple[SwitchConfig, ...] = ()
    defaults: None = None  # gone into the VMs
    staggered_start: StaggerConfig | None = None  # None: all at once


class Config(NamedTuple):
    """A whole file."""

    vms: tuple[VmConfig, ...]  # in the file's order, names unique
    warnings: tuple[str, ...] = ()  # lines of the form file:line:column: key.path: text
    staggered_start: StaggerConfig | None = None  # None: all at once
