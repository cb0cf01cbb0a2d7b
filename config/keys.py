"""Every key of vm.yaml, declared once: its name, kind of value, range and meaning.

The decoder, the JSON Schema and docs/vm-yaml.md are all derived from these tables. Defaults are
those of the classes in config.model; a key whose field has none must be given.
"""

from __future__ import annotations

from typing import Final

from config.devicekeys import DISK, RNG, VHOST_DEVICE
from config.kinds import Bool, Choice, Int, Path, Size, Text, Time, Words
from config.limitkeys import LIMITS
from config.model import (
    BootConfig,
    DebugConfig,
    FileConfig,
    StaggerConfig,
    VmConfig,
    VmmciConfig,
)
from config.netkeys import NIC, SWITCH, check_file, check_vm
from config.netkinds import Prefix
from config.tables import NAME, Key, ListOf, MapOf, PartOf, Table

BOOT: Final = Table(
    "boot",
    (
        Key(
            "kernel",
            Path(),
            "The kernel to load: a bzImage, an ELF vmlinux, or a multiboot image.",
            excludes="firmware",
        ),
        Key(
            "initrd",
            Path(),
            "An initial RAM disk, or the module of a multiboot kernel.",
            needs="kernel",
        ),
        Key(
            "cmdline",
            Words("a kernel command line", 4096, empty=True),
            "The kernel's command line. Line breaks become blanks, so `>-` may spread it over "
            "several lines. A kernel may take less than the 4096 bytes that fit here.",
            needs="kernel",
        ),
        Key(
            "firmware",
            Path("seabios"),
            "Start this firmware and let it find something to boot: `seabios` is the one that the "
            "host's package of that name has, anything else the file of an image of at most 4 MiB.",
        ),
        Key(
            "order",
            ListOf(Choice("disk", "cdrom", "net"), 3, unique=True),
            "What the firmware tries, first to last, and nothing else. Of several disks SeaBIOS "
            "boots the first, with blocks of 512 bytes; from `net` it cannot boot.",
            needs="firmware",
            absent="the firmware's own order",
        ),
    ),
    BootConfig,
    one_of=("kernel", "firmware"),
)

DEBUG: Final = Table(
    "debug",
    (
        Key("console", Bool(), "Write each byte that the guest puts to port 0x402 to the log."),
        Key(
            "exit",
            Bool(),
            "Let a guest's write of V to port 0xf4 end the VM with exit status 2V + 1. For tests: "
            "any program in the guest that reaches I/O ports can end the VM.",
        ),
        Key(
            "eventfds",
            Bool(),
            "Let KVM carry kicks and interrupts straight to and from device processes. Switched "
            "off, the VM process forwards them as it does on a host whose KVM cannot: slow, for "
            "tests.",
        ),
    ),
    DebugConfig,
)


VMMCI: Final = Table(
    "vmmci",
    (
        Key(
            "ack-timeout",
            Time(0.1, 3600),
            "How long a guest may take to take note of a request to shut down or reboot; then the "
            "next way is tried.",
        ),
        Key(
            "shutdown-timeout",
            Time(0.1, 86400),
            "How long it may take from then until it is down; then the VM is ended, or reset.",
        ),
    ),
    VmmciConfig,
    switch="enabled",
)

_WHO: Final = r"([A-Za-z_][A-Za-z0-9_.-]{0,31}|[0-9]{1,10})"
OWNER: Final = Text(
    "an owner such as alice, alice:staff, :staff or 1000", 65, f"{_WHO}(:{_WHO})?|:{_WHO}"
)

CHANGES: Final = ("boot", "memory", "interface", "disk", "cdrom", "instance")

VM: Final = Table(
    "vm",
    (
        Key(
            "name",
            NAME,
            "The VM's name: at most 63 letters, digits, `.`, `-`, `_`, the first a letter. "
            "Under `vms:` the key is the name.",
            absent="the file's name without its ending",
        ),
        Key("vcpus", Int(1, 32), "Virtual CPUs.", aliases=("cpus",)),
        Key(
            "memory",
            Size(1 << 20, 128 << 30, 4096, remark_bare=True),
            "Guest RAM, a multiple of 4 KiB: `512M`, `2G`, `2GiB`. A number without a unit is "
            "bytes, and gives a warning.",
        ),
        Key("boot", BOOT, "What the VM starts."),
        Key("debug", DEBUG, "Devices for tests and bring-up."),
        Key("enable", Bool(), "Start this VM when a whole file is started."),
        Key(
            "owner",
            OWNER,
            "Who may control the VM besides root: `user`, `user:group` or `:group`, each by name "
            "or number. See [pyvmctl.md](pyvmctl.md).",
            absent="whoever starts it",
        ),
        Key("disks", ListOf(DISK, 16), "Virtio block devices, in the guest's order."),
        Key(
            "cdrom",
            Path("empty"),
            "A CD-ROM drive with this ISO image or block device in it, or `empty`: `pyvmctl cdrom` "
            "changes the disc.",
            absent="no drive",
        ),
        Key("interfaces", ListOf(NIC, 16), "Virtio network devices, in the guest's order."),
        Key(
            "switches",
            MapOf(SWITCH, "switches"),
            "Virtual switches that interfaces join, by name. In a file of several VMs they stand "
            "beside `vms`.",
        ),
        Key(
            "local-prefix",
            Prefix(4),
            "Where local interfaces take their IPv4 addresses from. Interface 0 of the VM with "
            "the id 3 has 100.64.3.3, its host side 100.64.3.2.",
        ),
        Key(
            "local-inet6",
            Prefix(6, "auto"),
            "Give local interfaces IPv6 addresses, too: from this prefix, or with `auto` from a "
            "unique local one that this host always has.",
            absent="no IPv6",
        ),
        Key("rng", RNG, "The virtio entropy device."),
        Key(
            "vhost-user",
            ListOf(VHOST_DEVICE, 16),
            "Further virtio devices, each served by another program; see "
            "[vhost-user.md](vhost-user.md).",
        ),
        Key(
            "vmmci",
            VMMCI,
            "The control device through which `pyvmctl stop` and `reboot` ask the guest, and the "
            "times they give it; `false` leaves the device out. See [stopping.md](stopping.md).",
        ),
        Key(
            "jail",
            Choice("required", "best-effort", "off"),
            "What to do where the host cannot jail a device process: `required` refuses to start, "
            "`best-effort` reports what is missing.",
            absent="required for root, else best-effort",
        ),
        Key(
            "limits",
            LIMITS,
            "What the VM may use of the host, by a cgroup of its own. Where the host does not let "
            "it have one, the VM does not start. See [pyvmctl.md](pyvmctl.md).",
        ),
        Key("transitional", Bool(), "Let virtio devices serve drivers older than virtio 1.0, too."),
        Key("packed", Bool(), "Offer the packed virtqueue layout to the guest."),
        Key(
            "instance",
            NAME,
            "The VM of this file that this one is made from: it has that one's keys, but for its "
            "disks, `name`, `enable` and `allow`, unless it has its own.",
            absent="no template",
        ),
        Key(
            "allow",
            ListOf(Choice(*CHANGES), len(CHANGES), unique=True),
            "What VMs made from this one may change: `memory` stands for `vcpus`, too, and "
            "`instance` lets them be templates themselves.",
            absent="everything",
        ),
    ),
    VmConfig,
    check=check_vm,
)

STAGGER: Final = Table(
    "staggered-start",
    (
        Key("parallel", Int(1, 1024), "How many VMs are started together.", absent="one per CPU"),
        Key("delay", Time(0, 3600), "How long to wait before the next ones."),
    ),
    StaggerConfig,
)

NOT_SHARED: Final = ("name", "instance", "switches")  # VM keys that make no sense as defaults

# What a file of several VMs has beside the user's own keys. `defaults` is a VM with holes.
FILE: Final = Table(
    "file",
    (
        Key("vms", MapOf(VM, "VMs"), "The VMs, by name."),
        Key(
            "switches", MapOf(SWITCH, "switches"), "Virtual switches that interfaces join, by name."
        ),
        Key("defaults", PartOf(VM), "Keys that hold for every VM that does not have its own."),
        Key("staggered-start", STAGGER, "Start the VMs a few at a time.", absent="all at once"),
    ),
    FileConfig,
    check=check_file,
)
