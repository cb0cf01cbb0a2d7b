"""Interrupt routing of one VM: GSI routes, MSI, and level lines that devices share.

KVM numbers interrupt sources by GSI and looks each up in a table: a GSI leads to pins of the
interrupt chips, or to a message. 0–23 are the pins and keep KVM's own default routes; a number
from 24 up is handed to each MSI-X vector.

    GSI 0…15   PIC pin n and I/O APIC pin n
    GSI 16…23  I/O APIC pin n
    GSI 24…    the message of one vector

KVM replaces the whole table at a time (KVM_SET_GSI_ROUTING, some 70 µs), so it is only sent when
a message really differs: masking and unmasking a vector costs nothing here.

Locking: one lock per Router and one per Line, each held across the ioctl, so that KVM and our
copy agree in order. Nothing is called with them held but KVM.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from config.errors import HostError
from vmm.kvmabi import RoutingEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NR_PINS: Final = 24  # of the I/O APIC
NR_ISA: Final = 16  # of both PICs
MAX_ROUTES: Final = 4096  # KVM_CAP_IRQ_ROUTING: bounds GSI numbers and table rows alike

PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2  # KVM_IRQCHIP_*
TO_CHIP, TO_MSI = 1, 2  # KVM_IRQ_ROUTING_*


class VmEvents(Protocol):
    """Interrupts and eventfds of a VM (kvm.Vm): all that devices need of one.

    Every method raises KvmError when the kernel refuses.
    """

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive one pin."""

    def set_gsi_routing(self, entries: Sequence[RoutingEntry]) -> None:
        """Replace the routing table."""

    def irqfd(
        self, fd: int, gsi: int, resample_fd: int | None = None, *, deassign: bool = False
    ) -> None:
        """Let writes to eventfd `fd` raise `gsi`; with `resample_fd` as a level, until EOI."""

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
        """Let a guest's write signal `fd` instead of leaving KVM_RUN."""

    def signal_msi(self, address: int, data: int) -> None:
        """Send one message now."""


class Message(NamedTuple):
    """What a vector writes where to interrupt: an address inside the local APICs', and a word."""

    address: int
    data: int

    @property
    def interrupts(self) -> bool:
        """Whether it reaches a local APIC (Intel SDM vol. 3 §11.11.1), not some other place."""
        return self.address >> 20 == 0xFEE


def _chip_route(gsi: int, chip: int, pin: int) -> RoutingEntry:
    entry = RoutingEntry(gsi, TO_CHIP)
    entry.u[0:2] = (chip, pin)
    return entry


def _msi_route(gsi: int, message: Message) -> RoutingEntry:
    entry = RoutingEntry(gsi, TO_MSI)
    entry.u[0:3] = (message.address & 0xFFFFFFFF, message.address >> 32, message.data)
    return entry


def pin_routes() -> list[RoutingEntry]:
    """Return KVM's default table. Every table sent must repeat it, or the pins go dead."""
    apic = [_chip_route(gsi, IOAPIC, gsi) for gsi in range(NR_PINS)]
    pics = [
        _chip_route(gsi, PIC_SLAVE if gsi & 8 else PIC_MASTER, gsi & 7) for gsi in range(NR_ISA)
    ]
    return apic + pics


class Line:
    """A level-triggered pin that devices share: high while any of them asserts it."""

    def __init__(self, vm: VmEvents, gsi: int) -> None:
        self._vm, self._gsi = vm, gsi
        self._asserting: set[object] = set()
        self._lock = threading.Lock()

    def set(self, owner: object, asserted: bool) -> None:
        """Let `owner` assert or release the line; saying it twice changes nothing."""
        with self._lock:
            before = bool(self._asserting)
            (self._asserting.add if asserted else self._asserting.discard)(owner)
            if bool(self._asserting) != before:
                self._vm.irq_line(self._gsi, asserted)


class Router:
    """Hands out lines, GSIs and routes."""

    def __init__(self, vm: VmEvents, max_routes: int = MAX_ROUTES) -> None:
        """Route for `vm`; `max_routes` is its KVM_CAP_IRQ_ROUTING."""
        self.vm = vm
        self._lock = threading.Lock()
        self._lines: dict[int, Line] = {}
        self._pins = pin_routes()
        self._free = list(range(max_routes - len(self._pins) + NR_PINS - 1, NR_PINS - 1, -1))
        self._messages: dict[int, Message] = {}

    def line(self, gsi: int) -> Line:
        """Return the one Line of this pin; all who share the pin must use it."""
        with self._lock:
            if gsi not in self._lines:
                self._lines[gsi] = Line(self.vm, gsi)
            return self._lines[gsi]

    def wire(self, gsi: int, owner: object) -> Callable[[bool], None]:
        """Return `owner`'s end of a pin: a function that takes the level."""
        line = self.line(gsi)
        return lambda asserted: line.set(owner, asserted)

    def allocate(self) -> int:
        """Take a GSI for a vector. Raises HostError when KVM's table has no room for more."""
        with self._lock:
            if not self._free:
                raise HostError("KVM has no interrupt route left", hint="use fewer queues")
            return self._free.pop()

    def release(self, gsis: Iterable[int]) -> None:
        """Give GSIs back; no irqfd may be left on them."""
        with self._lock:
            for gsi in gsis:
                self._messages.pop(gsi, None)
                self._free.append(gsi)

    def route(self, gsi: int, message: Message) -> None:
        """Let `gsi` send `message`; once this returns, every new signal does."""
        with self._lock:
            if self._messages.get(gsi) == message:
                return
            messages = {**self._messages, gsi: message}
            self.vm.set_gsi_routing(
                [*self._pins, *(_msi_route(gsi, messages[gsi]) for gsi in sorted(messages))]
            )
            self._messages = messages

    def forget(self, gsis: Iterable[int]) -> None:
        """Drop routes nobody uses any more.

        KVM is not told: a route without an irqfd does nothing, and after a reset KVM's table is
        a new one anyway.
        """
        with self._lock:
            for gsi in gsis:
                self._messages.pop(gsi, None)
