"""Block device against a model: whatever is asked, in whatever shape, is what a bytearray says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.blkreq import (
    BLK_F_FLUSH,
    HEADER,
    S_IOERR,
    S_OK,
    SEGMENT,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.blklab import Answer, BlkLab
from tests.rng import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator

NR_SECTORS = 64


class Ask(NamedTuple):
    """One request, and how it is cut into descriptors."""

    kind: int
    sector: int
    nr_sectors: int
    seed: int


asks = st.builds(
    Ask,
    st.sampled_from([T_IN, T_IN, T_OUT, T_OUT, T_FLUSH, T_WRITE_ZEROES]),
    st.integers(0, NR_SECTORS),
    st.integers(0, 9),
    st.integers(0, 1 << 30),
)


@st.composite
def batches(draw: st.DrawFn) -> list[list[Ask]]:
    """Requests in the order a driver makes them; some go on where the last one ended."""
    found = []
    for batch in draw(st.lists(st.lists(asks, max_size=12), min_size=1, max_size=4)):
        for i in range(1, len(batch)):
            if draw(st.booleans()):
                before = batch[i - 1]
                batch[i] = batch[i]._replace(
                    kind=before.kind, sector=before.sector + before.nr_sectors
                )
        found.append(batch)
    return found


def cut(data: bytes, seed: int) -> list[bytes]:
    """Cut bytes into descriptors at random."""
    dice, pieces = seeded(seed), []
    while data:
        length = dice.choice((1, 7, 16, 100, 512, 513, 5000))
        pieces.append(data[:length])
        data = data[length:]
    return pieces


class Model:
    """What the disk holds, and what a request must bring."""

    def __init__(self, content: bytes) -> None:
        self.data = bytearray(content)

    def offer(self, blk: BlkLab, ask: Ask) -> Answer:
        """Offer a request to the device and return the answer that is right."""
        start, length = 512 * ask.sector, 512 * ask.nr_sectors
        fits = start + length <= len(self.data)
        status = S_OK if fits else S_IOERR
        header = HEADER.pack(ask.kind, 0, ask.sector)
        if ask.kind == T_IN:
            blk.offer(cut(header, ask.seed), [*map(len, cut(bytes(length + 1), ask.seed))])
            if fits:
                return Answer(S_OK, length + 1, bytes(self.data[start : start + length]))
            return Answer(S_IOERR, 0 if length else 1, b"\xee" * length)
        if ask.kind == T_OUT:
            data = seeded(ask.seed).randbytes(length)
            if fits:
                self.data[start : start + length] = data
            blk.offer(cut(header + data, ask.seed), [1])
        elif ask.kind == T_WRITE_ZEROES:
            if fits:
                self.data[start : start + length] = bytes(length)
            ranges = SEGMENT.pack(ask.sector, ask.nr_sectors, ask.seed & 1)
            blk.offer(cut(header + ranges, ask.seed), [1])
        else:
            blk.offer(cut(header, ask.seed), [1])
            status = S_OK
        return Answer(status, 1, b"")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.mark.parametrize("features", [0, F_EVENT_IDX | F_INDIRECT_DESC, F_RING_PACKED])
@settings(max_examples=60, deadline=None)
@given(batches=batches())
def test_the_disk_is_what_the_model_says(
    directory: Path, features: int, batches: list[list[Ask]]
) -> None:
    """Every answer of every batch, and the image at the end."""
    content = os.urandom(512 * NR_SECTORS)
    model = Model(content)
    packed = bool(features & F_RING_PACKED)
    with BlkLab(directory, len(content), content=content, packed=packed) as blk:
        blk.start(BLK_F_FLUSH | features, size=1024)
        for batch in batches:
            expected = [model.offer(blk, ask) for ask in batch]
            assert blk.answers() == expected
        assert blk.said == []
        assert blk.image.read_bytes() == model.data


@settings(max_examples=60, deadline=None)
@given(batches=batches())
def test_requests_that_overlap_in_time(directory: Path, batches: list[list[Ask]]) -> None:
    """With cache: none, one batch at a time; requests of one batch touch different sectors."""
    content = os.urandom(512 * NR_SECTORS)
    model = Model(content)
    with BlkLab(directory, len(content), content=content, cache="none") as blk:
        blk.start(BLK_F_FLUSH, size=1024)
        for batch in batches:
            taken: set[int] = set()
            expected: dict[int, Answer] = {}
            for token, ask in enumerate(batch, blk.queues[0]._next_token + 1):
                sectors = set(range(ask.sector, ask.sector + ask.nr_sectors))
                if ask.kind == T_FLUSH or not sectors & taken:
                    taken |= sectors
                    expected[token] = model.offer(blk, ask)
                else:
                    expected[token] = model.offer(blk, ask._replace(kind=T_FLUSH))
            answers = {used.token: blk._answer(0, used) for used in blk.collect()}
            assert answers == expected
        assert blk.said == []
        assert blk.image.read_bytes() == model.data
