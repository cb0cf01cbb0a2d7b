"""The VM's virtio devices: from vm.yaml to processes on one side and PCI functions on the other.

    vm.yaml ─► one row per device ─► channel, eventfds, PCI function ─► order ─► spawner ─► process

Slots are handed out as vmd does: entropy, then disks in their order. A device whose process dies
stays on the bus: its registers read as all-ones, the VM lives on, and `status` says so.
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from config.errors import HostError
from devices.spec import SPECS
from devices.viodev import ChannelError, ImsgType
from vmm import images, log
from vmm.channel import DeviceChannel
from vmm.interrupts import CONFIG
from vmm.launch import Order
from vmm.pci import intx_gsi
from vmm.virtio_pci import VirtioFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import ExitStack

    from config.model import VmConfig
    from devices.loop import Loop
    from vmm.launch import DeviceProcess, Spawner
    from vmm.machine import Machine


class Row(NamedTuple):
    """One device that vm.yaml asks for."""

    kind: str  # in devices.spec.SPECS
    name: str
    settings: Mapping[str, Any]
    queues: int  # how many request queues
    fds: Mapping[str, int]  # what the device needs beside channels, memory and eventfds


def rows(config: VmConfig, opened: ExitStack) -> Iterator[Row]:
    """Yield what vm.yaml asks for, files opened with our rights. Raises ConfigError, HostError."""
    yield Row("viornd", "viornd", config.rng._asdict(), 1, {})
    for index, disk in enumerate(config.disks):
        image = images.open_disk(disk, f"vioblk{index}")
        opened.callback(os.close, image)
        yield Row("vioblk", f"vioblk{index}", disk._asdict(), disk.queues, {"image": image})


class Device:
    """One device: both of its sides, and the eventfds between them."""

    def __init__(
        self,
        row: Row,
        config: VmConfig,
        machine: Machine,
        loop: Loop,
        failed: Callable[[str], None],
    ) -> None:
        self.row, self.name = row, row.name
        self.process: DeviceProcess | None = None
        self.cause = ""  # what went wrong with its channel, if that came first
        self.lost = ""  # why nobody serves it any more
        self.channel = DeviceChannel(row.name, loop, failed)
        self._kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(row.queues)]
        pci = machine.board.pci
        slot = pci.free_slot()
        self.function = VirtioFunction(
            SPECS[row.kind],
            row.name,
            gsi=intx_gsi(slot),
            nr_queues=row.queues,
            router=machine.router,
            vm=machine.vm,
            channel=self.channel,
            kicks=dict(enumerate(self._kicks)) if machine.ioeventfds else {},
            irqfd=machine.irqfds,
            transitional=config.transitional,
        )
        pci.add(self.function, slot)

    def order(self, config: VmConfig, machine: Machine) -> Order:
        """Say what process serves this device."""
        interrupts = self.function.interrupts
        fds = {"memory": machine.ram.fd, **self.row.fds}
        for queue, kick in enumerate(self._kicks):
            fds[f"kick{queue}"] = kick
        for name, queue in (*((f"call{n}", n) for n in range(self.row.queues)), ("callc", CONFIG)):
            call = interrupts.call_fd(queue)
            if call is not None:
                fds[name] = call
        if interrupts.resample_fd is not None:
            fds["resample"] = interrupts.resample_fd
        settings = {
            **self.row.settings,
            "packed": config.packed,
            "transitional": config.transitional,
        }
        regions = tuple((r.gpa, r.size, r.offset) for r in machine.ram.memory.regions)
        return Order(self.row.kind, self.name, settings, regions, fds)

    def close(self) -> None:
        """Ask its process to leave, and free what the VM process holds of the device."""
        self.channel.shut_down()
        self.channel.close()
        self.function.interrupts.close()
        for kick in self._kicks:
            os.close(kick)


class Devices:
    """All of them."""

    def __init__(
        self,
        config: VmConfig,
        machine: Machine,
        loop: Loop,
        spawner: Spawner,
        *,
        died: Callable[[str, str], None],
        parts: ExitStack,
    ) -> None:
        """Launch every device of vm.yaml and wait until all are ready.

        `died(name, how)` is called on the loop's thread when one has ended unasked; `parts`
        closes what was made, also after a failure here. Raises ConfigError, HostError.
        """
        self._died = died
        self._devices: dict[str, Device] = {}
        spawner.on_death = self._ended
        for row in rows(config, parts):
            device = Device(row, config, machine, loop, partial(self._failed, row.name))
            parts.callback(device.close)
            self._devices[row.name] = device
        waits = [
            (device, spawner.launch(device.order(config, machine), device.channel))
            for device in self._devices.values()
        ]
        for device, ready in waits:
            device.process = ready()
        spawner.watch(loop)

    def facts(self) -> list[dict[str, Any]]:
        """Return what `status --json` tells of each device."""
        return [
            {
                "name": device.name,
                "kind": device.row.kind,
                "pid": device.process.pid if device.process and not device.lost else 0,
                "state": "lost" if device.lost else "running",
                "reason": device.lost,
                "messages": device.channel.messages,
            }
            for device in self._devices.values()
        ]

    def pause(self) -> None:
        """Have every device finish and leave guest memory alone. The vCPUs are parked."""
        self._tell(ImsgType.PAUSE)

    def unpause(self) -> None:
        """Let every device go on."""
        self._tell(ImsgType.UNPAUSE)

    def set(self, name: str, setting: str, value: Any) -> Any:
        """Change something about a device at run time. Raises HostError in the device's words."""
        device = self._devices.get(name)
        if device is None:
            known = ", ".join(self._devices)
            raise HostError(f"there is no device {name}", hint=f"there are: {known}")
        request = json.dumps({"name": setting, "value": value}).encode()
        try:
            answer = json.loads(device.channel.call(ImsgType.SETTING, request))
        except (ValueError, RecursionError) as err:  # a compromised device may say anything
            raise HostError("answered nonsense", device=name) from err
        if not isinstance(answer, dict) or "value" not in answer:
            what = answer.get("error") if isinstance(answer, dict) else None
            raise HostError(str(what or "answered nonsense"), device=name)
        return answer["value"]

    def _tell(self, what: ImsgType) -> None:
        for device in self._devices.values():
            if device.channel.alive:
                try:
                    device.channel.call(what)
                except ChannelError as err:  # _failed() knows
                    log.error(str(err), device.name)

    def _failed(self, name: str, why: str) -> None:
        """A device's channel is no good any more: end what may still run behind it."""
        device = self._devices[name]
        device.cause = device.cause or why
        if device.process is not None:
            device.process.kill()  # its end comes back as _ended()

    def _ended(self, process: DeviceProcess) -> None:
        """A device process has ended unasked; its parent has told us how."""
        device = self._devices[process.name]
        device.channel.close()
        device.lost = f"process {process.pid} {process.ended}"
        if device.cause:
            device.lost += f" ({device.cause})"
        log.error(f"device lost: {device.lost}", device.name)
        self._died(device.name, device.lost)
