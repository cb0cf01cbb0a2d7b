"""Chains of qcow2 images of all kinds, made at random by QEMU's tools, and what they read as."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from tests.qcow2lab import pattern, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

SECTOR: Final = 512


class Chain:
    """Up to three images of qemu-img, one on the other, and what they should read as."""

    def __init__(self, directory: Path, rng: Random) -> None:
        self.rng, self.directory = rng, directory
        self.paths: list[Path] = []  # top first, as are the formats
        self.formats: list[str] = []
        self.model = bytearray()
        self.snapshots: list[bytes] = []
        levels = rng.randint(1, 3)
        for level in range(levels):
            size = SECTOR * rng.randint(200, 5000)
            if level == 0 and levels > 1 and rng.random() < 0.5:
                self._add_raw(size)
            else:
                self._add_qcow2(size)
                for number in range(rng.randint(0, 2)):
                    self._change()
                    # Not where refcounts cannot count twice as many references.
                    enough = self.bits > 1 and (self.bits >= 16 or not self.packed)
                    if level == levels - 1 and rng.random() < 0.5 and enough:
                        qemu_img("snapshot", "-c", f"s{number}", self.paths[0])
                        self.snapshots.append(bytes(self.model))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return len(self.model)

    def _add_raw(self, size: int) -> None:
        path = self.directory / "base.img"
        self.model = bytearray(self.rng.randbytes(size))
        path.write_bytes(self.model)
        self.paths.insert(0, path)
        self.formats.insert(0, "raw")

    def _add_qcow2(self, size: int) -> None:
        rng, path = self.rng, self.directory / f"level{len(self.paths)}.qcow2"
        self.cluster_size = 1 << rng.choice((9, 12, 12, 16, 16, 18))
        self.version = rng.choice((2, 3, 3))
        self.bits = 16 if self.version == 2 else 1 << rng.randrange(7)
        self.packed = False  # many compressed clusters share a host cluster
        options = f"cluster_size={self.cluster_size},refcount_bits={self.bits}"
        options += ",compat=" + {2: "0.10", 3: "1.1"}[self.version]
        if self.version == 3 and rng.random() < 0.3:
            options += ",lazy_refcounts=on"
        if not self.paths and rng.random() < 0.4:
            pages = [rng.randbytes(64) * 64 if rng.random() < 0.6 else bytes(4096)]
            pages += [pattern(rng, 4096) for _ in range(size >> 12)]
            self.model = bytearray(b"".join(pages)[:size].ljust(size, b"\0"))
            flat = self.directory / "flat.img"
            flat.write_bytes(self.model)
            qemu_img("convert", "-c", "-O", "qcow2", "-o", options, flat, path)
            self.packed = True
        else:
            backing = ["-b", self.paths[0].name, "-F", self.formats[0]] if self.paths else []
            qemu_img(
                "create", "-q", "-f", "qcow2", "-o", options, *backing, path.name, str(size),
                cwd=self.directory,
            )  # fmt: skip
            self.model = self.model[:size].ljust(size, b"\0")
        self.paths.insert(0, path)
        self.formats.insert(0, "qcow2")

    def some_range(self) -> tuple[int, int]:
        """Return an offset and a length within the disk."""
        sectors = self.size // SECTOR
        start = self.rng.randrange(sectors)
        count = min(self.rng.choice((1, 1, 8, 8, 8, 64, 128, 1024)), sectors - start)
        return start * SECTOR, count * SECTOR

    def _change(self) -> None:
        """Let qemu-io write data and zeroes of both kinds, and compressed clusters."""
        commands = []
        for _ in range(self.rng.randint(0, 8)):
            offset, length = self.some_range()
            byte = self.rng.choice((0, 0, self.rng.randint(1, 255)))
            how = self.rng.choice(("-z", "-z -u")) if not byte else f"-P {byte}"
            commands.append(f"write -q {how} {offset} {length}")
            self.model[offset : offset + length] = bytes([byte]) * length
        if commands:
            qemu_io(self.paths[0], *commands)
        cluster = self.rng.randrange(-(-self.size // self.cluster_size)) * self.cluster_size
        command = f"write -q -c -P 99 {cluster} {self.cluster_size}"
        words = ["qemu-io", "-f", "qcow2", "-c", command, str(self.paths[0])]
        # It refuses what has data already, and what is not a whole cluster.
        if subprocess.run(words, check=False, capture_output=True).returncode == 0:
            self.model[cluster : cluster + self.cluster_size] = b"\x63" * self.cluster_size
            self.packed = True
