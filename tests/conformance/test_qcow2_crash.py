"""A kill at any instant, and a power cut: qcow2 images stay consistent, and lose nothing.

A kill leaves at most leaks, and everything that was reported. A power cut leaves at most leaks,
and everything that was flushed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from devices import qcow2head
from devices.qcow2 import Qcow2, open_chain
from devices.qcow2create import create
from tests.qcow2crash import Believer, Effect, Recorder, cuts, kills, least, read_image
from tests.qcow2lab import content, needs_qemu, qemu_check, qemu_img, read, write
from tests.rng import seeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random
    from types import FrameType

    from devices.raw import Disk

SEEDS: Final = int(os.environ.get("PYVMD_QCOW2_SEEDS", "2"))
STATES: Final = int(os.environ.get("PYVMD_QCOW2_STATES", "20"))


class Kind(NamedTuple):
    """An image to begin with."""

    cluster_size: int
    version: int = 3
    bits: int = 16
    base: str = ""  # "raw" or "qcow2"
    snapshot: bool = False
    compressed: bool = False
    dirty: bool = False
    size: int = 48 << 10
    filled: int = 0  # bytes at the start that have data already
    nr_steps: int = 22


KINDS: Final = {
    # Refcount blocks of 64 counters: the second one is needed soon.
    "refcount blocks grow": Kind(512, bits=64, size=64 << 10, filled=24 << 10),
    # A table of 64 such blocks, full before the end; and resizing needs a longer L1 table.
    "refcount table and L1 table grow": Kind(
        512, bits=64, size=2088 << 10, filled=1976 << 10, nr_steps=8
    ),
    "version 2": Kind(1024, version=2),
    "narrow refcounts": Kind(512, bits=1, size=80 << 10),
    "on a raw base": Kind(1024, base="raw"),
    "on a qcow2 base": Kind(4096, base="qcow2"),
    "version 2 on a base": Kind(4096, version=2, base="raw"),
    "with a snapshot": Kind(1024, snapshot=True),
    "compressed": Kind(4096, compressed=True),
    # Its refcounts are made anew when it is opened, and that is part of the story.
    "not closed": Kind(512, dirty=True, filled=16 << 10, nr_steps=4),
}


class Story:
    """An image, what was done to it, and what should be in it."""

    def __init__(self, directory: Path, kind: Kind, rng: Random, patch: pytest.MonkeyPatch) -> None:
        self.path, self.base_path = directory / "a.qcow2", directory / "base.img"
        self._make(kind, rng)
        if kind.dirty:
            _forget_refcounts(self.path)
        self.before = self.path.read_bytes()
        self.fd = os.open(self.path, os.O_RDWR)
        self.base = self._open_base(kind)
        recorder = Recorder(patch)
        self.effects: list[Effect] = recorder.effects
        disk = Qcow2(self.fd, self.base)
        self.believer = Believer(read(disk, 0, disk.size))
        for _ in range(kind.nr_steps):
            self._do(disk, rng, kind)
        if not (kind.version == 2 and kind.snapshot):
            self._grow(disk, 96 << 10)
            self._note()
        disk.finish()
        self._note(flushed=True)
        patch.undo()
        os.close(self.fd)

    def _make(self, kind: Kind, rng: Random) -> None:
        data = rng.randbytes(kind.size)
        self.base_path.write_bytes(data)
        words = f"cluster_size={kind.cluster_size},refcount_bits={kind.bits}"
        words += ",compat=" + {2: "0.10", 3: "1.1"}[kind.version]
        if kind.compressed:
            flat = bytes(kind.size // 2) + b"compress me....." * (kind.size // 32)
            self.base_path.write_bytes(flat)
            qemu_img("convert", "-c", "-O", "qcow2", "-o", words, self.base_path, self.path)
        elif kind.snapshot:
            qemu_img("convert", "-O", "qcow2", "-o", words, self.base_path, self.path)
            qemu_img("snapshot", "-c", "s", self.path)
        elif kind.base:
            if kind.base == "qcow2":
                flat_path = self.base_path.with_suffix(".flat")
                flat_path.write_bytes(data)
                self.base_path.unlink()
                qemu_img("convert", "-O", "qcow2", flat_path, self.base_path)
            words += f",backing_file=base.img,backing_fmt={kind.base}"
            size = str(kind.size + 4096)
            qemu_img(
                "create", "-f", "qcow2", "-o", words, self.path.name, size, cwd=self.path.parent
            )
        else:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
            create(
                fd,
                kind.size,
                cluster_size=kind.cluster_size,
                version=kind.version,
                refcount_bits=kind.bits,
            )
            if kind.filled:
                disk = Qcow2(fd)
                write(disk, 0, rng.randbytes(kind.filled))
                disk.finish()
            os.close(fd)

    def _open_base(self, kind: Kind) -> Disk | None:
        if not kind.base:
            return None
        self.base_fd = os.open(self.base_path, os.O_RDONLY)
        return open_chain([self.base_fd], [kind.base])

    def _note(self, *, flushed: bool = False) -> None:
        self.believer.note(len(self.effects), flushed=flushed)

    def _do(self, disk: Qcow2, rng: Random, kind: Kind) -> None:
        believer = self.believer
        sectors = len(believer.now) // 512
        offset = 512 * rng.randrange(sectors)
        if kind.filled and rng.random() < 0.7:  # where something is to be allocated
            offset = 512 * rng.randrange(kind.filled // 512, sectors)
        length = min(512 * rng.choice((1, 1, 2, 9, 30)), len(believer.now) - offset)
        what = rng.choice(("write",) * 6 + ("zero", "unmap", "discard", "flush", "grow"))
        part = slice(offset, offset + length)
        if what == "write":
            data = rng.randbytes(length)
            believer.now[part] = data
            write(disk, offset, data)
        elif what in ("zero", "unmap"):
            believer.now[part] = bytes(length)
            disk.write_zeroes(offset, length, unmap=what == "unmap")
            disk.commit()
        elif what == "discard":
            disk.discard(offset, length)
            disk.commit()
            believer.now[part] = read(disk, offset, length)
        elif what == "flush":
            disk.flush()
        elif not (kind.version == 2 and kind.snapshot):
            self._grow(disk, 512 * rng.randint(1, 40))
        self._note(flushed=what == "flush")

    def _grow(self, disk: Qcow2, more: int) -> None:
        disk.resize(disk.size + more)
        self.believer.now.extend(bytes(more))


def _forget_refcounts(path: Path) -> None:
    """Make an image as one with lazy refcounts whose writer was killed: most of them are 0."""
    with path.open("r+b") as file:
        header = qcow2head.read(file.fileno())
        block = int.from_bytes(os.pread(file.fileno(), 8, header.refcount_offset), "big")
        os.pwrite(file.fileno(), bytes(header.cluster_size - 32), block + 32)
        os.pwrite(file.fileno(), b"\0" * 7 + b"\1", qcow2head.AT_INCOMPATIBLE)
        os.pwrite(file.fileno(), b"\0" * 7 + b"\1", qcow2head.AT_COMPATIBLE)


@needs_qemu
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", KINDS)
def test_a_kill_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """After every effect: no corruption, and every write that was reported is there."""
    story = Story(tmp_path, KINDS[name], seeded(seed), monkeypatch)
    assert len(story.effects) > 30
    for count, image in kills(story.before, story.effects):
        story.believer.judge_kill(count, read_image(image, story.base))


@needs_qemu
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", KINDS)
def test_a_power_cut_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """After every effect, each one since the last sync missing: what was flushed is there."""
    story = Story(tmp_path, KINDS[name], seeded(seed), monkeypatch)
    nr_cuts = 0
    for count, start, image in cuts(story.before, story.effects):
        story.believer.judge_cut(count, start, read_image(image, story.base))
        nr_cuts += 1
    assert nr_cuts > 20


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("nr_tables", [1, 1000])
def test_a_stable_write_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nr_tables: int, reopened: bool
) -> None:
    """Though it goes to a cluster whose entry was not on the medium, or was put out of the cache.

    The entry may be the work of another process, which was killed.
    """
    path, table = tmp_path / "a.qcow2", 64 * 512  # bytes that an L2 table maps
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    create(fd, 4 * table, cluster_size=512)
    disk = Qcow2(fd)
    write(disk, table, b"o" * 512)
    disk.flush()
    before = path.read_bytes()
    recorder = Recorder(monkeypatch)
    disk.map_._most_tables = nr_tables
    write(disk, 0, b"a" * 512)  # reported, and no more
    if reopened:
        disk = Qcow2(fd)
    for offset, data in ((0, b"s" * 512), (table - 512, b"s" * 1024)):
        if disk.place(offset, len(data), write=True, stable=True) < 0:
            disk.write([memoryview(data)], offset, len(data), stable=True)
        else:  # it would be written there, and nothing else be done
            disk.file.raw.write(
                [memoryview(data)], disk.place(offset, 512, write=True), len(data), stable=True
            )
        now = read_image(least(before, recorder.effects), None)
        assert now[offset : offset + len(data)] == data
    os.close(fd)


@needs_qemu
@pytest.mark.parametrize("name", KINDS)
def test_qemu_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What our own check calls consistent in these tests, qemu-img does, too.

    PYVMD_QCOW2_STATES=0 asks it about every state, instead of some of each kind of image.
    """
    story = Story(tmp_path, KINDS[name], seeded(5), monkeypatch)
    path, seen = tmp_path / "state.qcow2", dict[bytes, None]()
    for _, image in kills(story.before, story.effects):
        seen[image] = None
    assert len(seen) > 10
    step = max(len(seen) // STATES, 1) if STATES else 1
    for image in list(seen)[step - 1 :: step]:
        path.write_bytes(image)
        if not qcow2head.parse(image).dirty:  # it would count what is to be made anew
            assert qemu_check(path)[0] == 0


def _killed(number: int, top: Path, base: Path) -> bool:
    """Do what allocates, in a process that is killed at the `number`th line of devices/qcow2*.py.

    Returns whether it came so far.
    """
    pid = os.fork()
    if not pid:
        try:
            _work_until(number, os.open(top, os.O_RDWR), os.open(base, os.O_RDONLY))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _work_until(number: int, fd: int, base_fd: int) -> None:
    disk = open_chain([fd, base_fd], ["qcow2", "raw"])
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal left
        if "/devices/qcow2" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]  # it may return None
    write(disk, 512, b"n" * 2048)
    disk.finish()


@needs_qemu
def test_a_kill_at_every_line(tmp_path: Path) -> None:
    """A process is killed at each line that it executes: copy on write to new clusters, and close.

    Old or new data is there, for QEMU as well, and nothing worse than leaks. Larger changes have
    more lines; what they do to the file is what the tests above take apart.
    """
    base, top = tmp_path / "base.img", tmp_path / "a.qcow2"
    base.write_bytes(b"b" * 8192)
    words = "cluster_size=1024,backing_file=base.img,backing_fmt=raw"
    qemu_img("create", "-f", "qcow2", "-o", words, top.name, "8192", cwd=tmp_path)
    empty, states, number, struck = top.read_bytes(), set(), 0, True
    while struck:
        number += 1
        top.write_bytes(empty)
        struck = _killed(number, top, base)
        state = top.read_bytes()
        if state not in states:
            states.add(state)
            assert qemu_check(top)[0] == 0, f"killed at line {number}"
            data = content(top)
            assert data[512:2560] in (b"b" * 2048, b"n" * 2048)
            assert data[:512] + data[2560:] == b"b" * 6144
    assert number > 300
    assert len(states) > 5
    assert content(top)[512:2560] == b"n" * 2048
    assert qemu_check(top) == (0, 0)
