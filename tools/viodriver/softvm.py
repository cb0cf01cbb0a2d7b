"""Interrupts and doorbells of a VM without KVM: eventfds behave as if a kernel stood behind them.

What a VM process asks of KVM (`vmm.irq.VmEvents`) is done here in user space, when somebody looks:
`poll` takes the signals of attached eventfds and makes of them messages and lines, as KVM does at
once. A guest's write that an ioeventfd covers goes through `ring`.
"""

from __future__ import annotations

import os
import select
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from config.errors import KvmError
from vmm.irq import NR_PINS, TO_MSI

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvmabi import RoutingEntry


class SoftVm:
    """The interrupt side of one VM. For one thread."""

    def __init__(self) -> None:
        #: Messages that have arrived and were not taken, by their data.
        self.messages: Counter[int] = Counter()
        self._user: set[int] = set()  # pins that irq_line holds
        self._until_eoi: set[int] = set()  # pins that a resampling irqfd has raised
        self._irqfds: dict[int, tuple[int, int | None]] = {}  # eventfd → GSI, resample fd
        self._routes: dict[int, int] = {}  # GSI → message data
        self._doorbells: dict[tuple[int, int | None, bool], int] = {}

    # What a VM process calls.

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive one pin."""
        (self._user.add if level else self._user.discard)(gsi)

    def set_gsi_routing(self, entries: Sequence[RoutingEntry]) -> None:
        """Replace the routing table."""
        self._routes = {entry.gsi: entry.u[2] for entry in entries if entry.type == TO_MSI}

    def irqfd(
        self, fd: int, gsi: int, resample_fd: int | None = None, *, deassign: bool = False
    ) -> None:
        """Attach an eventfd to a GSI; or detach it, which empties it. Raises KvmError."""
        if not deassign:
            if fd in self._irqfds:
                raise KvmError(f"irqfd {gsi}: Device or resource busy")
            self._irqfds[fd] = gsi, resample_fd
            return
        if self._irqfds.pop(fd, (None, None))[0] != gsi:
            raise KvmError(f"irqfd {gsi}: No such file or directory")
        take(fd)
        self._until_eoi.discard(gsi)

    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int,
        datamatch: int | None = None,
        *,
        pio: bool = True,
        deassign: bool = False,
    ) -> None:
        """Let writes of `datamatch` (None: of anything) signal `fd`, or no longer."""
        key = (address, datamatch, pio)
        if deassign:
            if self._doorbells.pop(key, None) is None:
                raise KvmError(f"ioeventfd {address:#x}: No such file or directory")
        elif key in self._doorbells:
            raise KvmError(f"ioeventfd {address:#x}: File exists")
        else:
            self._doorbells[key] = fd

    def signal_msi(self, address: int, data: int) -> None:
        """Send one message."""
        self.messages[data] += 1

    # What the guest's side calls.

    def ring(self, address: int, value: int, *, pio: bool) -> bool:
        """Signal what waits for this write; False if nothing does: somebody must be told."""
        for match in (value, None):
            fd = self._doorbells.get((address, match, pio))
            if fd is not None:
                os.eventfd_write(fd, 1)
                return True
        return False

    def poll(self, timeout: float, *others: int) -> None:
        """Wait up to `timeout` seconds for a signal, or for one of `others` to be readable."""
        waiter = select.poll()
        for fd in (*self._irqfds, *others):
            waiter.register(fd, select.POLLIN)
        for fd, _ in waiter.poll(timeout * 1e3):
            if fd in self._irqfds and take(fd):
                gsi, _ = self._irqfds[fd]
                if gsi < NR_PINS:
                    self._until_eoi.add(gsi)
                else:
                    self.messages[self._routes[gsi]] += 1

    def take_message(self, data: int) -> bool:
        """Take all messages of this data that have arrived; False if there are none."""
        return bool(self.messages.pop(data, 0))

    def level(self, gsi: int) -> bool:
        """Whether a pin is high."""
        return gsi in self._user or gsi in self._until_eoi

    def eoi(self, gsi: int) -> None:
        """End the interrupt of a pin: what resamples it is told."""
        self._until_eoi.discard(gsi)
        resample = {other for at, other in self._irqfds.values() if at == gsi and other is not None}
        for fd in resample:
            os.eventfd_write(fd, 1)


def take(fd: int) -> int:
    """Read and clear an eventfd's counter, at once; 0 if it was."""
    counter = bytearray(8)
    with suppress(BlockingIOError):
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    return int.from_bytes(counter, "little")
