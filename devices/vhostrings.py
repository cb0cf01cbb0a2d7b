"""The rings of one vhost-user connection: set up piece by piece, started, stopped, moved.

    size, addresses, base ─┐
    features, memory ──────┼─► complete ─ open: a VirtQueue ─ enabled ─ live: the device serves it
    SET_VRING_KICK ────────┘                    ▲                │
                                    GET_VRING_BASE, RESET_DEVICE ◄┘

A ring is *started* by the descriptor for its kicks, or by the word that there is none, as soon as
everything else is there, and looked into once when it becomes live. The specification has it
start with the first kick; but after a reconnection the driver may have kicked our predecessor,
and would wait for ever.

How kicks and calls come and go is in `vhostbells.py`.

**Errors.** GuestError means that ring or driver are broken: nothing is served any more until a
reset, or until every ring has been stopped, and the ring's error eventfd tells.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from config.errors import GuestError, HostError
from devices.device import WARNING
from devices.features import F_RING_PACKED
from devices.inflight import Inflight
from devices.ring import MAX_SIZE, QueueState
from devices.vhostbells import Bells
from devices.vhostlog import PAGE as LOG_PAGE
from devices.vhostlog import Logged, open_logged
from devices.vhostring import Ring
from devices.vhostwire import F_LOG_ALL, F_PROTOCOL_FEATURES, VRING_LOG_USED
from devices.virtqueue import open_queue

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Device
    from devices.guestmem import GuestMemory
    from devices.loop import Loop
    from devices.vhostlog import DirtyLog
    from devices.vhostmem import Regions
    from devices.vhostring import Addresses
    from devices.virtqueue import VirtQueue

PACKED_START: Final = 0x8000_8000  # the base of a packed ring that is new: wrap counters of 1
_NO_EFFECT: Final = F_LOG_ALL  # on a queue that is open: it may change


class Rings:
    """All rings of a device."""

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        loop: Loop,
        say: Callable[[int, str], None],
    ) -> None:
        self.device, self._memory, self._say = device, memory, say
        self.rings = [Ring(index) for index in range(len(device.queue_sizes))]
        #: What the device serves, by index.
        self.live: list[VirtQueue | None] = [None] * len(self.rings)
        self.bells = Bells(self.rings, loop, self.serve, say)
        self.features = -1  # -1: not settled
        self.regions: Regions | None = None
        self.broken = False
        self._active = False  # whether the device knows of a driver
        self.log: DirtyLog | None = None
        self._log_fd = -1

    def ring(self, index: int) -> Ring:
        """Return a ring. Raises HostError if there is none."""
        if index >= len(self.rings):
            raise HostError(f"there is no ring {index}: there are {len(self.rings)}")
        return self.rings[index]

    # What is said about rings, one thing at a time.

    def set_features(self, features: int) -> None:
        """Settle the features. Raises HostError if a started ring has others."""
        changed = (features ^ self.features) & ~_NO_EFFECT if self.features >= 0 else -1
        if changed and any(ring.queue is not None for ring in self.rings):
            raise HostError(f"features {features:#x} while rings are started")
        if changed:
            self._deactivate()
        if (features ^ self.features) & F_LOG_ALL:
            self.move(lambda: setattr(self, "features", features))
        else:
            self.features = features
            self.settle_all()

    def set_log(self, log: DirtyLog) -> None:
        """Log writes there from now on, as long as F_LOG_ALL is among the features.

        Raises HostError if it does not reach to the end of memory.
        """
        if self.regions is not None:
            if log.nr_pages * LOG_PAGE < self.regions.end:
                what = f"a log of {log.nr_pages} pages"
                raise HostError(f"{what} for guest memory up to {self.regions.end:#x}")
            log.cover(self.regions.spans)
        if self.features >= 0 and self.features & F_LOG_ALL:
            self.move(lambda: setattr(self, "log", log))
        else:
            self.log = log

    def set_log_fd(self, fd: int) -> None:
        """Take the descriptor that tells of news in the log."""
        if self._log_fd >= 0:
            os.close(self._log_fd)
        self._log_fd = fd

    def set_size(self, index: int, size: int) -> None:
        """Say how many entries a ring has. Raises HostError."""
        ring = self._stopped(index)
        if not 0 < size <= MAX_SIZE:
            raise HostError(f"ring {index} with {size} entries")
        ring.size = size
        self.settle(ring)

    def set_base(self, index: int, base: int) -> None:
        """Say where a ring goes on. Raises HostError."""
        self._stopped(index).base = base

    def set_addresses(self, index: int, flags: int, addresses: Addresses) -> None:
        """Say where a ring is. Raises HostError, GuestError.

        Of one that is started only the logging may change.
        """
        ring = self.ring(index)
        if flags & ~VRING_LOG_USED:
            raise HostError(f"flags {flags:#x} of ring {index}")
        if self.regions is None:
            raise HostError(f"ring {index} has addresses, and there is no memory yet")
        for hva in addresses[:3]:
            self.regions.gpa(hva)
        if ring.queue is not None and ring.addresses is not None:
            if addresses[:3] != ring.addresses[:3]:
                raise HostError(f"ring {index} is started: it cannot move")
            if addresses != ring.addresses:
                self.move(lambda: setattr(ring, "addresses", addresses))
            return
        ring.addresses = addresses
        self.settle(ring)

    def set_kick(self, index: int, fd: int) -> None:
        """Take the descriptor for kicks (-1: poll instead), which starts the ring.

        Raises HostError if it cannot be waited for, GuestError if the ring cannot be.
        """
        ring = self.ring(index)
        self.bells.listen(ring, fd)
        ring.started, ring.polled = True, fd < 0
        self.bells.set_poller()
        self.settle(ring)
        if self.live[index] is not None:
            self.bells.schedule(index)

    def set_call(self, index: int, fd: int) -> None:
        """Take the descriptor for calls (-1: none); one that was due is made.

        So is one that may have gone to the descriptor before, at which nobody looks any more: QEMU
        sets the one that counts after it has started the ring, and a kick may be seen earlier than
        that message. One call too many does no harm.
        """
        ring = self.ring(index)
        ring.replace("call", fd)
        if fd >= 0 and (ring.called or ring.queue is not None):
            self.bells.call(ring)

    def set_error(self, index: int, fd: int) -> None:
        """Take the descriptor for errors (-1: none)."""
        self.ring(index).replace("err", fd)

    def enable(self, index: int, *, on: bool) -> None:
        """Let a ring have effects, or not."""
        ring = self.ring(index)
        ring.enabled = on
        self.settle(ring)

    def set_inflight(self, areas: list[memoryview]) -> None:
        """Take in-flight areas, one per ring from the first on. Raises HostError if too late."""
        if any(ring.queue is not None for ring in self.rings):
            raise HostError("an in-flight area while rings are started")
        for ring in self.rings:
            ring.inflight = areas[ring.index] if ring.index < len(areas) else None

    # Starting and stopping.

    def settle_all(self) -> None:
        """See what has become possible, ring by ring; what is wrong with one is its own affair."""
        for ring in self.rings:
            try:
                self.settle(ring)
            except GuestError as err:
                self.fail(err, ring.index)

    def settle(self, ring: Ring) -> None:
        """Open a ring that is complete, and serve it or not. Raises GuestError."""
        complete = ring.started and ring.size and ring.addresses is not None
        if ring.queue is None and complete and self.features >= 0 and not self.broken:
            ring.queue = self._open(ring, None)
        if ring.queue is None:
            return
        on = ring.enabled or not self.features & F_PROTOCOL_FEATURES
        if self.features & F_LOG_ALL and self.log is None:
            on = False  # a write that is not logged would be lost: wait for the log
        if on and not self.broken and self.live[ring.index] is None:
            try:
                self._begin(ring, ring.queue)
            except GuestError as err:  # what a predecessor left there makes no sense
                self.fail(err, ring.index)
        elif not on and self.live[ring.index] is not None:
            self._quiet(ring)

    def _open(self, ring: Ring, state: QueueState | None) -> VirtQueue:
        """Return the queue of a ring, at `state` or where it was left. Raises GuestError."""
        if ring.addresses is None or self.regions is None:
            raise GuestError(f"ring {ring.index} has no addresses")
        desc, used, avail = (self.regions.gpa(hva) for hva in ring.addresses[:3])
        where = self._memory, ring.size, desc, avail, used
        features, area, in_order = self.features, ring.inflight, self.device.in_order
        if features & F_LOG_ALL and self.log is not None:
            queue = open_logged(
                *where,
                features=features,
                inflight=area,
                in_order=in_order,
                log=self.log,
                log_gpa=ring.addresses.log_gpa,
            )
        else:
            queue = open_queue(*where, features=features, inflight=area, in_order=in_order)
        if state is not None:
            queue.load(state)
        elif ring.base >= 0 and not queue.adopted:
            queue.load(self._state_of(ring.base, used))
        return queue

    def _state_of(self, base: int, used_gpa: int) -> QueueState:
        """Return where a ring goes on, by its vring base.

        A packed ring's base has both cursors, used above avail. A split one's is the avail index
        alone; the used index is in the ring, where only we write.
        """
        if self.features & F_RING_PACKED:
            return QueueState(base & 0xFFFF, base >> 16)
        used = int.from_bytes(self._memory.read(used_gpa + 2, 2), "little")
        return QueueState(base & 0xFFFF, used)

    def _begin(self, ring: Ring, queue: VirtQueue) -> None:
        if not self._active:
            self._active = True
            self.device.activate(self.features, self.live)
        self.live[ring.index] = queue
        self.device.start_queue(ring.index, queue)
        self.bells.schedule(ring.index)

    def _quiet(self, ring: Ring) -> None:
        """Have the device finish with a live ring, and serve it no more. Raises GuestError."""
        index, queue = ring.index, self.live[ring.index]
        if queue is None:
            return
        try:
            self.device.stop_queue(index, queue)
        finally:
            self.live[index] = None
            self.device.reset_queue(index)

    def stop(self, index: int) -> int:
        """Stop a ring; return the base from which it can go on. Raises HostError."""
        ring = self.ring(index)
        packed = self.features >= 0 and self.features & F_RING_PACKED
        base = ring.base if ring.base >= 0 else PACKED_START if packed else 0
        queue = ring.queue
        if queue is not None:
            try:
                self._quiet(ring)
            except GuestError as err:
                self.fail(err, index)
            base = self._base_of(queue)
            self._let_go(queue)
        self.bells.listen(ring, -1)
        ring.forget()
        ring.base = base
        self.bells.set_poller()
        if self.broken and all(ring.queue is None for ring in self.rings):
            self._deactivate()
        return base

    def _let_go(self, queue: VirtQueue) -> None:
        """Leave a ring; what a predecessor left in its in-flight area stays there if it is open."""
        if not queue.nr_in_flight:
            queue.reset()

    def _base_of(self, queue: VirtQueue) -> int:
        avail, used = queue.save()
        if self.features & F_RING_PACKED:
            return avail | used << 16
        # What is in flight is lost: only from here can it be found again.
        return used if queue.nr_in_flight else avail

    def move(self, change: Callable[[], None]) -> None:
        """Have all rings let go of memory and log, make a change, and go on where they were."""
        states: dict[int, QueueState | None] = {}
        for ring in self.rings:
            queue = ring.queue
            if queue is None:
                continue
            try:
                self._quiet(ring)
            except GuestError as err:
                self.fail(err, ring.index)
            states[ring.index] = None if queue.nr_in_flight else queue.save()
            self._let_go(queue)
            ring.queue = None
        change()
        for index, state in states.items():
            ring = self.rings[index]
            try:
                ring.queue = self._open(ring, state)
                self.settle(ring)
            except GuestError as err:
                self.fail(err, index)
        self.settle_all()

    def set_regions(self, regions: Regions) -> None:
        """Use another memory from now on."""
        if self.regions is not None and regions.is_same_memory(self.regions):
            self.regions = regions
            return

        def change() -> None:
            self.regions = regions
            self._memory.replace(regions.spans)
            if self.log is not None:
                self.log.cover(regions.spans)

        self.move(change)

    def reset(self) -> None:
        """Return device and rings to their first state; what is set up has to be set up again.

        Each ring is stopped in good order and remembers where, for a monitor may ask for that
        later: QEMU up to 7.2 writes status 0 to stop a guest for a while, and asks then.
        """
        for ring in self.rings:
            self.stop(ring.index)
            if ring.inflight is not None:  # what a killed predecessor left there is void, too
                Inflight(ring.inflight, 1, packed=False).void()
            ring.enabled = ring.called = False
        self._deactivate()

    def _deactivate(self) -> None:
        """Have the device forget its driver."""
        self.broken = False
        self.device.reset()
        self.live[:] = [None] * len(self.live)
        self._active = False

    def fail(self, error: GuestError, index: int = -1) -> None:
        """Serve nothing any more: the driver, or the front end, broke a rule of ring `index`."""
        where = f"ring {index}: " if index >= 0 else ""
        self._say(WARNING, f"{where}broken until a reset: {error.what}")
        self.broken = True
        self.device.reset()
        for ring in self.rings:
            if isinstance(ring.queue, Logged):
                with suppress(GuestError):  # behind the end of the log: it may be this very error
                    ring.queue.mark_all()
        self.live[:] = [None] * len(self.live)
        self._active = False
        for ring in self.rings:
            if ring.started and index in (ring.index, -1):
                self.bells.tell(ring)

    def close(self) -> None:
        """Close all descriptors."""
        self.bells.close()
        self.set_log_fd(-1)

    def _stopped(self, index: int) -> Ring:
        ring = self.ring(index)
        if ring.queue is not None:
            raise HostError(f"ring {index} is started: too late to set it up")
        return ring

    # Kicks.

    def kick(self, index: int) -> None:
        """Take a kick that came as a message, which starts the ring as well. Raises HostError."""
        ring = self.ring(index)
        ring.started = True
        self.settle(ring)
        self.serve(index)

    def serve(self, index: int) -> None:
        """Have the device look into a ring: the hot path from wake-up to device."""
        queue = self.live[index]
        try:
            if queue is not None:
                if self.device.kick(index, queue):
                    self.bells.schedule(index)
            elif (idle := self.rings[index].queue) is not None and not self.broken:
                self.device.idle_kick(index, idle)
        except GuestError as err:
            self.fail(err, index)
        if self.log is not None and self.log.news:
            self.log.news = False
            self.bells.signal(self._log_fd)
