"""A virtio device of any kind that another program serves, by vhost-user: the front end.

The driver's registers are here, as every device's are; its queues and buffers are the other
program's, the *back end's*. This process is what stands between: it holds one end of a socket and
a guest's memory, in a jail, and nothing that it is told reaches the VM process but words.

    driver ── kick ──► back end ── call ──► driver     direct: this process sleeps
    driver ── kick ──► this process ──► back end       relayed, see below
    driver ◄─ call ─── this process ◄── back end

**Calls are relayed** while MSI-X is off, since a driver then asks ISR, which is here, and where
KVM does not carry interrupts. **Queues are relayed** for a back end that keeps no in-flight area
(`vhostshadow`), so that its end costs the guest nothing but time.

**The back end may go**, and come back as another process. `host.tell` says so to the VM process,
which connects anew and sends the socket as a setting. Meanwhile the driver waits: its registers
answer, its requests stay where they are. Then all is as it was: features, configuration as
written, queues, and what was in flight. A back end that is not what its predecessor was, or talks
nonsense, is sent away, and told apart from one that is gone, since it is tried less often.

Words:  peer-up  peer-lost (it is gone)  peer-bad (it is sent away)
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from functools import partial
from select import EPOLLET, EPOLLIN
from typing import TYPE_CHECKING, Any, Final, Protocol

from config.errors import GuestError
from devices.device import INFO, WARNING, Device, Host
from devices.eventfds import signal_if_room
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1
from devices.nethdr import NET_F_CTRL_VQ, NET_F_MQ
from devices.vhostask import RefusedError
from devices.vhostfront import Ring
from devices.vhostlook import Face
from devices.vhostpairs import CONTROL_SIZE, Pairs
from devices.vhostparts import HVA, Kept, Part, regions
from devices.vhostpeer import BackEnd
from devices.vhostshadow import STRIDE, USED_AT, Shadow
from devices.vhostwire import P_INFLIGHT_SHMFD, P_RESET_DEVICE, P_STATUS, Front, PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.guestmem import GuestMemory
    from devices.vhostfront import FrontEnd
    from devices.virtqueue import VirtQueue

PAUSE: Final = 1.5  # seconds for a pause: the VM process waits 2 s
BATCH: Final = 64  # chains popped together
BUDGET: Final = 256  # chains of one wake-up
_NET: Final = 1  # virtio device id

_STATUS: Final = 1 | 2 | 8  # ACKNOWLEDGE, DRIVER, FEATURES_OK
_DRIVER_OK: Final = 4


class GivingHost(Host, Protocol):
    """A process that can let another one serve its queues."""

    def give(self, index: int) -> tuple[int, int]:
        """Return the eventfds of a queue's kicks and calls (-1: none); see Process."""


def create(
    settings: Mapping[str, Any], fds: dict[str, int], memory: GuestMemory, host: GivingHost
) -> Viovhost:
    """Make the device on the connected socket `peer`, and keep `memory`.

    `rings` and `area` are files of shared memory. Without `peer` this process takes the place of
    one that was killed, and is given a socket as one whose back end has gone.

    Settings are those of vmm/peers.py: `queues` is how many there are to be, `least` how many the
    back end must have unless that is `exact`, `in_order` that it completes all in order.
    """
    names = "peer", "memory", "rings", "area"
    return Viovhost(memory, host, settings, {name: fds.pop(name, -1) for name in names})


class Viovhost(Device):
    """The driver's view of a device that is elsewhere."""

    host: GivingHost

    def __init__(
        self,
        memory: GuestMemory,
        host: GivingHost,
        settings: Mapping[str, Any],
        fds: Mapping[str, int],
    ) -> None:
        """Take over the descriptors `peer`, `memory`, `rings` and `area`."""
        super().__init__(memory, host)
        self._settings = settings
        self._name: str = settings["path"]
        count, self._pairs = settings["queues"], self._make_pairs()
        self.queue_sizes = (settings["queue_size"],) * count + (CONTROL_SIZE,) * bool(self._pairs)
        self._face = Face(settings)
        self._peer = BackEnd(host, self._face, self._name, fds["peer"])
        self._peer.run, self._peer.lost = self._run, self._lost
        size = STRIDE * count
        area = memoryview(mmap.mmap(fds["rings"], size))
        self._parts = [
            Part(Shadow(area[STRIDE * i : STRIDE * (i + 1)], self._name)) for i in range(count)
        ]
        self._err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._relays = True
        self._msix = self._paused = False
        self._served = False  # the back end knows features and memory, and has the queues
        self._kept = Kept(fds["area"], count)
        self._resumes, self._pairs_used = False, 1
        self._driver_features = 0
        self._queues: Sequence[VirtQueue | None] = ()
        self._regions = regions(memory, fds["memory"], fds["rings"], size)

    def begin(self) -> None:
        """Meet the back end for the first time; what it is then, it has to be ever after."""
        self._peer.count, face = self.totals[0], self._face
        if not face.queues:
            self._peer.begin()
            self.totals[0] = self._peer.count
        self.features = face.features
        if self._pairs is None:
            self.queue_sizes = self.queue_sizes[: face.queues]
        self._relays = not (face.keeps_books or self._settings["in_order"])
        if not self._relays:
            self._regions.pop()
        self.ring_features = F_VERSION_1 | face.offered & (
            F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET
        )
        if not self._relays:
            self.ring_features |= face.offered & F_IN_ORDER
            self.in_order = bool(face.offered & F_IN_ORDER)
            for index in range(face.queues):
                self._parts[index].given = self.host.give(index)
        if self._pairs is not None:
            self.dependencies = ((NET_F_MQ, NET_F_CTRL_VQ),)
            self._pairs.listen(self._parts[2].given[0], partial(self._live, 2))
        # For edges, and never read: who else has an eventfd may have made it one that blocks.
        for index in range(face.queues):
            called = partial(self._called, index)
            self.host.watch(self._parts[index].call, called, EPOLLIN | EPOLLET)
        self.host.watch(self._err, self._broken, EPOLLIN | EPOLLET)
        how = "queues relayed" if self._relays else "queues direct"
        self.host.log(INFO, f"served by {self._name}: {face.describe()}, {how}")

    # Configuration space.

    def config(self) -> bytes:
        """Return the configuration space as the back end last told it."""
        return self._face.config

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass a driver's write on; a back end that comes later gets it, too."""
        self._face.written[offset] = data

        def write(link: FrontEnd) -> None:
            try:
                link.set_config(offset, data)
            except RefusedError as err:  # what is read-only stays as it is
                self._face.written.pop(offset, None)
                self.host.log(WARNING, err.what)
            self._face.fetch(link)

        self._peer.attempt(write)

    # Life of a driver.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Hand the queues over, if there is anybody."""
        self._driver_features, self._queues = features, queues
        for part in self._parts:
            part.base, part.fresh = 0, True
        if self._pairs is not None:
            self._pairs.begin(features)
        if self._resumes:
            self._resumes = False
            self._adopt()
        self._run()

    def _adopt(self) -> None:
        """Find out where a killed predecessor's queues are."""
        if self._pairs is not None:
            self._pairs.used = self._pairs_used
            control = self._live(self._pairs.index)
            if control is not None:
                self._pairs.adopt(control)
        for index, part in enumerate(self._parts):
            queue = self._live(index)
            if queue is None or (self._pairs is not None and not self._pairs.has(index)):
                continue
            part.fresh = False
            if self._relays:
                chains = queue.resubmit()
                part.shadow.outstanding = {chain.head: chain.writable_bytes for chain in chains}
            else:
                part.base = self._used_index(queue)

    def queue_enabled(self, index: int) -> None:
        """Hand over one queue more."""
        if index >= len(self._parts):
            return  # the control queue
        part = self._parts[index]
        part.base, part.fresh = 0, True
        if self._served:
            self._peer.attempt(partial(self._start_queue, index))

    def reset_queue(self, index: int) -> None:
        """Take one queue back."""
        if index < len(self._parts):
            self._peer.attempt(partial(self._stop_queue, index))
            self._parts[index].shadow.reset()

    def reset(self) -> None:
        """Take all queues back, and have the back end forget the driver."""
        if self._queues:
            self._queues = ()
            self._peer.attempt(self._stop)
            self._peer.attempt(self._forget)
        for part in self._parts:
            part.shadow.reset()
        self._kept.area = None
        self._face.written.clear()
        if self._pairs is not None:
            self._pairs.end()

    def pause(self) -> None:
        """Take the queues back for now; the back end has finished what it had begun."""
        self._paused = True
        self._peer.attempt(self._stop, PAUSE)

    def unpause(self) -> None:
        """Hand them over again, where they were."""
        self._paused = False
        self._run()

    def msix(self, on: bool) -> None:
        """Let the back end interrupt by itself, or see to it that ISR tells of it."""
        self._msix = on
        if self._relays:
            return

        def turn(link: FrontEnd) -> None:
            for index, part in enumerate(self._parts):
                if part.started:
                    link.set_fd(Front.SET_VRING_CALL, index, self._call_fd(part))
                    self.host.call(index)  # one may have gone where nobody looks any more

        self._peer.attempt(turn)

    def close(self) -> None:
        """Hang up."""
        self._peer.close()

    # The back end.

    def take(self, name: str, value: Any, fd: int) -> Any:
        """Take the socket of a back end that is to take the place of one that is gone."""
        if name != "peer":
            return super().take(name, value, fd)
        self._peer.take(fd)
        return True

    def remember(self) -> dict[str, Any]:
        """Return what the back end was found to be, and what the driver has chosen."""
        return {
            "face": self._face.save(),
            "msix": self._msix,
            "area": self._kept.save(),
            "pairs": self._pairs.used if self._pairs is not None else 0,
        }

    def recall(self, state: dict[str, Any]) -> None:
        """Be for the driver what the predecessor was."""
        self._face.load(state["face"])

    def load(self, state: dict[str, Any]) -> None:
        """Go on for it, with whatever back end comes next."""
        if "face" not in state:
            return
        self._resumes, self._msix = True, bool(state["msix"])
        self._pairs_used = min(max(int(state["pairs"]), 1), len(self._parts) // 2)
        self._kept.load(state["area"])
        self.host.tell("peer-lost")

    def take_over(self) -> None:
        """Go on when there is a back end."""
        self._paused = False

    def _lost(self) -> None:
        """The back end is gone: take what it had done, and find out where the next has to start."""
        self._served = False
        for index, part in enumerate(self._parts):
            queue = self._live(index)
            if part.started and queue is not None:
                if self._relays:
                    with suppress(PeerError):
                        self._collect(index)
                else:
                    part.base = self._used_index(queue)
            part.started = False

    def _used_index(self, queue: VirtQueue) -> int:
        """Return where its used ring ends."""
        return int.from_bytes(self.memory.read(queue.areas[2] + 2, 2), "little")

    # Its queues.

    def _live(self, index: int) -> VirtQueue | None:
        return self._queues[index] if index < len(self._queues) else None

    def _run(self) -> None:
        """Have the back end serve every queue that the driver has enabled."""
        self.totals[0] = self._peer.count
        if self._queues and not self._paused and not self._served:
            self._peer.attempt(self._start)

    def _start(self, link: FrontEnd) -> None:
        features = self._driver_features & link.features
        if self._pairs is not None:
            features &= ~NET_F_CTRL_VQ  # that queue is ours: nobody else shall wait for commands
        link.accept(features)
        link.share(self._regions)
        if link.protocol & P_STATUS:
            link.set_status(_STATUS)
        if not self._relays and link.protocol & P_INFLIGHT_SHMFD:
            area = self._kept.area
            if area is None:
                size = max((queue.size for queue in self._queues if queue), default=1)
                area = self._kept.make(link, self._face.queues, size)
                self.host.checkpoint()
            link.set_inflight(area)
        for index in range(self._face.queues):
            self._start_queue(index, link)
        if link.protocol & P_STATUS:
            link.set_status(_STATUS | _DRIVER_OK)
        self._served = True

    def _start_queue(self, index: int, link: FrontEnd) -> None:
        queue, part = self._live(index), self._parts[index]
        if queue is None or part.started or not (self._pairs is None or self._pairs.has(index)):
            return
        desc, avail, used = (HVA + gpa for gpa in queue.areas)
        kick, base = part.given[0], part.base
        if self._relays:
            event_idx = bool(self._driver_features & F_EVENT_IDX)
            part.shadow.begin(queue.size, event_idx=event_idx)
            avail = self._regions[-1].hva + STRIDE * index
            used, kick, base = avail + USED_AT, part.kick, 0
        ring = Ring(queue.size, base, desc, avail, used)
        # Enabled first: what waits in a queue that starts disabled may be thrown away.
        link.enable_queue(index, on=self._pairs is None or index < 2 * self._pairs.used)
        link.start_queue(index, ring, kick=kick, call=self._call_fd(part), err=self._err)
        part.started = True
        if not part.fresh:
            # Its predecessor may have been killed before a call, and after it had taken a kick.
            signal_if_room(kick, 1)
            self.host.call(index)
        if self._relays:
            self.host.schedule(index)
        part.fresh = False

    def _stop(self, link: FrontEnd) -> None:
        self._served = False
        for index in range(self._face.queues):
            self._stop_queue(index, link)

    def _stop_queue(self, index: int, link: FrontEnd) -> None:
        part = self._parts[index]
        if part.started:
            part.base = link.stop_queue(index)
            part.started = False
            self._collect(index)

    def _make_pairs(self) -> Pairs | None:
        """Return what chooses among several queue pairs of a network device."""
        count = self._settings["queues"] // 2
        several = self._settings["virtio_id"] == _NET and count > 1
        return Pairs(self.host, count, self._choose_pairs) if several else None

    def _choose_pairs(self) -> None:
        """Enable the queues of the pairs that the driver has chosen, and no others."""

        def choose(link: FrontEnd) -> None:
            for index, part in enumerate(self._parts):
                if part.started and self._pairs is not None:
                    link.enable_queue(index, on=index < 2 * self._pairs.used)

        self.host.checkpoint()
        self._peer.attempt(choose)

    def _forget(self, link: FrontEnd) -> None:
        if link.protocol & P_RESET_DEVICE:
            link.reset_device()
        elif link.protocol & P_STATUS:
            link.set_status(0)

    def _call_fd(self, part: Part) -> int:
        """Return where the back end is to call."""
        direct = not self._relays and self._msix and part.given[1] >= 0
        return part.given[1] if direct else part.call

    # What passes through here.

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Offer the back end what the driver has made available, if queues are relayed."""
        if self._pairs is not None:
            return self._pairs.serve(index, queue)
        part = self._parts[index]
        if not part.started:
            return False  # all queues are scheduled when they are
        left, tell = BUDGET, False
        queue.disable_kicks()
        while left > 0:
            chains = queue.pop_batch(min(left, BATCH))
            if not chains:
                if queue.enable_kicks():
                    continue
                break
            left -= len(chains)
            tell |= part.shadow.offer({chain.head: chain.writable_bytes for chain in chains})
        if tell:
            signal_if_room(part.kick, 1)
        return left <= 0

    def _called(self, index: int, _events: int) -> None:
        """The back end calls, and it is here that somebody listens."""
        if self._relays:
            self._peer.attempt(lambda link: self._collect(index))
        elif self._live(index) is not None:
            self.host.call(index)

    def _collect(self, index: int) -> None:
        """Give back to the driver what the back end has done. Raises PeerError."""
        queue = self._live(index)
        if not self._relays or queue is None:
            return
        queue.push_batch(self._parts[index].shadow.take())
        if queue.should_call():
            self.host.call(index)

    def _broken(self, _events: int) -> None:
        """The back end cannot go on with a queue: so it says of what a driver has written."""
        if self._queues:
            self._peer.attempt(self._stop)
            raise GuestError(f"{self._name} reports a broken queue")
