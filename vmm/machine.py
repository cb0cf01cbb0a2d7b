"""The machine: KVM, guest RAM, vCPU threads and the board, put together and started.

Knows nothing of sockets, files or users; vm.py does. All methods are for the loop's thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from config.errors import ConfigError, HostError
from vmm import acpi, boot, cpu, memory, mptable
from vmm.board import COM1, Board
from vmm.coalesced import CoalescedPort
from vmm.irq import Router
from vmm.kvm import System, Vm
from vmm.kvmabi import Cap, Exit
from vmm.vcpu import Exits, Gate, VcpuThread, catch_kick

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.errors import KvmError
    from config.model import VmConfig
    from devices.loop import Loop
    from vmm.boot import BootImages, Entry
    from vmm.firmware import Firmware

ACPI_TABLES = 0xE0000  # between the option ROMs and the end of the first MiB


class Owner(Protocol):
    """Who decides what happens next. Called on any thread; returns at once."""

    def reset(self, reason: str) -> None:
        """The guest asks for a reset."""

    def power_off(self, reason: str) -> None:
        """The guest switches itself off."""

    def debug_exit(self, status: int) -> None:
        """The guest ends the VM with a status (isa-debug-exit)."""

    def failed(self, error: KvmError) -> None:
        """The VM cannot go on."""

    def transmit(self, data: bytes) -> None:
        """The guest wrote to its serial port."""

    def debug_line(self, line: str) -> None:
        """The guest wrote a line to the debug console."""


class Machine:
    """One PC. Built once; power_on() and power_off() alternate, a reset is one of each."""

    def __init__(
        self, config: VmConfig, images: BootImages | Firmware, loop: Loop, owner: Owner
    ) -> None:
        """Take what the machine needs from the host. Raises ConfigError, HostError, KvmError."""
        self.config, self._images = config, images
        catch_kick()
        self._system = System()
        try:
            if config.vcpus > self._system.max_vcpus:
                raise ConfigError(
                    f"vcpus {config.vcpus} is more than this host's KVM allows "
                    f"({self._system.max_vcpus})",
                    vm=config.name,
                )
            self.ram = memory.Ram(config.name, config.memory)
        except BaseException:
            self._system.close()
            raise
        self.vm = Vm(self._system)
        self.router = Router(self.vm, self._system.capability(Cap.IRQ_ROUTING))
        self.board = Board(config, self.vm, loop, owner)
        self._coalesced = CoalescedPort(COM1, self.board.uart.write_many, loop.timer)
        self.board.uart.on_batching = self._coalesced.switch
        self._exits = Exits(
            self.board.pio,
            self.board.mmio,
            self._coalesced.drain,
            owner.reset,
            owner.power_off,
            owner.failed,
        )
        able = self._system.capability
        wanted = config.debug.eventfds
        #: Whether KVM carries kicks, and interrupts, without this process.
        self.ioeventfds = wanted and bool(able(Cap.IOEVENTFD))
        self.irqfds = wanted and bool(able(Cap.IRQFD) and able(Cap.IRQFD_RESAMPLE))
        self.first_run = 0.0  # CLOCK_MONOTONIC
        #: Called on the loop's thread while that waits for a vCPU, which may wait for a device.
        self.meanwhile: Callable[[], object] = lambda: None
        self._gate = Gate()
        self._vcpus: list[VcpuThread] = []
        self._counts: dict[str, int] = {}

    def power_on(self) -> None:
        """Load the guest and make its vCPUs, parked. Raises ConfigError, HostError, KvmError."""
        count = self.config.vcpus
        self.vm.create_chips()
        self.ram.plug_into(self.vm)
        entry = self._load()
        supported = self._system.supported_cpuid()
        deadline = bool(self._system.capability(Cap.TSC_DEADLINE_TIMER))
        self._gate = Gate()
        for index in range(count):
            vcpu = self.vm.create_vcpu(index)
            self._vcpus.append(VcpuThread(vcpu, self._exits, self._gate))
            cpu.set_up(vcpu, cpu.cpuid(supported, index, count, tsc_deadline=deadline), entry)
        self.board.connect()
        ring = self._vcpus[0].vcpu.ring
        if ring is not None:
            self._coalesced.attach(self.vm, ring)
            self._coalesced.switch(self.board.uart.batching)
        for thread in self._vcpus:
            thread.start()

    def _load(self) -> Entry:
        """Put into memory what the guest starts from, by kernel or by firmware."""
        ram, pci, count = self.ram.memory, self.board.pci, self.config.vcpus
        if not isinstance(self._images, boot.BootImages):
            return self._images.power_on(self.config, self.vm, ram, self.board)
        tables = acpi.build(count, pci.intx_gsi, base_gpa=ACPI_TABLES)
        ram.write(ACPI_TABLES, tables.blob)
        ram.write(mptable.ADDRESS, mptable.build(count, pci.intx_gsi))
        return boot.load(ram, memory.e820(self.config.memory), self._images, ACPI_TABLES)

    def resume(self) -> None:
        """Let the vCPUs run."""
        self.first_run = self.first_run or time.monotonic()
        for thread in self._vcpus:
            thread.vcpu.clock_was_stopped()
        self._gate.set(Gate.Mode.RUN)

    def pause(self) -> None:
        """Park every vCPU; returns once none runs. Raises HostError if one does not come."""
        self._gate.set(Gate.Mode.PARK)
        self._poke()
        if not self._gate.all_parked(len(self._vcpus), self.meanwhile):
            raise HostError("a vCPU does not stop", vm=self.config.name)

    def power_off(self) -> None:
        """End the vCPUs and forget the guest's state; RAM keeps its bytes, as on a real reset."""
        self.halt()
        self.vm.renew()

    def poke(self) -> None:
        """Stop the vCPUs at their gates without waiting; safe on a vCPU's own thread."""
        self._gate.set(Gate.Mode.PARK)
        self._poke()

    def exits(self) -> dict[str, int]:
        """Return exits to user space so far, by KVM's name for the reason."""
        total = dict(self._counts)
        for thread in self._vcpus:
            self._count(thread, total)
        return total

    def halt(self) -> None:
        """End the vCPUs and quieten the devices, which may be closed then."""
        self._end_vcpus()
        self.board.reset()

    def close(self) -> None:
        """Give everything back to the host."""
        self.halt()
        self.vm.close()
        self.ram.close()
        self._system.close()

    def _end_vcpus(self) -> None:
        self._gate.set(Gate.Mode.LEAVE)
        self._poke()
        for thread in self._vcpus:
            thread.join()
        self._coalesced.detach()
        for thread in self._vcpus:
            self._count(thread, self._counts)
            thread.vcpu.close()
        self._vcpus = []

    def _poke(self) -> None:
        for thread in self._vcpus:
            thread.poke()

    def _count(self, thread: VcpuThread, into: dict[str, int]) -> None:
        for reason, count in thread.counts.items():
            if count:
                name = Exit(reason).name.lower() if reason in set(Exit) else str(reason)
                into[name] = into.get(name, 0) + count
