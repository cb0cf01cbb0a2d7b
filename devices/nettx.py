"""Sending: frames of one transmit queue to a port (virtio 1.2 §5.1.6.2).

A frame is written straight from guest memory, behind a header that is ours: the guest's was
copied once, checked, and what goes on is built from the copy. Only where somebody looks at the
head of a frame, it is copied, too, so that what was looked at is what is sent.
"""

from __future__ import annotations

import errno
from select import EPOLLOUT
from typing import TYPE_CHECKING, Final

from devices.netfilter import HEAD_FROM
from devices.nethdr import ETHERNET, HEADER_BYTES, MAX_FRAME, HeaderRules
from devices.netpop import pop_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.device import Host
    from devices.netlimit import Limit
    from devices.netpop import Frame
    from devices.netport import Counters, Port, Watch
    from devices.virtqueue import VirtQueue

BUDGET: Final = 2 << 20  # bytes per wake-up, at most about 1 ms
FRAME_COST: Final = 8192  # bytes: what a frame counts for beside its own
HEAD: Final = HEAD_FROM  # bytes that are copied if somebody looks; netlocal wants fewer
BATCH: Final = 64  # frames popped, and given back, together

# What the kernel says of one frame, not of the port: the frame is lost, as on any network.
_REFUSED: Final = (errno.EINVAL, errno.EMSGSIZE)
_NO_MEMORY: Final = (errno.ENOBUFS, errno.ENOMEM)


class Sender:
    """One transmit queue's side of a port."""

    def __init__(
        self,
        host: Host,
        port: Port,
        index: int,
        counters: Counters,
        lost: Callable[[OSError], None],
    ) -> None:
        """Send to `port` for queue `index`; `lost` is told when the port fails."""
        self._host, self._port, self._index = host, port, index
        self._counters, self._lost = counters, lost
        self._rules = HeaderRules(0, HEADER_BYTES)
        self._header_bytes = HEADER_BYTES
        self._refilled = host.timer(self.again)
        self.watch: Watch | None = None
        #: What is allowed per second, if that is limited.
        self.limit: Limit | None = None
        #: Whether frames go anywhere; if not, they are counted and given back.
        self.up = True
        #: Whether a frame with this head may be sent; None: all may.
        self.accept: Callable[[bytes], bool] | None = None
        #: Takes a frame that stays here: its private head, and all of it behind a header of ours.
        #: Returns whether it has.
        self.keep: Callable[[bytes, Sequence[bytes | memoryview]], bool] | None = None
        #: Shown each frame sent, without its header: views, and how many bytes they count.
        self.show: Callable[[Sequence[bytes | memoryview], int], None] | None = None

    def begin(self, features: int, header_bytes: int) -> None:
        """Serve a driver with these features, and headers of 10 or 12 bytes, from now on."""
        self._rules, self._header_bytes = HeaderRules(features, header_bytes), header_bytes

    def adopt(self, queue: VirtQueue) -> None:
        """Give back what a killed predecessor had: it may have sent it, and twice is worse."""
        queue.push_batch([(chain.head, 0) for chain in queue.resubmit()])
        if queue.should_call():
            self._host.call(self._index)

    def end(self) -> None:
        """Forget the driver."""
        self._refilled.disarm()
        if self.watch is not None:
            self.watch.drop(EPOLLOUT)

    def again(self) -> None:
        """Have the queue looked into soon: the port can take more, or the limit allows more."""
        if self.watch is not None:
            self.watch.drop(EPOLLOUT)
        self._host.schedule(self._index)

    def serve(self, queue: VirtQueue) -> bool:
        """Send what is there, as far as limits and budget go; True if the budget ended it."""
        left = BUDGET
        queue.disable_kicks()
        while left > 0:
            if self.limit is not None and (seconds := self.limit.wait()) > 0:
                self._refilled.arm(seconds)
                return False
            frames = pop_frames(queue, BATCH, self._header_bytes)
            if not frames:
                if queue.enable_kicks():
                    continue
                return False
            done: list[tuple[int, int]] = []
            cost = self._send(frames, done)
            queue.push_batch(done)
            if queue.should_call():
                self._host.call(self._index)
            if len(done) < len(frames):
                queue.rewind(len(frames) - len(done))
                if cost < 0:  # when the port can take more, again() is called
                    return False
            left -= abs(cost)
        return True

    def _send(self, frames: list[Frame], done: list[tuple[int, int]]) -> int:
        """Send frames until one cannot go now; return what they count for.

        That is negative if the port takes no more for now.
        """
        send, zero, sanitized = self._port.send, self._rules.zero, self._rules.sanitized
        accept, keep, show, limit = self.accept, self.keep, self.show, self.limit
        looked_at = accept is not None or keep is not None
        drop = self._counters.drop
        nr_frames = nr_bytes = 0
        cost = 0
        for head, size, iov in frames:
            cost += size + FRAME_COST
            if size < ETHERNET or size > MAX_FRAME:
                drop("malformed" if size < 0 else "short" if size < ETHERNET else "too long")
                done.append((head, 0))
                continue
            if not self.up:
                drop("link down")
                done.append((head, 0))
                continue
            if iov[0] != zero:
                header = sanitized(bytes(iov[0]), size)
                if header is None:
                    drop("malformed")
                    done.append((head, 0))
                    continue
                iov[0] = header
            if looked_at:
                first = _privatise(iov)
                if accept is not None and not accept(first):
                    drop("filtered")
                    done.append((head, 0))
                    continue
                if keep is not None and keep(first, iov):
                    done.append((head, 0))
                    continue
            try:
                send(iov)
            except BlockingIOError:
                if self.watch is not None:
                    self.watch.want(EPOLLOUT)
                cost = -cost
                break
            except OSError as err:
                drop(self._failed(err))
                done.append((head, 0))
                continue
            done.append((head, 0))
            nr_frames += 1
            nr_bytes += size
            if show is not None:
                show(iov[1:], size)
            if limit is not None:
                limit.take(size)
                if limit.wait() > 0:
                    break
        self._counters.frames += nr_frames
        self._counters.bytes += nr_bytes
        return cost

    def _failed(self, err: OSError) -> str:
        """Return why a frame was lost; a port that failed for good says so to the device."""
        if err.errno in _REFUSED:
            return "refused"
        if err.errno in _NO_MEMORY:
            return "no memory"
        self._lost(err)
        return "port failed"


def _privatise(iov: list[bytes | memoryview]) -> bytes:
    """Put a private copy in place of a frame's first HEAD bytes, and return it."""
    first = iov[1]
    if len(first) >= HEAD:
        head = bytes(first[:HEAD])
        iov[1:2] = [head, first[HEAD:]]
        return head
    head, views = b"", iov[1:]
    rest: list[bytes | memoryview] = []
    for view in views:
        lack = HEAD - len(head)
        head += bytes(view[:lack])
        if len(view) > lack:
            rest.append(view[lack:])
    iov[1:] = [head, *rest]
    return head
