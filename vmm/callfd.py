"""A call eventfd: what a device process writes to interrupt, and the GSI that KVM links it to.

The device may write at any instant, while another thread attaches and detaches. No signal is
lost and none is seen twice, because the counter of the eventfd is the only place one can wait:

 1. *Detach is a clean cut.* KVM takes a signal and clears the counter in one step. When the
    ioctl returns, what came before the cut has been delivered, KVM has left the counter at 0,
    and what came after it is in the counter.
 2. *The counter is the pending bit.* It needs no watcher and no copy: to look, poll(2) asks
    whether there is something to read, and nothing is read.
 3. *Attach looks back.* KVM first puts itself on the eventfd and then looks at the counter: what
    waited is delivered, once, and a signal in between finds KVM there. That counter is then out
    of date, but nobody looks at it until the next cut has cleared it.

So a caller has one rule to keep: where the GSI leads must be settled before move() attaches.
(tests/kvm checks 1 and 3 against the running kernel.)
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.irq import VmEvents


class CallFd:
    """Owns one eventfd. Not thread-safe against itself: its owner locks."""

    def __init__(self) -> None:
        """Open the eventfd. Raises OSError."""
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.gsi: int | None = None

    def move(self, vm: VmEvents, gsi: int | None, resample_fd: int | None = None) -> None:
        """Link it to `gsi` (None: to nothing) instead of where it was."""
        if self.gsi is not None:
            vm.irqfd(self.fd, self.gsi, deassign=True)
            self.gsi = None
        if gsi is not None:
            vm.irqfd(self.fd, gsi, resample_fd)
            self.gsi = gsi

    def waiting(self) -> bool:
        """Whether a signal waits for a GSI; changes nothing."""
        if self.gsi is not None:
            return False  # the counter is out of date
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def drain(self) -> None:
        """Forget what waits."""
        # Not eventfd_read: the device process shares the open file and could have taken its
        # O_NONBLOCK away, and this thread would hang.
        with suppress(BlockingIOError):
            os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def close(self) -> None:
        """Free the descriptor; it must be linked to nothing."""
        os.close(self.fd)
