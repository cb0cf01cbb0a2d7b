"""The board: which chip sits at which port, on which interrupt line.

An i440FX-class PC without legacy storage. PIC, I/O APIC, local APICs, PIT and port 0x61 live in
the kernel and do not appear here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from vmm.bus import Bus, Handler
from vmm.debugport import DebugConsole, DebugExit
from vmm.i8042 import I8042, FastA20
from vmm.memory import split
from vmm.pci import INTX_GSIS, SEABIOS_GSIS, PciBus
from vmm.pm import Pm, ResetControl
from vmm.rtc import Rtc
from vmm.uart import Uart

if TYPE_CHECKING:
    from config.model import VmConfig
    from devices.loop import Loop
    from vmm.kvm import Vm
    from vmm.machine import Owner

I8042_PORTS: Final = 0x60  # to 0x64; of those between, 0x61 never leaves the kernel
RTC_PORTS: Final = 0x70
SYSTEM_CONTROL_A: Final = 0x92
DEBUG_EXIT: Final = 0xF4
COM1: Final = 0x3F8
DEBUG_CONSOLE: Final = 0x402
PM_BLOCK: Final = 0x600

IRQ_KEYBOARD: Final = 1
IRQ_COM1: Final = 4
IRQ_RTC: Final = 8
IRQ_SCI: Final = 9


class Chip(Handler, Protocol):
    """What has registers and a reset line."""

    def reset(self) -> None:
        """Return to power-on."""


class Board:
    """The chips and their wires. Knows no vCPU; reset() is the reset line."""

    def __init__(self, config: VmConfig, vm: Vm, loop: Loop, owner: Owner) -> None:
        low, high = split(config.memory)
        self.pio, self.mmio = Bus("port"), Bus("address")
        self.uart = Uart(partial(vm.irq_line, IRQ_COM1), owner.transmit)
        self.rtc = Rtc(
            partial(vm.irq_line, IRQ_RTC), low, high, vcpus=config.vcpus, timer=loop.timer
        )
        self.i8042 = I8042(partial(vm.irq_line, IRQ_KEYBOARD), owner.reset)
        self.pm = Pm(partial(vm.irq_line, IRQ_SCI), owner.power_off, timer=loop.timer)
        gsis = SEABIOS_GSIS if config.boot.firmware else INTX_GSIS
        self.pci = PciBus(self.pio, self.mmio, ResetControl(owner.reset), gsis)
        chips: list[tuple[int, int, Chip, str]] = [
            (COM1, 8, self.uart, "COM1"),
            (RTC_PORTS, 2, self.rtc, "RTC"),
            (I8042_PORTS, 5, self.i8042, "i8042"),
            (SYSTEM_CONTROL_A, 1, FastA20(owner.reset), "system control A"),
        ]
        if config.debug.console:
            chips.append((DEBUG_CONSOLE, 1, DebugConsole(owner.debug_line), "debug console"))
        if config.debug.exit:
            chips.append((DEBUG_EXIT, 1, DebugExit(owner.debug_exit), "debug exit"))
        for base, length, chip, name in chips:
            self.pio.claim(base, length, chip, name, width=1)
        self.pio.claim(PM_BLOCK, 12, self.pm, "ACPI PM")
        self._resettable: tuple[Chip | Pm | PciBus, ...] = (
            *(chip for _, _, chip, _ in chips),
            self.pm,
            self.pci,
        )

    def connect(self) -> None:
        """Wire the board to a VM that has its interrupt chips; after every reset too."""
        self.pci.connect()

    def reset(self) -> None:
        """Return every chip to power-on; vCPUs are stopped, the VM's descriptor is still open."""
        for chip in self._resettable:
            chip.reset()
