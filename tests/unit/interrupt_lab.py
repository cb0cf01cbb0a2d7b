"""One virtio-like device on a fake VM: what its process does, and what its driver does."""

from __future__ import annotations

from tests.unit.fake_vm import FakeVm, take
from tests.unit.pci_guest import COMMAND, STATUS, Guest, card
from vmm.interrupts import CONFIG, Interrupts
from vmm.irq import Router
from vmm.pci import intx_gsi

ADDRESS = 0xFEE01000
MASTER, INTX_OFF = 0x4, 0x400
MEMORY = 0x2
ENABLE, FUNCTION_MASK = 0x8000, 0x4000


class Lab:
    """Two queues and a configuration interrupt in slot 1, on INTx GSI 5."""

    def __init__(
        self,
        *,
        irqfd: bool = True,
        queues: int = 2,
        needs_master: bool = True,
        msix_bar: int | None = 1,
    ) -> None:
        self.guest, self.vm = Guest(), FakeVm()
        self.router = Router(self.vm)
        self.irqfd, self.isr = irqfd, False
        self.function = card("vioblk0")
        self.gsi = intx_gsi(1)
        self.interrupts = Interrupts(
            self.function,
            self.router,
            queues,
            self.gsi,
            lambda: self.isr,
            irqfd=irqfd,
            needs_master=needs_master,
            msix_bar=msix_bar,
        )
        self.sources = (*range(queues), CONFIG)
        self.slot = self.guest.bus.add(self.function)
        self.guest.bus.connect()

    def close(self) -> None:
        """Free the descriptors."""
        self.interrupts.close()

    # The device process.

    def signal(self, queue: int) -> None:
        """Interrupt for `queue`, the only way this device knows."""
        self.isr = True
        fd = self.interrupts.call_fd(queue)
        if fd is None:
            self.interrupts.notify(queue)
        else:
            self.vm.signal(fd)

    def resample(self) -> None:
        """Look at resample_fd, and signal again if ISR is not 0."""
        fd = self.interrupts.resample_fd
        if fd is not None and take(fd) and self.isr:
            self.signal(CONFIG)

    # The guest.

    def read_isr(self) -> bool:
        """Read and clear ISR; the transport lowers the line."""
        isr, self.isr = self.isr, False
        self.interrupts.lower()
        return isr

    def eoi(self) -> None:
        """End the interrupt."""
        self.vm.eoi(self.gsi)
        self.resample()

    @property
    def line(self) -> bool:
        """Whether the INTx line is high."""
        return self.vm.level(self.gsi)

    def command(self, bits: int) -> None:
        """Write the command register; memory decoding stays on."""
        self.guest.write(self.slot, COMMAND, 2, MEMORY | bits)

    def status_bit(self) -> bool:
        """Read the interrupt status bit."""
        return bool(self.guest.read(self.slot, STATUS, 2) & 8)

    def control(self, bits: int) -> None:
        """Write MSI-X message control."""
        at = dict(self.guest.capabilities(self.slot))[0x11]
        self.guest.write(self.slot, at + 2, 2, bits)

    def table(self, vector: int, register: int, value: int) -> None:
        """Write one dword of a table entry."""
        self.guest.mmio.write(self._bar + 16 * vector + 4 * register, 4, value)

    def mask(self, vector: int, masked: bool = True) -> None:
        """Write vector control."""
        self.table(vector, 3, masked)

    def program(self, vector: int, data: int) -> None:
        """Write a vector's message."""
        self.table(vector, 0, ADDRESS)
        self.table(vector, 1, 0)
        self.table(vector, 2, data)

    def pba(self) -> int:
        """Read the pending bits."""
        return self.guest.mmio.read(self._bar + 0x800, 4)

    @property
    def _bar(self) -> int:
        return self.guest.read(self.slot, 0x14) & ~0xF

    def use_msix(self) -> None:
        """Do what a driver does: source n gets vector n with data 0x40 + n, all unmasked."""
        self.command(MASTER)
        self.control(ENABLE | FUNCTION_MASK)
        for vector, queue in enumerate(self.sources):
            self.program(vector, 0x40 + vector)
            self.mask(vector, False)
            assert self.interrupts.set_vector(queue, vector) == vector
        self.control(ENABLE)

    def heard(self) -> list[int]:
        """Return the data of messages since the last call."""
        sent, self.vm.sent = self.vm.sent, []
        return [message.data for message in sent]
