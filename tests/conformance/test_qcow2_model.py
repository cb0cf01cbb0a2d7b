"""qcow2 images of all kinds, changed at random: contents as the model, and consistent for QEMU.

PYVMD_QCOW2_SEEDS=200 tries that many chains instead of a few.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from devices.qcow2 import Qcow2
from devices.qcow2check import check
from tests.qcow2chain import SECTOR, Chain
from tests.qcow2lab import content, needs_qemu, opened, pattern, qemu_check, qemu_img, read, write
from tests.rng import seeded

if TYPE_CHECKING:
    from pathlib import Path

SEEDS: Final = int(os.environ.get("PYVMD_QCOW2_SEEDS", "24"))


def _session(chain: Chain) -> None:
    """Open the chain, do things, close it."""
    with opened(*chain.paths, formats=chain.formats) as disk:
        assert isinstance(disk, Qcow2)
        assert read(disk, 0, chain.size) == chain.model
        at = 0
        for run in disk.map(0, chain.size):
            assert run.offset == at
            at += run.length
            if run.kind in ("zero", "unallocated"):
                assert not any(chain.model[run.offset : at])
        assert at == chain.size
        for _ in range(chain.rng.randint(1, 30)):
            _do(chain, disk)
        assert read(disk, 0, chain.size) == chain.model


def _do(chain: Chain, disk: Qcow2) -> None:
    offset, length = chain.some_range()
    part = slice(offset, offset + length)
    what = chain.rng.choice(("read", "write", "write", "zero", "discard", "flush", "grow"))
    if what == "read":
        assert read(disk, offset, length) == chain.model[part]
    elif what == "write":
        data = pattern(chain.rng, length)
        write(disk, offset, data)
        chain.model[part] = data
    elif what == "zero":
        disk.write_zeroes(offset, length, unmap=chain.rng.random() < 0.5)
        disk.commit()
        chain.model[part] = bytes(length)
    elif what == "discard":
        disk.discard(offset, length)
        disk.commit()
        now = read(disk, offset, length)
        # Undefined, but nobody else's data: what was there, or zeroes.
        assert all(new in (old, 0) for new, old in zip(now, chain.model[part], strict=True))
        chain.model[part] = now
    elif what == "flush":
        disk.flush()
    elif not (chain.version == 2 and chain.snapshots):
        size = chain.size + SECTOR * chain.rng.randint(0, 300)
        disk.resize(size)
        chain.model.extend(bytes(size - chain.size))


@needs_qemu
@pytest.mark.parametrize("seed", range(SEEDS))
def test_contents_and_consistency(tmp_path: Path, seed: int) -> None:
    """Versions, cluster sizes, refcount widths, chains, compression, zeroes, snapshots; reopened.

    Afterwards the disk reads as the model for us and for QEMU, snapshots as when they were
    taken, qemu-img finds neither corruption nor leak, and bases are what they were.
    """
    rng = seeded(seed)
    chain = Chain(tmp_path, rng)
    bases = [path.read_bytes() for path in chain.paths[1:]]
    top = chain.paths[0]
    for _ in range(rng.randint(1, 3)):
        _session(chain)

        assert qemu_check(top) == (0, 0)
        with open(top, "rb") as file:
            report = check(file.fileno())
        assert (report.corruptions, report.leaks, report.texts) == (0, 0, ())
        assert content(top) == chain.model
    assert [path.read_bytes() for path in chain.paths[1:]] == bases
    for number, name in enumerate(_snapshot_names(top)):
        flat = tmp_path / "snapshot.img"
        qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", top, flat)
        was = chain.snapshots[number]
        assert flat.read_bytes().ljust(len(was), b"\0")[: len(was)] == was


def _snapshot_names(path: Path) -> list[str]:
    return [line.split()[1] for line in qemu_img("snapshot", "-l", path).splitlines()[2:]]
