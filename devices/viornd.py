"""virtio entropy device (virtio 1.2 §5.4): fills guest buffers with host randomness.

Queue 0: requestq, device-writable buffers only. Configuration space: none. Features: none.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError, GuestError
from devices.bucket import TokenBucket
from devices.device import Device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.chain import Chain
    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue

QUEUE_SIZE: Final = 64
MAX_REQUEST: Final = 64 * 1024  # bytes: a longer buffer comes back filled in part (§5.4.6.2)
BUDGET: Final = 256 * 1024  # bytes per wake-up, about 1 ms
REQUEST_COST: Final = 4096  # bytes: what a request counts for beside its own

_REQUESTS, _BYTES = range(2)  # of its counters


def create(
    settings: Mapping[str, Any], _fds: Mapping[str, int], memory: GuestMemory, host: Host
) -> Viornd:
    """Make the device. Settings: `rate` in bytes per second, 0 for no limit."""
    return Viornd(memory, host, settings.get("rate", 0))


class Viornd(Device):
    """Serves requestq. Holds no descriptor: getrandom(2) and one copy cost what readv(2) does."""

    queue_sizes = (QUEUE_SIZE,)
    in_order = True

    def __init__(self, memory: GuestMemory, host: Host, rate: int) -> None:
        super().__init__(memory, host)
        self._timer = host.timer(self._refilled)
        self._bucket: TokenBucket | None = None
        self._limit = MAX_REQUEST
        self._set_rate(rate)

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Answer what a predecessor was killed over."""
        for index, queue in enumerate(queues):
            if queue is not None:
                self.start_queue(index, queue)

    def start_queue(self, index: int, queue: VirtQueue) -> None:
        """Answer what a predecessor was killed over; a call is due for it."""
        for chain in queue.resubmit():
            self._answer(queue, chain)

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Answer what is there, as far as budget and rate go, then call once."""
        left = BUDGET
        queue.disable_kicks()
        while left > 0 and not self._must_wait():
            chain = queue.pop()
            if chain is None:
                if queue.enable_kicks():
                    continue
                break
            left -= self._answer(queue, chain) + REQUEST_COST
        if queue.should_call():
            self.host.call(index)
        return left <= 0

    def reset(self) -> None:
        """Forget that somebody waited; the rate goes on over resets."""
        self._timer.disarm()

    def setting(self, name: str, value: Any) -> Any:
        """Change `rate`: bytes per second, 0 for no limit."""
        if name != "rate":
            return super().setting(name, value)
        if type(value) is not int or not 0 <= value < 1 << 53:
            raise ConfigError(f"rate: {value!r} is not a number of bytes per second, 0 or more")
        self._set_rate(value)
        self.host.schedule(0)  # who waited for the old rate need not
        return value

    def remember(self) -> dict[str, Any]:
        """Return the rate, which may have been changed."""
        return {"rate": self._rate}

    def load(self, state: dict[str, Any]) -> None:
        """Take the rate over."""
        if "rate" in state:
            self._set_rate(int(state["rate"]))

    def _answer(self, queue: VirtQueue, chain: Chain) -> int:
        """Fill and give back one chain; return how many bytes were filled."""
        if chain.readable:
            raise GuestError("entropy request with a readable buffer")
        written = self._fill(chain.writable, chain.writable_bytes)
        queue.push(chain.head, written)
        self.totals[_REQUESTS] += 1
        self.totals[_BYTES] += written
        return written

    def _fill(self, views: Sequence[memoryview], size: int) -> int:
        """Fill the first `size` bytes of `views`, up to the limit; return how many were filled."""
        data = os.getrandom(min(size, self._limit))
        at = 0
        for view in views:
            piece = data[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
        if self._bucket is not None:
            self._bucket.take(at)
        return at

    def _set_rate(self, rate: int) -> None:
        self._rate = rate
        # At most a second's worth in one request, so that no request takes a later one's turn.
        self._limit = min(MAX_REQUEST, rate) if rate else MAX_REQUEST
        self._bucket = TokenBucket(rate, rate) if rate else None
        self._timer.disarm()

    def _must_wait(self) -> bool:
        """Tell whether the rate is used up; then a timer has been set for when it is not."""
        if self._bucket is None:
            return False
        seconds = self._bucket.wait()
        if seconds > 0:
            self._timer.arm(seconds)
        return seconds > 0

    def _refilled(self) -> None:
        self.host.schedule(0)
