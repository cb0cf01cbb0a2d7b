"""Every state in which a kill or a power cut can leave an image.

What a process does to a file is a list of effects: writes, truncations, holes, syncs. Killed at
any statement whatever, it leaves some first part of that list: so all first parts are all that a
kill can leave. After a power cut, any effect since the last sync may be missing, too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from devices import raw, window
from devices.qcow2 import Qcow2
from devices.qcow2check import check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from devices.raw import Disk


class Effect(NamedTuple):
    """One system call that changes the file, or syncs it."""

    kind: str  # "write", "stable" (a write that is on the medium), "truncate", "clear" or "sync"
    offset: int = 0  # of "truncate": the size
    data: bytes = b""
    length: int = 0


class Recorder:
    """Notes the effects on one descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.effects: list[Effect] = []
        pwritev, ftruncate, fdatasync = os.pwritev, os.ftruncate, os.fdatasync
        fallocate = raw._libc.fallocate

        def write(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            done = pwritev(fd, views, offset, flags)
            kind = "stable" if flags & os.RWF_DSYNC else "write"
            self.effects.append(Effect(kind, offset, b"".join(views)[:done]))
            return done

        def truncate(fd: int, size: int) -> None:
            ftruncate(fd, size)
            self.effects.append(Effect("truncate", size))

        def sync(fd: int) -> None:
            fdatasync(fd)
            self.effects.append(Effect("sync"))

        class Libc:
            @staticmethod
            def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
                result: int = fallocate(fd, mode, offset, length)
                if not result:
                    self.effects.append(Effect("clear", offset, length=length))
                return result

        # Copies into a map, of data in place, are in the page cache as soon as these are.
        monkeypatch.setattr(window, "suits", lambda _fd: False)
        monkeypatch.setattr(os, "pwritev", write)
        monkeypatch.setattr(os, "ftruncate", truncate)
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(raw, "_libc", Libc)


def apply(image: bytearray, effect: Effect) -> None:
    """Do to an image in memory what an effect did to the file."""
    if effect.kind in ("write", "stable"):
        end = effect.offset + len(effect.data)
        if end > len(image):
            image.extend(bytes(end - len(image)))
        image[effect.offset : end] = effect.data
    elif effect.kind == "truncate":
        del image[effect.offset :]
        image.extend(bytes(effect.offset - len(image)))
    elif effect.kind == "clear":
        end = min(effect.offset + effect.length, len(image))
        image[effect.offset : end] = bytes(max(end - effect.offset, 0))


def kills(before: bytes, effects: Sequence[Effect]) -> Iterator[tuple[int, bytes]]:
    """Yield every state a kill can leave, with how many effects there were."""
    image = bytearray(before)
    yield 0, before
    for count, effect in enumerate(effects, 1):
        apply(image, effect)
        yield count, bytes(image)


def cuts(before: bytes, effects: Sequence[Effect]) -> Iterator[tuple[int, int, bytes]]:
    """Yield states a power cut can leave: at each point, with each effect not yet synced missing.

    And with all of them missing. With how many effects there were, and how many before the last
    sync among them.
    """
    synced, start = bytearray(before), 0
    for count in range(len(effects) + 1):
        for lost in range(start, count - 1):  # without the last is what an earlier point yields
            image = bytearray(synced)
            for index in range(start, count):
                if index != lost:
                    apply(image, effects[index])
            yield count, start, bytes(image)
        if count < len(effects) and effects[count].kind == "sync":
            yield count, start, bytes(synced)
            for effect in effects[start:count]:
                apply(synced, effect)
            start = count + 1


def least(before: bytes, effects: Sequence[Effect]) -> bytes:
    """Return what is on the medium for sure when all effects are done."""
    image, unsure = bytearray(before), []
    for effect in effects:
        unsure.append(effect)
        if effect.kind == "stable":
            apply(image, effect)
        if effect.kind == "sync":
            for one in unsure:
                apply(image, one)
            unsure.clear()
    return bytes(image)


class Believer:
    """What a driver may find on the disk, sector by sector, as it goes along."""

    SECTOR = 512

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        #: Per operation that was reported: effects by then, what the disk read as.
        self.reported: list[tuple[int, bytes]] = [(0, content)]
        #: The same for flushes.
        self.flushed: list[tuple[int, bytes]] = [(0, content)]

    def note(self, count: int, *, flushed: bool) -> None:
        """An operation was reported, after `count` effects."""
        self.reported.append((count, bytes(self.now)))
        if flushed:
            self.flushed.append((count, bytes(self.now)))

    def judge_kill(self, count: int, content: bytes) -> None:
        """All that was reported is there; what was in progress is there or not, by sectors."""
        last = max(i for i, (done, _) in enumerate(self.reported) if done <= count)
        self._judge(content, self.reported[last : last + 2], f"killed after {count} effects")

    def judge_cut(self, count: int, start: int, content: bytes) -> None:
        """All that was flushed is there; of what came after, any part."""
        base = max(i for i, (done, _) in enumerate(self.flushed) if done <= start)
        first = self.flushed[base][0]
        stage = [content for done, content in self.reported if done >= first and done <= count]
        after = [content for done, content in self.reported if done > count][:1]
        states = [self.flushed[base], *((0, one) for one in (*stage, *after))]
        self._judge(content, states, f"cut after {count} effects, {start} of them synced")

    def _judge(self, content: bytes, states: Sequence[tuple[int, bytes]], when: str) -> None:
        least = min(len(state) for _, state in states)
        assert len(content) >= least
        if any(content[:least] == state[:least] for _, state in states):
            return
        for at in range(0, least, self.SECTOR):
            part = content[at : at + self.SECTOR]
            choice = {state[at : at + self.SECTOR] for _, state in states}
            assert part in choice, f"{when}: sector {at // self.SECTOR} reads {part[:16]!r}"


def read_image(image: bytes, base: Disk | None) -> bytes:
    """Check an image in memory, and return what its disk reads as."""
    fd = os.memfd_create("image")
    readonly = -1
    try:
        os.truncate(fd, len(image))
        for at in range(0, len(image), 4096):  # a sparse file is quicker to make and to check
            piece = image[at : at + 4096]
            if any(piece):
                os.pwrite(fd, piece, at)
        readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        report = check(readonly)
        assert report.dirty or not report.corruptions, report.texts
        disk = Qcow2(readonly, base)
        data = bytearray(disk.size)
        assert disk.read([memoryview(data)], 0, disk.size) == disk.size
        return bytes(data)
    finally:
        os.close(fd)
        if readonly >= 0:
            os.close(readonly)
