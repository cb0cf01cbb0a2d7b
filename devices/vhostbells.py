"""Kicks and calls of a vhost-user connection: whatever a front end has sent to signal with.

A descriptor for kicks is an eventfd, nearly always. It belongs to the front end, which may have
made it one that blocks, so it is watched for edges and never read. A pipe, which QEMU uses where
there are no eventfds, has to be emptied, or the next kick would find no room.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from select import EPOLLET, EPOLLIN
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices.device import WARNING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.loop import Loop
    from devices.vhostring import Ring

POLL_EVERY: Final = 0.001  # seconds, for a front end that does not kick
_PIPE: Final = 1 << 16  # bytes that one read empties


class Bells:
    """Has rings served, and their driver called."""

    def __init__(
        self,
        rings: Sequence[Ring],
        loop: Loop,
        serve: Callable[[int], None],
        say: Callable[[int, str], None],
    ) -> None:
        """Call `serve(index)` for every kick."""
        self._rings, self._loop, self._serve, self._say = rings, loop, serve, say
        self._due: dict[int, None] = {}  # rings to be served soon, first come, first served
        self._turn = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add(self._turn, EPOLLIN, self._take_turn)
        self._poller = loop.timer(self._poll)
        #: Tell the front end, by message, of a call or an error of a ring; False: it cannot be.
        self.tell_call: Callable[[int], bool] = lambda index: False
        self.tell_error: Callable[[int], bool] = lambda index: False

    # In.

    def listen(self, ring: Ring, fd: int) -> None:
        """Take over the descriptor for kicks of a ring, -1 for none.

        Raises HostError, `fd` closed, if it cannot be waited for.
        """
        if fd >= 0:
            try:
                self._watch(ring.index, fd)
            except OSError as err:
                os.close(fd)
                what = f"kicks of ring {ring.index} by this descriptor"
                raise HostError(f"{what}: {err.strerror}") from err
        if ring.kick >= 0:
            self._loop.remove(ring.kick)
        ring.replace("kick", fd)

    def _watch(self, index: int, fd: int) -> None:
        def kicked(_events: int) -> None:
            self._serve(index)

        def emptied(_events: int) -> None:
            with suppress(BlockingIOError):  # the front end has emptied it
                if not os.read(fd, _PIPE):  # nobody is left to kick
                    self._loop.remove(fd)
            self._serve(index)

        if stat.S_IFMT(os.fstat(fd).st_mode):
            self._loop.add(fd, EPOLLIN, emptied)
        else:
            self._loop.add(fd, EPOLLIN | EPOLLET, kicked)

    def schedule(self, index: int) -> None:
        """Have a ring served soon, after others had their turn."""
        if not self._due:
            os.eventfd_write(self._turn, 1)
        self._due[index] = None

    def _take_turn(self, _events: int) -> None:
        os.eventfd_read(self._turn)
        due, self._due = self._due, {}
        for index in due:
            self._serve(index)

    def set_poller(self) -> None:
        """Poll as long as there is a ring to be polled."""
        if any(ring.polled for ring in self._rings):
            self._poller.arm(POLL_EVERY, POLL_EVERY)
        else:
            self._poller.disarm()

    def _poll(self) -> None:
        for ring in self._rings:
            if ring.polled and ring.queue is not None:
                self._serve(ring.index)

    # Out.

    def call(self, ring: Ring) -> None:
        """Interrupt the driver for a ring."""
        ring.called = not self.signal(ring.call) and not self.tell_call(ring.index)

    def tell(self, ring: Ring) -> None:
        """Tell the front end that a ring is broken."""
        if not self.signal(ring.err):
            self.tell_error(ring.index)

    def signal(self, fd: int) -> bool:
        """Write to an eventfd of the front end; whatever it really is, that is its affair."""
        if fd < 0:
            return False
        try:
            os.eventfd_write(fd, 1)
        except OSError as err:
            self._say(WARNING, f"an eventfd of the front end: {err.strerror}")
        return True

    def close(self) -> None:
        """Free what is ours, and all descriptors of the rings."""
        for ring in self._rings:
            self.listen(ring, -1)
            ring.close()
        self._poller.close()
        self._loop.remove(self._turn)
        os.close(self._turn)
