"""The way to a device that somebody serves over vhost-user, ours or another's.

    with VhostUser("/run/blk.sock") as device:
        [queue] = device.start(F_EVENT_IDX)

The protocol has no registers: what a driver writes there becomes messages (`devices.vhostfront`),
and what no message carries is kept here. `status` is ours, unless the back end knows STATUS; a
queue's largest size is what the caller says, since no back end tells. Of a ring that it cannot
go on with a back end tells by an eventfd, which shows as NEEDS_RESET.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from devices.features import F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.packed import WRAP
from devices.vhostask import connect
from devices.vhostfront import DEADLINE, FrontEnd, MemoryRegion, Ring
from devices.vhostwire import (
    CONFIG_MAX,
    F_LOG_ALL,
    P_BACKEND_REQ,
    P_CONFIG,
    P_MQ,
    P_RESET_DEVICE,
    P_STATUS,
    PeerError,
)
from devices.viodev import CONFIG_CHANGE
from tools.viodriver.memory import make_memfd
from tools.viodriver.transport import FEATURES_OK, NEEDS_RESET, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from devices.vhostwire import Wire
    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver

QUEUE_SIZE: Final = 256  # entries, where nobody says otherwise
HVA: Final = 1 << 40  # what is added to a guest address to name it in messages


class VhostUser(Transport):
    """Plays the monitor for one back end."""

    transport = "vhost-user"

    def __init__(
        self,
        peer: str | Wire,
        *,
        memory_size: int = 8 << 20,
        regions: Sequence[Region] = (),
        nr_queues: int = 0,
        queue_size: int = QUEUE_SIZE,
        deadline: float = DEADLINE,
    ) -> None:
        """Connect to the socket at `peer`, or take over a connection, and share memory.

        `nr_queues` is how many to have; 0: all that the back end has, 1 if it does not tell.
        Raises PeerError.
        """
        regions = tuple(regions) or (Region(0, memory_size, 0),)
        self.front = FrontEnd(connect(peer) if isinstance(peer, str) else peer, deadline)
        #: Kick, call and error eventfds of each queue that is enabled.
        self._events: dict[int, tuple[int, int, int]] = {}
        self._status = self._features = 0
        self._largest = queue_size
        memory_fd = make_memfd(max(region.offset + region.size for region in regions))
        try:
            self.memory = GuestMemory(memory_fd, regions)
            self.front.negotiate()
            if self.front.protocol & P_BACKEND_REQ:
                self.front.open_back_channel()
            self.front.share(
                [MemoryRegion(r.gpa, r.size, HVA + r.gpa, r.offset, memory_fd) for r in regions]
            )
            most = self.front.queue_count() if self.front.protocol & P_MQ else 1
        except BaseException:
            self.front.close()
            raise
        finally:
            os.close(memory_fd)
        self.nr_queues = nr_queues or most

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the queues if the back end still answers, and hang up."""
        with suppress(PeerError):
            self._stop_all()
        for index in list(self._events):
            self._drop_events(index)
        self.front.close()

    # What a transport provides.

    @property
    def status(self) -> int:
        """device_status."""
        if self.front.protocol & P_STATUS:
            return self.front.status()
        failed = any(_readable(err, 0.0) for _, _, err in self._events.values())
        return self._status | NEEDS_RESET * failed

    @status.setter
    def status(self, value: int) -> None:
        if not value:
            self._stop_all()
            self._features = 0
            if self.front.protocol & P_RESET_DEVICE:
                self.front.reset_device()
        elif value & FEATURES_OK and not self._status & FEATURES_OK:
            if self._features & ~self.offered():
                value &= ~FEATURES_OK
            else:
                self.front.accept(self._features)
        self._status = value
        if self.front.protocol & P_STATUS:
            self.front.set_status(value)

    def offered(self) -> int:
        """Return what the back end offers to a driver."""
        return self.front.features & ~F_LOG_ALL

    def accept(self, features: int) -> None:
        """Remember the driver's features; FEATURES_OK sends them."""
        self._features = features

    def queue_size(self, index: int) -> int:
        """Return what the caller said."""
        return self._largest if index < self.nr_queues else 0

    def enable(self, index: int, queue: SplitDriver | PackedDriver) -> bool:
        """Start and enable a queue; False if the back end refused."""
        if index in self._events:
            return False
        start = WRAP | WRAP << 16 if self._features & F_RING_PACKED else 0
        return self.resume(index, queue, start)

    def resume(self, index: int, queue: SplitDriver | PackedDriver, base: int) -> bool:
        """Start and enable a queue from where `stop_queue` of a back end said that it stands."""
        self._drop_events(index)
        kick, call, err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        self._events[index] = kick, call, err
        ring = Ring(
            queue.size, base, HVA + queue.desc_gpa, HVA + queue.avail_gpa, HVA + queue.used_gpa
        )
        try:
            self.front.start_queue(index, ring, kick=kick, call=call, err=err)
            self.front.enable_queue(index)
        except PeerError:
            self._drop_events(index)
            if not self.alive:
                raise
            return False
        return True

    def disable(self, index: int) -> bool:
        """Stop a queue."""
        if index in self._events:
            self.front.enable_queue(index, on=False)
            self.front.stop_queue(index)
            self._drop_events(index)
        return True

    def kick(self, queue: int) -> None:
        """Signal the queue's eventfd."""
        os.eventfd_write(self._events[queue][0], 1)

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for a call of that queue (or for CONFIG_CHANGE), and take it."""
        if queue == CONFIG_CHANGE:
            return self._wait_config(timeout)
        call = self.call_fd(queue)
        if not _readable(call, timeout):
            return False
        os.eventfd_read(call)
        return True

    def call_fd(self, queue: int) -> int:
        """Return the eventfd that the back end signals."""
        return self._events[queue][1]

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes; what a back end does not have reads as all-ones.

        Always from the start, since many back ends know no other place.
        """
        end = offset + size
        if not self.front.protocol & P_CONFIG or not 0 < end <= CONFIG_MAX:
            return (1 << 8 * size) - 1
        try:
            space = self.front.get_config(end)
        except PeerError:
            if not self.alive:
                raise
            return (1 << 8 * size) - 1
        return int.from_bytes(space[offset:end], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes. Raises Refused where it is read-only."""
        self.front.set_config(offset, value.to_bytes(size, "little"))

    @property
    def alive(self) -> bool:
        """Whether the back end has not hung up."""
        return not _readable(self.front.fileno(), 0.0)

    def facts(self) -> dict[str, Any]:
        """Return the peer and the protocol features agreed on."""
        return {"peer": self.front.name, "protocol_features": self.front.protocol}

    # Insides.

    def _stop_all(self) -> None:
        for index in list(self._events):
            self.front.stop_queue(index)
            self._drop_events(index)

    def _drop_events(self, index: int) -> None:
        for fd in self._events.pop(index, ()):
            os.close(fd)

    def _wait_config(self, timeout: float) -> bool:
        back, end = self.front.back, time.monotonic() + timeout
        while back is not None and _readable(back.fileno(), max(end - time.monotonic(), 0.0)):
            message = back.receive()
            if message is not None:
                return True
        return False


def _readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1e3))
