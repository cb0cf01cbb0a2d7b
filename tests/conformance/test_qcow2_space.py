"""qcow2 images on a file system that is full, really full, and then is not any more."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from devices.qcow2check import check
from tests.qcow2lab import needs_qemu, new_image, qemu_check, read, write
from tests.rng import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE: Final = 4 << 20
SECTOR: Final = 512
NR_STEPS: Final = 300
MORE_AT: Final = 200  # there is room again from this step on


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB, 15 of which `ballast` has; it is gone when nobody has it open."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "none", place], check=True)
    fd = os.open(place, os.O_RDONLY)
    subprocess.run(["umount", "--lazy", place], check=True)
    inside = Path(f"/proc/{os.getpid()}/fd/{fd}")
    (inside / "ballast").write_bytes(bytes(15 << 20))
    yield inside
    os.close(fd)


@needs_qemu
@pytest.mark.parametrize("seed", range(4))
def test_no_space_left(small: Path, seed: int) -> None:
    """What fails, fails with ENOSPC; it and nothing else is lost, and with room all goes on.

    In the end neither we nor QEMU find corruption or leak.
    """
    rng, path = seeded(seed), small / "a.qcow2"
    shape = {"cluster_size": 1 << rng.choice((9, 12, 16)), "refcount_bits": 1 << rng.randrange(7)}
    model, unknown, nr_failed = bytearray(SIZE), set[int](), 0
    with new_image(path, SIZE, **shape) as disk:
        for step in range(NR_STEPS):
            if step == MORE_AT:
                (small / "ballast").unlink()
            offset = rng.randrange(SIZE // SECTOR) * SECTOR
            length = min(SECTOR * rng.choice((1, 8, 64, 128)), SIZE - offset)
            sectors = range(offset // SECTOR, (offset + length) // SECTOR)
            data = rng.randbytes(length)
            try:
                what = rng.choice(("write", "write", "write", "discard", "zero", "flush"))
                if what == "write":
                    write(disk, offset, data)
                elif what == "discard":
                    disk.discard(offset, length)
                    disk.commit()
                    data = read(disk, offset, length)
                elif what == "zero":
                    disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                    disk.commit()
                    data = bytes(length)
                else:
                    disk.flush()
                    continue
                model[offset : offset + length] = data
                unknown.difference_update(sectors)
            except OSError as err:
                if err.errno != errno.ENOSPC or step >= MORE_AT:
                    raise
                unknown.update(sectors)
                nr_failed += 1
        now = read(disk, 0, SIZE)
        for sector in set(range(SIZE // SECTOR)) - unknown:
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            assert now[part] == model[part], f"sector {sector}"
    assert nr_failed > 10
    with path.open("rb") as file:
        report = check(file.fileno())
    assert (report.corruptions, report.leaks) == (0, 0)
    assert qemu_check(path) == (0, 0)
