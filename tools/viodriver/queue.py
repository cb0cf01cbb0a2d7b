"""The driver's view of a virtqueue: what both layouts have in common."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, Self

from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC
from devices.virtqueue import VirtQueue, open_queue
from tools.viodriver.errors import NoRoomError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from devices.guestmem import GuestMemory


class Segment(NamedTuple):
    """One descriptor's worth of a request."""

    gpa: int
    length: int  # bytes
    writable: bool  # by the device


class Arena:
    """Hands out guest memory for buffers and indirect tables, 16-byte aligned, first fit by size.

    The same calls give the same addresses in every run.
    """

    def __init__(self, gpa: int, length: int) -> None:
        self._next, self._end = gpa, gpa + length
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, length: int) -> int:
        """Return the address of `length` bytes. Raises NoRoomError."""
        length = max(16, -(-length // 16) * 16)
        if self._free[length]:
            return self._free[length].pop()
        if self._next + length > self._end:
            raise NoRoomError(f"no {length} bytes left for buffers")
        self._next += length
        return self._next - length

    def give(self, gpa: int, length: int) -> None:
        """Take memory back."""
        self._free[max(16, -(-length // 16) * 16)].append(gpa)


class Request:
    """A chain that the driver has placed: it can be submitted again each time it comes back."""

    __slots__ = ("buffers", "descs", "head", "indirect_gpa", "owned", "segments", "token")

    def __init__(self, token: int, segments: Sequence[Segment], *, owned: bool) -> None:
        self.token = token
        self.segments = tuple(segments)
        self.owned = owned  # freed when it is collected, with what is its own
        self.buffers = False  # whether the memory of its segments is
        self.indirect_gpa = 0  # of its indirect table, if it has one
        self.descs: list[int] = []  # places in the ring or table, while it has any
        self.head = -1  # what the device calls it

    @property
    def writable_bytes(self) -> int:
        """Room the device has to write, in bytes."""
        return sum(segment.length for segment in self.segments if segment.writable)


class Used(NamedTuple):
    """A request that the device gave back."""

    request: Request
    written: int  # bytes the device says it wrote

    @property
    def token(self) -> int:
        """What add() returned."""
        return self.request.token


class DriverQueue:
    """Driver side of one virtqueue in guest memory at `base_gpa`, buffers included.

    The ring parts come first, each aligned to `align` bytes (4096 makes the legacy layout of
    §2.7.2), then `arena_bytes` for buffers. `desc_gpa`, `avail_gpa` and `used_gpa` are what a
    driver writes into the queue registers.
    """

    layout: str  #: split or packed

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        base_gpa: int,
        features: int,
        *,
        align: int = 64,
        arena_bytes: int = 1 << 19,
    ) -> None:
        self.memory, self.size, self.features = memory, size, features
        self._align, self._arena_bytes = align, arena_bytes
        self.indirect = bool(features & F_INDIRECT_DESC)
        self.event_idx = bool(features & F_EVENT_IDX)
        self.in_order = bool(features & F_IN_ORDER)
        self.desc_gpa = base_gpa
        self.avail_gpa, self.used_gpa, end = self._layout(base_gpa, align)
        memory.write(base_gpa, bytes(end - base_gpa))
        self.arena = Arena(-(-end // 64) * 64, arena_bytes)
        self._requests: dict[int, Request] = {}  # by head, in the order of submission
        self._next_token = 0

    def again(self) -> Self:
        """Return a fresh queue in the same place; this one is not to be used any more."""
        return type(self)(
            self.memory,
            self.size,
            self.desc_gpa,
            self.features,
            align=self._align,
            arena_bytes=self._arena_bytes,
        )

    def places(self, segments: int) -> int:
        """Return how many descriptors a request of so many segments takes in the ring."""
        return 1 if self.indirect and segments > 1 else segments

    def open_device(self, inflight: memoryview | None = None) -> VirtQueue:
        """Return the device side of this queue, in this process, on the same memory."""
        return open_queue(
            self.memory,
            self.size,
            self.desc_gpa,
            self.avail_gpa,
            self.used_gpa,
            features=self.features,
            inflight=inflight,
        )

    # Requests.

    def place(
        self,
        readable: Iterable[bytes | int] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool | None = None,
    ) -> Request:
        """Allocate and fill buffers for a request, and its indirect table if it gets one.

        `readable` holds contents, or lengths of zeros; `writable` holds lengths. `indirect` None
        means "as Linux does": whenever negotiated and there is more than one segment.
        """
        segments: list[Segment] = []
        for part in readable:
            data = bytes(part) if isinstance(part, int) else part
            gpa = self.arena.take(len(data))
            self.memory.write(gpa, data)
            segments.append(Segment(gpa, len(data), writable=False))
        segments += [Segment(self.arena.take(n), n, writable=True) for n in writable]
        request = self.place_at(segments, indirect=indirect)
        request.buffers = True
        return request

    def place_at(self, segments: Sequence[Segment], *, indirect: bool | None = None) -> Request:
        """Make a request of segments that lie where the caller says."""
        if indirect is None:
            indirect = self.indirect and len(segments) > 1
        self._next_token += 1
        request = Request(self._next_token, segments, owned=False)
        if indirect:
            request.indirect_gpa = self.arena.take(DESC.size * len(segments))
            self.memory.write(request.indirect_gpa, self._table(segments))
        return request

    def add(
        self,
        readable: Iterable[bytes | int] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool | None = None,
    ) -> int:
        """Place a request, submit it, and free it when it is collected. Return its token.

        Raises NoRoomError, nothing submitted, if the ring is full.
        """
        request = self.place(readable, writable, indirect=indirect)
        request.owned = True
        try:
            self.submit(request)
        except NoRoomError:
            self.free(request)
            raise
        return request.token

    def submit(self, *requests: Request) -> None:
        """Make requests available, in one step. Raises NoRoomError, nothing changed."""
        raise NotImplementedError

    def collect(self) -> list[Used]:
        """Take back what the device has used since the last time, in its order."""
        done: list[Used] = []
        for head, written in self.used():
            for used in self._finished(head, written):
                done.append(used)
                self._retire(used.request)
                if used.request.owned:
                    self.free(used.request)
        return done

    def give_heads(self, heads: Sequence[int]) -> None:
        """Make requests available again that `take_heads` has returned; for load generators.

        Only requests that were placed once and submitted before, on a queue without IN_ORDER.
        """
        raise NotImplementedError

    def take_heads(self) -> list[int]:
        """Take back what the device has used, as `collect` does, and return heads alone.

        The requests keep their places: all of them are given again, or `keep` ends that.
        """
        raise NotImplementedError

    def data(self, request: Request, length: int | None = None) -> bytes:
        """Return what the first `length` writable bytes of a request hold; None means all."""
        parts = [self.memory.read(s.gpa, s.length) for s in request.segments if s.writable]
        return b"".join(parts)[:length]

    @property
    def outstanding(self) -> int:
        """Count the requests the device has."""
        return len(self._requests)

    @property
    def free_places(self) -> int:
        """Count the descriptors that are free for further requests."""
        raise NotImplementedError

    def cursors(self) -> tuple[int, int]:
        """Return where the next available and the next used entry will be, as devices count."""
        raise NotImplementedError

    def _finished(self, head: int, written: int) -> list[Used]:
        """Return the requests one used entry stands for: with IN_ORDER, all before it too."""
        if not self.in_order:
            return [Used(self._requests.pop(head), written)]
        done: list[Used] = []
        while True:
            oldest = next(iter(self._requests))
            request = self._requests.pop(oldest)
            if oldest == head:
                return [*done, Used(request, written)]
            done.append(Used(request, request.writable_bytes))

    def free(self, request: Request) -> None:
        """Give memory back to the arena: an indirect table, and buffers that place() took."""
        for segment in request.segments if request.buffers else ():
            self.arena.give(segment.gpa, segment.length)
        if request.indirect_gpa:
            self.arena.give(request.indirect_gpa, DESC.size * len(request.segments))

    def _elements(self, request: Request) -> list[tuple[int, int, int]]:
        """Return addr, len and flags of the descriptors a request needs in the ring."""
        if request.indirect_gpa:
            return [(request.indirect_gpa, DESC.size * len(request.segments), DESC_F_INDIRECT)]
        flags = [DESC_F_WRITE if segment.writable else 0 for segment in request.segments]
        flags[:-1] = [bits | DESC_F_NEXT for bits in flags[:-1]]
        return [(s.gpa, s.length, bits) for s, bits in zip(request.segments, flags, strict=True)]

    # What a layout provides.

    def _layout(self, base_gpa: int, align: int) -> tuple[int, int, int]:
        """Return the addresses of driver area, device area, and the end of the ring."""
        raise NotImplementedError

    def _table(self, segments: Sequence[Segment]) -> bytes:
        """Return the bytes of an indirect table."""
        raise NotImplementedError

    def _retire(self, request: Request) -> None:
        """Free the places a used request had in the ring."""
        raise NotImplementedError

    def used(self) -> Iterator[tuple[int, int]]:
        """Take the new used entries as they are: head and written."""
        raise NotImplementedError

    def kick_needed(self) -> bool:
        """Tell whether the device wants a kick for what was submitted since the last time asked."""
        raise NotImplementedError

    def enable_calls(self) -> bool:
        """Ask for a call with the next used entry; return True if there is one already."""
        raise NotImplementedError

    def disable_calls(self) -> None:
        """Tell the device that calls are not needed."""
        raise NotImplementedError
