"""A network device whose further queue pairs are served by processes of their own: the first one.

It is the device as ever, but for the queues of the other pairs. Those it leaves to `netpair`
processes, and whatever changes ends in `Remotes.follow`, which returns when they know.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from config.errors import GuestError, HostError
from devices.device import Host
from devices.netdevice import Vionet
from devices.nethdr import ETHERNET
from devices.netlimit import Shares
from devices.netport import Counters
from devices.netqueues import header_bytes_of
from devices.netremote import Remotes
from devices.pcap import OUTBOUND
from devices.spec import COUNTERS_STRIDE
from devices.virtqueue import QueueState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from config.errors import PyvmError
    from devices.guestmem import GuestMemory
    from devices.netlink import Captured
    from devices.netport import Backend
    from devices.virtqueue import VirtQueue


class LeadingHost(Host, Protocol):
    """A process that need not serve all queues of its device."""

    def leave(self, index: int) -> None:
        """Leave the kicks of a queue to another process; see Process."""


class Leader(Vionet):
    """Serves the first pair and the control queue; `netremote.Leader` of the others."""

    host: LeadingHost

    def __init__(
        self,
        memory: GuestMemory,
        host: LeadingHost,
        backend: Backend,
        settings: Mapping[str, Any],
        others: Mapping[int, tuple[int, int]],
    ) -> None:
        """Take over, for each other pair, a connection and the eventfd of its calls."""
        self._paused = self._halted = self._direct = False
        self._off: set[int] = set()  # queues that are being reset
        self._lives: dict[int, tuple[VirtQueue, int]] = {}
        self._old_lives: dict[int, int] = {}  # of queues that a predecessor began
        self._nr_lives = 0
        self._resumes = bool(settings.get("resumes"))
        self._shares: Shares | None = None  # from `begin` on
        super().__init__(memory, host, backend, settings)
        self._others = list(others)
        self._remotes = Remotes(host, self, others, settings.get("lives", ()))

    def begin(self) -> None:
        """Share the limits, and tell the others what to begin with, whenever they read it."""
        for number in self._others:
            for index in self._queues_of(number):
                self.host.leave(index)
        self._shares = Shares(self.totals, 0, 1 + len(self._others))
        self._set_limits()
        super().begin()
        if not self._resumes:
            self._remotes.follow(wait=False)

    # What the others follow.

    def pair_state(self, number: int) -> dict[str, Any]:
        """Return what pair `number` has to do; `netpair` says what it means."""
        return {
            "run": bool(self._queues) and not self._paused and not self._halted,
            "features": self._features,
            "queues": [self._queue_state(index) for index in self._queues_of(number)],
            "used": number < self._pairs,
            "up": self._link.up,
            "offloads": self._offloads,
            "filter": self._look.filter.save(),
            "rates": dict(self._rates.values),
            "snaplen": self._look.captures.snaplen,
            "direct": self._direct,
        }

    def _queues_of(self, number: int) -> tuple[int, int]:
        return 2 * number, 2 * number + 1

    def _queue_state(self, index: int) -> dict[str, Any] | None:
        queue = self._queues[index] if self._queues and index not in self._off else None
        if queue is None or index == self._control_index:
            return None  # without MQ the third queue is the control queue
        if index not in self._lives or self._lives[index][0] is not queue:
            life = self._old_lives.pop(index, 0)
            if not life:
                self._nr_lives = life = self._nr_lives + 1
            self._lives[index] = queue, life
        return {
            "epoch": self._lives[index][1],
            "size": queue.size,
            "areas": list(queue.areas),
            "cursors": list(queue.save()),
        }

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Begin with all pairs; with those that start beside this process, when they are there."""
        super().activate(features, queues)
        self._remotes.follow(wait=not self._resumes)

    def queue_enabled(self, index: int) -> None:
        """Have it served."""
        self._off.discard(index)
        self._remotes.follow()

    def reset_queue(self, index: int) -> None:
        """Be done with a queue, whoever serves it."""
        self._off.add(index)
        self._old_lives.pop(index, None)
        super().reset_queue(index)
        self._remotes.follow()

    def reset(self) -> None:
        """Forget the driver in all processes."""
        super().reset()
        self._off.clear()
        self._lives.clear()
        self._old_lives.clear()
        self._halted = False
        self._remotes.reset()
        self._remotes.follow()

    def halt(self, error: PyvmError) -> None:
        """Have no pair served."""
        self._halted = True
        self._remotes.follow()

    def pause(self) -> None:
        """Have no process look at guest memory, and learn where each queue is."""
        super().pause()
        self._paused = True
        if self._resumes:  # with nothing to follow yet
            return
        self._remotes.follow()
        for number in self._others:
            at = zip(self._queues_of(number), self._remotes.cursors(number), strict=True)
            for index, cursors in at:
                if cursors is not None and self._queues and index in self._lives:
                    with suppress(GuestError):  # what a process says that is taken over
                        self._lives[index][0].load(QueueState(*cursors))

    def unpause(self) -> None:
        """Go on everywhere."""
        self._paused = False
        super().unpause()
        self._remotes.follow(wait=not self._resumes)
        self._resumes = False

    def take_over(self) -> None:
        """Go on everywhere: nothing has changed but the process."""
        self._paused = self._resumes = False
        self._remotes.follow(wait=False)

    def msix(self, on: bool) -> None:
        """Have the others call the driver themselves, or by way of ISR."""
        self._direct = on
        self._remotes.follow()
        for number in self._others:
            for index in self._queues_of(number):
                self.host.call(index)  # one may have gone where nobody looks any more

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the address from an old driver, for all pairs."""
        super().write_config(offset, data)
        self._remotes.follow()

    def _settle(self) -> None:
        """See to it that a command holds in all processes, too, before it is acknowledged."""
        self._remotes.follow()
        super()._settle()

    def _link_changed(self) -> None:
        super()._link_changed()
        self._remotes.follow()

    # Settings.

    def setting(self, name: str, value: Any) -> Any:
        """Change something for all pairs; see Vionet. Raises ConfigError."""
        result = super().setting(name, value)
        if name != "counters":
            self._remotes.follow()
        return result

    def take(self, name: str, value: Any, fd: int) -> Any:
        """Begin a capture, or take the connection to a new `pair` process; see Remotes.take."""
        if name == "pair":
            self._remotes.take(value, fd)
            return True
        result = super().take(name, value, fd)
        self._remotes.follow()
        return result

    def _set_limits(self) -> None:
        """All processes share what is allowed."""
        limits = self._rates.limits(self._shares)
        for pair in self._served:
            pair.limit(limits)

    def _facts(self) -> dict[str, Any]:
        facts = super()._facts()
        for way, mine in self.counters.items():
            whole = Counters(way)
            whole.add(mine)
            for number in self._others:
                other = Counters(way)
                other.resume(self.totals[number * COUNTERS_STRIDE :])
                whole.add(other)
            facts[way] = whole.facts()
        return facts

    def save(self) -> dict[str, Any]:
        """Return what the driver has set. Raises HostError if a pair is just being replaced."""
        for number in self._others:
            used = [self._queue_state(index) is not None for index in self._queues_of(number)]
            known = [at is not None for at in self._remotes.cursors(number)]
            if used != known:
                raise HostError(f"queue pair {number} has no process just now", hint="try again")
        return super().save()

    def remember(self) -> dict[str, Any]:
        """Return all that is not in registers."""
        lives = {**self._old_lives, **{index: life for index, (_, life) in self._lives.items()}}
        return {
            **super().remember(),
            "lives": sorted(lives.items()),
            "nr_lives": self._nr_lives,
            "direct": self._direct,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` or `remember` described."""
        if "lives" in state:
            self._old_lives = {int(index): int(life) for index, life in state["lives"]}
            self._nr_lives, self._direct = int(state["nr_lives"]), bool(state["direct"])
        super().load(state)

    # What the others say.

    def captured(self, frame: Captured) -> None:
        """Show a frame to the capture."""
        sent = frame.direction == OUTBOUND
        self._look.captures.left_out(frame.left_out)
        if self._look.captures.active:
            self._look.captures.shower(sent=sent)([frame.data], frame.length)

    def kept(self, frame: bytes) -> None:
        """Answer a frame for the host's end of a local link; what is not for it goes out."""
        length = header_bytes_of(self._features)
        header, data = frame[:length], frame[length:]
        if not self._queues or not self._link.up or len(data) < ETHERNET:
            return
        if self._look.answer(data, partial=header[0] & 1 == 1):
            return
        try:
            self._backend.ports[0].send([header, data])
        except OSError:  # as good as lost on the way
            return
        self.counters["tx"].frames += 1
        self.counters["tx"].bytes += len(data)

    def port_lost(self, err: OSError) -> None:
        """Take note that the tap is gone, or down."""
        self._link.failed(err)
