"""A machine of one device on a PCI bus, in this process: our buses, our function, no KVM.

    with PciHost("viornd") as host:
        device = PciDriver(host, host.slot)      # finds everything in configuration space

The device process is a real one; between it and the driver stands what a VM process has there:
`vmm.pci`, `vmm.virtio_pci`, `vmm.interrupts` and `vmm.channel`, on a `SoftVm`. It shows a driver
what a board shows a guest: ports, addresses, messages and lines.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from config.errors import HostError
from devices.guestmem import GuestMemory, Region
from devices.loop import Loop
from devices.spec import SPECS
from tools.viodriver.memory import make_memfd
from tools.viodriver.softvm import SoftVm
from vmm.bus import Bus
from vmm.channel import DeviceChannel
from vmm.interrupts import CONFIG
from vmm.irq import Router
from vmm.launch import Order, Spawner
from vmm.pci import PciBus
from vmm.virtio_pci import VirtioFunction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from vmm.launch import DeviceProcess


class PciHost:
    """Plays VM process and board for one device process. For one thread."""

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any] | None = None,
        *,
        memory_size: int = 8 << 20,
        fds: Mapping[str, int] | None = None,
        queues: int = 0,
        transitional: bool = False,
        irqfd: bool = True,
        ioeventfd: bool = True,
        jail: str = "off",
        spawner: Spawner | None = None,
    ) -> None:
        """Launch a device, plug it in, and wait until it is ready. Raises HostError.

        The arguments are those of `DeviceHost`; without `irqfd` the device sends messages, without
        `ioeventfd` its doorbell is a register. A `spawner` given here is shared and stays.
        """
        self._own_spawner = spawner is None
        self.spawner = spawner or Spawner("test", jail)
        self.loop = Loop()
        self.vm = SoftVm()
        self.lost = ""  # why the device is gone
        self.channel = DeviceChannel(f"{kind}0", self.loop, self._failed)
        self.process: DeviceProcess | None = None
        self._kicks: list[int] = []
        self._pio, self._mmio = Bus("port"), Bus("address")
        self.pci = PciBus(self._pio, self._mmio)
        nr_queues = queues or len(SPECS[kind].queues)
        regions = (Region(0, memory_size, 0),)
        memory_fd = make_memfd(memory_size)
        try:
            self.memory = GuestMemory(memory_fd, regions)
            self._kicks = [
                os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(nr_queues)
            ]
            slot = self.pci.free_slot()
            self.function = VirtioFunction(
                SPECS[kind],
                f"{kind}0",
                gsi=self.pci.intx_gsi(slot),
                nr_queues=nr_queues,
                router=Router(self.vm),
                vm=self.vm,  # type: ignore[arg-type]  # all it asks of one is VmEvents
                channel=self.channel,
                kicks=dict(enumerate(self._kicks)) if ioeventfd else {},
                transitional=transitional,
                irqfd=irqfd,
            )
            self.slot = self.pci.add(self.function, slot)
            given = {"memory": memory_fd, **self._events(nr_queues), **(fds or {})}
            order = Order(
                kind,
                f"{kind}0",
                {**(settings or {}), "transitional": transitional},
                regions,
                given,
            )
            self.process = self.spawner.launch(order, self.channel)()
            self.pci.connect()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory_fd)

    def _events(self, nr_queues: int) -> dict[str, int]:
        """Return the eventfds of the device by the names that it knows."""
        interrupts = self.function.interrupts
        calls = {f"call{queue}": interrupts.call_fd(queue) for queue in range(nr_queues)}
        calls |= {"callc": interrupts.call_fd(CONFIG), "resample": interrupts.resample_fd}
        kicks = {f"kick{queue}": fd for queue, fd in enumerate(self._kicks)}
        return {**kicks, **{name: fd for name, fd in calls.items() if fd is not None}}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask the process to leave, and free what the host holds of it."""
        self.channel.shut_down()
        self.channel.close()
        if hasattr(self, "function"):
            self.function.interrupts.close()
        if self._own_spawner:
            self.spawner.close(self.loop)
        for fd in self._kicks:
            os.close(fd)
        self._kicks.clear()
        self.loop.close()

    # The board, as a driver sees it.

    def port_read(self, port: int, size: int) -> int:
        """Read a port."""
        return self._pio.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write a port; a doorbell does not come further than KVM."""
        if not self.vm.ring(port, value, pio=True):
            self._pio.write(port, size, value)

    def memory_read(self, address: int, size: int) -> int:
        """Read a device's memory."""
        return self._mmio.read(address, size)

    def memory_write(self, address: int, size: int, value: int) -> None:
        """Write a device's memory."""
        if not self.vm.ring(address, value, pio=False):
            self._mmio.write(address, size, value)

    def wait(self, timeout: float) -> None:
        """Let time pass until something happens, at most `timeout` seconds."""
        self.vm.poll(timeout, self.loop.fileno())
        self._turn()

    def take_message(self, data: int) -> bool:
        """Take the messages of this data that have come; False if there are none."""
        return self.vm.take_message(data)

    def line(self, gsi: int) -> bool:
        """Whether an interrupt line is high."""
        return self.vm.level(gsi)

    def end_interrupt(self, gsi: int) -> None:
        """Write EOI for a line."""
        self.vm.eoi(gsi)

    @property
    def alive(self) -> bool:
        """Whether the device process has not ended, as far as this process has noticed."""
        self._turn()
        return self.channel.alive and self.process is not None and not self.process.wait(0.0)

    def _turn(self) -> None:
        """Run what waits on the loop, and no more."""
        self.loop.call(self.loop.stop)
        self.loop.run()

    def _failed(self, why: str) -> None:
        self.lost = why


def slots(host: PciHost) -> list[int]:
    """Return the slots with something in them, by looking at each, as firmware does."""
    found = []
    for slot in range(32):
        host.port_write(0xCF8, 4, 1 << 31 | slot << 11)
        if host.port_read(0xCFC, 2) != 0xFFFF:
            found.append(slot)
    if not found:
        raise HostError("there is nothing on the PCI bus")
    return found
