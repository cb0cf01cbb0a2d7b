"""A virtio device on the PCI bus: its BARs, and register accesses that become viodev_msgs.

    BAR0  I/O, 4 KiB   common 0x000, notify 0x100, ISR 0x200, device 0x300 (vmd's layout)
    BAR1  memory       MSI-X table and PBA

A transitional device has the legacy 0.9 registers in BAR0 and the modern ones in BAR2; vmmci has
the legacy ones alone. All of
virtio's registers live in the device process. This file answers only what PCI owns: the vector
registers, and, where KVM can, the doorbells, which are ioeventfds and wake nobody here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.errors import KvmError
from devices.spec import COMMON_LENGTH, VMD_VENDOR, Block, Common, Legacy
from vmm import log
from vmm.interrupts import CONFIG, NO_VECTOR, Interrupts
from vmm.pcicap import CfgType, ConfigWindow, add_block
from vmm.pcifunc import BAR_IO, PciFunction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.spec import DeviceSpec
    from vmm.channel import DeviceChannel
    from vmm.irq import Router
    from vmm.kvm import Vm

MODERN_SIZE: Final = 0x1000
LEGACY_SIZE: Final = 0x100
LEGACY_VECTORS: Final = 0x14  # two 16-bit registers, there while MSI-X is on
LEGACY_VECTORS_END: Final = 0x18
NOTIFY_LENGTH: Final = 2


class Doorbells:
    """The notify register of one BAR as ioeventfds: a write of queue n signals kick n."""

    def __init__(self, vm: Vm, kicks: Mapping[int, int], offset: int, name: str) -> None:
        """`kicks` are eventfds by queue, none where KVM shall not be used."""
        self._vm, self._kicks, self._offset, self._name = vm, kicks, offset, name
        self._address: int | None = None

    def moved(self, address: int | None) -> None:
        """The BAR decodes at `address` from now on, or nowhere."""
        old, self._address = self._address, address
        try:
            if old is not None:
                self._switch(old, deassign=True)
            if address is not None:
                self._switch(address, deassign=False)
        except KvmError as err:
            # Each write now exits and is forwarded: slower, and right.
            log.warning(f"no ioeventfd: {err}", self._name)

    def _switch(self, address: int, *, deassign: bool) -> None:
        for queue, fd in self._kicks.items():
            self._vm.ioeventfd(
                fd, address + self._offset, NOTIFY_LENGTH, queue, pio=True, deassign=deassign
            )


class VirtioFunction(PciFunction):
    """One virtio device's PCI function."""

    def __init__(
        self,
        spec: DeviceSpec,
        name: str,
        *,
        gsi: int,
        nr_queues: int,
        router: Router,
        vm: Vm,
        channel: DeviceChannel,
        kicks: Mapping[int, int],
        transitional: bool = False,
        irqfd: bool = True,
        tells_msix: bool = False,
    ) -> None:
        """Describe the device and make its interrupts. Raises HostError.

        `tells_msix`: the device hears of MSI-X, for its queues call from elsewhere.
        """
        transitional = (transitional and bool(spec.transitional_id)) or spec.legacy_only
        super().__init__(
            name,
            spec.vendor,
            spec.transitional_id if transitional else spec.pci_device,
            spec.pci_class,
            revision=0 if transitional else 1,
            # A legacy driver tells devices apart by the subsystem id (virtio 1.2 §4.1.2.1).
            subsystem=(VMD_VENDOR, spec.virtio_id),
        )
        self._channel = channel
        self.interrupts = Interrupts(
            self,
            router,
            nr_queues,
            gsi,
            self._isr,
            irqfd=irqfd,
            msix_bar=None if spec.legacy_only else 1,
            needs_master=not transitional,
        )
        self.parts.append(_DeviceReset(channel))
        if tells_msix:
            self.interrupts.on_msix = lambda on: channel.write(Block.MSIX, 1, int(on))
        channel.on_kick = self.interrupts.notify
        if spec.legacy_only:
            registers = LegacyRegisters(channel, self.interrupts)
            self.add_bar(0, MODERN_SIZE, registers, flags=BAR_IO)  # the size is vmd's
            return
        modern = ModernRegisters(channel, self.interrupts)
        at = 0
        if transitional:
            legacy = LegacyRegisters(channel, self.interrupts)
            bells = Doorbells(vm, kicks, Legacy.QUEUE_NOTIFY, name)
            self.add_bar(0, LEGACY_SIZE, legacy, flags=BAR_IO, on_change=bells.moved)
            at = 2
        bells = Doorbells(vm, kicks, Block.NOTIFY, name)
        self.add_bar(at, MODERN_SIZE, modern, flags=BAR_IO, on_change=bells.moved)
        add_block(self, CfgType.COMMON, at, Block.COMMON, COMMON_LENGTH)
        if spec.config_length:
            add_block(self, CfgType.DEVICE, at, Block.DEVICE, spec.config_length)
        add_block(self, CfgType.ISR, at, Block.ISR, 1)
        add_block(self, CfgType.NOTIFY, at, Block.NOTIFY, NOTIFY_LENGTH, notify_multiplier=0)
        ConfigWindow(self)

    def _isr(self) -> bool:
        value, _ = self._channel.read(Block.ISR_PEEK, 1)
        return self._channel.alive and value != 0


class _DeviceReset:
    """Resets the virtio device along with its PCI function."""

    def __init__(self, channel: DeviceChannel) -> None:
        self._channel = channel

    def reset(self) -> None:
        """Write 0 to device_status, and wait until the device has done with guest memory."""
        status = Block.COMMON + Common.DEVICE_STATUS
        self._channel.write(status, 1, 0)
        self._channel.read(status, 1)

    def connect(self) -> None:
        """A device process knows nothing of KVM."""


class _Registers:
    """What both register blocks share: forwarding, and the interrupt state in replies."""

    def __init__(self, channel: DeviceChannel, interrupts: Interrupts) -> None:
        self._channel, self._interrupts = channel, interrupts
        self._queue = 0  # the queue selected, as the device has it too

    def _forward_read(self, reg: int, size: int) -> int:
        value, state = self._channel.read(reg, size)
        if state < 0:
            self._interrupts.lower()
            if self._interrupts.call_fd(CONFIG) is None and not self._interrupts.msix_enabled:
                self._look_again()
        return value

    def _look_again(self) -> None:
        """Undo a lower() that was too late.

        Where interrupts are messages, the device may have sent one right behind its answer, and
        the loop's thread may have raised the line before this thread lowered it.
        """
        isr, _ = self._channel.read(Block.ISR_PEEK, 1)
        if isr and self._channel.alive:
            self._interrupts.notify(CONFIG)

    def _forward_write(self, reg: int, size: int, value: int) -> None:
        self._channel.write(reg, size, value)

    def _set_vector(self, queue: int, value: int) -> None:
        self._interrupts.set_vector(queue, value & 0xFFFF)

    def _reset(self) -> None:
        """The driver resets the device: its vectors go, and nothing interrupts any more."""
        self._interrupts.clear_vectors()
        self._queue = 0


class ModernRegisters(_Registers):
    """The modern block behind its BAR."""

    def read(self, offset: int, size: int) -> int:
        """Read a register; what is between the blocks reads 0."""
        if size == 2 and offset == Common.MSIX_CONFIG:
            return self._interrupts.vector(CONFIG)
        if size == 2 and offset == Common.QUEUE_MSIX_VECTOR:
            return self._interrupts.vector(self._queue)
        if Block.NOTIFY <= offset < Block.ISR or (offset & ~0xFF == Block.ISR and offset & 0xFF):
            return 0
        return self._forward_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; what is between the blocks drops it."""
        if Block.ISR < offset < Block.DEVICE:
            return
        if size == 2 and offset == Common.MSIX_CONFIG:
            self._set_vector(CONFIG, value)
            return
        if size == 2 and offset == Common.QUEUE_MSIX_VECTOR:
            self._set_vector(self._queue, value)
            return
        if offset == Common.QUEUE_SELECT and size == 2:
            self._queue = value
        elif offset == Common.DEVICE_STATUS and size == 1 and not value:
            self._forward_write(offset, size, value)
            self._reset()
            return
        self._forward_write(offset, size, value)


class LegacyRegisters(_Registers):
    """The 0.9 block: while MSI-X is on, two vector registers push the device's own up by four."""

    def read(self, offset: int, size: int) -> int:
        """Read a register."""
        if self._interrupts.msix_enabled and offset >= LEGACY_VECTORS:
            if offset < LEGACY_VECTORS_END:
                queue = CONFIG if offset < LEGACY_VECTORS + 2 else self._queue
                return self._interrupts.vector(queue) if size == 2 else NO_VECTOR
            offset -= LEGACY_VECTORS_END - LEGACY_VECTORS
        return self._forward_read(Block.LEGACY + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        if self._interrupts.msix_enabled and offset >= LEGACY_VECTORS:
            if offset < LEGACY_VECTORS_END:
                self._set_vector(CONFIG if offset < LEGACY_VECTORS + 2 else self._queue, value)
                return
            offset -= LEGACY_VECTORS_END - LEGACY_VECTORS
        if offset == Legacy.QUEUE_SELECT and size == 2:
            self._queue = value
        self._forward_write(Block.LEGACY + offset, size, value)
        if offset == Legacy.DEVICE_STATUS and size == 1 and not value:
            self._reset()
