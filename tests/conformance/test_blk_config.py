"""Block device: features, configuration space, cache mode, resize (virtio 1.2 §5.2.3 to §5.2.5)."""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError, PyvmError
from config.model import DiskConfig
from devices.blkreq import (
    BLK_F_BLK_SIZE,
    BLK_F_CONFIG_WCE,
    BLK_F_DISCARD,
    BLK_F_FLUSH,
    BLK_F_MQ,
    BLK_F_RO,
    BLK_F_SEG_MAX,
    BLK_F_SIZE_MAX,
    BLK_F_TOPOLOGY,
    BLK_F_WRITE_ZEROES,
    S_IOERR,
    S_OK,
    SEGMENT,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.features import F_IN_ORDER, RING_FEATURES
from devices.spec import SPECS
from devices.vioblk import create
from devices.viodev import CONFIG_CHANGE
from tests.blklab import BlkLab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20
# struct virtio_blk_config up to and with unused1, as §5.2.4 has it.
CONFIG = Struct("<Q I I HBB I BBHI B B H I I I I I B 3s")
NAMES = (
    *("capacity", "size_max", "seg_max", "cylinders", "heads", "sectors", "blk_size"),
    *("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size", "writeback"),
    *("unused0", "num_queues", "max_discard_sectors", "max_discard_seg"),
    *("discard_sector_alignment", "max_write_zeroes_sectors", "max_write_zeroes_seg"),
    *("write_zeroes_may_unmap", "unused1"),
)
WRITEBACK = 32


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., BlkLab]]:
    """Return a function that makes a device with these settings."""
    made: list[BlkLab] = []

    def make_(size: int = SIZE, **settings: Any) -> BlkLab:
        made.append(BlkLab(tmp_path, size, **settings))
        return made[-1]

    yield make_
    for lab in made:
        lab.__exit__(None, None, None)


def fields(blk: BlkLab) -> dict[str, Any]:
    """Read the whole configuration space through its registers."""
    data = bytes(blk.read_config(at, 1) for at in range(CONFIG.size))
    return dict(zip(NAMES, CONFIG.unpack(data), strict=True))


# Features


def test_5_2_3_features(make: Callable[..., BlkLab]) -> None:
    """A plain disk offers what its file's head says; no SCSI, barriers or geometry."""
    common = BLK_F_SIZE_MAX | BLK_F_SEG_MAX | BLK_F_BLK_SIZE | BLK_F_TOPOLOGY | BLK_F_FLUSH

    writable = common | BLK_F_CONFIG_WCE | BLK_F_DISCARD | BLK_F_WRITE_ZEROES
    assert make().offered() & ~RING_FEATURES == writable
    assert make(readonly=True).offered() & ~RING_FEATURES == common | BLK_F_RO
    assert make(queues=2).offered() & ~RING_FEATURES == writable | BLK_F_MQ


def test_in_order_is_offered_if_true(make: Callable[..., BlkLab]) -> None:
    """Requests that overlap come back in any order, and only those."""
    assert make().offered() & F_IN_ORDER
    assert not make(cache="none").offered() & F_IN_ORDER


# Layout


def test_5_2_4_layout(make: Callable[..., BlkLab]) -> None:
    """Every field is where the specification has it, with its value."""
    blk = make(
        SIZE + 512,
        block_size=1024,
        physical_block_size=8192,
        min_io_size=16384,
        opt_io_size=1 << 20,
        queues=3,
    )

    assert CONFIG.size == SPECS["vioblk"].config_length
    assert fields(blk) == {
        "capacity": SIZE // 512,  # of whole blocks
        "size_max": 131072,
        "seg_max": 254,
        "cylinders": 0,
        "heads": 0,
        "sectors": 0,
        "blk_size": 1024,
        "physical_block_exp": 3,
        "alignment_offset": 0,
        "min_io_size": 16,
        "opt_io_size": 1024,
        "writeback": 1,
        "unused0": 0,
        "num_queues": 3,
        "max_discard_sectors": 524288,
        "max_discard_seg": 64,
        "discard_sector_alignment": os.stat(blk.image).st_blksize // 512,
        "max_write_zeroes_sectors": 65536,
        "max_write_zeroes_seg": 1,
        "write_zeroes_may_unmap": 1,
        "unused1": b"\0\0\0",
    }


def test_5_2_4_fields_without_their_feature_are_zero(make: Callable[..., BlkLab]) -> None:
    """A read-only disk with one queue has neither cache mode, nor discard, nor a queue count."""
    found = fields(make(readonly=True))

    assert all(found[name] == 0 for name in NAMES[NAMES.index("writeback") :] if name != "unused1")


def test_5_2_4_capacity_is_64_bits(make: Callable[..., BlkLab]) -> None:
    """A disk of 4 TiB has more than 2³² sectors."""
    blk = make(4 << 40)

    assert blk.read_config(0, 8) == 8 << 30
    assert [blk.read_config(at, 4) for at in (0, 4)] == [0, 2]


def test_seg_max_fits_the_queue(make: Callable[..., BlkLab]) -> None:
    """A request of seg_max segments fits a queue without indirect descriptors."""
    blk = make()
    [queue] = blk.start(BLK_F_SEG_MAX)

    assert blk.read_config(12, 4) + 2 == queue.size


def test_5_2_6_2_read_only(make: Callable[..., BlkLab]) -> None:
    """With RO every write MUST end in IOERR, and write nothing; reads and flushes work."""
    blk = make(readonly=True, content=b"r" * 512)
    blk.start(BLK_F_RO | BLK_F_FLUSH)

    for kind, data in (
        (T_OUT, b"w" * 512),
        (T_DISCARD, SEGMENT.pack(0, 1, 0)),
        (T_WRITE_ZEROES, SEGMENT.pack(0, 1, 0)),
    ):
        assert blk.ask(kind, 0, data) == (S_IOERR, 1, b"")
    assert blk.ask(T_IN, 0, room=512).data == b"r" * 512
    assert blk.ask(T_FLUSH).status == S_OK


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        *((WRITEBACK, 1, value) for value in (2, 0xFF)),
        *((WRITEBACK, size, 0) for size in (2, 4)),
        *((at, 1, 1) for at in (31, 33, 60)),
        *((at, 4, 1) for at in (0, 200)),
    ],
)
def test_other_configuration_writes_change_nothing(
    make: Callable[..., BlkLab], offset: int, size: int, value: int
) -> None:
    """Only writeback can be written, in its own width, with 0 or 1."""
    blk = make()
    blk.start(BLK_F_CONFIG_WCE | BLK_F_FLUSH)
    before = fields(blk)

    blk.write_config(offset, size, value)

    assert fields(blk) == before


# Resize


def test_resize_tells_the_driver(make: Callable[..., BlkLab]) -> None:
    """A grown disk has a new capacity, a new generation, and a configuration interrupt."""
    blk = make()
    blk.start()
    generation = blk.read(0x15, 1)
    assert blk.ask(T_IN, SIZE // 512, room=512).status == S_IOERR

    assert blk.device.setting("resize", 3 * SIZE) == 3 * SIZE

    assert blk.read_config(0, 8) == 3 * SIZE // 512
    assert blk.read(0x15, 1) != generation
    assert blk.interrupts[-1] == CONFIG_CHANGE
    assert blk.isr() & 2
    assert blk.ask(T_OUT, 3 * SIZE // 512 - 1, b"n" * 512).status == S_OK


def test_resize_to_the_same_size_is_silent(make: Callable[..., BlkLab]) -> None:
    """Without a change there is no interrupt."""
    blk = make()
    blk.start()

    for value in (0, SIZE):
        assert blk.device.setting("resize", value) == SIZE

    assert blk.interrupts == []


def test_resize_counts_whole_blocks(make: Callable[..., BlkLab]) -> None:
    """The guest never sees a part of a block."""
    blk = make(block_size=4096)
    os.truncate(blk.image, SIZE + 4095)

    assert blk.device.setting("resize", 0) == SIZE


@pytest.mark.parametrize("value", [-512, 100, "1G", None, True, 1.5, SIZE - 512, 1 << 80])
def test_resize_refuses(make: Callable[..., BlkLab], value: Any) -> None:
    """What is no size, or less than there is, or too much, changes nothing and says so."""
    blk = make()

    with pytest.raises(PyvmError):
        blk.device.setting("resize", value)

    assert blk.read_config(0, 8) == blk.image.stat().st_size // 512 == SIZE // 512


def test_other_settings_are_refused(make: Callable[..., BlkLab]) -> None:
    """Nothing else can be changed while the VM runs."""
    with pytest.raises(ConfigError, match="no setting 'serial'"):
        make().device.setting("serial", "x")


# Making it


def test_an_image_that_is_no_disk_is_refused(make: Callable[..., BlkLab], tmp_path: Path) -> None:
    """create() takes raw images of one block or more."""
    blk = make()
    disk = DiskConfig(path="", format="raw", block_size=4096)

    def try_(size: int, **changes: Any) -> None:
        os.truncate(blk.image, size)
        with open(blk.image, "rb+") as image:
            create({**disk._asdict(), **changes}, {"image": image.fileno()}, blk.memory, blk)

    try_(4096)
    with pytest.raises(ConfigError, match="4095 bytes: less than one block"):
        try_(4095)
    with pytest.raises(ConfigError, match=r"format .vmdk.: raw or qcow2"):
        try_(4096, format="vmdk")
