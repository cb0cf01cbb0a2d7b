"""Verified requests to a disk: single sectors, many at a time, each with what it must hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from devices.blkreq import HEADER, S_OK, T_IN, T_OUT
from tests.rng import seeded

if TYPE_CHECKING:
    from tools.viodriver import PackedDriver, SplitDriver

SIZE: Final = 4 << 20
SECTOR: Final = 512
DEPTH: Final = 48


class Sectors:
    """A disk of SIZE bytes, zeroes at first, with one driver."""

    def __init__(self, queue: SplitDriver | PackedDriver, requests: int, seed: int = 11) -> None:
        """Prepare to make so many requests, half of them writes."""
        self.done = 0
        self._queue, self._left, self._rng = queue, requests, seeded(seed)
        self._model: dict[int, bytes] = {}
        self._busy: dict[int, tuple[int, bytes | None]] = {}  # token → sector, data of a write

    @property
    def over(self) -> bool:
        """Whether all have come back."""
        return not self._left and not self._busy

    def ask(self) -> None:
        """Make requests until DEPTH are on their way, none of them for the same sector."""
        queue, rng = self._queue, self._rng
        taken = {sector for sector, _ in self._busy.values()}
        while self._left and len(self._busy) < DEPTH:
            sector = rng.randrange(SIZE // SECTOR)
            if sector in taken:
                continue
            taken.add(sector)
            if rng.random() < 0.5:
                data = rng.randbytes(SECTOR)
                token = queue.add([HEADER.pack(T_OUT, 0, sector), data], [1])
                self._busy[token] = sector, data
            else:
                token = queue.add([HEADER.pack(T_IN, 0, sector)], [SECTOR, 1])
                self._busy[token] = sector, None
            self._left -= 1

    def take(self) -> None:
        """Look at what has come back: each once, and with the data that was written last."""
        for used in self._queue.collect():
            sector, written = self._busy.pop(used.token)
            answer = self._queue.data(used.request)
            assert answer[-1] == S_OK
            if written is not None:
                self._model[sector] = written
            else:
                assert answer[:-1] == self._model.get(sector, bytes(SECTOR)), sector
            self.done += 1

    def compare(self, image: Path) -> None:
        """See whether a raw image holds what it must, after a flush."""
        content = image.read_bytes()
        for sector, data in self._model.items():
            assert content[sector * SECTOR :][:SECTOR] == data
