"""devices.qcow2 and what is below it: hostile tables; created, checked, mended."""

from __future__ import annotations

import errno
import os
import zlib
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError
from devices import qcow2usage
from devices.qcow2 import Qcow2, open_chain
from devices.qcow2block import Block
from devices.qcow2check import check, mend
from devices.qcow2create import create
from devices.qcow2head import AT_INCOMPATIBLE
from devices.qcow2usage import CHUNK
from devices.raw import Raw
from tests.qcow2lab import needs_qemu, new_image, opened, qemu_check, qemu_img, qemu_io, read, write

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
CLUSTER = 4096
COPIED = 1 << 63


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image whose first four clusters have data."""
    path = tmp_path / "a.qcow2"
    with new_image(path, SIZE, cluster_size=CLUSTER) as disk:
        write(disk, 0, b"d" * 4 * CLUSTER)
    return path


def tables(path: Path) -> tuple[int, int, int]:
    """Where the L1 table, the first L2 table and the refcount table are."""
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    return l1, int.from_bytes(data[l1 : l1 + 8], "big") & COPIED - 1, 0x1000


def poke(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(pack(">Q", value))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (COPIED | 0x1_0000_0000, "no cluster of the file"),
        (COPIED | 0x5200, "no cluster of the file"),
        (COPIED, "lacks an offset"),
        (COPIED | 1 << 58 | 0x5000, "reserved bits"),
        (COPIED | 4, "reserved bits"),
        (COPIED | 0x1000, "the refcount table is there"),
        (COPIED | 0x2000, "a refcount block is there"),
        (COPIED | 0x3000, "the L1 table is there"),
        (0x1000, "the refcount table is there"),
        (1 << 62, "the header is there"),
        (COPIED | 1 << 62 | 0x5000, "not written in place"),
    ],
)
def test_an_l2_entry_that_points_wrong(path: Path, entry: int, complaint: str) -> None:
    """Reads and writes fail, saying where; nothing is written; the image is marked corrupt."""
    _, l2, _ = tables(path)
    poke(path, l2 + 16, entry)
    before = path.read_bytes()
    with opened(path) as disk:
        with pytest.raises(OSError, match="L2 entry 2 at .*" + complaint) as caught:
            write(disk, 2 * CLUSTER, b"x" * 512)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="read-only, or marked corrupt"):
            write(disk, 0, b"x" * 512)
    after = bytearray(path.read_bytes())
    assert after[AT_INCOMPATIBLE + 7] == 2
    after[AT_INCOMPATIBLE + 7] = 0
    assert after[: len(before)] == before or _only_refcounts_differ(before, after)
    with pytest.raises(ConfigError, match="marked corrupt"), opened(path):
        pass


def _only_refcounts_differ(before: bytes, after: bytearray) -> bool:
    return before[:0x2000] == after[:0x2000] and before[0x3000:] == after[0x3000 : len(before)]


@pytest.mark.parametrize(
    ("what", "value", "complaint"),
    [
        ("l1", COPIED | 1 << 40, "L1 entry 0 at 0x3000 is 0x8000010000000000: no cluster"),
        ("l1", COPIED | 0x1000, "L1 entry 0 at 0x3000 .*: the refcount table is there"),
        ("l1", COPIED | 0x2000, "L1 entry 0 at 0x3000 .*: a refcount block is there"),
        ("refcount", 0x12345, "refcount table entry 0 at 0x1000 is 0x12345: no cluster"),
        ("refcount", 1 << 50, "refcount table entry 0 at 0x1000 .*: no cluster"),
        (
            "refcount",
            0x1000,
            "refcount table entry 0 at 0x1000 is 0x1000: the refcount table is there",
        ),
    ],
)
def test_tables_that_cannot_be_are_refused(
    path: Path, what: str, value: int, complaint: str
) -> None:
    """When it is opened: which entry, where, and what it is."""
    l1, _, refcount = tables(path)
    poke(path, {"l1": l1, "refcount": refcount}[what], value)
    with pytest.raises((ConfigError, OSError), match=complaint), opened(path) as disk:
        write(disk, 8 * CLUSTER, b"x" * 512)


def test_a_compressed_cluster_is_never_more_than_a_cluster(path: Path) -> None:
    """A megabyte that packs into a few bytes gives one cluster; garbage and too little, EIO."""
    _, l2, _ = tables(path)
    host = os.path.getsize(path)
    for data, good in (
        (b"z" * (1 << 20), True),
        (b"z" * 100, False),
        (b"", False),
    ):
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(data) + packer.flush() if data else b"\xff" * 100
        with path.open("r+b") as file:
            file.seek(host)
            file.write(packed.ljust(CLUSTER, b"\0"))
        poke(path, l2 + 8 * 9, 1 << 62 | 7 << 58 | host)
        with opened(path, readonly=True) as disk:
            if good:
                assert read(disk, 9 * CLUSTER, CLUSTER) == b"z" * CLUSTER
            else:
                with pytest.raises(OSError, match=f"compressed cluster at {host:#x}"):
                    read(disk, 9 * CLUSTER, CLUSTER)


def test_a_base_must_be_given_where_the_header_names_one(path: Path, tmp_path: Path) -> None:
    """And only there; whatever its name is, nothing is opened."""
    base = tmp_path / "base.img"
    base.write_bytes(bytes(SIZE))
    fd = os.open(tmp_path / "b.qcow2", os.O_RDWR | os.O_CREAT)
    create(fd, SIZE, backing_file="/etc/shadow", backing_format="raw")
    with base.open("rb") as below, path.open("r+b") as plain:
        with pytest.raises(ConfigError, match="backing file '/etc/shadow', none is given"):
            Qcow2(fd)
        with pytest.raises(ConfigError, match="a base is given"):
            Qcow2(plain.fileno(), Raw(below.fileno()))
        with pytest.raises(ConfigError, match="raw image stands on nothing"):
            open_chain([below.fileno(), below.fileno()], ["raw", "raw"])
        assert open_chain([fd, below.fileno()], ["qcow2", "raw"]).size == SIZE
    os.close(fd)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_counters_of_every_width(bits: int) -> None:
    """What is set is got, its neighbours stay, and free ones are found."""
    block = Block(bytearray(512), bits)
    model = [0] * block.entries
    for index, count, value in ((3, 9, 1), (0, 1, 1), (11, 1, block.most), (30, 20, 1), (5, 2, 0)):
        block.set(index, count, value)
        model[index : index + count] = [value] * count
    assert [block.get(i) for i in range(block.entries)] == model
    assert list(block.values()) == model
    for start in range(60):
        first = model.index(0, start)
        length = next(i for i in range(1, 6) if i == 5 or model[first + i])
        assert block.find_free(start, 5) == (first, length)
    block.set(0, block.entries, 1)
    assert block.find_free(0, 5) == (0, 0)


@needs_qemu
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
@pytest.mark.parametrize("size", [0, 512, 3 << 30])
def test_a_new_image(tmp_path: Path, version: int, cluster_size: int, size: int) -> None:
    """qemu-img finds it sound and empty, of that size."""
    path = tmp_path / "new.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    header = create(fd, size, cluster_size=cluster_size, version=version)
    assert Qcow2(fd).size == size
    os.close(fd)
    assert header.size == size
    assert qemu_check(path) == (0, 0)
    assert f"({size} bytes)" in qemu_img("info", path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cluster_size": 1000}, "cluster size 1000: a power of two"),
        ({"cluster_size": 256}, "cluster size 256"),
        ({"refcount_bits": 3}, "refcounts of 3 bits"),
        ({"version": 2, "refcount_bits": 8}, "refcounts of 8 bits: 16 with version 2"),
        ({"version": 4}, "version 4"),
        ({"cluster_size": 512, "size": 1 << 40}, "too many for clusters of 512"),
    ],
)
def test_an_image_that_cannot_be_made(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    """Refused in words, before anything is written."""
    with (tmp_path / "x").open("w+b") as file:
        with pytest.raises(ConfigError, match=complaint):
            create(file.fileno(), options.pop("size", SIZE), **options)
        assert os.fstat(file.fileno()).st_size == 0


# Check and mend.


def test_leaks_are_found_and_mended(path: Path) -> None:
    """A cluster that is counted, and that nobody points to."""
    with path.open("r+b") as file:
        before = check(file.fileno())
        assert (before.corruptions, before.leaks, before.allocated) == (0, 0, 4)
        Qcow2(file.fileno())._alloc.take(1)  # type: ignore[union-attr]
        found = check(file.fileno())
        assert (found.corruptions, found.leaks) == (0, 8)
        assert "leaked: refcount 1, 0 references" in found.texts[0]
        after = mend(file.fileno(), leaks_only=True)
        assert (after.corruptions, after.leaks, after.mended) == (0, 0, 8)


@needs_qemu
def test_wrong_refcounts_and_flags_are_found_and_mended(path: Path) -> None:
    """A reference too many for a refcount, and a flag that lies, as qemu-img sees it, too."""
    _, l2, _ = tables(path)
    data = path.read_bytes()
    first = int.from_bytes(data[l2 : l2 + 8], "big")
    poke(path, l2 + 8 * 20, first)
    poke(path, l2 + 8, int.from_bytes(data[l2 + 8 : l2 + 16], "big") & ~COPIED)
    with path.open("r+b") as file:
        found = check(file.fileno())
        assert (found.corruptions, found.leaks) == (2, 0)
        assert qemu_check(path)[0] > 0
        after = mend(file.fileno(), leaks_only=False)
        assert (after.corruptions, after.leaks, after.texts) == (0, 0, ())
    assert qemu_check(path) == (0, 0)
    with opened(path) as disk:
        write(disk, 20 * CLUSTER, b"own copy" * 64)
        assert read(disk, 0, CLUSTER) == b"d" * CLUSTER


@needs_qemu
def test_a_dirty_image_gets_new_refcounts(tmp_path: Path) -> None:
    """Lazy refcounts that a killed writer never wrote are made anew before the first write."""
    path = tmp_path / "lazy.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", path, "1M")
    qemu_io(path, "write -q -P 7 0 256k")
    with path.open("r+b") as file:
        block = int.from_bytes(os.pread(file.fileno(), 8, 0x1000), "big")
        os.pwrite(file.fileno(), bytes(256), block + 64)  # refcounts that were never written
        os.pwrite(file.fileno(), pack(">Q", 1), AT_INCOMPATIBLE)
        assert check(file.fileno()).dirty
    assert qemu_check(path)[0] > 0
    with opened(path, readonly=True) as disk:
        assert read(disk, 0, 4096) == b"\7" * 4096
    with opened(path) as disk:
        write(disk, 300 << 10, b"n" * 4096)
        assert read(disk, 0, 256 << 10) == b"\7" * (256 << 10)
    assert qemu_check(path) == (0, 0)


@pytest.mark.parametrize("bits", [1, 2])
def test_more_references_than_a_refcount_can_count(tmp_path: Path, bits: int) -> None:
    """Counters of few bits and an image that would need more: refused, and left as it is."""
    path, most = tmp_path / "a.qcow2", (1 << bits) - 1
    with new_image(path, SIZE, cluster_size=CLUSTER, refcount_bits=bits) as disk:
        write(disk, 0, b"d" * 8 * CLUSTER)
    _, l2, _ = tables(path)
    first = int.from_bytes(path.read_bytes()[l2 : l2 + 8], "big")
    for index in range(1, most + 1):
        poke(path, l2 + 8 * index, first)
    poke(path, AT_INCOMPATIBLE, 1)
    before = path.read_bytes()
    complaint = f"has {most + 1} references, refcounts of {bits} bits hold less"
    with path.open("r+b") as file:
        with pytest.raises(ConfigError, match=complaint):
            Qcow2(file.fileno())
        with pytest.raises(ConfigError, match=complaint):
            mend(file.fileno(), leaks_only=False)
        assert check(file.fileno()).corruptions
    assert path.read_bytes()[: len(before)] == before


def test_a_check_takes_so_much_memory_and_no_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that point all over a sparse file are counted up to a bound."""
    _, l2, _ = tables(path)
    with path.open("r+b") as file:
        file.truncate(8 * CHUNK * CLUSTER)
        for index in range(4):
            poke(path, l2 + 8 * index, COPIED | index * CHUNK * CLUSTER + (64 << 10))
        assert check(file.fileno()).corruptions >= 4
        monkeypatch.setattr(qcow2usage, "MOST_CHUNKS", 3)
        with pytest.raises(OSError, match=r"in more than 3 pieces .* qemu-img check may"):
            check(file.fileno())


@pytest.fixture
def with_snapshot(path: Path) -> Path:
    """The image, with an internal snapshot."""
    qemu_img("snapshot", "-c", "s", path)
    return path


@needs_qemu
@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, 1 << 40, "an L1 table of 1 entries at 0x10000000000"),
        (0, 0x5001, "an L1 table of 1 entries at 0x5001"),
        (8, 1 << 56, "an L1 table of [0-9]+ entries at"),
        (32, 5000, "5[0-9]+ bytes, 5000 of them extra, are too many"),
        (8, 1 << 32 | 0xFFFF_FFFF, "[0-9]+ bytes, 24 of them extra, are too many"),
    ],
)
def test_a_snapshot_table_that_cannot_be(
    with_snapshot: Path, at: int, value: int, complaint: str
) -> None:
    """Whoever would write is told which snapshot, where, and what; reading goes on."""
    path = with_snapshot
    table = int.from_bytes(path.read_bytes()[64:72], "big")
    poke(path, table + at, value)
    with pytest.raises(ConfigError, match=f"snapshot 0 at {table:#x}: {complaint}"), opened(path):
        pass
    with opened(path, readonly=True) as disk:
        assert read(disk, 0, 4 * CLUSTER) == b"d" * 4 * CLUSTER
    with path.open("rb") as file:
        report = check(file.fileno())
    assert any(f"snapshot 0 at {table:#x}" in text for text in report.texts)


@needs_qemu
def test_more_snapshots_than_there_are(with_snapshot: Path) -> None:
    """The table ends with the file, or in something else."""
    path = with_snapshot
    with path.open("r+b") as file:
        file.seek(60)
        file.write(pack(">I", 60000))
    with pytest.raises(ConfigError, match=r"snapshot \d+ at 0x"), opened(path):
        pass


def test_space_is_freed(path: Path) -> None:
    """Discarded and zeroed clusters are reused, and the file does not grow."""
    with opened(path) as disk:
        disk.flush()
        for turn in range(40):
            disk.write_zeroes(0, 4 * CLUSTER, unmap=True)
            disk.flush()
            write(disk, 0, bytes([turn + 1]) * 4 * CLUSTER)
    assert path.stat().st_size < 80 * CLUSTER  # and not 160
