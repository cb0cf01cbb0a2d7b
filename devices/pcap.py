"""Captures of an interface's frames, as pcapng (draft-ietf-opsawg-pcapng) for any reader of it.

    frame ─► add(), which copies at most `snaplen` bytes ─► backlog, bounded ─► flush() ─► fd

Neither blocks: the descriptor is to be non-blocking, or a regular file. What finds the backlog
full, or comes after the file could not be written any more, is counted and not captured: the next
packet that is says how many were lost before it (epb_dropcount), and `close` writes the totals
(Interface Statistics). A block is never written in part and forgotten: a reader sees whole blocks,
however much the descriptor takes at a time.

Seen from the guest's interface: what the guest sends is outbound, what it gets is inbound. Times
are nanoseconds since 1970. A frame that leaves its checksum or its segmentation to the device is
captured as the guest gave it, up to 64 KiB and without a checksum.
"""

from __future__ import annotations

import os
import time
from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INBOUND, OUTBOUND = 1, 2  # to the guest, from the guest; the bits of epb_flags
SNAPLEN: Final = 65549  # bytes: the largest frame with offloads, and a VLAN tag
BACKLOG: Final = 1 << 20  # bytes that wait to be written
_WRITE: Final = 64  # blocks per write

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6  # block types
_MAGIC: Final = 0x1A2B3C4D  # its order tells ours
_ETHERNET: Final = 1  # LINKTYPE_ETHERNET
_UNKNOWN_LENGTH: Final = (1 << 64) - 1
_IF_NAME, _IF_TSRESOL, _APPLICATION = 2, 9, 4  # options, by the block they are in
_FLAGS, _DROPCOUNT = 2, 4
_RECEIVED, _DROPPED = 4, 5
_NANOSECONDS: Final = b"\x09"  # 10⁻⁹

_PACKET_HEAD: Final = Struct("<IIIIIII")  # type, length, interface, time high and low, lengths
_FLAGS_OPTION: Final = Struct("<HHI")


class Capture:
    """Writes frames of one interface to a descriptor, which stays the caller's."""

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        header: int = 12,
        snaplen: int = SNAPLEN,
        backlog: int = BACKLOG,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Begin a capture of interface `name`; its head waits for the first `flush`.

        `header` bytes before each frame, the virtio header, are not captured.
        """
        self._fd, self._header, self._snaplen = fd, header, snaplen
        self._limit, self._clock = backlog, clock
        self._waiting: deque[bytes | memoryview] = deque()
        self.backlog = 0  # bytes
        self.captured = self.lost = 0  # frames
        self._lost_before = 0  # of those, since the last one captured
        self.error = ""  # why nothing is written any more
        self._put(_section() + _interface(name, snaplen))

    def add(self, direction: int, views: Sequence[bytes | memoryview], length: int) -> None:
        """Capture a frame: the first `length` bytes of `views`, header included.

        `direction` is INBOUND or OUTBOUND.
        """
        skip, length = self._header, max(length - self._header, 0)
        taken = min(length, self._snaplen)
        pad = -taken % 4
        size = _PACKET_HEAD.size + taken + pad + 16
        if self._lost_before:
            size += 12
        if self.error or self.backlog + size > self._limit:
            self.lose(1)
            return
        now = self._clock()
        parts: list[bytes | memoryview] = [
            _PACKET_HEAD.pack(
                _PACKET, size, 0, now >> 32 & 0xFFFF_FFFF, now & 0xFFFF_FFFF, taken, length
            )
        ]
        left = taken
        for view in views:
            part = view[skip : skip + left]
            skip = max(skip - len(view), 0)
            left -= len(part)
            parts.append(part)
            if not left:
                break
        parts += (bytes(left + pad), _FLAGS_OPTION.pack(_FLAGS, 4, direction))
        if self._lost_before:
            parts.append(_option(_DROPCOUNT, self._lost_before.to_bytes(8, "little")))
            self._lost_before = 0
        parts += (bytes(4), size.to_bytes(4, "little"))  # end of options; the length again
        self._put(b"".join(parts))
        self.captured += 1

    def lose(self, count: int) -> None:
        """Take note that so many frames were not captured."""
        self.lost += count
        self._lost_before += count

    def flush(self) -> bool:
        """Write what the descriptor takes; True if nothing waits any more.

        An error ends the capture: `error` says which, and everything later counts as lost.
        """
        while self._waiting:
            some = [self._waiting[i] for i in range(min(len(self._waiting), _WRITE))]
            try:
                written = os.writev(self._fd, some)
            except BlockingIOError:
                return False
            except OSError as err:
                self.error = os.strerror(err.errno or 0)
                self._waiting.clear()
                self.backlog = 0
                return True
            if not written:
                return False
            self.backlog -= written
            while written:
                first = self._waiting.popleft()
                if written < len(first):
                    self._waiting.appendleft(memoryview(first)[written:])
                    break
                written -= len(first)
        return True

    def close(self) -> bool:
        """Put the totals behind the last frame; then as `flush`. Nothing may be added later."""
        now = self._clock()
        head = (
            bytes(4) + (now >> 32).to_bytes(4, "little") + (now & 0xFFFF_FFFF).to_bytes(4, "little")
        )
        if not self.error:
            self._put(
                _block(
                    _STATISTICS,
                    head,
                    (_RECEIVED, (self.captured + self.lost).to_bytes(8, "little")),
                    (_DROPPED, self.lost.to_bytes(8, "little")),
                )
            )
        return self.flush()

    def _put(self, block: bytes) -> None:
        self._waiting.append(block)
        self.backlog += len(block)


def _option(code: int, data: bytes) -> bytes:
    pair = code.to_bytes(2, "little") + len(data).to_bytes(2, "little")
    return pair + data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes, *options: tuple[int, bytes]) -> bytes:
    """Return a block: its length stands before and behind."""
    body += b"".join(_option(code, data) for code, data in options) + bytes(4)
    length = (12 + len(body)).to_bytes(4, "little")
    return kind.to_bytes(4, "little") + length + body + length


def _section() -> bytes:
    version = b"\x01\0\0\0"  # 1.0
    head = _MAGIC.to_bytes(4, "little") + version + _UNKNOWN_LENGTH.to_bytes(8, "little")
    return _block(_SECTION, head, (_APPLICATION, b"pyvmd"))


def _interface(name: str, snaplen: int) -> bytes:
    head = _ETHERNET.to_bytes(2, "little") + bytes(2) + snaplen.to_bytes(4, "little")
    return _block(_INTERFACE, head, (_IF_NAME, name.encode()), (_IF_TSRESOL, _NANOSECONDS))
