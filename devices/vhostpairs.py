"""Queue pairs of a network device that another program serves, and the queue that chooses them.

A back end has the queues of all pairs and starts and stops each; how many are in use is said on the
control queue (virtio 1.2 §5.1.6.5.6), which is the front end's: it is answered here.
"""

from __future__ import annotations

from select import EPOLLET, EPOLLIN
from typing import TYPE_CHECKING, Final

from devices.netctrl import Control
from devices.nethdr import NET_F_CTRL_VQ, NET_F_MQ

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Host
    from devices.virtqueue import VirtQueue

CONTROL_SIZE: Final = 64  # entries of the control queue


class Pairs:
    """Which pairs are in use, by a driver that may choose; netctrl.Controlled."""

    def __init__(self, host: Host, most: int, changed: Callable[[], None]) -> None:
        """There are `most`; `changed` is called when other ones are to be enabled."""
        self._host, self._most, self._changed = host, most, changed
        self._control = Control(host, self)
        self._early: Callable[[], VirtQueue | None] = lambda: None
        #: How many are in use, and which queue is the control queue.
        self.used, self.index = 1, 2 * most

    def listen(self, kick_fd: int, queue: Callable[[], VirtQueue | None]) -> None:
        """Be told of kicks of queue 2, which is the control queue of some drivers."""
        self._early = queue
        self._host.watch(kick_fd, self._kicked, EPOLLIN | EPOLLET)

    def begin(self, features: int) -> None:
        """A driver begins, with one pair; without MQ it knows no more, and no queues of others."""
        self.used = 1
        self.index = 2 * self._most if features & NET_F_MQ else 2
        self._control.begin(features if features & NET_F_CTRL_VQ else 0)

    def end(self) -> None:
        """Forget the driver."""
        self._control.end()

    def has(self, index: int) -> bool:
        """Whether a queue is the back end's."""
        return index < min(self.index, 2 * self._most)

    def adopt(self, queue: VirtQueue | None) -> None:
        """Answer the commands that a killed predecessor had popped."""
        if queue is not None:
            for chain in queue.resubmit():
                self._control.answer(queue, chain)

    def serve(self, index: int, queue: VirtQueue) -> bool:
        """Answer the control queue. Raises GuestError."""
        return index == self.index and self._control.serve(index, queue)

    def _kicked(self, _events: int) -> None:
        queue = self._early()
        if self.index == 2 and queue is not None and self._control.serve(2, queue):
            self._host.schedule(2)

    # netctrl.Controlled.

    def use_pairs(self, count: int) -> bool:
        """Use so many queue pairs."""
        if not 1 <= count <= self._most:
            return False
        self.used = count
        self._changed()
        return True

    def use_offloads(self, offloads: int) -> bool:
        """Never offered, as all that follows."""
        return False

    def announced(self) -> bool:
        """Refuse."""
        return False

    def filter_command(self, kind: int, command: int, data: bytes) -> bool:
        """Refuse."""
        return False
