"""The queues of a device that another program serves: handed to the back end, and taken back."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from devices.device import Host
from devices.eventfds import signal_if_room
from devices.features import F_EVENT_IDX
from devices.nethdr import NET_F_CTRL_VQ
from devices.vhostfront import Ring
from devices.vhostparts import HVA, USED_END, Kept, Part, regions
from devices.vhostshadow import STRIDE, USED_AT, Shadow
from devices.vhostwire import P_INFLIGHT_SHMFD, P_STATUS, Front, PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.guestmem import GuestMemory
    from devices.vhostfront import FrontEnd
    from devices.vhostlook import Face
    from devices.vhostpairs import Pairs
    from devices.virtqueue import VirtQueue

_STATUS: Final = 1 | 2 | 8  # ACKNOWLEDGE, DRIVER, FEATURES_OK
_DRIVER_OK: Final = 4


class GivingHost(Host, Protocol):
    """A process that can let another one serve its queues."""

    def give(self, index: int) -> tuple[int, int]:
        """Return the eventfds of a queue's kicks and calls (-1: none); see Process."""


class Handover:
    """All queues: which of them the back end has, and where each of them is."""

    def __init__(
        self,
        host: Host,
        memory: GuestMemory,
        fds: Mapping[str, int],
        face: Face,
        *,
        pairs: Pairs | None,
        name: str,
    ) -> None:
        """Take over the descriptors `memory`, `rings` and `area`; see viovhost.create."""
        self._host, self._memory, self._face, self._pairs = host, memory, face, pairs
        count: int = face.most
        size = STRIDE * count
        area = memoryview(mmap.mmap(fds["rings"], size))
        #: One for each that there may be.
        self.parts = [Part(Shadow(area[STRIDE * i : STRIDE * (i + 1)], name)) for i in range(count)]
        self.kept = Kept(fds["area"], count)
        self._regions = regions(memory, fds["memory"], fds["rings"], size)
        #: Signalled by a back end that cannot go on with a queue.
        self.err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.relays = True  #: whether queues pass through this process
        self.msix = False  #: whether calls may go past ISR
        self.served = False  #: whether the back end knows features and memory, and has the queues
        self.features = 0  #: what the driver has accepted
        self.queues: Sequence[VirtQueue | None] = ()  #: those of the driver; empty without one

    def go_direct(self, host: GivingHost) -> None:
        """Let the back end have kicks, calls and rings to itself; for all that comes."""
        self.relays = False
        self._regions.pop()
        for index in range(self._face.queues):
            self.parts[index].given = host.give(index)

    def begin(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Know a driver, whose queues have not run."""
        self.features, self.queues = features, queues
        for part in self.parts:
            part.renew()

    def reset(self) -> None:
        """Forget what was in flight."""
        for part in self.parts:
            part.shadow.reset()
        self.kept.area = None

    def live(self, index: int) -> VirtQueue | None:
        """Return a queue of the driver's, if it is enabled."""
        return self.queues[index] if index < len(self.queues) else None

    def adopt(self) -> None:
        """Find out where a killed predecessor's queues are."""
        for index, part in enumerate(self.parts):
            queue = self.live(index)
            if queue is None or (self._pairs is not None and not self._pairs.has(index)):
                continue
            part.fresh = False
            if self.relays:
                chains = queue.resubmit()
                part.shadow.outstanding = {chain.head: chain.writable_bytes for chain in chains}
            part.base = USED_END

    def start(self, link: FrontEnd) -> None:
        """Have a back end serve every queue that the driver has enabled. Raises PeerError."""
        features = self.features & link.features
        if self._pairs is not None:
            features &= ~NET_F_CTRL_VQ  # that queue is ours: nobody else shall wait for commands
        link.accept(features)
        link.share(self._regions)
        if link.protocol & P_STATUS:
            link.set_status(_STATUS)
        if not self.relays and link.protocol & P_INFLIGHT_SHMFD:
            area = self.kept.area
            if area is None:
                size = max((queue.size for queue in self.queues if queue), default=1)
                area = self.kept.make(link, self._face.queues, size)
                self._host.checkpoint()
            link.set_inflight(area)
        for index in range(self._face.queues):
            self.start_queue(index, link)
        if link.protocol & P_STATUS:
            link.set_status(_STATUS | _DRIVER_OK)
        self.served = True

    def start_queue(self, index: int, link: FrontEnd) -> None:
        """Have it serve one queue, where that is its to serve."""
        queue, part = self.live(index), self.parts[index]
        if queue is None or part.started or not (self._pairs is None or self._pairs.has(index)):
            return
        desc, avail, used = (HVA + gpa for gpa in queue.areas)
        kick, base = part.given[0], part.base
        if self.relays:
            event_idx = bool(self.features & F_EVENT_IDX)
            part.shadow.begin(queue.size, event_idx=event_idx)
            avail = self._regions[-1].hva + STRIDE * index
            used, kick, base = avail + USED_AT, part.kick, 0
        if base == USED_END:
            base = int.from_bytes(self._memory.read(queue.areas[2] + 2, 2), "little")
        ring = Ring(queue.size, base, desc, avail, used)
        # Enabled first: what waits in a queue that starts disabled may be thrown away.
        link.enable_queue(index, on=self._pairs is None or index < 2 * self._pairs.used)
        link.start_queue(index, ring, kick=kick, call=self._call_fd(part), err=self.err)
        part.started = True
        if not part.fresh:
            # Its predecessor may have been killed before a call, and after it had taken a kick.
            signal_if_room(kick, 1)
            self._host.call(index)
        if self.relays:
            self._host.schedule(index)
        part.fresh = False

    def stop(self, link: FrontEnd) -> None:
        """Take all queues back. Raises PeerError."""
        self.served = False
        for index in range(self._face.queues):
            self.stop_queue(index, link)

    def stop_queue(self, index: int, link: FrontEnd) -> None:
        """Take one back, with all that has been done in it."""
        part = self.parts[index]
        if part.started:
            part.base = link.stop_queue(index)
            part.started = False
            self.collect(index)

    def _call_fd(self, part: Part) -> int:
        """Return where the back end is to call."""
        direct = not self.relays and self.msix and part.given[1] >= 0
        return part.given[1] if direct else part.call

    def collect(self, index: int) -> None:
        """Give back to the driver what the back end has done. Raises PeerError."""
        queue = self.live(index)
        if not self.relays or queue is None:
            return
        queue.push_batch(self.parts[index].shadow.take())
        if queue.should_call():
            self._host.call(index)

    def lost(self) -> None:
        """The back end is gone: take what it had done, and find out where the next has to start."""
        self.served = False
        for index, part in enumerate(self.parts):
            queue = self.live(index)
            if part.started and queue is not None:
                if self.relays:
                    with suppress(PeerError):
                        self.collect(index)
                part.base = USED_END
            part.started = False

    def choose(self, link: FrontEnd) -> None:
        """Enable the queues of the pairs that the driver has chosen, and no others."""
        for index, part in enumerate(self.parts):
            if part.started and self._pairs is not None:
                link.enable_queue(index, on=index < 2 * self._pairs.used)

    def turn_calls(self, link: FrontEnd) -> None:
        """Have the back end call where it is to call now."""
        for index, part in enumerate(self.parts):
            if part.started:
                link.set_fd(Front.SET_VRING_CALL, index, self._call_fd(part))
                self._host.call(index)  # one may have gone where nobody looks any more
