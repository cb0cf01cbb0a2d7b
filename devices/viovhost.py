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

from functools import partial
from select import EPOLLET, EPOLLIN
from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError
from devices.device import INFO, WARNING, Device
from devices.eventfds import signal_if_room
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_RESET, F_VERSION_1
from devices.nethdr import NET_F_CTRL_VQ, NET_F_MQ
from devices.vhostask import RefusedError
from devices.vhosthand import GivingHost, Handover
from devices.vhostlook import Face
from devices.vhostpairs import CONTROL_SIZE, Pairs
from devices.vhostpeer import BackEnd
from devices.vhostwire import P_RESET_DEVICE, P_STATUS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.guestmem import GuestMemory
    from devices.vhostfront import FrontEnd
    from devices.virtqueue import VirtQueue

PAUSE: Final = 1.5  # seconds for a pause: the VM process waits 2 s
BATCH: Final = 64  # chains popped together
BUDGET: Final = 256  # chains of one wake-up
_NET: Final = 1  # virtio device id


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
        self._hand = Handover(host, memory, fds, self._face, pairs=self._pairs, name=self._name)
        self._peer.run, self._peer.lost = self._run, self._hand.lost
        self._paused = False
        self._resumes, self._pairs_used = False, 1

    def begin(self) -> None:
        """Meet the back end for the first time; what it is then, it has to be ever after."""
        self._peer.count, face = self.totals[0], self._face
        if not face.queues:
            self._peer.begin()
            self.totals[0] = self._peer.count
        self.features = face.features
        if self._pairs is None:
            self.queue_sizes = self.queue_sizes[: face.queues]
        relays = not (face.keeps_books or self._settings["in_order"])
        self.ring_features = F_VERSION_1 | face.offered & (
            F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET
        )
        if not relays:
            self.ring_features |= face.offered & F_IN_ORDER
            self.in_order = bool(face.offered & F_IN_ORDER)
            self._hand.go_direct(self.host)
        if self._pairs is not None:
            self.dependencies = ((NET_F_MQ, NET_F_CTRL_VQ),)
            self._pairs.listen(self._hand.parts[2].given[0], partial(self._hand.live, 2))
        # For edges, and never read: who else has an eventfd may have made it one that blocks.
        for index in range(face.queues):
            called = partial(self._called, index)
            self.host.watch(self._hand.parts[index].call, called, EPOLLIN | EPOLLET)
        self.host.watch(self._hand.err, self._broken, EPOLLIN | EPOLLET)
        how = "queues relayed" if relays else "queues direct"
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
        self._hand.begin(features, queues)
        if self._pairs is not None:
            self._pairs.begin(features)
        if self._resumes:
            self._resumes = False
            if self._pairs is not None:
                self._pairs.used = self._pairs_used
                self._pairs.adopt(self._hand.live(self._pairs.index))
            self._hand.adopt()
        self._run()

    def queue_enabled(self, index: int) -> None:
        """Hand over one queue more."""
        if index >= len(self._hand.parts):
            return  # the control queue
        self._hand.parts[index].renew()
        if self._hand.served:
            self._peer.attempt(partial(self._hand.start_queue, index))

    def reset_queue(self, index: int) -> None:
        """Take one queue back."""
        if index < len(self._hand.parts):
            self._peer.attempt(partial(self._hand.stop_queue, index))
            self._hand.parts[index].shadow.reset()

    def reset(self) -> None:
        """Take all queues back, and have the back end forget the driver."""
        if self._hand.queues:
            self._hand.queues = ()
            self._peer.attempt(self._hand.stop)
            self._peer.attempt(self._forget)
        self._hand.reset()
        self._face.written.clear()
        if self._pairs is not None:
            self._pairs.end()

    def pause(self) -> None:
        """Take the queues back for now; the back end has finished what it had begun."""
        self._paused = True
        self._peer.attempt(self._hand.stop, PAUSE)

    def unpause(self) -> None:
        """Hand them over again, where they were."""
        self._paused = False
        self._run()

    def msix(self, on: bool) -> None:
        """Let the back end interrupt by itself, or see to it that ISR tells of it."""
        self._hand.msix = on
        if not self._hand.relays:
            self._peer.attempt(self._hand.turn_calls)

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
            "msix": self._hand.msix,
            "area": self._hand.kept.save(),
            "pairs": self._pairs.used if self._pairs is not None else 0,
        }

    def recall(self, state: dict[str, Any]) -> None:
        """Be for the driver what the predecessor was."""
        self._face.load(state["face"])

    def load(self, state: dict[str, Any]) -> None:
        """Go on for it, with whatever back end comes next."""
        if "face" not in state:
            return
        self._resumes, self._hand.msix = True, bool(state["msix"])
        self._pairs_used = min(max(int(state["pairs"]), 1), len(self._hand.parts) // 2)
        self._hand.kept.load(state["area"])
        self.host.tell("peer-lost")

    def take_over(self) -> None:
        """Go on when there is a back end."""
        self._paused = False

    def _run(self) -> None:
        """Have the back end serve every queue that the driver has enabled."""
        self.totals[0] = self._peer.count
        if self._hand.queues and not self._paused and not self._hand.served:
            self._peer.attempt(self._hand.start)

    def _make_pairs(self) -> Pairs | None:
        """Return what chooses among several queue pairs of a network device."""
        count = self._settings["queues"] // 2
        several = self._settings["virtio_id"] == _NET and count > 1
        return Pairs(self.host, count, self._choose_pairs) if several else None

    def _choose_pairs(self) -> None:
        """Enable the queues of the pairs that the driver has chosen, and no others."""
        self.host.checkpoint()
        self._peer.attempt(self._hand.choose)

    def _forget(self, link: FrontEnd) -> None:
        if link.protocol & P_RESET_DEVICE:
            link.reset_device()
        elif link.protocol & P_STATUS:
            link.set_status(0)

    # What passes through here.

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Offer the back end what the driver has made available, if queues are relayed."""
        if self._pairs is not None:
            return self._pairs.serve(index, queue)
        part = self._hand.parts[index]
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
        if self._hand.relays:
            self._peer.attempt(lambda link: self._hand.collect(index))
        elif self._hand.live(index) is not None:
            self.host.call(index)

    def _broken(self, _events: int) -> None:
        """The back end cannot go on with a queue: so it says of what a driver has written."""
        if self._hand.queues:
            self._peer.attempt(self._hand.stop)
            raise GuestError(f"{self._name} reports a broken queue")
