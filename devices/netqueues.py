"""One queue pair of a network device: a receive queue, a transmit queue, and a port for both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices import nethdr as hdr
from devices.features import F_VERSION_1
from devices.netlook import Verdicts
from devices.netrx import Receiver
from devices.nettx import Sender

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.device import Host
    from devices.netfilter import Filter
    from devices.netlimit import Limit
    from devices.netport import Counters, Port, Watch
    from devices.virtqueue import VirtQueue

    Keep = Callable[[bytes, Sequence[bytes | memoryview]], bool]  # see Sender.keep
    Show = Callable[[Sequence[bytes | memoryview], int], None]  # see Receiver.show


def header_bytes_of(features: int) -> int:
    """Return how long the header of a driver with these features is (§5.1.6.1)."""
    long = features & (F_VERSION_1 | hdr.NET_F_MRG_RXBUF)
    return hdr.HEADER_BYTES if long else hdr.OLD_HEADER_BYTES


class QueuePair:
    """Both directions of one port."""

    def __init__(
        self,
        host: Host,
        port: Port,
        index: int,
        counters: Mapping[str, Counters],
        lost: Callable[[OSError], None],
    ) -> None:
        """Serve queues `index` and `index + 1`; `lost` is told when the port fails."""
        self._host, self._index = host, index
        self.receiver = Receiver(host, port, index, counters["rx"], lost)
        self.sender = Sender(host, port, index + 1, counters["tx"], lost)

    def watch(self, watch: Watch) -> None:
        """Have both directions learn by this when the port is ready."""
        self.receiver.watch = self.sender.watch = watch

    def begin(self, features: int, mtu: int) -> None:
        """Serve a driver with these features; `mtu` is what the device tells, 0: nothing."""
        header_bytes, merge = header_bytes_of(features), bool(features & hdr.NET_F_MRG_RXBUF)
        told = mtu * (features & hdr.NET_F_MTU > 0)
        self.receiver.begin(header_bytes, merge=merge, mtu=told)
        self.sender.begin(features, header_bytes)

    def expect(self, offloads: int) -> None:
        """Deliver frames with these of a driver's GUEST_ features only."""
        kinds, sums = hdr.gso_types(offloads), bool(offloads & hdr.NET_F_GUEST_CSUM)
        self.receiver.expect(kinds, sums=sums)

    def limit(self, limits: Mapping[str, Limit | None]) -> None:
        """Let no more through than these allow."""
        self.receiver.limit, self.sender.limit = limits["rx"], limits["tx"]

    def look(
        self,
        rules: Filter,
        *,
        locked: bool,
        keep: Keep | None,
        shows: tuple[Show, Show] | None,
    ) -> None:
        """Have as little looked at as possible: what a filter, a local link, a capture has to see.

        `shows` are for what is received and what is sent.
        """
        receiver, sender = self.receiver, self.sender
        receiver.accept = Verdicts(rules.to_guest).__getitem__ if rules.to_needed else None
        receiver.secret = locked
        sender.accept = rules.from_guest if rules.from_needed else None
        sender.keep = keep
        receiver.show, sender.show = shows or (None, None)

    def adopt(self, index: int, queue: VirtQueue) -> None:
        """Go on with what a killed predecessor had popped of one of the two queues."""
        (self.receiver if index == self._index else self.sender).adopt(queue)

    def reset_queue(self, index: int) -> None:
        """Forget the buffers of one of the two queues."""
        (self.receiver if index == self._index else self.sender).end()

    def end(self) -> None:
        """Forget the driver: no access to guest memory afterwards."""
        self.receiver.end()
        self.sender.end()

    def discard(self, index: int, queue: VirtQueue) -> bool:
        """Serve one of the two queues while the pair is not used; True: call again soon.

        What a driver sends all the same has nowhere to go (§5.1.6.5.5.2).
        """
        if index == self._index:
            return False
        queue.drop_all()
        if queue.should_call():
            self._host.call(index)
        return queue.enable_kicks()
