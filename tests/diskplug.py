"""A disk of a VM whose processes are killed, and a guest that knows what has to be on it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from config.errors import ConfigError
from config.model import DiskConfig
from devices.blkreq import (
    BLK_F_DISCARD,
    BLK_F_FLUSH,
    BLK_F_MQ,
    BLK_F_RO,
    BLK_F_WRITE_ZEROES,
    HEADER,
    S_IOERR,
    S_OK,
    SEGMENT,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.pluglab import DEADLINE, PlugLab
from tests.rng import seeded
from tools.viodriver import NoRoomError

if TYPE_CHECKING:
    from pathlib import Path
RING: Final = F_INDIRECT_DESC | F_EVENT_IDX
SIZE: Final = 2 << 20  # bytes of a disk
MOST: Final = 64 << 10  # bytes of a request
DEPTH: Final = 24  # requests in flight on a queue
KINDS: Final = (T_IN,) * 6 + (T_OUT,) * 8 + (T_FLUSH, T_DISCARD, T_WRITE_ZEROES)


class DiskPlug(PlugLab):
    """A VM with one disk, `vioblk0`."""

    def __init__(
        self,
        path: Path,
        *,
        packed: bool = False,
        direct: bool = True,
        format: str = "raw",
        queues: int = 1,
        **disk: Any,
    ) -> None:
        """Launch it; without `direct` kicks and calls are messages."""
        row = DiskConfig(str(path), format, queues=queues, **disk)
        try:
            super().__init__(
                "vioblk0", queues, packed=packed, irqfd=direct, kicks=direct, disks=(row,)
            )
        except ConfigError as err:
            if "cache: writeback" in err.hint:
                pytest.skip(f"no O_DIRECT: {err}")
            raise
        self.layout = RING | F_RING_PACKED * packed
        self.layout |= BLK_F_MQ * (queues > 1)

    def kill_now(self) -> None:
        """Kill the process that there is, whatever it is at, without a word to anybody."""
        if self.device.process is not None:
            self.device.process.kill()

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 0) -> Answer:
        """Make one request on the first queue, and wait for it."""
        self.offer(kind, sector, data, room=room)
        [answer] = self.answers(1)
        return answer

    def offer(self, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 0) -> None:
        """Make one request on the first queue, and kick."""
        readable = [HEADER.pack(kind, 0, sector), *([data] if data else [])]
        self.queues[0].add(readable, [room, 1] if room else [1])
        self.kick(0)

    def answers(self, count: int) -> list[Answer]:
        """Wait for so many answers on the first queue, in the order in which they come."""
        queue = self.queues[0]
        found: list[Answer] = []
        end = time.monotonic() + DEADLINE
        while len(found) < count:
            assert time.monotonic() < end, (self.facts(), self.lost)
            self.wait_call(0, 0.01)
            datas = [queue.data(used.request) for used in queue.collect()]
            found += [Answer(data[-1], data[:-1]) for data in datas]
        return found

    def begin(self, features: int = BLK_F_FLUSH) -> None:
        """Drive it to DRIVER_OK."""
        self.queues = self.start(self.layout | features, arena_bytes=2 << 20)

    @property
    def sectors(self) -> int:
        """The capacity that the driver reads."""
        return self.read_config(0, 8)


def empty_image(path: Path) -> Path:
    """Make a raw image of zeroes there."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return path


class Answer(NamedTuple):
    """What became of a request."""

    status: int
    data: bytes


class _Asked(NamedTuple):
    kind: int
    offset: int
    content: bytes  # to be there afterwards, or to be read


class Guest:
    """Asks for this and that, many requests at a time, and looks at every answer.

    No request overlaps one that is in flight, so what each has to bring is known.
    """

    def __init__(
        self,
        lab: DiskPlug,
        content: bytes,
        seed: int,
        *,
        readonly: bool = False,
        features: int = BLK_F_FLUSH,
    ) -> None:
        """The disk has `content`; it may be read only."""
        self.lab, self.disk, self.rng = lab, bytearray(content), seeded(seed)
        self.known = bytearray(b"\1") * (len(content) // 512)  # 0: was discarded
        self._busy = bytearray(len(self.known))
        self._asked: list[dict[int, _Asked]] = [{} for _ in range(lab.nr_queues)]
        self._readonly = readonly
        self.answered = 0
        lab.begin(features | (BLK_F_RO if readonly else BLK_F_DISCARD | BLK_F_WRITE_ZEROES))

    def run(self, count: int) -> None:
        """Go on until so many more have been answered, and the device was killed on the way."""
        goal, end = self.answered + count, time.monotonic() + 2 * DEADLINE
        kill_at, killed = self.answered + self.rng.randrange(count), False
        nr_replaced = len(self.lab.replaced)
        while self.answered < goal or len(self.lab.replaced) == nr_replaced:
            for index in range(self.lab.nr_queues):
                for _ in range(8):
                    if len(self._asked[index]) < DEPTH:
                        self._offer(index)
                self.lab.kick(index)
                if kill_at <= self.answered and not killed:
                    killed = True
                    self.lab.kill_now()
                self._collect(index)
            assert time.monotonic() < end, (self.lab.facts(), self.lab.lost, self.lab.replaced)

    def finish(self) -> None:
        """Have all of it answered."""
        end = time.monotonic() + 2 * DEADLINE
        while any(self._asked):
            for index in range(self.lab.nr_queues):
                self.lab.kick(index)
                self._collect(index)
            assert time.monotonic() < end, (self.lab.facts(), self.lab.lost)
        assert not any(queue.collect() for queue in self.lab.queues)

    def check(self, content: bytes) -> None:
        """See that this is what is on the disk, but for what was discarded."""
        assert len(content) == len(self.disk)
        for sector, known in enumerate(self.known):
            at = slice(512 * sector, 512 * sector + 512)
            assert not known or content[at] == self.disk[at], hex(512 * sector)

    def read_all(self) -> bytes:
        """Read the whole disk."""
        parts = []
        for sector in range(0, len(self.known), MOST // 512):
            answer = self.lab.ask(T_IN, sector, room=min(MOST, len(self.disk) - 512 * sector))
            assert answer.status == S_OK
            parts.append(answer.data)
        return b"".join(parts)

    def _offer(self, index: int) -> None:
        """Ask for something, unless there is no room or somebody has asked for the like."""
        rng = self.rng
        kind = rng.choice(KINDS)
        nr_sectors = rng.choice((1, 2, 8, 8, 8, 8, 16, 24, 128))
        if kind in (T_DISCARD, T_WRITE_ZEROES):
            nr_sectors *= 4
        unit = min(nr_sectors, 8)
        first = unit * rng.randrange((len(self.known) - nr_sectors) // unit + 1)
        span = slice(first, first + nr_sectors)
        if kind == T_FLUSH:
            span, nr_sectors = slice(0, 0), 0
        if any(self._busy[span]):
            return
        offset, length = 512 * first, 512 * nr_sectors
        content, room = bytes(self.disk[offset : offset + length]), [1]
        parts = [HEADER.pack(kind, 0, first if kind in (T_IN, T_OUT) else 0)]
        if kind == T_IN:
            room = [length, 1]
        elif kind == T_OUT:
            content = rng.randbytes(64) * (length // 64)
            parts.append(content)
        elif kind != T_FLUSH:
            parts.append(SEGMENT.pack(first, nr_sectors, rng.randrange(2) * (kind != T_DISCARD)))
            content = bytes(length)
        try:
            token = self.lab.queues[index].add(parts, room)
        except NoRoomError:
            return
        self._busy[span] = b"\1" * nr_sectors
        self._asked[index][token] = _Asked(kind, offset, content)

    def _collect(self, index: int) -> None:
        queue = self.lab.queues[index]
        for used in queue.collect():
            kind, offset, content = self._asked[index].pop(used.token)
            first, nr_sectors = offset // 512, len(content) // 512
            span = slice(first, first + nr_sectors)
            self._busy[span] = bytes(nr_sectors)
            self.answered += 1
            *data, status = queue.data(used.request)
            if self._readonly and kind not in (T_IN, T_FLUSH):
                assert status == S_IOERR
                continue
            assert status == S_OK, (kind, hex(offset), status)
            if kind == T_IN:
                assert used.written == len(content) + 1
                for sector in range(nr_sectors):
                    at = slice(512 * sector, 512 * sector + 512)
                    if self.known[first + sector]:
                        assert bytes(data[at]) == content[at], hex(offset + 512 * sector)
            elif kind != T_FLUSH:
                self.disk[offset : offset + len(content)] = content
                self.known[span] = bytes([kind != T_DISCARD]) * nr_sectors
