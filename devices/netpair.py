"""A further queue pair of a network device, in a process of its own.

It has one descriptor of the tap, the two rings and their eventfds, guest memory, and a connection
to the first pair's process, whose word it follows (`netlink`): a state is all that it has to do by
now. Registers, commands and settings are over there.

    run       whether the queues are served; if not, guest memory is left alone
    features  the driver's
    queues    of each of the two, null or {"epoch", "size", "areas", "cursors"}: an epoch is one
              life of a queue, from enable to reset; cursors are where it begins
    used      whether the driver uses the pair
    up        whether the link is up
    offloads, filter, rates    what holds for all pairs
    snaplen   bytes of each frame that are captured, 0: none
    direct    whether calls go to the driver; if not, ISR is the first process's, and so are they

The process may be killed at any instant. Where its queues are, and which life of them that is, lies
in the in-flight area that its successor gets, too.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, Protocol

from config.errors import GuestError
from devices import netlink
from devices.device import Device, Host
from devices.netfilter import Filter
from devices.netlimit import Rates, Shares
from devices.netlink import DEADLINE, STATE_MAX, Captured, GoneError, Link, LinkError
from devices.netlocal import Local
from devices.netport import Counters, Watch
from devices.netqueues import QueuePair
from devices.pcap import INBOUND, OUTBOUND
from devices.spec import COUNTERS_STRIDE, EPOCH_AT, SPECS
from devices.tap import TapPort
from devices.virtqueue import QueueState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from config.errors import PyvmError
    from devices.guestmem import GuestMemory
    from devices.transport import Transport
    from devices.virtqueue import VirtQueue

RX, TX = 0, 1


class DrivenHost(Host, Protocol):
    """A process whose queues are not set up by a driver through registers."""

    transport: Transport

    def divert(self, fd: int) -> None:
        """Have calls go to this eventfd; -1: to the driver again. See Process."""


class NetPair(Device):
    """Serves queues 2n and 2n + 1 of a network device as its own 0 and 1."""

    host: DrivenHost
    in_order = True
    queue_sizes = SPECS["vionet"].queues[:2]

    def __init__(
        self,
        memory: GuestMemory,
        host: DrivenHost,
        settings: Mapping[str, Any],
        fds: dict[str, int],
    ) -> None:
        """Take over the descriptors `tap0`, `link` and `bell`; `settings` are the device's."""
        super().__init__(memory, host)
        self._number, self._mtu = settings["pair"], settings["mtu"]
        self._processes = settings["queues"]
        self._port = port = TapPort(fds.pop("tap0"))
        os.set_blocking(port.fd, False)
        self._link, self._bell = Link(fds.pop("link")), fds.pop("bell")
        self._can_call = "call0" in fds
        self.counters = {way: Counters(way) for way in ("rx", "tx")}
        self._pair = QueuePair(host, port, RX, self.counters, self._failed)
        self._watch = Watch(host, port, self._readable, self._pair.sender.again, self._gone)
        self._pair.watch(self._watch)
        lladdr = bytes.fromhex(settings["lladdr"].replace(":", ""))
        self._locked = settings["locked"]
        self._filter = Filter(lladdr, locked=self._locked)
        self._local = Local(settings["local"]) if settings["local"] is not None else None
        self._rates = Rates(settings)
        self._state: dict[str, Any] = {}
        self._lost = self._running = self._up = False
        self._used: bool | None = None  # as whoever had the tap's queue before has left it
        self._epochs = [0, 0]
        self._snaplen = self._left_out = 0

    def begin(self) -> None:
        """Go on counting where a predecessor was, and listen."""
        page = self.totals
        self._shares = Shares(page, self._number, self._processes)
        at = self._number * COUNTERS_STRIDE
        self.totals = page[at : at + len(SPECS["vionet"].counters)]
        for counters in self.counters.values():
            counters.resume(self.totals)
        self.host.watch(self._link.fd, self._hear)

    # What the first process says.

    def _hear(self, _events: int) -> None:
        """Follow a state. Raises LinkError: then this process has nothing more to do."""
        try:
            message = self._link.receive(STATE_MAX)
        except GoneError:
            self._orphaned()
            return
        if message is None:
            return
        if message[0] != netlink.STATE:
            raise LinkError(f"sent a message of kind {message[0]}")
        state = json.loads(message[1:])
        self._follow(state)
        cursors = [None if queue is None else queue.save() for queue in self._queues]
        self._say(netlink.followed(state["number"], cursors))

    def _orphaned(self) -> None:
        """The first process has died, and nobody knows any more what is to be done: do nothing."""
        self.host.unwatch(self._link.fd)
        self._running = False
        self._watch.drop(EPOLLIN | EPOLLOUT)
        self._pair.receiver.pause(self._queues[RX])

    def _say(self, message: bytes) -> None:
        with suppress(GoneError):  # which is seen where messages are read
            self._link.send(message, time.monotonic() + DEADLINE)

    @property
    def _queues(self) -> Sequence[VirtQueue | None]:
        return self.host.transport.live

    def _follow(self, state: dict[str, Any]) -> None:
        before, self._state = self._state, state
        for index, queue in enumerate(state["queues"]):
            if self._epochs[index] and (queue is None or queue["epoch"] != self._epochs[index]):
                self._end_queue(index)
        self._running = state["run"]
        if not self._running:
            self._watch.drop(EPOLLIN | EPOLLOUT)
            self._pair.receiver.pause(self._queues[RX])
        features = state["features"]
        if features != before.get("features"):
            self._pair.begin(features, self._mtu)
        self._pair.expect(state["offloads"])
        if state["rates"] != before.get("rates"):
            for name, value in state["rates"].items():
                self._rates.set(name, value)
            self._pair.limit(self._rates.limits(self._shares))
        self.host.divert(-1 if state["direct"] and self._can_call else self._bell)
        self._snaplen = state["snaplen"]
        self._filter.load(state["filter"])
        self._filter.activate(features)
        self._look()
        self._use(state["used"])
        self._set_up(state["up"], drains=bool(before))
        if self._running:
            for index, queue in enumerate(state["queues"]):
                if queue is not None and not self._epochs[index]:
                    self._begin_queue(index, queue, features)
                self.host.schedule(index)

    def _begin_queue(self, index: int, wanted: Mapping[str, Any], features: int) -> None:
        """Serve a queue; where a predecessor was killed in the same life of it, go on there."""
        transport = self.host.transport
        registers, epoch = transport.registers[index], wanted["epoch"]
        area = registers.inflight
        if area is None:
            raise LinkError("no in-flight area")  # a mistake of the VM process's
        word = area[EPOCH_AT : EPOCH_AT + 8].cast("Q")
        if word[0] != epoch:
            registers.reset()
            word[0] = 0
        registers.size = wanted["size"]
        registers.desc_gpa, registers.avail_gpa, registers.used_gpa = wanted["areas"]
        self._epochs[index] = epoch
        try:
            queue = registers.open(self.memory, features)
            if not queue.adopted:
                queue.load(QueueState(*wanted["cursors"]))
            word[0] = epoch
            transport.live[index] = queue
            self._pair.adopt(index, queue)
        except GuestError as err:
            transport.fail(err)

    def _end_queue(self, index: int) -> None:
        """Let go of a queue for good."""
        transport = self.host.transport
        self._pair.reset_queue(index)
        transport.live[index] = None
        transport.registers[index].reset()
        self._epochs[index] = 0

    def _use(self, used: bool) -> None:
        """Have frames arrive here, or on the other pairs only."""
        if used != self._used:
            try:
                self._port.attach(on=used)
            except OSError as err:  # the tap is gone
                self._failed(err)
        self._used = used
        if not used:
            self._watch.drop(EPOLLIN)

    def _set_up(self, up: bool, *, drains: bool) -> None:
        came_up = up and not self._up
        self._up = up
        if came_up:
            if drains:
                self._port.drain()  # what is from before the link came up
            self._lost = False
        self._pair.sender.up = up
        if not up:
            self._watch.drop(EPOLLIN)

    def _look(self) -> None:
        """Have as little looked at as possible."""
        keep = self._keep if self._local is not None else None
        shows = (self._shower(INBOUND), self._shower(OUTBOUND)) if self._snaplen else None
        self._pair.look(self._filter, locked=self._locked, keep=keep, shows=shows)

    # What the first process is told.

    def _keep(self, head: bytes, iov: Sequence[bytes | memoryview]) -> bool:
        """Pass on what may be for the host's end of a local link; it is lost if there is no room.

        What is not for it goes to the tap over there.
        """
        if self._local is None or not self._local.wants(head):
            return False
        if sum(map(len, iov)) > netlink.KEPT_MAX:
            return False
        self._attempt([bytes((netlink.KEPT,)), *map(bytes, iov)])
        return True

    def _attempt(self, parts: Sequence[bytes]) -> bool:
        try:
            return self._link.attempt(parts)
        except GoneError:  # which is seen where messages are read
            return False

    def _shower(self, direction: int) -> Callable[[Sequence[bytes | memoryview], int], None]:
        snaplen = self._snaplen

        def show(views: Sequence[bytes | memoryview], length: int) -> None:
            parts, left = [], min(length, snaplen)
            for view in views:
                parts.append(bytes(view[:left]))
                left -= len(parts[-1])
            frame = Captured(direction, self._left_out, length, b"".join(parts))
            if self._attempt(netlink.captured(frame)):
                self._left_out = 0
            else:
                self._left_out += 1

        return show

    def halt(self, error: PyvmError) -> None:
        """Have the first process ask the driver for a reset."""
        text = error.what.encode()[: netlink.TEXT_MAX]
        self._say(bytes((netlink.BROKEN,)) + text)

    def _failed(self, err: OSError) -> None:
        """The port is lost, until the first process says that the link is up again."""
        self._watch.drop(EPOLLIN | EPOLLOUT)
        if not self._lost:
            self._lost = True
            self._say(netlink.lost(err))

    def _gone(self) -> None:
        self._failed(OSError(0, "the other end is gone"))

    # Its queues.

    def _readable(self) -> None:
        queue = self._queues[RX]
        if queue is None or not self._receives:
            self._watch.drop(EPOLLIN)
        elif self._receive(queue):
            self.host.schedule(RX)

    @property
    def _receives(self) -> bool:
        return self._running and bool(self._used) and self._up and not self._lost

    def _receive(self, queue: VirtQueue) -> bool:
        again = self._pair.receiver.serve(queue)
        self.counters["rx"].publish(self.totals)
        return again

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Serve a queue, as far as its budget goes."""
        if not self._running:
            return False
        if not self._used:
            return self._pair.discard(index, queue)
        if index == RX:
            return self._receives and self._receive(queue)
        again = self._pair.sender.serve(queue)
        self.counters["tx"].publish(self.totals)
        return again

    def reset(self) -> None:
        """Nobody resets this process's registers: its queues end by what it is told."""
