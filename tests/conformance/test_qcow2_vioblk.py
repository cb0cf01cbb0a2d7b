"""qcow2 images of all kinds behind vioblk, as a guest sees them: random requests, kills, QEMU.

PYVMD_QCOW2_SEEDS=200 tries that many chains instead of a few.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from struct import pack
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.model import DiskConfig
from devices import imageuser
from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    S_OK,
    SEGMENT,
    SEGMENT_F_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.qcow2check import mend
from devices.viodev import ImsgType
from tests.qcow2chain import SECTOR, Chain
from tests.qcow2lab import content, needs_qemu, pattern, qemu_check
from tests.rng import seeded
from tools.viodriver.private import DEADLINE, DeviceHost, shared_spawner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmm.launch import Spawner

SEEDS: Final = int(os.environ.get("PYVMD_QCOW2_SEEDS", "8"))
MOST_OPEN: Final = 40  # requests that have been made and not answered
MOST_BYTES: Final = 128 << 10  # of one request


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    """One spawner for all."""
    with shared_spawner("best-effort") as spawner:
        yield spawner


class Guest:
    """A driver of one device process on a chain, and what it may find there."""

    def __init__(self, chain: Chain, spawner: Spawner) -> None:
        self.chain, self.rng = chain, chain.rng
        cache = self.rng.choice(("writeback", "none"))
        flags = os.O_DIRECT * (cache == "none")
        #: Of each sector with a request under way, what else it may read as.
        self.doubt: dict[int, set[bytes]] = {}
        with ExitStack() as stack:
            fds = {}
            for index, path in enumerate(chain.paths):
                name = f"base{index - 1}" if index else "image"
                fds[name] = os.open(path, flags | (os.O_RDONLY if index else os.O_RDWR))
                stack.callback(os.close, fds[name])
            imageuser.lock(fds["image"], write=True)
            disk = DiskConfig(path="", format="qcow2", cache=cache)
            settings = {**disk._asdict(), "bases": chain.formats[1:]}
            self.host = DeviceHost("vioblk", settings, fds=fds, spawner=spawner)
        # Every second one gets each write on the medium before it is answered.
        features = self.rng.choice((BLK_F_FLUSH, 0))
        [self.queue] = self.host.start(features, arena_bytes=7 << 20)

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> bytes:
        """Make a request and wait for it; it must succeed. Returns what was read."""
        self._add(kind, sector, data, room)
        self.host.kick(0)
        [answer] = self._answers(1)
        return answer

    def do_some(self) -> None:
        """Make a request of any kind, and see that it does what it should."""
        rng, model = self.rng, self.chain.model
        offset, length = self._range()
        part = slice(offset, offset + length)
        what = rng.choice((T_IN, T_OUT, T_OUT, T_WRITE_ZEROES, T_DISCARD, T_FLUSH, "grow"))
        if what == T_IN:
            assert self.ask(T_IN, offset // SECTOR, room=length) == model[part]
        elif what == T_OUT:
            data = pattern(rng, length)
            self.ask(T_OUT, offset // SECTOR, data)
            model[part] = data
        elif what == T_WRITE_ZEROES:
            flags = rng.choice((0, SEGMENT_F_UNMAP))
            self.ask(what, data=SEGMENT.pack(offset // SECTOR, length // SECTOR, flags))
            model[part] = bytes(length)
        elif what == T_DISCARD:
            self.ask(what, data=SEGMENT.pack(offset // SECTOR, length // SECTOR, 0))
            now = self.ask(T_IN, offset // SECTOR, room=length)
            assert all(new in (old, 0) for new, old in zip(now, model[part], strict=True))
            model[part] = now
        elif what == T_FLUSH:
            self.ask(T_FLUSH)
        elif not (self.chain.version == 2 and self.chain.snapshots):
            size = len(model) + SECTOR * rng.randint(1, 300)
            told = self.host.ask(ImsgType.SETTING, {"name": "resize", "value": size})
            assert told == {"value": size}
            model.extend(bytes(size - len(model)))

    def die_amid_writes(self) -> None:
        """Have many writes under way, and after some number of answers kill the device."""
        model, taken = self.chain.model, set[int]()
        for _ in range(self.rng.randint(1, MOST_OPEN)):
            offset, length = self._range()
            sectors = set(range(offset // SECTOR, (offset + length) // SECTOR))
            if sectors & taken:  # of two at once on one sector, either may be the last
                continue
            taken |= sectors
            data = pattern(self.rng, length)
            self._add(T_OUT, offset // SECTOR, data)
            for at in range(0, length, SECTOR):
                self.doubt[(offset + at) // SECTOR] = {
                    bytes(model[offset + at : offset + at + SECTOR]),
                    data[at : at + SECTOR],
                }
            model[offset : offset + length] = data
        self.host.kick(0)
        nr_open = self.queue.outstanding
        for request in self._done(self.rng.randint(0, nr_open)):
            assert self.queue.data(request)[-1] == S_OK
            header = self.host.memory.read(request.segments[0].gpa, HEADER.size)
            start = HEADER.unpack(header)[2]
            for sector in range(start, start + request.segments[1].length // SECTOR):
                del self.doubt[sector]
        self.host.process.kill()
        self.host.wait_end()
        self.host.close()
        # What it had handed to the kernel may still be on its way, and the lock tells.
        with self.chain.paths[0].open("r+b") as file:
            fcntl.fcntl(
                file, fcntl.F_OFD_SETLKW, pack(imageuser.FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            )

    def judge(self) -> None:
        """Compare the image with the model, and let QEMU look at it; what was in doubt is known."""
        top, model = self.chain.paths[0], self.chain.model
        now = content(top)
        for sector, choices in self.doubt.items():
            found = now[sector * SECTOR : (sector + 1) * SECTOR]
            assert found in choices, f"sector {sector} reads {found[:16]!r}"
            model[sector * SECTOR : (sector + 1) * SECTOR] = found
        self.doubt.clear()
        assert now == model
        assert qemu_check(top)[0] == 0

    def _range(self) -> tuple[int, int]:
        offset, length = self.chain.some_range()
        return offset, min(length, MOST_BYTES)

    def _add(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> None:
        parts = [HEADER.pack(kind, 0, sector), *([data] if data else [])]
        self.queue.add(parts, [*([room] if room else []), 1])

    def _done(self, count: int) -> list[Any]:
        """Wait for so many requests to be done, and take those."""
        found: list[Any] = []
        while len(found) < count:
            more = [used.request for used in self.queue.collect()]
            found += more
            if not more and self.queue.enable_calls():
                assert self.host.wait_call(0, DEADLINE), self.host.said
        return found

    def _answers(self, count: int) -> list[bytes]:
        answers = [self.queue.data(request) for request in self._done(count)]
        assert all(answer[-1] == S_OK for answer in answers), self.host.said
        return [answer[:-1] for answer in answers]


@needs_qemu
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_requests_and_kills(tmp_path: Path, spawner: Spawner, seed: int) -> None:
    """Each process does random requests, and is closed, or killed while it writes.

    After each the contents are what was answered, and of what was not, either; QEMU finds no
    corruption, and after a close no more leaks than before. In the end mending leaves none.
    """
    rng = seeded(seed)
    chain, leaks = Chain(tmp_path, rng), 0
    bases = [path.read_bytes() for path in chain.paths[1:]]
    for _ in range(4):
        guest = Guest(chain, spawner)
        for _ in range(rng.randint(0, 25)):
            guest.do_some()
        if rng.random() < 0.6:
            guest.die_amid_writes()
            guest.judge()
            leaks = qemu_check(chain.paths[0])[1]
        else:
            guest.host.close()
            guest.judge()
            assert qemu_check(chain.paths[0])[1] <= leaks
    with chain.paths[0].open("r+b") as file:
        mend(file.fileno(), leaks_only=True)
    assert qemu_check(chain.paths[0]) == (0, 0)
    assert content(chain.paths[0]) == chain.model
    assert [path.read_bytes() for path in chain.paths[1:]] == bases
