"""Every key of vm.yaml, declared once: its name, kind of value, range and meaning.

The decoder, the JSON Schema and docs/vm-yaml.md are all derived from these tables. Defaults are
those of the classes in config.model; a key whose field has none must be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.kinds import BlockSize, Bool, Choice, Int, Kind, Path, Rate, Size, Text, Words
from config.model import BootConfig, DebugConfig, DiskConfig, RngConfig, VmConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IGNORED_PREFIX: Final = "x-"  # such keys are the user's own: notes, anchors, other tools' data

# table.key → what it will be. Refused until then; taking a line out is all that opens the key.
NOT_BUILT: Final[dict[str, str]] = {
    "file.switches": "virtual switches that interfaces join",
    "file.staggered-start": "starting many VMs a few at a time",
    "vm.cdrom": "an ISO image in a virtio CD-ROM drive",
    "vm.interfaces": "virtio network devices",
    "vm.vmmci": "the control device that asks a guest to shut down",
    "vm.balloon": "the virtio memory balloon",
    "vm.vhost-user": "devices served by other programs",
    "vm.instances": "VMs made from this one as a template",
    "vm.allow": "who may make instances of this VM, and with which changes",
    "boot.firmware": "starting through SeaBIOS or another firmware image",
    "boot.order": "which devices the firmware tries",
}


class Key(NamedTuple):
    """One key of a mapping."""

    name: str
    kind: Kind | ListOf | Table
    help: str  # one or two sentences for the manual and for editors
    aliases: tuple[str, ...] = ()
    needs: str = ""  # the key that must be there, too
    excludes: str = ""  # the key that must not
    absent: str = ""  # what leaving it out means, where the default's value does not tell

    @property
    def field(self) -> str:
        """Its name in the record."""
        return self.name.replace("-", "_")

    @property
    def below(self) -> Table | None:
        """The table of its value, or of each item of its list; None if it holds scalars."""
        inner = self.kind.item if isinstance(self.kind, ListOf) else self.kind
        return inner if isinstance(inner, Table) else None


class ListOf(NamedTuple):
    """A list of at most `most` items."""

    item: Kind | Table
    most: int
    unique: bool = False


class Table(NamedTuple):
    """The keys of one kind of mapping, and the record it becomes."""

    name: str
    keys: tuple[Key, ...]
    make: type[Any]  # a NamedTuple class of config.model
    one_of: tuple[str, ...] = ()  # one of these keys must be there
    check: Callable[[Any], Iterator[tuple[str, str]]] | None = None  # record → (key, complaint)

    def spellings(self) -> dict[str, Key]:
        """Return every accepted spelling with its key, without what is not built yet."""
        known: dict[str, Key] = {}
        for key in self.keys:
            if f"{self.name}.{key.name}" not in NOT_BUILT:
                known.update(dict.fromkeys((key.name, *key.aliases), key))
        return known

    def names(self) -> list[str]:
        """Return the keys without their aliases and without what is not built yet."""
        return list(dict.fromkeys(key.name for key in self.spellings().values()))

    def required(self, key: Key) -> bool:
        """Tell whether `key` must be given."""
        return key.field not in self.make._field_defaults

    def default(self, key: Key) -> str:
        """Return what leaving `key` out means, in words for the manual; "" if there are none."""
        if key.absent or self.required(key) or not isinstance(key.kind, Kind):
            return key.absent
        return key.kind.show(self.make._field_defaults[key.field])


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
            "Start this firmware and let it find something to boot.",
        ),
        Key(
            "order",
            ListOf(Choice("disk", "cdrom", "net"), 3, unique=True),
            "What the firmware tries, first to last.",
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
        Key("path", Path(), "The image or block device."),
        Key(
            "format",
            Choice("raw", "qcow2"),
            "The image's format. It is never guessed: a guest that owns a raw image could write "
            "a qcow2 header into it that names any file of the host.",
        ),
        Key("readonly", Bool(), "Refuse the guest's writes and open the image without them."),
        Key(
            "cache",
            Choice("writeback", "none"),
            "`writeback` goes through the host's page cache, `none` past it (O_DIRECT). "
            "A flush by the guest reaches the disk either way.",
        ),
        Key(
            "serial",
            Text("a serial number of at most 20 bytes", 20),
            "The serial number that the guest reads.",
            absent="none",
        ),
        Key("queues", Int(1, 32), "Request queues; more than one helps a guest with many CPUs."),
        Key("block-size", BlockSize(512, 4096), "Logical block size that the guest sees."),
        Key(
            "physical-block-size",
            BlockSize(512, 64 << 10),
            "Block size below which the guest should not write.",
            absent="as block-size",
        ),
        Key(
            "min-io-size",
            Size(512, 16 << 20, 512),
            "Smallest request that the storage handles well.",
            absent="not told",
        ),
        Key(
            "opt-io-size",
            Size(512, 1 << 30, 512),
            "Request size that the storage handles best.",
            absent="not told",
        ),
    ),
    DiskConfig,
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
    ),
    RngConfig,
)

NAME: Final = Text(
    "a name of at most 63 letters, digits, '.', '-', '_' that starts with a letter",
    63,
    r"[A-Za-z][A-Za-z0-9._-]{0,62}",
)
_WHO: Final = r"([A-Za-z_][A-Za-z0-9_.-]{0,31}|[0-9]{1,10})"
OWNER: Final = Text(
    "an owner such as alice, alice:staff, :staff or 1000", 65, f"{_WHO}(:{_WHO})?|:{_WHO}"
)

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
            "or number.",
            absent="whoever starts it",
        ),
        Key("disks", ListOf(DISK, 16), "Virtio block devices, in the guest's order."),
        Key("rng", RNG, "The virtio entropy device."),
        Key(
            "jail",
            Choice("required", "best-effort", "off"),
            "What to do where the host cannot jail a device process: `required` refuses to start, "
            "`best-effort` reports what is missing.",
            absent="required for root, else best-effort",
        ),
        Key("transitional", Bool(), "Let virtio devices serve drivers older than virtio 1.0, too."),
        Key("packed", Bool(), "Offer the packed virtqueue layout to the guest."),
    ),
    VmConfig,
)
