"""virtio network device (virtio 1.2 §5.1): what its driver sees, and all of it in one process.

Queues: 2n receives and 2n+1 transmits for queue pair n; behind the last pair the control queue,
which is number 2 for a driver without MQ. Configuration space: see `netconfig`.

    tx queue ── nettx.Sender ──► netport.Port (tap, stream) ── netrx.Receiver ──► rx queue
                                control queue ── netctrl ──► this file

**Offloads** are what the backend offers. A tap's frames of 64 KiB go straight between guest
memory and kernel, one system call each. Payload is not touched, unless somebody wants to see it.
"""

from __future__ import annotations

from select import EPOLLIN
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError
from devices import nethdr as hdr
from devices.device import Device
from devices.features import F_VERSION_1
from devices.netconfig import config_space, offered
from devices.netctrl import Control
from devices.netlimit import RATES, Rates
from devices.netlook import Onlookers
from devices.netport import Counters
from devices.netqueues import QueuePair, header_bytes_of
from devices.netstate import Link
from devices.spec import SPECS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.netport import Backend
    from devices.virtqueue import VirtQueue

RX_SIZE, TX_SIZE, CONTROL_SIZE = SPECS["vionet"].queues


class Vionet(Device):
    """Holds the parts, and what is common to all queue pairs.

    Settings: lladdr "fe:e1:bb:d1:00:01", locked: no other address is sent from or received for;
    mtu in bytes, 0: not told; queues: pairs; link: whether it is up; rx_rate and tx_rate in bytes
    per second, rx_pps and tx_pps in frames, 0: no limit; local: None or settings of netlocal.
    """

    in_order = True
    forgetful = hdr.NET_F_CTRL_GUEST_OFFLOADS
    dependencies = hdr.DEPENDENCIES

    def __init__(
        self, memory: GuestMemory, host: Host, backend: Backend, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(memory, host)
        self._backend = backend
        self._max_pairs: int = settings["queues"]
        self._mtu = settings["mtu"]
        self._rates = Rates(settings)
        self._announcing = False
        self.counters = {way: Counters(way) for way in ("rx", "tx")}
        self._link = link = Link(host, backend, self._link_changed, wanted=settings["link"])
        self._served = [
            QueuePair(host, port, 2 * n, self.counters, link.failed)
            for n, port in enumerate(backend.ports)
        ]
        readable = [self._on_readable(n) for n in range(len(self._served))]
        link.watch(readable, [pair.sender.again for pair in self._served])
        for pair, watch in zip(self._served, link.watches, strict=True):
            pair.watch(watch)
        self._control = Control(host, self)
        self._control_index = 2 * self._max_pairs
        self._look = Onlookers(host, settings, self._served)
        self.queue_sizes = (RX_SIZE, TX_SIZE) * self._max_pairs + (CONTROL_SIZE,)
        self.features = offered(backend.features, self._mtu, self._max_pairs)
        self._queues: Sequence[VirtQueue | None] = ()
        self._features = self._offloads = 0
        self._pairs = self._max_pairs  # as it was opened
        self._restored: dict[str, Any] = {}
        self._set_limits()
        self._set_pairs(1)
        for pair in self._served:
            pair.sender.up = link.up

    def begin(self) -> None:
        """Count on where a predecessor has stopped."""
        for counters in self.counters.values():
            counters.resume(self.totals)

    @property
    def queue_num(self) -> int:
        """Pairs: what monitors mean by it."""
        return self._max_pairs

    # Configuration space.

    def config(self) -> bytes:
        """See `netconfig`."""
        return config_space(
            self._look.filter.lladdr,
            self._max_pairs,
            self._mtu,
            up=self._link.up,
            announcing=self._announcing,
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the address, byte by byte, from a driver that knows no other way (§5.1.4.4)."""
        mac, end = self._look.filter.lladdr, offset + len(data)
        if end <= len(mac) and self._queues and not self._features & F_VERSION_1:
            self._look.filter.set_lladdr(mac[:offset] + data + mac[end:])
            self._look.apply()

    # Life of a driver.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Set the backend to what the driver has accepted."""
        self._queues, self._features = queues, features
        self._control_index = 2 * self._max_pairs if features & hdr.NET_F_MQ else 2
        self._link.attempt(self._backend.set_header, header_bytes_of(features))
        for pair in self._served:
            pair.begin(features, self._mtu)
        self._control.begin(features)
        self._set_offloads(features & hdr.GUEST_OFFLOADS)
        self._restore()
        self._look.filter.activate(features)
        self._look.apply()
        for index, queue in enumerate(queues):
            if queue is not None:
                self._adopt(index, queue)
        self._look.listening = self._link.up
        self._look.tell()

    def start_queue(self, index: int, queue: VirtQueue) -> None:
        """Go on with what a killed predecessor had popped."""
        self._adopt(index, queue)
        self._follow_queues()

    def stop_queue(self, index: int, queue: VirtQueue) -> None:
        """Give receive buffers back; nothing else stays in flight."""
        if index != self._control_index and not index % 2 and index // 2 < len(self._served):
            self._served[index // 2].receiver.stop(queue)

    def idle_kick(self, index: int, queue: VirtQueue) -> None:
        """Throw away what is sent."""
        if index % 2 and index != self._control_index:
            queue.drop_all()
            if queue.should_call():
                self.host.call(index)

    def _follow_queues(self) -> None:
        """Use the pairs that are started, for a driver whose commands somebody else has taken.

        Monitors keep the control queue to themselves, and start and stop queues instead.
        """
        if self._features & hdr.NET_F_MQ and not self._features & hdr.NET_F_CTRL_VQ:
            started = [n for n in range(self._max_pairs) if self._queues[2 * n] is not None]
            if started and started[-1] + 1 != self._pairs:
                self._set_pairs(started[-1] + 1)

    def _adopt(self, index: int, queue: VirtQueue) -> None:
        """Go on with what a killed predecessor had popped."""
        if index == self._control_index:
            for chain in queue.resubmit():
                self._control.answer(queue, chain)
        elif index // 2 < len(self._served):
            self._served[index // 2].adopt(index, queue)

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Serve a queue, as far as its budget goes."""
        if index == self._control_index:
            return self._control.serve(index, queue)
        pair, transmits = divmod(index, 2)
        if pair >= self._pairs:
            return pair < len(self._served) and self._served[pair].discard(index, queue)
        if transmits:
            again = self._served[pair].sender.serve(queue)
            self.counters["tx"].publish(self.totals)
            return again
        return self._link.up and self._receive(pair, queue)

    def reset_queue(self, index: int) -> None:
        """Forget its buffers."""
        pair = index // 2
        if index != self._control_index and pair < len(self._served):
            self._served[pair].reset_queue(index)
        if self._queues:
            self._follow_queues()

    def reset(self) -> None:
        """Forget the driver and everything it has set."""
        self._control.end()
        for pair in self._served:
            pair.end()
        self._queues, self._features = (), 0
        self._announcing, self._restored = False, {}
        self._look.reset()
        self._set_pairs(1)
        self._set_offloads(0)
        self._link.wait()

    def pause(self) -> None:
        """Give the receive buffers back; what is sent is sent."""
        for n, pair in enumerate(self._served):
            pair.receiver.pause(self._queues[2 * n] if self._queues else None)

    def unpause(self) -> None:
        """Have the driver tell its neighbours where it is: that may have changed."""
        if self._announce():
            self.host.config_changed()

    # What commands change: netctrl.Controlled.

    def filter_command(self, kind: int, command: int, data: bytes) -> bool:
        """Do a command about addresses or VLANs."""
        good = self._look.command(kind, command, data)
        self._settle()
        return good

    def announced(self) -> bool:
        """Note that the driver has announced itself."""
        self._announcing = False
        self._settle()
        return True

    def use_pairs(self, count: int) -> bool:
        """Use so many queue pairs."""
        if not 0 < count <= self._max_pairs:
            return False
        self._set_pairs(count)
        self._settle()
        return True

    def use_offloads(self, offloads: int) -> bool:
        """Have frames arrive with these offloads only; others that wait already are dropped."""
        good = self._set_offloads(offloads)
        self._settle()
        return good

    def _settle(self) -> None:
        """See to it that a command holds, for whatever process comes, before it is acknowledged."""
        self.host.checkpoint()

    def _set_offloads(self, offloads: int) -> bool:
        self._offloads = offloads
        for pair in self._served:
            pair.expect(offloads)
        return self._link.attempt(self._backend.offload, offloads)

    def _set_pairs(self, count: int) -> None:
        if count != self._pairs:
            self._link.attempt(self._backend.attach, count)
        self._pairs = count
        for watch in self._link.watches[count:]:
            watch.drop(EPOLLIN)
        self._look_at_all()

    # The link.

    def _link_changed(self) -> None:
        """Let both directions and the driver know."""
        for pair in self._served:
            pair.sender.up = self._link.up
        if self._link.up:
            self._announce()
            self._look_at_all()
            self._look.listening = bool(self._queues)
            self._look.tell()
        else:
            self._look.listening = False
            self._link.drop(EPOLLIN)
        self.host.config_changed()

    def _announce(self) -> bool:
        """Ask the driver to announce itself, if it can; return whether."""
        if self._link.up and self._features & hdr.NET_F_GUEST_ANNOUNCE:
            self._announcing = True
        return self._announcing

    def _on_readable(self, pair: int) -> Callable[[], None]:
        def readable() -> None:
            queue = self._queues[2 * pair] if self._queues else None
            if queue is None or not self._link.up or pair >= self._pairs:
                self._link.watches[pair].drop(EPOLLIN)
            elif self._receive(pair, queue):
                self.host.schedule(2 * pair)

        return readable

    def _receive(self, pair: int, queue: VirtQueue) -> bool:
        again = self._served[pair].receiver.serve(queue)
        self.counters["rx"].publish(self.totals)
        return again

    def _look_at_all(self) -> None:
        """Have every queue served soon: what it waited for may be there."""
        for index in range(2 * self._pairs if self._queues else 0):
            self.host.schedule(index)

    # Life of the process.

    def setting(self, name: str, value: Any) -> Any:
        """Change `link` (a bool) or one of RATES; read `counters`; end a `capture` with None.

        Raises ConfigError.
        """
        if name == "counters":
            return self._facts()
        if name == "capture" and value is None:
            return self._look.end_capture()
        if name == "link":
            if not isinstance(value, bool):
                raise ConfigError(f"link: {value!r} is neither true nor false")
            self._link.set_wanted(value)
            return self._link.up
        if name not in RATES:
            return super().setting(name, value)
        self._rates.set(name, value)
        self._set_limits()
        self._look_at_all()
        return value

    def take(self, name: str, value: Any, fd: int) -> Any:
        """Begin a `capture`; see Captures.begin."""
        if name != "capture":
            return super().take(name, value, fd)
        return self._look.begin_capture(value, fd)

    def _facts(self) -> dict[str, Any]:
        return {
            **{way: counters.facts() for way, counters in self.counters.items()},
            "link": self._link.up,
            "lost": self._link.lost,
            "pairs": self._pairs,
            "offloads": self._offloads,
            **self._look.facts(),
        }

    def _set_limits(self) -> None:
        """All pairs share what is allowed."""
        limits = self._rates.limits()
        for pair in self._served:
            pair.limit(limits)

    def save(self) -> dict[str, Any]:
        """Return what the driver has set by commands."""
        return self._driven()

    def _driven(self) -> dict[str, Any]:
        return {
            "filter": self._look.filter.save(),
            "pairs": self._pairs,
            "offloads": self._offloads,
            "announcing": self._announcing,
        }

    def remember(self) -> dict[str, Any]:
        """Return what has been set from outside, too."""
        return {
            # Before there is a driver, that is nothing to be set again.
            "driven": self._driven() if self._queues else {},
            "link": self._link.wanted,
            "rates": dict(self._rates.values),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take that; what the driver has set, for when it is active again."""
        if "driven" in state:
            for name, value in state["rates"].items():
                self._rates.set(name, value)
            self._set_limits()
            self._link.set_wanted(bool(state["link"]))
            state = state["driven"]
        self._restored = state

    def _restore(self) -> None:
        state, self._restored = self._restored, {}
        if state:
            self._announcing = state["announcing"]
            self._look.filter.load(state["filter"])
            self._set_offloads(state["offloads"])
            self._set_pairs(state["pairs"])
