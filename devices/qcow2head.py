r"""The header of a qcow2 image (QEMU docs/interop/qcow2.rst): bytes → `Header` → bytes.

    0 magic "QFI\xfb"             32 u32 crypt_method             64 u64 snapshots_offset
    4 u32 version, 2 or 3         36 u32 l1_size, in entries      72 u64 incompatible_features
    8 u64 backing_file_offset     40 u64 l1_table_offset          80 u64 compatible_features
   16 u32 backing_file_size       48 u64 refcount_table_offset    88 u64 autoclear_features
   20 u32 cluster_bits            56 u32 refcount_table_clusters  96 u32 refcount_order
   24 u64 size, in bytes          60 u32 nb_snapshots            100 u32 header_length

All big-endian; from 72 on in version 3 only. Behind it come header extensions (type u32, length
u32, data padded to 8 bytes) up to one of type 0, then the name of the backing file, all within
the first cluster.

An image is somebody else's word. What is here only understands it: no file is opened, no name
followed, nothing decided. It is the one module of the formats that the VM process imports too
(late, in `devices.bases`), to find the backing files of a chain; hence it imports little.

Every complaint is a ConfigError that names field, byte offset and value. The caller, who knows the
path, puts it in front.
"""

from __future__ import annotations

import mmap
import os
from struct import Struct
from typing import Final, NamedTuple, NoReturn

from config.errors import ConfigError

MAGIC: Final = b"QFI\xfb"
LEAST_CLUSTER_BITS: Final = 9
MOST_CLUSTER_BITS: Final = 21  # 2 MiB: QEMU's limit, too
MOST_L1_BYTES: Final = 32 << 20  # QEMU's limits; they bound what opening an image may cost
MOST_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MOST_SNAPSHOTS: Final = 1 << 16
MOST_NAME_BYTES: Final = 1023
MOST_EXTENSIONS: Final = 1024
OFFSET_END: Final = 1 << 56  # no table or cluster lies beyond

INCOMPATIBLE_DIRTY: Final = 1 << 0  # refcounts may be wrong
INCOMPATIBLE_CORRUPT: Final = 1 << 1  # anything may be wrong: never written to
INCOMPATIBLE_KNOWN: Final = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE279_2ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803_F857
EXTENSION_BITMAPS: Final = 0x2385_2875

# Where single fields are rewritten in a live image.
AT_SIZE: Final = 24
AT_L1: Final = 36  # l1_size u32, l1_table_offset u64
AT_REFCOUNT_TABLE: Final = 48  # offset u64, clusters u32
AT_INCOMPATIBLE: Final = 72
AT_COMPATIBLE: Final = 80
AT_AUTOCLEAR: Final = 88
L1: Final = Struct(">IQ")
REFCOUNT_TABLE: Final = Struct(">QI")

V2_BYTES: Final = 72
V3_BYTES: Final = 104
_V2: Final = Struct(">4sIQIIQIIQQIIQ")
_V3: Final = Struct(">QQQII")
_EXTENSION: Final = Struct(">II")
_COMPRESSION_AT: Final = 104  # u8, where header_length reaches so far
_COMPRESSIONS: Final = {1: "zstd"}
_PROBE: Final = 1 << 16  # bytes that nearly always hold all of it

# What the bits mean that nobody may ignore and we do not have.
_REFUSED: Final = {
    2: ("an external data file", "qemu-img convert -O qcow2 makes one image of it"),
    3: ("compression", ""),  # which one is in a field of its own
    4: ("extended L2 entries", "qemu-img convert -O qcow2 -o extended_l2=off makes one without"),
}
_ENCRYPTIONS: Final = {1: "AES", 2: "LUKS"}


class Header(NamedTuple):
    """A header that can be trusted as far as one can see without the rest of the image.

    Offsets and sizes are bytes; tables lie on cluster boundaries.
    """

    version: int  # 2 or 3
    cluster_bits: int  # 9 to 21
    size: int  # of the disk, < 2⁶³; not always whole sectors
    l1_offset: int
    l1_entries: int  # enough for `size`, perhaps more
    refcount_offset: int
    refcount_clusters: int  # of the refcount table, at least 1
    refcount_bits: int = 16  # 1, 2, 4, … 64
    backing_file: str = ""  # as it is written there, surrogates for what is not UTF-8; "": none
    backing_format: str = ""  # "raw", "qcow2", …; "" if the header names none
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0  # dirty, corrupt or nothing
    compatible: int = 0
    autoclear: int = 0
    header_length: int = V3_BYTES
    additional: bytes = b""  # header fields from byte 104 to header_length, not interpreted
    extensions: tuple[tuple[int, bytes], ...] = ()  # all but the backing format, in their order

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be wrong: whoever opens it to write rebuilds them first."""
        return bool(self.incompatible & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether somebody found metadata that contradicts itself: it may only be read."""
        return bool(self.incompatible & INCOMPATIBLE_CORRUPT)

    def extension(self, kind: int) -> bytes | None:
        """Return the data of the first extension of a type, or None."""
        return next((data for found, data in self.extensions if found == kind), None)


def read(fd: int) -> Header:
    """Read and parse the header of an image, O_DIRECT or not. Raises ConfigError, OSError."""
    data = _pread(fd, _PROBE)
    bits = _V2.unpack_from(data)[4] if data[:4] == MAGIC and len(data) >= V2_BYTES else 0
    if len(data) == _PROBE and LEAST_CLUSTER_BITS <= bits <= MOST_CLUSTER_BITS:
        data = _pread(fd, max(_PROBE, 1 << bits))
    return parse(data)


def _pread(fd: int, length: int) -> bytes:
    with mmap.mmap(-1, length) as pages:  # aligned as O_DIRECT wants it
        return pages[: os.preadv(fd, [pages], 0)]


def parse(data: bytes) -> Header:
    """Take apart the beginning of an image: its first cluster, or all of a shorter file.

    Raises ConfigError for what breaks the format's rules, and for features that are not built.
    """
    if data[:4] != MAGIC:
        _wrong("magic", 0, data[:4].hex() or "missing", f"a qcow2 image begins with {MAGIC.hex()}")
    if len(data) < V2_BYTES:
        raise ConfigError(f"qcow2 header: the file has {len(data)} bytes, a header {V2_BYTES}")
    # fmt: off
    (
        _, version, name_at, name_bytes, bits, size, crypt, l1_entries, l1_offset,
        refcount_offset, refcount_clusters, snapshots, snapshots_offset,
    ) = _V2.unpack_from(data)
    # fmt: on
    if version not in (2, 3):
        _wrong("version", 4, version, "2 or 3 is allowed")
    if not LEAST_CLUSTER_BITS <= bits <= MOST_CLUSTER_BITS:
        _wrong("cluster_bits", 20, bits, f"{LEAST_CLUSTER_BITS} to {MOST_CLUSTER_BITS} are allowed")
    if crypt:
        kind = _ENCRYPTIONS.get(crypt, "unknown")
        _refused("crypt_method", 32, crypt, f"{kind} encryption", "convert it with qemu-img")
    incompatible = compatible = autoclear = 0
    order, length = 4, V2_BYTES
    if version == 3:
        if len(data) < V3_BYTES:
            what = f"the file has {len(data)} bytes, a version 3 header {V3_BYTES}"
            raise ConfigError(f"qcow2 header: {what}")
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, V2_BYTES)
        if length < V3_BYTES or length % 8 or length > min(1 << bits, len(data)):
            what = f"a multiple of 8 from {V3_BYTES} to the end of the first cluster is allowed"
            _wrong("header_length", 100, length, what)
        if order > 6:
            _wrong("refcount_order", 96, order, "0 to 6 are allowed")
    name = _name(data, name_at, name_bytes, 1 << bits)
    end = min(name_at or 1 << bits, len(data))
    backing_format, extensions = _extensions(data, length, end)
    _check_features(data, incompatible, length, extensions)
    header = Header(
        version=version,
        cluster_bits=bits,
        size=size,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
        refcount_bits=1 << order,
        backing_file=name,
        backing_format=backing_format if name else "",
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        header_length=length,
        additional=data[V3_BYTES:length],
        extensions=extensions,
    )
    _check_tables(header)
    return header


def build(header: Header) -> bytes:
    """Return the bytes of a header, extensions and name: at most a cluster, not padded to it.

    Raises ConfigError if they do not fit, and for what `parse` would refuse.
    """
    v3 = header.version == 3
    length = V3_BYTES + len(header.additional) if v3 else V2_BYTES
    extensions = list(header.extensions)
    if header.backing_format:
        extensions.insert(0, (EXTENSION_BACKING_FORMAT, header.backing_format.encode("ascii")))
    tail = b"".join(
        _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions
    ) + bytes(_EXTENSION.size)
    name = os.fsencode(header.backing_file)
    name_at = length + len(tail) if name else 0
    # fmt: off
    head = _V2.pack(
        MAGIC, header.version, name_at, len(name), header.cluster_bits, header.size, 0,
        header.l1_entries, header.l1_offset, header.refcount_offset, header.refcount_clusters,
        header.snapshots, header.snapshots_offset,
    )
    # fmt: on
    if v3:
        order = header.refcount_bits.bit_length() - 1
        head += _V3.pack(header.incompatible, header.compatible, header.autoclear, order, length)
        head += header.additional
    data = head + tail + name
    if len(name) > MOST_NAME_BYTES or len(data) > header.cluster_size:
        raise ConfigError(
            f"qcow2 header: {len(data)} bytes, {len(name)} of them the backing file's name, do not "
            f"fit: a cluster has {header.cluster_size}, a name at most {MOST_NAME_BYTES}",
            hint="use larger clusters or a shorter name",
        )
    parse(data.ljust(min(header.cluster_size, _PROBE), b"\0"))
    return data


def l1_entries_for(size: int, cluster_bits: int) -> int:
    """Return how many L1 entries a disk of `size` bytes needs."""
    return -(-size >> (2 * cluster_bits - 3))


def _name(data: bytes, at: int, length: int, cluster_size: int) -> str:
    """Return the backing file's name, "" if there is none."""
    if not at:
        return ""
    if length > MOST_NAME_BYTES:
        _wrong("backing_file_size", 16, length, f"at most {MOST_NAME_BYTES} are allowed")
    if at < V2_BYTES or at + length > min(cluster_size, len(data)):
        _wrong("backing_file_offset", 8, f"{at:#x}", "the name lies outside the first cluster")
    name = data[at : at + length]
    if b"\0" in name:
        _wrong("backing file name", at, repr(name), "it holds a zero byte")
    return os.fsdecode(name)


def _extensions(data: bytes, at: int, end: int) -> tuple[str, tuple[tuple[int, bytes], ...]]:
    """Return the backing format, and the other extensions between `at` and `end`."""
    backing_format = ""
    extensions: list[tuple[int, bytes]] = []
    while at + _EXTENSION.size <= end and len(extensions) < MOST_EXTENSIONS:
        kind, length = _EXTENSION.unpack_from(data, at)
        if kind == EXTENSION_END:
            break
        start = at + _EXTENSION.size
        if start + length > end:
            _wrong(f"extension {kind:#010x} length", at + 4, length, f"it ends beyond {end:#x}")
        value = data[start : start + length]
        if kind == EXTENSION_BACKING_FORMAT:
            if not (value.isascii() and value.decode("ascii").isprintable() and length <= 64):
                _wrong("backing format", start, repr(value[:64]), "a name in ASCII is expected")
            backing_format = value.decode("ascii")
        else:
            extensions.append((kind, value))
        at = start + length + -length % 8
    return backing_format, tuple(extensions)


def _check_features(
    data: bytes, incompatible: int, length: int, extensions: tuple[tuple[int, bytes], ...]
) -> None:
    """Refuse what nobody may ignore and we do not have."""
    unknown = incompatible & ~INCOMPATIBLE_KNOWN
    if not unknown:
        return
    bit = (unknown & -unknown).bit_length() - 1  # the lowest
    what, hint = _REFUSED.get(bit, ("", ""))
    if bit == 3:
        method = data[_COMPRESSION_AT] if length > _COMPRESSION_AT else 0
        what = f"{_COMPRESSIONS.get(method, f'type {method}')} compression"
        hint = "qemu-img convert -O qcow2 -o compression_type=zlib makes one without"
    if not what:
        what = f"an unknown feature, bit {bit}"
        names = next((d for kind, d in extensions if kind == EXTENSION_FEATURE_NAMES), b"")
        for at in range(0, len(names) - 47, 48):
            if names[at] == 0 and names[at + 1] == bit:
                text = names[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace")
                what += f" ({text if text.isprintable() else ascii(text)})"
                break
    _refused("incompatible_features", AT_INCOMPATIBLE, f"{incompatible:#x}", what, hint)


def _check_tables(header: Header) -> None:
    """Refuse tables that cannot be where the header says."""
    mask = header.cluster_size - 1
    if header.size >= 1 << 63:
        _wrong("size", AT_SIZE, header.size, "less than 2⁶³ is allowed")
    if header.l1_entries * 8 > MOST_L1_BYTES:
        most = MOST_L1_BYTES // 8
        _wrong("l1_size", AT_L1, header.l1_entries, f"at most {most} entries are allowed")
    needed = l1_entries_for(header.size, header.cluster_bits)
    if header.l1_entries < needed:
        what = f"a disk of {header.size} bytes needs {needed} entries"
        _wrong("l1_size", AT_L1, header.l1_entries, what)
    clusters = header.refcount_clusters
    if not 0 < clusters << header.cluster_bits <= max(MOST_REFCOUNT_TABLE_BYTES, mask + 1):
        what = f"1 to {MOST_REFCOUNT_TABLE_BYTES >> header.cluster_bits} clusters are allowed"
        _wrong("refcount_table_clusters", 56, clusters, what)
    if header.snapshots > MOST_SNAPSHOTS:
        _wrong("nb_snapshots", 60, header.snapshots, f"at most {MOST_SNAPSHOTS} are allowed")
    for field, at, offset, needed in (
        ("l1_table_offset", 40, header.l1_offset, header.l1_entries),
        ("refcount_table_offset", 48, header.refcount_offset, clusters),
        ("snapshots_offset", 64, header.snapshots_offset, header.snapshots),
    ):
        if needed and (offset & mask or not mask < offset < OFFSET_END):
            what = f"a multiple of {mask + 1} behind the header and below 2⁵⁶ is expected"
            _wrong(field, at, f"{offset:#x}", what)


def _wrong(field: str, at: int, value: object, why: str) -> NoReturn:
    raise ConfigError(f"qcow2 header: {field} at byte {at} is {value}: {why}")


def _refused(field: str, at: int, value: object, what: str, hint: str) -> NoReturn:
    raise ConfigError(
        f"qcow2 header: {field} at byte {at} is {value}: {what} is not built", hint=hint
    )
