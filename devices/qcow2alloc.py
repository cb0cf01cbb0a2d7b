"""Host clusters of a qcow2 image: taken for new data and tables, given back when not needed.

**Taking.** Clusters are reserved many at a time: their refcounts are written and on the medium
before the first is handed out. So whatever points to a cluster can be written at once, in any
order, and no refcount is ever too low. Reserved clusters read as zeroes. A process that is killed
leaves what it had reserved as leaks, up to MOST_RESERVED bytes of holes.

**Giving back.** What pointed to a cluster is gone from the medium only after the next sync, so
that long the cluster keeps its refcount.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from devices.qcow2file import ImageFile
    from devices.qcow2refs import Refcounts

LEAST_RESERVED: Final = 8  # clusters, the first time; twice as many each time
MOST_RESERVED: Final = 32 << 20  # bytes
MOST_CLUSTERS: Final = 2048  # reserved at a time
MOST_DOOMED: Final = 1 << 16  # clusters that wait for a sync


class Allocator:
    """Takes from what it has reserved, and gives back after a sync."""

    def __init__(self, file: ImageFile, refs: Refcounts) -> None:
        self._file, self._refs = file, refs
        self._next = self._stop = 0  # reserved clusters, by number
        self.reused = False  # whether what is reserved was something else before
        self._reserve_next = LEAST_RESERVED
        self._hint = 0  # no cluster below is free
        self._doomed: list[int] = []  # clusters to count down after the next sync, by number
        file.on_sync = self._synced

    @property
    def settled(self) -> bool:
        """Whether nothing waits for a sync."""
        return not self._doomed

    def take(self, most: int) -> tuple[int, int]:
        """Return the offset of new clusters, and how many: 1 to `most`, in a row. Raises OSError.

        They are counted once, and read as zeroes.
        """
        if self._next == self._stop:
            self._reserve()
        count = min(most, self._stop - self._next)
        first, self._next = self._next, self._next + count
        return first << self._file.bits, count

    def take_row(self, count: int) -> int:
        """Return the offset of exactly `count` clusters in a row. Raises OSError."""
        if count == 1:
            return self.take(1)[0]
        return self._refs.grow(count) << self._file.bits

    def untake(self, offset: int, count: int) -> None:
        """Give back what was taken, and nothing ever pointed to."""
        self._free(offset >> self._file.bits, count)

    def drop(self, offset: int, count: int = 1) -> None:
        """After the next sync, count one reference less to each of `count` clusters."""
        first = offset >> self._file.bits
        self._doomed.extend(range(first, first + count))
        if len(self._doomed) > MOST_DOOMED:
            self._file.sync()

    def close(self) -> None:
        """Give back what is reserved. Raises OSError."""
        first, count = self._next, self._stop - self._next
        self._next = self._stop = 0
        if not count:
            return
        self._free(first, count)
        file = self._file
        if (first + count) << file.bits == file.end == file.raw.find_size():
            os.ftruncate(file.raw.fd, first << file.bits)
            file.look_again()

    def _reserve(self) -> None:
        """Reserve more, or if there is no room for that one cluster. Raises OSError."""
        file, refs = self._file, self._refs
        file.may_write()
        wanted = self._reserve_next
        self._reserve_next = min(2 * wanted, MOST_RESERVED >> file.bits, MOST_CLUSTERS)
        first, count = refs.find_free(self._hint, wanted)
        if not count:
            refs.grow(0)
            first, count = refs.find_free(self._hint, wanted)
        if owner := file.guard.hit(first << file.bits) or (not first and "the header"):
            raise file.corrupt(f"cluster {first:#x} has refcount 0, and {owner} is there")
        count = next((i for i in range(count) if file.guard.hit((first + i) << file.bits)), count)
        self.reused = first << file.bits < file.end
        try:
            file.clear(first << file.bits, count << file.bits)
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or count == 1:
                raise
            count, self._reserve_next = 1, LEAST_RESERVED
            file.clear(first << file.bits, count << file.bits)
        refs.set(first, count, 1)
        self._hint = first + count
        file.sync()
        self._next, self._stop = first, first + count

    def _synced(self) -> None:
        """Free what was waiting: nothing on the medium points to it any more."""
        doomed, self._doomed = sorted(self._doomed), []
        for first, count in _rows(doomed):
            if count > 1 and all(self._refs.get(first + i) == 1 for i in range(count)):
                self._free(first, count)
                continue
            for cluster in range(first, first + count):
                try:
                    if self._refs.drop(cluster):
                        self._freed(cluster, 1)
                except OSError:
                    pass  # a leak, or marked corrupt: nothing of the guest's is lost

    def _free(self, first: int, count: int) -> None:
        """Clusters with refcount 1 become free; if that cannot be written they are leaked."""
        try:
            self._refs.set(first, count, 0)
            self._freed(first, count)
        except OSError:
            pass

    def _freed(self, first: int, count: int) -> None:
        """Let the host have the space."""
        self._hint = min(self._hint, first)
        self._file.raw.discard(first << self._file.bits, count << self._file.bits)


def _rows(clusters: list[int]) -> list[tuple[int, int]]:
    """Return the rows, first and length, that sorted numbers form; a repeated one begins a row."""
    rows: list[tuple[int, int]] = []
    for cluster in clusters:
        if rows and sum(rows[-1]) == cluster:
            rows[-1] = rows[-1][0], rows[-1][1] + 1
        else:
            rows.append((cluster, 1))
    return rows
