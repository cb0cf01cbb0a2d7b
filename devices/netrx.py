"""Receiving: frames from a port into the buffers of one receive queue (virtio 1.2 §5.1.6.4).

How long the next frame is, nobody says before it is read. So it is read into as many buffers as
the one before took, and behind them into private memory: then a row of equal frames costs one
system call each and no copy, and a surprise costs a copy.

    iov:   buffer   buffer   …   scratch
           └─ as many as last time ─┘   └─ what is longer, to be copied on

A driver with MRG_RXBUF gets a frame in several buffers (`num_buffers`), any other in one; what
does not fit there is dropped, and the buffer used for the next. A frame for which there are not
enough buffers yet is held until there are, but not for ever: a driver may be waiting for us.

Popped buffers are kept from one wake-up to the next, and go back to the ring for a pause.
"""

from __future__ import annotations

from collections import deque
from select import EPOLLIN
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.features import F_INDIRECT_DESC
from devices.netfilter import HEAD_TO
from devices.nethdr import (
    ETHERNET,
    GSO_ECN,
    HDR_F_NEEDS_CSUM,
    HEADER_BYTES,
    OLD_HEADER_BYTES,
    VLAN_TAG,
)
from devices.netpop import IOV_MAX, Buffers, gather, pop_buffers, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.device import Host
    from devices.netlimit import Limit
    from devices.netport import Counters, Port, Watch
    from devices.virtqueue import VirtQueue

BUDGET: Final = 2 << 20  # bytes per wake-up, at most about 1 ms
FRAME_COST: Final = 8192  # bytes: what a frame counts for beside its own
CHUNK: Final = 128  # buffers popped together
SCRATCH: Final = 68 << 10  # bytes: longer than any frame with its header
HOLD: Final = 0.25  # seconds that a frame waits for buffers
INJECTED_MAX: Final = 16  # frames of our own that may wait

GOING_ON, EMPTY, STARVED, LIMITED, LOST, BUSY = range(6)  # how a turn ended


class Receiver:
    """One receive queue's side of a port."""

    def __init__(
        self,
        host: Host,
        port: Port,
        index: int,
        counters: Counters,
        lost: Callable[[OSError], None],
    ) -> None:
        """Receive from `port` for queue `index`; `lost` is told when the port fails."""
        self._host, self._port, self._index = host, port, index
        self._counters, self._lost = counters, lost
        self._buffers = Buffers()
        self._done: list[tuple[int, int]] = []
        self._scratch = memoryview(bytearray(SCRATCH))
        self._left = 0
        self._chains = 1  # how many buffers the latest frame took
        self._held: tuple[int, int] | None = None  # see _settle()
        self._injected: deque[bytes] = deque()
        self._refilled = host.timer(self._again)
        self._patience = host.timer(self._give_up)
        self._header_bytes, self._merge = HEADER_BYTES, False
        self._longest = SCRATCH  # bytes of a frame that is not to be cut, with its header
        self._gso: frozenset[int] = frozenset()
        self._sums = False
        self.watch: Watch | None = None
        #: What is allowed per second, if that is limited.
        self.limit: Limit | None = None
        #: Whether a frame with this head is the guest's; None: all are.
        self.accept: Callable[[bytes], bool] | None = None
        #: Whether a frame that is not the guest's must not even be in its memory for a moment.
        self.secret = False
        #: Shown each frame received, without its header: views, and how many bytes they count.
        self.show: Callable[[Sequence[memoryview], int], None] | None = None

    # Life of a driver.

    def begin(self, header_bytes: int, *, merge: bool, mtu: int) -> None:
        """Serve a driver with such headers from now on; `merge`: it takes frames in parts.

        It has been told `mtu`, if that is not 0, and gets no longer packet whole (§5.1.4.1).
        """
        self._header_bytes, self._merge = header_bytes, merge
        self._longest = header_bytes + ETHERNET + VLAN_TAG + mtu if mtu else SCRATCH

    def expect(self, gso: frozenset[int], *, sums: bool) -> None:
        """Deliver these gso types only; without `sums` all checksums are complete."""
        self._gso, self._sums = gso, sums

    def adopt(self, queue: VirtQueue) -> None:
        """Take over the buffers that a killed predecessor had."""
        for chain in queue.resubmit():
            self._buffers.add(chain)

    def end(self) -> None:
        """Forget driver, buffers and frames: no access to guest memory afterwards."""
        if self.watch is not None:
            self.watch.drop(EPOLLIN)
        self._refilled.disarm()
        self._patience.disarm()
        self._buffers.clear()
        self._injected.clear()
        self._held = None
        self._chains = 1

    def pause(self, queue: VirtQueue | None) -> None:
        """Give the buffers back to the ring; a frame that was held is lost."""
        if queue is not None and queue.rewind(len(self._buffers.heads)):
            self._buffers.clear()
            self._give_up()

    def stop(self, queue: VirtQueue) -> None:
        """Give all buffers back: to the ring, but those of a predecessor to the driver, empty."""
        heads = list(self._buffers.heads)
        while heads and queue.rewind(1):
            heads.pop()
        queue.push_batch([(head, 0) for head in heads])
        self.end()

    def inject(self, frame: bytes) -> None:
        """Deliver a frame of our own, without header, soon; lost if the guest takes none."""
        if len(self._injected) < INJECTED_MAX:
            self._injected.append(frame)
            self._host.schedule(self._index)
        else:
            self._counters.drop("no buffers")

    # A turn.

    def serve(self, queue: VirtQueue) -> bool:
        """Receive what is there, as far as buffers, limits and budget go; call once.

        Returns True if somebody has to call again, since no event will.
        """
        queue.disable_kicks()
        self._left = BUDGET
        end = LOST
        try:
            end = self._turn(queue)
        finally:
            queue.push_batch(self._done)
            self._done.clear()
            if queue.should_call():
                self._host.call(self._index)
        if self.watch is not None:
            (self.watch.want if end in (EMPTY, BUSY) else self.watch.drop)(EPOLLIN)
        return end == BUSY and (self._port.buffered or bool(self._injected))

    def _turn(self, queue: VirtQueue) -> int:
        buffers, end = self._buffers, GOING_ON
        while self._left > 0 and end == GOING_ON:
            if len(buffers.heads) < self._chains and not self._refill(queue) and not buffers.heads:
                return STARVED
            if self.limit is not None and (seconds := self.limit.wait()) > 0:
                self._refilled.arm(seconds)
                return LIMITED
            if self._held is not None:
                end = self._settle(queue, *self._held)
            elif self._injected:
                frame = self._injected.popleft()
                size = self._header_bytes + len(frame)
                self._scratch[: self._header_bytes] = bytes(self._header_bytes)
                self._scratch[self._header_bytes : size] = frame
                end = self._settle(queue, size, 0)
            elif (
                self.secret
                or len(buffers.views[0]) < self._header_bytes
                or buffers.spans[0] >= IOV_MAX
            ):
                end = self._private(queue)
            else:
                plain = self._chains == 1 and len(buffers.views) == len(buffers.heads)
                roomy = buffers.sizes[0] >= self._header_bytes + ETHERNET
                if plain and roomy and not self._looked_at():
                    end = self._usual(queue)
                else:
                    end = self._direct(queue)
        return BUSY if end == GOING_ON else end

    def _usual(self, queue: VirtQueue) -> int:
        """Receive frames that fit a buffer of one view, while nobody looks at them.

        What `_direct` does, in the fewest steps; whatever is different is left to that.
        """
        buffers, done, scratch, before = self._buffers, self._done, self._scratch, self._left
        heads, sizes, views = buffers.heads, buffers.sizes, buffers.views
        receive, gso, header_bytes = self._port.receive, self._gso, self._header_bytes
        numbered, shortest = header_bytes != OLD_HEADER_BYTES, header_bytes + ETHERNET
        longest = self._longest
        at, left, odd, end = 0, before, -1, GOING_ON
        try:
            for head, room, view in zip(heads, sizes, views, strict=True):
                if left <= 0 or room < shortest:
                    break
                size = receive((view, scratch))
                if not shortest <= size <= room or view[1] not in gso or size > longest:
                    odd = size
                    break
                left -= size + FRAME_COST
                if numbered:
                    view[10] = 1
                    view[11] = 0
                done.append((head, size))
                at += 1
        except BlockingIOError:
            end = EMPTY
        except OSError as err:
            self._lost(err)
            end = LOST
        finally:
            buffers.drop(at, at)
            self._left = left - (FRAME_COST + odd if odd >= 0 else 0)
            self._counters.frames += at
            self._counters.bytes += before - left - at * (FRAME_COST + header_bytes)
        if odd >= shortest:
            if self._taken(buffers.views[0], odd):
                return self._settle(queue, odd, min(odd, buffers.sizes[0]))
        elif odd >= 0:
            self._counters.drop("short")
        return end

    def _direct(self, queue: VirtQueue) -> int:
        """Receive into guest memory, until something else is to be done."""
        buffers, done, scratch, left = self._buffers, self._done, self._scratch, self._left
        heads, sizes, spans, views = buffers.heads, buffers.sizes, buffers.spans, buffers.views
        receive, accept, limit, show = self._port.receive, self.accept, self.limit, self.show
        header_bytes, merge, gso, sums = self._header_bytes, self._merge, self._gso, self._sums
        numbered = header_bytes != OLD_HEADER_BYTES
        shortest, longest = header_bytes + ETHERNET, self._longest
        nr_chains, plain = len(heads), len(views) == len(heads)
        count = self._chains if merge else 1
        at = view_at = nr_frames = nr_bytes = 0
        overlong, room, end = 0, 0, GOING_ON
        try:
            while left > 0 and at < nr_chains:
                first = views[view_at]
                if at + count > nr_chains:
                    if at:
                        break  # there may be more buffers meanwhile
                    count = nr_chains
                if count == 1:
                    room, stop = sizes[at], view_at + spans[at]
                else:
                    room = sum(sizes[at : at + count])
                    stop = view_at + (count if plain else sum(spans[at : at + count]))
                if len(first) < header_bytes or stop - view_at >= IOV_MAX:
                    if count > 1:
                        count = 1
                        continue
                    break
                iov = views[view_at:stop]
                iov.append(scratch)
                size = receive(iov)
                left -= size + FRAME_COST
                if size < shortest:
                    self._counters.drop("short")
                    continue
                doubtful = not sums or first[1] not in gso or size > longest
                if doubtful and not self._taken(first, size):
                    continue
                if accept is not None and not accept(
                    gather(iov, header_bytes, min(HEAD_TO, size - header_bytes))
                ):
                    self._counters.drop("filtered")
                    continue
                if size > room:
                    overlong = size
                    break
                if show is not None:
                    show([first[header_bytes:], *iov[1:-1]], size - header_bytes)
                if size <= sizes[at]:
                    count = 1
                    done.append((heads[at], size))
                else:
                    last = at + count - 1
                    rest = size - room + sizes[last]
                    while rest <= 0:  # shorter than the one before
                        last -= 1
                        rest += sizes[last]
                    count = last + 1 - at
                    done += zip(heads[at:last], sizes[at:last], strict=True)
                    done.append((heads[last], rest))
                if numbered:
                    first[10], first[11] = count & 0xFF, count >> 8
                view_at += count if plain else sum(spans[at : at + count])
                at += count
                nr_frames += 1
                nr_bytes += size - header_bytes
                if limit is not None:
                    limit.take(size - header_bytes)
                    break
        except BlockingIOError:
            end = EMPTY
        except OSError as err:
            self._lost(err)
            end = LOST
        finally:
            buffers.drop(at, view_at)
            self._left, self._chains = left, count
            self._counters.frames += nr_frames
            self._counters.bytes += nr_bytes
        if overlong:
            return self._settle(queue, overlong, room)
        return end

    def _private(self, queue: VirtQueue) -> int:
        """Receive one frame into private memory, and copy it if the guest may have it."""
        scratch, header_bytes = self._scratch, self._header_bytes
        try:
            size = self._port.receive([scratch])
        except BlockingIOError:
            return EMPTY
        except OSError as err:
            self._lost(err)
            return LOST
        self._left -= size + FRAME_COST
        if size < header_bytes + ETHERNET:
            self._counters.drop("short")
        elif not self._taken(scratch, size):
            pass
        elif self.accept is not None and not self.accept(
            bytes(scratch[header_bytes : min(header_bytes + HEAD_TO, size)])
        ):
            self._counters.drop("filtered")
        else:
            return self._settle(queue, size, 0)
        return GOING_ON

    def _looked_at(self) -> bool:
        """Tell whether frames are checked, counted or shown one by one."""
        looks = self.accept is not None or self.limit is not None or self.show is not None
        return looks or not self._sums

    def _taken(self, header: memoryview, size: int) -> bool:
        """Tell whether the driver takes a frame of `size` bytes with this header; count it if not.

        A frame that has waited since before offloads were switched off may still need one. For a
        driver without GUEST_CSUM the header becomes 0 (§5.1.6.4.1).
        """
        if header[1] not in self._gso or (not self._sums and header[0] & HDR_F_NEEDS_CSUM):
            self._counters.drop("stale offload")
            return False
        if size > self._longest and not header[1] & ~GSO_ECN:
            self._counters.drop("too long")
            return False
        if not self._sums:
            header[:OLD_HEADER_BYTES] = bytes(OLD_HEADER_BYTES)
        return True

    # Frames that are longer than thought, held, or of our own.

    def _settle(self, queue: VirtQueue, size: int, placed: int) -> int:
        """Deliver a frame of `size` bytes: the first `placed` are in the oldest buffers.

        The others are in scratch. Returns STARVED, the frame held, if it needs more buffers.
        """
        buffers, self._held = self._buffers, None
        sizes, rest = buffers.sizes, size - placed
        if sizes[0] < self._header_bytes:
            raise GuestError(f"receive buffer of {sizes[0]} bytes: less than a header")
        if rest >= SCRATCH or (size > sizes[0] and not self._merge):
            self._counters.drop("too long")
            return GOING_ON
        count = room = 0
        while room < size:
            if count == len(sizes) and not self._refill(queue):
                direct = not queue.features & F_INDIRECT_DESC
                if len(sizes) >= queue.size or (direct and sum(buffers.spans) >= queue.size):
                    self._counters.drop("too long")  # the whole ring is too small for it
                    return GOING_ON
                self._held = size, placed
                self._patience.arm(HOLD)
                return STARVED
            room += sizes[count]
            count += 1
        self._patience.disarm()
        nr_views = sum(buffers.spans[:count])
        views = buffers.views[:nr_views]
        scatter(views, placed, self._scratch[:rest])
        if self._header_bytes == HEADER_BYTES:
            scatter(views, OLD_HEADER_BYTES, memoryview(count.to_bytes(2, "little")))
        if self.show is not None:
            self.show(
                [memoryview(gather(views, self._header_bytes, size))], size - self._header_bytes
            )
        for at in range(count):
            self._done.append((buffers.heads[at], min(sizes[at], size)))
            size -= sizes[at]
        self._counters.frames += 1
        return self._count(placed + rest, count, nr_views)

    def _count(self, size: int, count: int, nr_views: int) -> int:
        """Finish a frame that took so many buffers."""
        self._buffers.drop(count, nr_views)
        self._chains = count
        self._counters.bytes += size - self._header_bytes
        if self.limit is not None:
            self.limit.take(size - self._header_bytes)
        return GOING_ON

    def _refill(self, queue: VirtQueue) -> bool:
        """Pop more buffers; False if there are none, and then a kick will come with the next."""
        while not pop_buffers(queue, CHUNK, self._buffers):
            if not queue.enable_kicks():
                return False
        return True

    def _again(self) -> None:
        self._host.schedule(self._index)

    def _give_up(self) -> None:
        """Drop the frame that is held, so that others may come."""
        if self._held is not None:
            self._held = None
            self._counters.drop("no buffers")
            self._host.schedule(self._index)
