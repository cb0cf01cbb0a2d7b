"""A VM's interrupt side without KVM: same promises, plus an adversary at every ioctl.

Attach and detach behave as the kernel's do (tests/kvm/test_irqfd.py checks that they do):
attaching delivers what is in the counter and leaves the counter alone, detaching clears it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from config.errors import KvmError
from vmm.irq import NR_PINS, TO_MSI, Message, pin_routes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.kvmabi import RoutingEntry


class FakeVm:
    """Counts what reaches the guest. `adversary` runs before and after each ioctl."""

    def __init__(self) -> None:
        self.adversary: Callable[[], None] = lambda: None
        self.on_message: Callable[[Message, int | None], None] = lambda message, fd: None
        self.on_pin: Callable[[int], None] = lambda fd: None
        self.sent: list[Message] = []
        self.tables: list[list[RoutingEntry]] = []
        self.lines: list[tuple[int, bool]] = []
        self.irqfds: dict[int, tuple[int, int | None]] = {}
        self.doorbells: dict[tuple[int, int, int | None, bool], int] = {}
        self._user: set[int] = set()
        self._resampled: set[int] = set()
        self._routes: dict[int, Message] = {}

    # What vmm calls.

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive a pin from user space."""
        self.adversary()
        self.lines.append((gsi, level))
        (self._user.add if level else self._user.discard)(gsi)
        self.adversary()

    def set_gsi_routing(self, entries: Sequence[RoutingEntry]) -> None:
        """Replace the table; one that forgets a pin is refused."""
        self.adversary()
        rows = [bytes(entry) for entry in entries]
        if rows[: len(pin_routes())] != [bytes(entry) for entry in pin_routes()]:
            raise KvmError("the pins' routes are gone")
        self.tables.append(list(entries))
        self._routes = {
            entry.gsi: Message(entry.u[1] << 32 | entry.u[0], entry.u[2])
            for entry in entries
            if entry.type == TO_MSI
        }
        self.adversary()

    def irqfd(
        self, fd: int, gsi: int, resample_fd: int | None = None, *, deassign: bool = False
    ) -> None:
        """Attach or detach; stricter than KVM about detaching what is not there."""
        self.adversary()
        if deassign:
            self._detach(fd, gsi)
        else:
            self._attach(fd, gsi, resample_fd)
        self.adversary()

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
        """Note a doorbell, or its removal."""
        self.adversary()
        key = (address, length, datamatch, pio)
        if deassign:
            del self.doorbells[key]
        elif key in self.doorbells:
            raise KvmError(f"ioeventfd {address:#x}: File exists")
        else:
            self.doorbells[key] = fd
        self.adversary()

    def signal_msi(self, address: int, data: int) -> None:
        """Send a message."""
        self.adversary()
        self._send(Message(address, data), None)
        self.adversary()

    def _attach(self, fd: int, gsi: int, resample_fd: int | None) -> None:
        if fd in self.irqfds:
            raise KvmError(f"irqfd {gsi}: Device or resource busy")
        self.irqfds[fd] = gsi, resample_fd
        count = take(fd)
        if count:
            os.eventfd_write(fd, count)
            self._inject(fd)

    def _detach(self, fd: int, gsi: int) -> None:
        if self.irqfds.get(fd, (None, None))[0] != gsi:
            raise KvmError(f"eventfd {fd} is not on GSI {gsi}")
        del self.irqfds[fd]
        take(fd)
        if not any(resample and other == gsi for other, resample in self.irqfds.values()):
            self._resampled.discard(gsi)

    # What device and guest do.

    def signal(self, fd: int) -> None:
        """A device process writes its call eventfd."""
        if fd in self.irqfds:
            take(fd)
            self._inject(fd)
        else:
            os.eventfd_write(fd, 1)

    def level(self, gsi: int) -> bool:
        """Return whether a pin is high."""
        return gsi in self._user or gsi in self._resampled

    def eoi(self, gsi: int) -> None:
        """The guest ends the interrupt of a pin."""
        self._resampled.discard(gsi)
        for other, resample_fd in list(self.irqfds.values()):
            if other == gsi and resample_fd is not None:
                os.eventfd_write(resample_fd, 1)

    def _inject(self, fd: int) -> None:
        gsi, resample_fd = self.irqfds[fd]
        if gsi < NR_PINS:
            assert resample_fd is not None, "a pin needs a resampling irqfd"
            self._resampled.add(gsi)
            self.on_pin(fd)
        else:
            self._send(self._routes[gsi], fd)  # KeyError: attached before it was routed

    def _send(self, message: Message, fd: int | None) -> None:
        self.sent.append(message)
        self.on_message(message, fd)


def take(fd: int) -> int:
    """Read and clear an eventfd's counter, as the kernel does: whatever its flags, at once."""
    counter = bytearray(8)
    with suppress(BlockingIOError):
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    return int.from_bytes(counter, "little")
