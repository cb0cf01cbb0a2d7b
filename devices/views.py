"""Lists of memoryviews, as preadv(2) and pwritev(2) take them: cut, copied, zeroed."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

# Never written, so that all of it is the kernel's one page of zeroes; page aligned.
ZEROES: Final = memoryview(
    mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
)


def skip(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first `count` bytes; the caller's stay as they are."""
    left: list[memoryview] = []
    for view in views:
        if count < len(view):
            left.append(view[count:])
        count = max(count - len(view), 0)
    return left


def cut(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """Return views of `length` bytes from byte `start` on."""
    found: list[memoryview] = []
    for view in views:
        if start < len(view):
            found.append(view[start : start + length])
            length -= len(found[-1])
            if not length:
                break
        start = max(start - len(view), 0)
    return found


def copy(piece: memoryview | bytes, views: Sequence[memoryview]) -> None:
    """Copy a piece into the views, as far as it goes."""
    at = 0
    for view in views:
        part = piece[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)


def gather(piece: memoryview, views: Sequence[memoryview]) -> None:
    """Fill a piece from the views."""
    at = 0
    for view in views:
        part = piece[at : at + len(view)]
        part[:] = view[: len(part)]
        at += len(part)


def zero(views: Sequence[memoryview]) -> None:
    """Fill the views with zeroes."""
    for view in views:
        for at in range(0, len(view), len(ZEROES)):
            part = view[at : at + len(ZEROES)]
            part[:] = ZEROES[: len(part)]


def zeroes(length: int) -> list[memoryview]:
    """Return views of `length` zeroes."""
    count, rest = divmod(length, len(ZEROES))
    return [ZEROES] * count + ([ZEROES[:rest]] if rest else [])
