"""Block device: when writes become stable (virtio 1.2 §5.2.5, §5.2.6.2)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from devices.blkreq import BLK_F_CONFIG_WCE, BLK_F_FLUSH, S_OK, T_OUT
from devices.features import F_VERSION_1
from tests.blklab import BlkLab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20
WRITEBACK = 32  # offset in configuration space


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., BlkLab]]:
    """Return a function that makes a device with these settings."""
    made: list[BlkLab] = []

    def make_(**settings: Any) -> BlkLab:
        made.append(BlkLab(tmp_path, SIZE, **settings))
        return made[-1]

    yield make_
    for lab in made:
        lab.__exit__(None, None, None)


def stable_writes(blk: BlkLab, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make a write and tell whether it was on the medium before it was reported."""
    flags_seen = []
    write = os.pwritev

    def watch(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        return write(fd, views, offset, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", watch)
        assert blk.ask(T_OUT, 0, b"w" * 512).status == S_OK
    assert flags_seen in ([0], [os.RWF_DSYNC])
    return bool(flags_seen[0])


@pytest.mark.parametrize(
    ("features", "writeback"),
    [
        (0, False),
        (BLK_F_FLUSH, True),
        (BLK_F_CONFIG_WCE, False),
        (BLK_F_CONFIG_WCE | BLK_F_FLUSH, True),
    ],
)
def test_5_2_5_2_initial_cache_mode(
    make: Callable[..., BlkLab],
    monkeypatch: pytest.MonkeyPatch,
    features: int,
    writeback: bool,
) -> None:
    """A driver that cannot flush gets writethrough: CONFIG_WCE alone MUST start with 0."""
    blk = make()
    blk.start(features)

    assert blk.read_config(WRITEBACK, 1) == writeback
    assert stable_writes(blk, monkeypatch) is not writeback


def test_5_2_6_2_the_driver_switches_the_cache(
    make: Callable[..., BlkLab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CONFIG_WCE, writeback decides from the next write on."""
    blk = make()
    blk.start(BLK_F_CONFIG_WCE | BLK_F_FLUSH)

    for mode in (0, 1, 0):
        blk.write_config(WRITEBACK, 1, mode)
        assert blk.read_config(WRITEBACK, 1) == mode
        assert stable_writes(blk, monkeypatch) is (mode == 0)


def test_a_reset_restores_the_cache_mode(make: Callable[..., BlkLab]) -> None:
    """A driver's choice does not outlive it."""
    blk = make()
    blk.start(BLK_F_CONFIG_WCE | BLK_F_FLUSH)
    blk.write_config(WRITEBACK, 1, 0)

    blk.start(BLK_F_CONFIG_WCE | BLK_F_FLUSH)

    assert blk.read_config(WRITEBACK, 1) == 1


def test_5_2_5_3_a_legacy_driver_sets_the_cache_mode_early(
    make: Callable[..., BlkLab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the legacy interface the mode is the driver's, whenever it was written."""
    blk = make()
    blk.status = 0
    blk.write_config(WRITEBACK, 1, 0)
    blk.start_legacy(BLK_F_CONFIG_WCE | BLK_F_FLUSH)  # begins with a reset
    assert blk.read_config(WRITEBACK, 1) == 1
    blk.write_config(WRITEBACK, 1, 0)
    assert stable_writes(blk, monkeypatch)

    blk.start_legacy(BLK_F_CONFIG_WCE)
    assert blk.read_config(WRITEBACK, 1) == 1  # MUST NOT change it for lack of FLUSH
    assert not stable_writes(blk, monkeypatch)

    blk.start_legacy(0)
    assert stable_writes(blk, monkeypatch)


def test_the_cache_mode_is_saved(make: Callable[..., BlkLab]) -> None:
    """A device that takes over from another keeps the driver's cache mode."""
    blk = make()
    blk.start(BLK_F_CONFIG_WCE | BLK_F_FLUSH)
    blk.write_config(WRITEBACK, 1, 0)
    state = blk.registers.save()

    other = make()
    other.memory.write(0, blk.memory.read(0, 1 << 20))
    other.registers.load(state)

    assert other.read_config(WRITEBACK, 1) == 0
    assert state["features"] & F_VERSION_1
