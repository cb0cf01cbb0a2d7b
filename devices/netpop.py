"""The shortest ways from a split ring to frames and to buffers for frames.

A frame to send is header and data, readable: one descriptor, a chain, or an indirect table. A
buffer to fill is writable, nearly always one descriptor. `pop_frames` and `pop_buffers` do what
`queue.pop` does, without a chain object and a call for each; every doubt ends in leaving the
chain where it is, for `queue.pop` to judge. This file knows the insides of `SplitQueue`, and
test_net_pop.py runs both ways side by side.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, walk
from devices.virtqueue import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.virtqueue import Chain, VirtQueue

# head, bytes without header, [private header, views of the rest]
Frame = tuple[int, int, list[bytes | memoryview]]

IOV_MAX: Final = 1024  # of one writev(2), the header's among them
PIECES_MAX: Final = IOV_MAX - 1  # of a frame to send: its head may have to be copied, into one more
SEEN_MAX: Final = 1024  # descriptors whose views are kept, beside those of one batch

_desc: Final = DESC.unpack_from
_UNSEEN: Final = memoryview(b"")  # no buffer is empty
_row: Final = Struct("<QIH")  # a descriptor without where it goes on, which these do not
_raw: Final = Struct(f"{_row.size}s").unpack_from
_rows: Final = DESC.iter_unpack
_NO_ROWS: Final = _rows(b"")
_HEADERS: Final = {length: Struct(f"{length}s").unpack_from for length in (10, 12)}


class Buffers:
    """Buffers of the driver that nothing is in yet, oldest first: four lists in step.

    `heads` and `sizes` have an entry per chain, and so has `spans`: how many of `views` it has.
    `seen` has the views of usual descriptors, by address, length and flags as they stand there: a
    driver posts the same again and again, what was found good once is so while the memory is
    mapped, and a look-up is cheaper than checks and a new view.
    """

    __slots__ = ("heads", "seen", "sizes", "spans", "views")

    def __init__(self) -> None:
        self.seen: dict[tuple[bytes], memoryview] = {}
        self.heads: list[int] = []
        self.sizes: list[int] = []
        self.spans: list[int] = []
        self.views: list[memoryview] = []

    def add(self, chain: Chain) -> None:
        """Take a chain that was popped. Raises GuestError if nothing can be received there."""
        if chain.readable:
            raise GuestError("receive buffer with a readable descriptor")
        self.heads.append(chain.head)
        self.sizes.append(chain.writable_bytes)
        self.spans.append(len(chain.writable))
        self.views += chain.writable

    def drop(self, chains: int, views: int) -> None:
        """Forget the oldest, that many chains and views."""
        del self.heads[:chains], self.sizes[:chains], self.spans[:chains], self.views[:views]

    def clear(self) -> None:
        """Forget all."""
        self.drop(len(self.heads), len(self.views))
        self.seen.clear()


def pop_frames(queue: VirtQueue, limit: int, header_bytes: int) -> list[Frame]:
    """Take up to `limit` frames to send. Raises GuestError if the first is broken."""
    frames = _usual_frames(queue, limit, header_bytes) if type(queue) is SplitQueue else []
    if frames:
        return frames
    chains = queue.pop_batch(limit)
    try:
        for chain in chains:
            frames.append(frame_of(chain, header_bytes))
    except GuestError:
        if not frames:
            raise
        queue.rewind(len(chains) - len(frames))  # those before it are to be sent first
    return frames


def frame_of(chain: Chain, header_bytes: int) -> Frame:
    """Return the frame in a chain, its header gathered from as many views as it takes (§2.7.4.1).

    One without a whole header has -1 bytes. Raises GuestError if the device could write there.
    """
    if chain.writable:
        raise GuestError("frame to send with a writable descriptor")
    if chain.readable_bytes < header_bytes:
        return chain.head, -1, []
    header, views = b"", chain.readable
    iov: list[bytes | memoryview] = [header]
    for view in views:
        lack = header_bytes - len(header)
        if lack:
            header += bytes(view[:lack])
            view = view[lack:]  # noqa: PLW2901  what is left of it
        if view:
            iov.append(view)
    iov[0] = header
    if len(iov) > PIECES_MAX:
        iov[PIECES_MAX - 1 :] = [b"".join(iov[PIECES_MAX - 1 :])]
    return chain.head, chain.readable_bytes - header_bytes, iov


def _usual_frames(queue: SplitQueue, limit: int, header_bytes: int) -> list[Frame]:
    """Take frames whose header is in their first view; [] is no sign that there are none."""
    frames: list[Frame] = []
    cursor, size, mask, memory = queue._next_avail, queue.size, queue._mask, queue._memory
    avail, table, in_flight, area = queue._avail, queue._table, queue._in_flight, queue._area
    pending = (avail[1] - cursor) & 0xFFFF
    if pending > size:
        return frames
    header_of, indirect = _HEADERS[header_bytes], queue._indirect
    start, end, _, rom = memory.hot
    for _ in range(pending if pending < limit else limit):
        head = avail[2 + (cursor & mask)]
        if head >= size or head in in_flight:
            break
        addr, length, flags, index = _desc(table, 16 * head)
        rows: Iterator[tuple[int, ...]] = _NO_ROWS
        if flags == DESC_F_INDIRECT and indirect and start <= addr and addr + length <= end:
            if length % 16 or not 0 < length < 16 * IOV_MAX:
                break
            rows = _rows(rom[addr - start : addr - start + length])
            addr, length, flags, index = next(rows)
        at, total = addr - start, length - header_bytes
        if flags and (rows is _NO_ROWS or flags != DESC_F_NEXT or index != 1):
            frame = _walked_frame(queue, head, header_bytes)
            if frame is None:
                break
            start, end, _, rom = memory.hot
            total, iov = frame
        elif at < 0 or addr + length > end or total <= 0:
            break
        else:
            iov = [header_of(rom, at)[0], rom[at + header_bytes : at + length]]
            if flags:
                for addr, length, flags, index in rows:
                    at = addr - start
                    if at < 0 or addr + length > end or not length:
                        flags = DESC_F_INDIRECT  # noqa: PLW2901  for the test below
                        break
                    iov.append(rom[at : at + length])
                    total += length
                    if flags != DESC_F_NEXT or index != len(iov) - 1:
                        break
                if flags or len(iov) > PIECES_MAX:  # not "all there is, one after another"
                    break
        in_flight[head] = cursor
        queue._next_avail = cursor = (cursor + 1) & 0xFFFF
        frames.append((head, total, iov))
    if area is not None:
        area.take_all([frame[0] for frame in frames])
    return frames


def _walked_frame(
    queue: SplitQueue, head: int, header_bytes: int
) -> tuple[int, list[bytes | memoryview]] | None:
    """Return a frame's bytes and parts by way of its chain, None if there is any doubt."""
    try:
        chain = walk(queue._memory, queue._table, queue.size, head, queue._indirect)
    except GuestError:
        return None
    total, iov = chain.readable_bytes - header_bytes, chain.readable
    if chain.writable or total <= 0 or len(iov) >= PIECES_MAX or len(iov[0]) <= header_bytes:
        return None
    header, *_ = _HEADERS[header_bytes](iov[0])
    return total, [header, iov[0][header_bytes:], *iov[1:]]


def pop_buffers(queue: VirtQueue, limit: int, buffers: Buffers) -> bool:
    """Add up to `limit` buffers; return whether there were any. Raises GuestError."""
    before = len(buffers.heads)
    if type(queue) is SplitQueue:
        _usual_buffers(queue, limit, buffers)
    if len(buffers.heads) == before:
        for chain in queue.pop_batch(limit):
            buffers.add(chain)
    return len(buffers.heads) > before


def _usual_buffers(queue: SplitQueue, limit: int, buffers: Buffers) -> None:
    """Take buffers of one descriptor each: all up to the limit or the ring's end, or none."""
    cursor, size, memory = queue._next_avail, queue.size, queue._memory
    in_flight, area, seen = queue._in_flight, queue._area, buffers.seen
    pending, at = (queue._avail[1] - cursor) & 0xFFFF, cursor & queue._mask
    count = min(pending, limit, size - at)
    if pending > size or not count:
        return
    heads = queue._avail[2 + at : 2 + at + count].tolist()
    if max(heads) >= size or len(set(heads)) < count or not in_flight.keys().isdisjoint(heads):
        return
    table = queue._table
    rows = [_raw(table, 16 * head) for head in heads]  # private copies, the only ones
    views = [seen.get(row, _UNSEEN) for row in rows]
    if not all(views):
        if len(seen) > SEEN_MAX:
            seen.clear()
        for place, row in enumerate(rows):
            if not views[place]:
                addr, length, flags = _row.unpack(*row)
                if flags != DESC_F_WRITE or not length:
                    return
                try:
                    seen[row] = views[place] = memory.view(addr, length)
                except GuestError:
                    return  # outside RAM, or over a seam
    if area is not None:
        area.take_all(heads)
    in_flight.update(zip(heads, range(cursor, cursor + count), strict=True))
    queue._next_avail = (cursor + count) & 0xFFFF
    buffers.heads += heads
    buffers.sizes += map(len, views)
    buffers.views += views
    buffers.spans += [1] * count


def gather(views: Sequence[memoryview], start: int, length: int) -> bytes:
    """Return up to `length` bytes of what lies in `views`, from `start` on."""
    first = views[0]
    if start + length <= len(first):
        return bytes(first[start : start + length])
    return b"".join(views)[start : start + length]


def scatter(views: Sequence[memoryview], start: int, data: memoryview) -> None:
    """Write `data` into `views`, which have room for it, from `start` on."""
    for view in views:
        if start >= len(view):
            start -= len(view)
            continue
        part = data[: len(view) - start]
        view[start : start + len(part)] = part
        data = data[len(part) :]
        if not data:
            return
        start = 0
