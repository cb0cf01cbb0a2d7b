"""Bytes that are spread over views, in whatever pieces a driver chose (virtio 1.2 §2.7.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def gather(views: Sequence[memoryview], count: int) -> bytes:
    """Return a copy of the first `count` bytes, each read once; fewer if there are fewer."""
    if views and len(views[0]) >= count:
        return bytes(views[0][:count])
    return b"".join(bytes(view) for view in first(views, count))


def first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return views of the first `count` bytes."""
    found: list[memoryview] = []
    for view in views:
        if count <= 0:
            break
        found.append(view if len(view) <= count else view[:count])
        count -= len(view)
    return found


def after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return views of all but the first `count` bytes."""
    found: list[memoryview] = []
    for view in views:
        if count < len(view):
            found.append(view[count:] if count else view)
        count = max(count - len(view), 0)
    return found


def fill(views: Sequence[memoryview], data: bytes) -> int:
    """Store `data` in the views as far as they go; return how many bytes that is."""
    done = 0
    for view in views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
    return done
