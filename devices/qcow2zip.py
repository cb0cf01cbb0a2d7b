"""Compressed clusters of a qcow2 image: read, and never written.

Whatever an image holds, one cluster comes out or an error: the output is bounded beforehand.
"""

from __future__ import annotations

import errno
import zlib
from typing import TYPE_CHECKING, Final

from devices.qcow2map import packed_span

if TYPE_CHECKING:
    from devices.qcow2file import ImageFile

_WINDOW: Final = -15  # deflate without a header, whatever window it was made with


class Unpacker:
    """Unpacks clusters, and keeps the last: small reads in a row ask for the same one."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self._last = 0, b""  # entry, data

    def unpack(self, entry: int) -> bytes:
        """Return the cluster that an L2 entry stands for. Raises OSError."""
        if self._last[0] == entry:
            return self._last[1]
        file = self._file
        offset, length = packed_span(entry, file.bits)
        if offset >= file.end:
            raise file.corrupt(f"compressed cluster at {offset:#x}: the file ends at {file.end:#x}")
        packed = file.get(offset, min(length, file.end - offset))
        try:
            data = zlib.decompressobj(_WINDOW).decompress(packed, file.cluster_size)
        except zlib.error as err:
            raise OSError(errno.EIO, f"compressed cluster at {offset:#x}: {err}") from err
        if len(data) != file.cluster_size:
            what = f"{len(data)} bytes came out, not a cluster"
            raise OSError(errno.EIO, f"compressed cluster at {offset:#x}: {what}")
        self._last = entry, data
        return data
