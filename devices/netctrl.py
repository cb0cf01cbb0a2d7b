"""The control queue of a network device (virtio 1.2 §5.1.6.5): commands, and what they answer.

    command: u8 class, u8 command, data   readable        ack: u8   writable, 0 or 1

A command that is unknown, was not negotiated, or has data of another length than it says, is
answered with ERR and changes nothing. Lengths are compared, never believed. What concerns
addresses and VLANs is the filter's, the rest the device's.

Pairs and offloads are set in the host's kernel, under the one lock of all its interfaces, and
told to whoever there listens for changes. So a guest has a number of such commands per second;
with them spent, the control queue rests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from config.errors import GuestError
from devices import nethdr as hdr
from devices.bucket import TokenBucket
from devices.netfilter import CONTROL_MAX

if TYPE_CHECKING:
    from devices.device import Host
    from devices.virtqueue import Chain, VirtQueue

OK: Final = b"\0"
ERR: Final = b"\1"

BATCH: Final = 16  # commands per wake-up
CHANGES_RATE: Final = 20.0  # commands per second that change the host's interface
CHANGES_BURST: Final = 64

CLASS_RX: Final = 0
CLASS_MAC: Final = 1
CLASS_VLAN: Final = 2
CLASS_ANNOUNCE: Final = 3
CLASS_MQ: Final = 4
CLASS_GUEST_OFFLOADS: Final = 5

ANNOUNCE_ACK: Final = 0
MQ_PAIRS_SET: Final = 0
GUEST_OFFLOADS_SET: Final = 0


class Controlled(Protocol):
    """What commands change. Each returns False if it will not be."""

    def filter_command(self, kind: int, command: int, data: bytes) -> bool:
        """Do a command of the classes RX, MAC and VLAN."""

    def announced(self) -> bool:
        """Note that the driver has announced itself."""

    def use_pairs(self, count: int) -> bool:
        """Use so many queue pairs."""

    def use_offloads(self, offloads: int) -> bool:
        """Deliver frames with these offloads only."""


class Control:
    """Answers the commands of one driver."""

    def __init__(self, host: Host, target: Controlled) -> None:
        self._host, self._target = host, target
        self._features = self._index = 0
        self._changes = TokenBucket(CHANGES_RATE, CHANGES_BURST)  # a reset does not fill it
        self._rested = host.timer(self._again)

    def begin(self, features: int) -> None:
        """Serve a driver that has negotiated these."""
        self._features = features

    def end(self) -> None:
        """Forget the driver."""
        self._rested.disarm()

    def serve(self, index: int, queue: VirtQueue) -> bool:
        """Answer what is there, up to a budget; True if that ended it. Raises GuestError."""
        queue.disable_kicks()
        if (seconds := self._changes.wait()) > 0:
            self._index = index
            self._rested.arm(seconds)
            return False
        chains = queue.pop_batch(BATCH)
        while not chains and queue.enable_kicks():
            chains = queue.pop_batch(BATCH)
        for chain in chains:
            self.answer(queue, chain)
        if queue.should_call():
            self._host.call(index)
        return bool(chains)

    def _again(self) -> None:
        self._host.schedule(self._index)

    def answer(self, queue: VirtQueue, chain: Chain) -> None:
        """Do one command. Raises GuestError if there is no room for its ack."""
        if not chain.writable:
            raise GuestError("control command without room for its ack")
        good = chain.readable_bytes <= 2 + CONTROL_MAX and self._do(b"".join(chain.readable))
        chain.writable[0][:1] = OK if good else ERR
        queue.push(chain.head, 1)

    def _do(self, command: bytes) -> bool:
        if len(command) < 2:
            return False
        (kind, what), data = command[:2], command[2:]
        value = int.from_bytes(data, "little")
        if kind in (CLASS_MQ, CLASS_GUEST_OFFLOADS):
            self._changes.take(1)
        match kind:
            case 0 | 1 | 2:
                return self._target.filter_command(kind, what, data)
            case 3 if self._features & hdr.NET_F_GUEST_ANNOUNCE:
                return what == ANNOUNCE_ACK and not data and self._target.announced()
            case 4 if self._features & hdr.NET_F_MQ:
                return what == MQ_PAIRS_SET and len(data) == 2 and self._target.use_pairs(value)
            case 5 if self._features & hdr.NET_F_CTRL_GUEST_OFFLOADS:
                mine = not value & ~(self._features & hdr.GUEST_OFFLOADS)
                fits = what == GUEST_OFFLOADS_SET and len(data) == 8
                return fits and mine and self._target.use_offloads(value)
        return False
