"""Copying between images, piece by piece: no byte more than needs to be read or written.

An image is looked at as runs, each DATA, ZERO or, in an overlay, BASE: whatever its base has
there. Data that turns out to be zeroes is not written but left out, or freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from config.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vmm.progress import Work

CHUNK: Final = 1 << 20  # bytes read at once; a signal waits for so many at most
DATA: Final = "data"
ZERO: Final = "zero"
BASE: Final = "base"

_LEAST_BLOCK: Final = 4096
_ZEROES: Final = bytes(CHUNK)


class Disk(Protocol):
    """What is copied from and to: a part of devices.raw.Disk, which tells more."""

    size: int
    granularity: int

    def read(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """Fill views."""

    def write(self, views: Sequence[memoryview], offset: int, length: int) -> int:
        """Write views."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeroes."""


class Run(NamedTuple):
    """A range of a disk that is all of one kind."""

    offset: int  # bytes
    length: int
    kind: str  # DATA, ZERO or BASE


def copy(
    source: Disk, target: Disk, runs: Iterable[Run], work: Work, *, fresh: bool = False
) -> None:
    """Copy runs of a disk to the same place on another, BASE runs like data.

    With `fresh` the target reads as zeroes so far. Raises HostError, KeyboardInterrupt,
    StoppedError; what was copied until then is there.
    """
    block = block_of(target)
    for run in runs:
        for at, length in chunks(run.offset, run.length, block):
            if run.kind == ZERO:
                if not fresh:
                    zero(target, at, length)
            else:
                data = read(source, at, length)
                for start, stop, empty in pieces(data, at, block):
                    if not empty:
                        write(target, at + start, memoryview(data)[start:stop])
                    elif not fresh:
                        zero(target, at + start, stop - start)
            work.add(length)


def together(size: int, *layers: Sequence[Run]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Cut `size` bytes wherever one of several disks changes its kind: offset, length, kinds.

    Each layer's runs are in order, without gaps from 0 on; behind its end a disk is ZERO.
    """
    at, nexts = 0, [0] * len(layers)
    while at < size:
        stop, kinds = size, []
        for index, runs in enumerate(layers):
            while nexts[index] < len(runs) and _end(runs[nexts[index]]) <= at:
                nexts[index] += 1
            here = runs[nexts[index]] if nexts[index] < len(runs) else None
            kinds.append(here.kind if here else ZERO)
            stop = min(stop, _end(here)) if here else stop
        yield at, stop - at, tuple(kinds)
        at = stop


def _end(run: Run) -> int:
    return run.offset + run.length


def block_of(disk: Disk) -> int:
    """Return in how large pieces it pays to leave zeroes out."""
    return min(max(disk.granularity, _LEAST_BLOCK), CHUNK)


def chunks(offset: int, length: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut a range where a multiple of `block` is, into at most CHUNK bytes."""
    end = offset + length
    while offset < end:
        stop = min(offset + CHUNK, end)
        if stop < end:
            stop -= stop % block
        yield offset, stop - offset
        offset = stop


def blocks(at: int, length: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut what belongs at offset `at` at every multiple of `block`: start and stop within it."""
    start = 0
    while start < length:
        stop = min(start + block - (at + start) % block, length)
        yield start, stop
        start = stop


def pieces(data: bytearray, at: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cut data that belongs at offset `at` into the longest ranges of blocks, all zeroes or not."""
    start, before = 0, None
    for here, stop in blocks(at, len(data), block):
        empty = data.startswith(_ZEROES[: stop - here], here)
        if before is not None and empty != before:
            yield start, here, before
            start = here
        before = empty
    if before is not None:
        yield start, len(data), before


def read(disk: Disk, offset: int, length: int) -> bytearray:
    """Return bytes of a disk, zeroes behind its end. Raises HostError."""
    data = bytearray(length)
    inside = min(max(disk.size - offset, 0), length)
    if inside:
        try:
            disk.read([memoryview(data)[:inside]], offset, inside)
        except OSError as err:
            raise HostError(f"cannot read at byte {offset}: {err.strerror}") from err
    return data


def write(disk: Disk, offset: int, data: memoryview) -> None:
    """Write all of `data`. Raises HostError."""
    try:
        done = disk.write([data], offset, len(data))
    except OSError as err:
        raise HostError(f"cannot write at byte {offset}: {err.strerror}") from err
    if done != len(data):
        raise HostError(f"cannot write at byte {offset}: it took {done} bytes of {len(data)}")


def zero(disk: Disk, offset: int, length: int) -> None:
    """Make a range read as zeroes, freeing its space. Raises HostError."""
    try:
        disk.write_zeroes(offset, length, unmap=True)
    except OSError as err:
        raise HostError(f"cannot write at byte {offset}: {err.strerror}") from err


def copy_differing(image: Disk, other: Disk | None, runs: Iterable[Run], work: Work) -> None:
    """Write into `image` what it reads as itself, wherever `other` reads differently.

    So that `other` can take the place of what is below the image. None reads as zeroes. Raises
    what copy() does.
    """
    block = block_of(image)
    for run in runs:
        for at, length in chunks(run.offset, run.length, block):
            ours = read(image, at, length)
            theirs = bytes(length) if other is None else bytes(read(other, at, length))
            if ours != theirs:
                for start, stop in blocks(at, length, block):
                    if not ours.startswith(theirs[start:stop], start):
                        write(image, at + start, memoryview(ours)[start:stop])
            work.add(length)
