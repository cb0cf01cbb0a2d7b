"""The log of a VM: `time level vm/device: sentence`, one write per line.

Logging never raises and never blocks on a full disk: what could not be written is counted, and
told once when writing works again. A file that reaches its limit becomes FILE.1 and starts
again. What a guest can cause goes through `limited`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices.lines import printable, stamp
from vmm import safefile

if TYPE_CHECKING:
    from collections.abc import Callable

LOG_LIMIT: Final = 1 << 20  # bytes in one file; two files at most
TEXT_LIMIT: Final = 2048  # characters of one message


class Appender:
    """A bounded file that only grows at its end. Not thread-safe: its owner locks.

    `note(lost, why)` gives the bytes that tell of a gap of `lost` bytes. Raises HostError when
    the file cannot be opened, and nothing later.
    """

    def __init__(self, path: str, limit: int, note: Callable[[int, str], bytes]) -> None:
        self.path, self.lost = path, 0
        self._limit, self._note, self._why, self._torn = limit, note, "", False
        try:
            self._fd = self._open()
        except OSError as err:
            raise HostError(f"cannot open {path}: {err.strerror}") from err
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append `data`, whole if the disk has room."""
        if self._size and self._size + len(data) > self._limit:
            self._rotate()
        if self.lost and not self._told():
            self.lost += len(data)
            return
        self.lost += self._append(data)

    def close(self) -> None:
        """Free the descriptor; more writes are lost."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _told(self) -> bool:
        """Try to put the note about the gap in place."""
        note = self._note(self.lost, self._why)
        if self._append(b"\n" + note if self._torn else note):
            return False
        self.lost = 0
        return True

    def _append(self, data: bytes) -> int:
        """Write once; return how many bytes did not fit."""
        try:
            done = os.write(self._fd, data)
        except OSError as err:
            done, self._why = 0, err.strerror or str(err)
        self._size += done
        if done:
            self._torn = done < len(data)
        return len(data) - done

    def _open(self) -> int:
        # A VM process's umask lets no group read it, unless one owns the VM.
        return safefile.open_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode=0o640)

    def _rotate(self) -> None:
        try:
            os.replace(self.path, f"{self.path}.1")
            fd = self._open()
        except OSError:
            # The bound matters more than the history.
            fd = -1
            try:
                os.ftruncate(self._fd, 0)
            except OSError:
                return
        if fd >= 0:
            os.close(self._fd)
            self._fd = fd
        self._size = 0


class _State:
    """Where lines go. One per process."""

    lock = threading.Lock()
    vm = ""
    verbose = False
    stderr = True  # until setup() says otherwise, so that early words are not lost
    file: Appender | None = None


def setup(path: str = "", *, vm: str = "", stderr: bool = False, verbose: bool = False) -> None:
    """Send the lines of this process to `path` and/or standard error. Raises HostError."""
    file = Appender(path, LOG_LIMIT, _gap) if path else None
    with _State.lock:
        if _State.file is not None:
            _State.file.close()
        _State.file, _State.vm, _State.stderr, _State.verbose = file, vm, stderr, verbose


def debug(text: str, who: str = "") -> None:
    """Log what only helps to find a fault; dropped unless verbose."""
    if _State.verbose:
        _emit("debug", text, who)


def info(text: str, who: str = "") -> None:
    """Log a step in the VM's life; `who` names the device or part."""
    _emit("info", text, who)


def warning(text: str, who: str = "") -> None:
    """Log the guest's fault. Guests can cause many: prefer limited()."""
    _emit("warning", text, who)


def error(text: str, who: str = "") -> None:
    """Log a fault of ours or of the host."""
    _emit("error", text, who)


def _line(level: str, text: str, who: str) -> bytes:
    where = "/".join(part for part in (_State.vm, who) if part) or "pyvmd"
    if len(text) > TEXT_LIMIT:
        text = f"{text[:TEXT_LIMIT]}... ({len(text)} characters)"
    return f"{stamp()} {level} {printable(where)}: {printable(text)}\n".encode()


def _gap(lost: int, why: str) -> bytes:
    return _line("error", f"{lost} bytes of this log were lost: {why}", "log")


def _emit(level: str, text: str, who: str) -> None:
    line = _line(level, text, who)
    with _State.lock:
        if _State.file is not None:
            _State.file.write(line)
        if _State.stderr:
            with contextlib.suppress(OSError):  # nobody is left to be told
                os.write(2, line)


class _Bucket:
    """Holds up to `size` tokens, gains one per `seconds`, and counts those who came in vain."""

    def __init__(self, size: int, seconds: float, now: float) -> None:
        self._size, self._seconds, self._stamp, self._tokens = size, seconds, now, float(size)
        self.dropped = 0

    def ready(self, now: float) -> bool:
        """Return whether take() may be called."""
        gained = (now - self._stamp) / self._seconds
        self._tokens, self._stamp = min(self._size, self._tokens + gained), now
        return self._tokens >= 1

    def take(self) -> int:
        """Use a token; return how many came in vain since the last one."""
        self._tokens -= 1
        dropped, self.dropped = self.dropped, 0
        return dropped


class Limited:
    """Warnings a guest can cause at will: per key `burst` at once, then one per `seconds`.

    At most `keys` keys are remembered, and all together get `keys` times one key's share, so that
    a guest cannot get round the limit by walking through keys. Thread-safe.
    """

    def __init__(
        self,
        burst: int = 5,
        seconds: float = 10.0,
        keys: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst, self._seconds, self._keys, self._clock = burst, seconds, keys, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        self._all = _Bucket(burst * keys, seconds / keys, clock())

    def warning(
        self, key: str, text: str, who: str = "", level: Callable[[str, str], None] | None = None
    ) -> bool:
        """Log `text` unless `key` has had its share; return whether it was logged.

        As a warning, unless `level` is another of this file's.
        """
        similar = others = 0
        with self._lock:
            now = self._clock()
            mine = self._buckets.pop(key, None)
            if mine is None:
                mine = _Bucket(self._burst, self._seconds, now)
            self._buckets[key] = mine  # the dict's order is the order of use
            logged = mine.ready(now) and self._all.ready(now)
            if logged:
                similar, others = mine.take(), self._all.take()
            else:
                mine.dropped += 1
            if len(self._buckets) > self._keys:
                self._all.dropped += self._buckets.pop(next(iter(self._buckets))).dropped
        if similar:
            warning(f"{similar} similar suppressed", who)
        if others:
            warning(f"{others} other warnings suppressed")
        if logged:
            (level or warning)(text, who)
        return logged


_limited = Limited()


def limited(
    key: str, text: str, who: str = "", level: Callable[[str, str], None] | None = None
) -> bool:
    """Log what a guest or client can cause at will, at the default rate for `key`."""
    return _limited.warning(key, text, who, level)
