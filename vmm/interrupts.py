"""Interrupts of one PCI device: what can interrupt, and where that leads right now.

A device says "look at queue n" by writing one eventfd, always the same, and knows nothing else.
Registers that the guest writes decide where that goes:

    MSI-X on, vector may send         irqfd on the vector's GSI ─► message
    MSI-X on, vector masked or none   nowhere: the eventfd's counter keeps it
    MSI-X off, INTx on                resampling irqfd on the slot's pin ─► level line
    MSI-X off, INTx off               nowhere: the device's ISR register keeps it

Every change takes the same two steps: set the register, then `_sync` moves each eventfd to where
it now belongs, message first. `callfd` tells why no signal gets lost meanwhile.

Level-triggered INTx needs the device's help, since only its ISR register knows whether it still
asserts. KVM lowers the line at EOI and signals `resample_fd`; the device process must then write
a call eventfd again if its ISR is not 0, or an interrupt that came between the guest's ISR read
and its EOI is lost. When INTx gets switched on, `isr` puts the same question to the device:
counters say nothing there, for the guest may have read ISR since.

Without irqfd (and for what the VM process itself has to report) there is `notify`, which follows
the same registers; what must wait is a flag. The VM process never writes an eventfd that a
device process shares: one that filled the counter could hang it.

Locking: Interrupts.lock guards everything here and the MSI-X registers. It comes below
PciBus.lock and above the Router's. `isr` is called with PciBus.lock held, never with this one.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from vmm.callfd import CallFd
from vmm.msix import CAP_MSIX, CONTROL, Msix
from vmm.pcifunc import COMMAND_INTX_OFF, COMMAND_MASTER, STATUS_INTX, Header

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.irq import Message, Router
    from vmm.pcifunc import PciFunction

NO_VECTOR: Final = 0xFFFF  # VIRTIO_MSI_NO_VECTOR
CONFIG: Final = 0xFFFF  # in place of a queue: the configuration change interrupt


class _Source:
    """One thing that can interrupt: a queue, or the configuration."""

    __slots__ = ("call", "vector", "waiting")

    def __init__(self, call: CallFd | None) -> None:
        self.call = call
        self.vector = NO_VECTOR
        self.waiting = False  # notify() came while the vector had to keep silent

    def drain(self) -> None:
        """Forget what waits: nobody is to hear of it any more."""
        self.waiting = False
        if self.call is not None:
            self.call.drain()


class Interrupts:
    """Call eventfds, vectors and the INTx pin of one function."""

    def __init__(
        self,
        function: PciFunction,
        router: Router,
        nr_queues: int,
        gsi: int,
        isr: Callable[[], bool],
        *,
        irqfd: bool = True,
        msix_bar: int | None = 1,
        needs_master: bool = True,
    ) -> None:
        """Add INTA on `gsi`, and MSI-X in memory BAR `msix_bar` unless None, to `function`.

        `isr()` tells whether the device's ISR is not 0 and leaves it as it is. `needs_master`:
        messages wait while the driver has bus mastering off; old legacy drivers never turn it on.
        Raises HostError when descriptors or GSIs run out.
        """
        self.lock = threading.Lock()
        self._function, self._router, self._pin, self._isr = function, router, gsi, isr
        self._line, self._needs_master = router.line(gsi), needs_master
        self._connected = self._asserted = False
        self._command = self._control_at = 0
        self._sources: dict[int, _Source] = {}
        self._gsis: list[int] = []  # of each vector
        #: Called with whether the guest has MSI-X on, when that changes; no lock of ours is held.
        self.on_msix: Callable[[bool], None] = lambda on: None
        self._told = False
        self._msix: Msix | None = None
        self.resample_fd: int | None = None  # signalled at EOI; the device process watches it
        try:
            if irqfd:
                self.resample_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            for queue in (*range(nr_queues), CONFIG):
                self._sources[queue] = _Source(CallFd() if irqfd else None)
            if msix_bar is not None:
                self._gsis.extend(router.allocate() for _ in self._sources)
                self._msix = Msix(len(self._gsis), self.lock, self._sync_vector, self._pending)
                self._add_msix(self._msix, msix_bar)
        except OSError as err:
            self.close()
            raise HostError(f"{function.name}: eventfd: {err.strerror}") from err
        except BaseException:
            self.close()
            raise
        command, status = Header.COMMAND.value, Header.STATUS.value
        function.watch(command.offset, command.width, after_write=self._registers_written)
        function.watch(status.offset, status.width, before_read=self._show_status)
        function.use_intx(gsi)
        function.parts.append(self)

    def _add_msix(self, msix: Msix, bar: int) -> None:
        self._function.add_bar(bar, msix.bar_size, msix)
        self._control_at = CONTROL + self._function.add_capability(CAP_MSIX, *msix.capability(bar))
        self._function.watch(self._control_at, 2, after_write=self._registers_written)

    # For the transport.

    @property
    def vectors(self) -> int:
        """How many MSI-X vectors there are: one per queue and one for CONFIG, or none."""
        return len(self._gsis)

    @property
    def msix_enabled(self) -> bool:
        """Whether the guest has MSI-X on; a legacy register block looks different then."""
        return self._msix is not None and self._msix.enabled

    def call_fd(self, queue: int) -> int | None:
        """Return the eventfd that interrupts for `queue` (or CONFIG); None without irqfd."""
        source = self._sources.get(queue)
        return source.call.fd if source is not None and source.call is not None else None

    def vector(self, queue: int) -> int:
        """Return the vector of `queue` (or CONFIG); NO_VECTOR also for one that is not there."""
        source = self._sources.get(queue)
        return source.vector if source is not None else NO_VECTOR

    def set_vector(self, queue: int, vector: int) -> int:
        """Give `queue` (or CONFIG) a vector, and return the one it has now.

        NO_VECTOR takes it away, and so does a vector or queue that is not there: the driver
        reads back that it was refused (virtio 1.2 §4.1.5.1.2.1).
        """
        with self.lock:
            source = self._sources.get(queue)
            if source is None:
                return NO_VECTOR
            if not 0 <= vector < self.vectors:
                vector = NO_VECTOR
            if source.vector == NO_VECTOR:
                source.drain()  # from before there was anybody to tell; a move keeps what waits
            source.vector = vector
            self._sync(source)
            return vector

    def clear_vectors(self) -> None:
        """Take every vector away and release the line, as a reset of the virtio device does."""
        for queue in self._sources:
            self.set_vector(queue, NO_VECTOR)
        self.lower()

    def notify(self, queue: int) -> None:
        """Interrupt for `queue` (or CONFIG) without an eventfd; unknown queues are ignored."""
        with self.lock:
            source = self._sources.get(queue)
            if source is None or not self._connected:
                return  # a message on its way while the machine was reset ends here, too
            if not self.msix_enabled:
                self._asserted = True
                self._drive_line()
            elif source.vector != NO_VECTOR:
                source.waiting = True
                self._sync(source)

    def lower(self) -> None:
        """Release the line: the guest has read ISR, or the device said so."""
        with self.lock:
            self._asserted = False
            self._drive_line()

    # For the function and the bus.

    def reset(self) -> None:
        """Return to power-on and take every eventfd back from KVM; they stay open."""
        with self.lock:
            self._connected = self._asserted = False
            self._command = 0
            if self._msix is not None:
                self._msix.reset()
            for source in self._sources.values():
                source.vector = NO_VECTOR
                self._sync(source)
                source.drain()
            self._drive_line()
            self._router.forget(self._gsis)
        self._tell_msix()

    def connect(self) -> None:
        """Wire up to a VM that has its interrupt chips."""
        with self.lock:
            self._connected = True
            self._sync_all()

    def close(self) -> None:
        """Let go of everything; all eventfds are closed, on this side at least."""
        self.reset()
        for source in self._sources.values():
            if source.call is not None:
                source.call.close()
        if self.resample_fd is not None:
            os.close(self.resample_fd)
        self._router.release(self._gsis)
        self._sources, self._gsis, self.resample_fd = {}, [], None

    def _registers_written(self) -> None:
        """Act on the command register or message control, which the guest has written."""
        with self.lock:
            before = self._intx_on
            self._command = self._function.command
            if self._msix is not None:
                self._msix.set_control(self._function.read(self._control_at, 2))
            self._sync_all()
            switched_on = self._intx_on and not before
        self._tell_msix()
        if switched_on and self._isr():
            self.notify(CONFIG)

    def _tell_msix(self) -> None:
        if self._told != self.msix_enabled:
            self._told = self.msix_enabled
            self.on_msix(self._told)

    def _show_status(self) -> None:
        """Make the interrupt status bit true, for the guest is about to read it."""
        wants = not self.msix_enabled and (self._asserted or self._isr())
        offset, width, _ = Header.STATUS.value
        status = self._function.read(offset, width) & ~STATUS_INTX
        self._function.put(offset, width, status | STATUS_INTX * wants)

    # What follows from the registers; the lock is held.

    @property
    def _intx_on(self) -> bool:
        return self._connected and not self.msix_enabled and not self._command & COMMAND_INTX_OFF

    def _drive_line(self) -> None:
        self._line.set(self, self._asserted and self._intx_on)

    def _message(self, vector: int) -> Message | None:
        """Return what `vector` may send now."""
        if self._msix is None or vector >= self.vectors or not self._connected:
            return None
        if self._needs_master and not self._command & COMMAND_MASTER:
            return None
        return self._msix.message(vector)

    def _pending(self, vector: int) -> bool:
        """Answer the PBA: something waits for `vector`."""
        return self.msix_enabled and any(
            source.waiting or (source.call is not None and source.call.waiting())
            for source in self._sources.values()
            if source.vector == vector
        )

    def _sync_all(self) -> None:
        for source in self._sources.values():
            self._sync(source)
        self._drive_line()

    def _sync_vector(self, vector: int) -> None:
        for source in self._sources.values():
            if source.vector == vector:
                self._sync(source)

    def _sync(self, source: _Source) -> None:
        """Move one source to where the registers say it belongs."""
        message = self._message(source.vector)
        if source.call is not None:
            self._move(source.call, source.vector, message)
        if not self.msix_enabled:
            source.waiting = False
        if source.waiting and message is not None:
            source.waiting = False
            self._router.vm.signal_msi(*message)

    def _move(self, call: CallFd, vector: int, message: Message | None) -> None:
        if message is not None:
            self._router.route(self._gsis[vector], message)
            if call.gsi != self._gsis[vector]:
                call.move(self._router.vm, self._gsis[vector])
        elif not self._intx_on:
            call.move(self._router.vm, None)
        elif call.gsi != self._pin:
            call.move(self._router.vm, None)
            call.drain()  # `isr` knows better what is still true
            call.move(self._router.vm, self._pin, self.resample_fd)
