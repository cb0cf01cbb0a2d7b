"""Is a qcow2 image consistent? And if not, what of it can be mended.

Usage, all references counted ──┬─ less than the refcount: a leak, space that nobody gets
refcounts, as they are written ─┴─ more: corruption, since writers would reuse the cluster
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from config.errors import ConfigError
from devices import qcow2head
from devices.qcow2file import COPIED, OFFSET_MASK, ImageFile
from devices.qcow2map import COMPRESSED
from devices.qcow2rebuild import write_anew
from devices.qcow2refs import Refcounts
from devices.qcow2usage import CHUNK, MOST_TEXTS, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.qcow2usage import Progress


class Report(NamedTuple):
    """What a check has found. Clusters are counted, unless said otherwise."""

    corruptions: int  # contradictions that may cost data
    leaks: int  # clusters whose refcount is too high
    texts: tuple[str, ...]  # the first of either, in words
    allocated: int  # guest clusters that have data of their own
    compressed: int  # of these
    total: int  # guest clusters
    image_end: int  # bytes up to the end of the last cluster in use
    dirty: bool  # refcounts were not kept up to date: they are made anew when it is opened
    mended: int = 0  # corruptions and leaks that are gone now


def check(fd: int, progress: Progress | None = None) -> Report:
    """Check an image that nobody writes to. Raises ConfigError for no qcow2 image, OSError."""
    return _Check(fd, progress).report()


def mend(fd: int, *, leaks_only: bool, progress: Progress | None = None) -> Report:
    """Mend what can be, and check again; `mended` in the result says how much it was.

    Refcounts and "copied" flags can be mended; entries that point nowhere stay as they are.
    Raises ConfigError, OSError.
    """
    before = _Check(fd, progress)
    found = before.report()
    broken = before.wrong_refcounts or before.refs is None
    if broken and not leaks_only:
        before.make_refcounts()
    elif before.refs is not None:
        before.free_leaks(before.refs)
    before.file.sync()
    if not leaks_only:
        _Check(fd, progress).mend_flags()  # it sees the refcounts that are there now
    after = check(fd, progress)
    if not leaks_only and not after.corruptions:
        _unmark(before.file)
        after = after._replace(dirty=False)
    gone = found.corruptions + found.leaks - after.corruptions - after.leaks
    return after._replace(mended=max(gone, 0))


def _unmark(file: ImageFile) -> None:
    """Take the marks for dirty and corrupt off."""
    known = file.header.incompatible & ~qcow2head.INCOMPATIBLE_KNOWN
    if known != file.header.incompatible:
        file.sync()
        file.change_header(qcow2head.AT_INCOMPATIBLE, known.to_bytes(8, "big"), incompatible=known)


class _Check:
    """One check: counts, refcounts, and their differences."""

    def __init__(self, fd: int, progress: Progress | None) -> None:
        self.file = file = ImageFile(fd)
        file.readonly = file.raw.readonly  # a corrupt image is what mending is for
        self.usage = usage = Usage(file, progress)
        self.refs: Refcounts | None = None
        try:
            self.refs = Refcounts(file)
        except ConfigError as err:
            usage.complain(err.what)
        self.leaked: dict[int, int] = {}  # cluster → what its refcount should be
        self.wrong_refcounts = self.wrong_flags = 0
        self._last = max(usage.used(), default=0)
        if self.refs is not None:
            self._count_refcounts(self.refs)
            self._compare(self.refs)
            for at, entry in self._wrong_flags(self.refs):
                self.wrong_flags += 1
                flag = "set" if entry & COPIED else "clear"
                self._say(f"entry at {at:#x} is {entry:#x}: its copied flag is {flag}")

    @property
    def corruptions(self) -> int:
        """How many contradictions there are."""
        return self.usage.problems + self.wrong_refcounts + self.wrong_flags

    def report(self) -> Report:
        """Return what was found."""
        usage, header = self.usage, self.file.header
        return Report(
            corruptions=self.corruptions,
            leaks=len(self.leaked),
            texts=tuple(usage.texts),
            allocated=usage.allocated,
            compressed=usage.compressed,
            total=-(-header.size >> header.cluster_bits),
            image_end=(self._last + 1) << header.cluster_bits,
            dirty=header.dirty,
        )

    def _say(self, text: str) -> None:
        if len(self.usage.texts) < MOST_TEXTS:
            self.usage.texts.append(text)

    def _count_refcounts(self, refs: Refcounts) -> None:
        """Count what refcounts occupy themselves; write_anew() counts without."""
        header, usage = self.file.header, self.usage
        length = header.refcount_clusters << self.file.bits
        self.own = [(header.refcount_offset, length)]
        self.own += [(offset, self.file.cluster_size) for offset in refs.table if offset]
        for offset, length in self.own:
            usage.add(offset >> self.file.bits, length >> self.file.bits)

    def _compare(self, refs: Refcounts) -> None:
        """Compare refcounts with references, block by block."""
        per_block, usage = refs.per_block, self.usage
        numbers = {number for number, offset in enumerate(refs.table) if offset}
        for chunk in usage.chunks:
            end = (chunk + 1) * CHUNK
            numbers.update(range(chunk * CHUNK // per_block, -(-end // per_block)))
        for number in sorted(numbers):
            block, first = refs.block(number), number * per_block
            wanted = usage.slice(first, per_block)
            values = block.values() if block is not None else array("B", bytes(per_block))
            if last := max((i for i, value in enumerate(values) if value), default=0):
                self._last = max(self._last, first + last)
            if values == wanted:
                continue
            for index, (value, count) in enumerate(zip(values, wanted, strict=True)):
                if value < count:
                    self.wrong_refcounts += 1
                elif value > count:
                    self.leaked[first + index] = count
                else:
                    continue
                kind = "leaked" if value > count else "in danger"
                self._say(
                    f"cluster {first + index:#x} is {kind}: refcount {value}, {count} references"
                )

    def _wrong_flags(self, refs: Refcounts) -> Iterator[tuple[int, int]]:
        """Yield where the disk's own tables have a wrong copied flag, and the entry there."""
        file, header = self.file, self.file.header
        if 8 * header.l1_entries + header.l1_offset > file.end:
            return
        for number, entry in enumerate(file.words(header.l1_offset, header.l1_entries)):
            table = entry & OFFSET_MASK
            if not file.holds(table):
                continue
            if bool(entry & COPIED) != (refs.get(table >> file.bits) == 1):
                yield header.l1_offset + 8 * number, entry
            block_at, values = -1, array("B")  # the block of counters looked at last
            for index, found in enumerate(file.words(table, file.cluster_size >> 3)):
                host = found & OFFSET_MASK
                if not found or found & COMPRESSED or not file.holds(host):
                    continue
                at, place = divmod(host >> file.bits, refs.per_block)
                if at != block_at:
                    block_at, block = at, refs.block(at)
                    values = block.values() if block is not None else array("B")
                if bool(found & COPIED) != (place < len(values) and values[place] == 1):
                    yield table + 8 * index, found

    # Mending.

    def free_leaks(self, refs: Refcounts) -> None:
        """Lower the refcounts that are too high."""
        for cluster, count in sorted(self.leaked.items()):
            refs.set(cluster, 1, count)

    def make_refcounts(self) -> None:
        """Write refcounts anew; what the old ones occupy becomes free."""
        if self.refs is not None:
            for offset, length in self.own:
                for i in range(length >> self.file.bits):
                    self.usage.forget((offset >> self.file.bits) + i)
        write_anew(self.file, self.usage)

    def mend_flags(self) -> None:
        """Make copied flags say what refcounts do."""
        if self.refs is not None:
            for at, entry in list(self._wrong_flags(self.refs)):
                self.file.put(at, (entry ^ COPIED).to_bytes(8, "big"))
            self.file.sync()
