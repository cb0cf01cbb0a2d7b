"""The VM's virtio devices: from vm.yaml to processes on one side and PCI functions on the other.

    vm.yaml ─► one row per device ─► channel, eventfds, PCI function ─► order ─► spawner ─► process

When a process dies another one takes its place (`vmm/lasting.py`). Where one after another dies
at once the device is lost, and stays on the bus: its registers read as all-ones, the VM lives on,
and `status` says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError, PyvmError
from devices.spec import SPECS
from devices.viodev import DATA_MAX, ChannelError, ImsgType
from vmm import log
from vmm.channel import DeviceChannel
from vmm.counters import Counters
from vmm.interrupts import CONFIG
from vmm.lasting import Lasting
from vmm.launch import Order
from vmm.rows import Row, open_drive, rows
from vmm.virtio_pci import VirtioFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack

    from config.model import VmConfig
    from devices.loop import Loop
    from vmm.launch import DeviceProcess, Spawner
    from vmm.machine import Machine
    from vmm.net.network import Network
    from vmm.netpairs import Pairs
    from vmm.peers import Peers

CALL_ATTEMPTS: Final = 5  # processes that may die over a call, one after the other


class Device:
    """One device: both of its sides, and the eventfds between them."""

    def __init__(
        self,
        row: Row,
        config: VmConfig,
        machine: Machine,
        loop: Loop,
        *,
        failed: Callable[[str], None],
        spawner: Spawner,
        hand: Callable[[list[int], int], Any],
    ) -> None:
        """Plug it in; `failed(why)` and `hand` are those of its channel and of `netpairs`."""
        self.row, self.name = row, row.name
        self._config, self._machine = config, machine
        self.process: DeviceProcess | None = None
        self.lost = ""  # why nobody serves it any more
        self.channel = DeviceChannel(row.name, loop, failed)
        self.counters = Counters(row.kind, row.processes)
        self.channel.is_busy = self.counters.busy
        self.others: Pairs | None = None
        self.lasting = Lasting(row.name, row.queues)
        self.channel.handled = self.lasting.handled
        if row.processes > 1:
            from vmm.netpairs import Hand, Pairs  # 1 ms, which most VMs do not spend

            taps = {n: row.fds[f"tap{n}"] for n in range(1, row.processes)}
            self.others = Pairs(row.name, taps, Hand(loop, spawner, self._order, hand))
        self._kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(row.queues)]
        pci = machine.board.pci
        slot = pci.free_slot()
        self.function = VirtioFunction(
            row.spec,
            row.name,
            gsi=pci.intx_gsi(slot),
            nr_queues=row.queues,
            router=machine.router,
            vm=machine.vm,
            channel=self.channel,
            kicks=dict(enumerate(self._kicks)) if machine.ioeventfds else {},
            irqfd=machine.irqfds,
            transitional=config.transitional,
            tells_msix=row.spec.hands_over or row.processes > 1,
        )
        pci.add(self.function, slot)

    def launch(
        self, spawner: Spawner, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> Callable[[], None]:
        """Ask for what serves this device; call what is returned to wait until it is ready.

        `settings` go to its first process, beside the device's. Raises HostError.
        """
        interrupts = self.function.interrupts
        fds, settings = {**self.row.fds, **self.lasting.fds}, dict(settings)
        if (config := interrupts.call_fd(CONFIG)) is not None:
            fds["callc"] = config
        if interrupts.resample_fd is not None:
            fds["resample"] = interrupts.resample_fd
        if self.others is not None:
            settings |= {"apart": True, "lives": self.others.lives()}
            fds = {name: fd for name, fd in fds.items() if not name.startswith("tap")}
            fds |= {"tap0": self.row.fds["tap0"], **self.others.fds()}
        order = self._order(self.name, settings, 0, self.row.queues, fds)
        waits = [spawner.launch(order, self.channel)]
        further = self.others.launch() if self.others is not None else None

        def wait() -> None:
            try:
                self.process = waits.pop()()
            finally:
                if further is not None:
                    further()

        return wait

    def stop(self, deadline: float) -> bool:
        """End all its processes; False if one has not by `deadline` on the monotonic clock."""
        self.channel.hang_up()
        if self.process is not None:
            self.process.kill()
        gone = self.others is None or self.others.end(deadline)
        return gone and (self.process is None or self.process.wait(deadline))

    def _order(
        self,
        name: str,
        settings: Mapping[str, Any],
        first: int,
        count: int,
        fds: Mapping[str, int],
    ) -> Order:
        """Say what a process of this device is to be: one that has `count` queues from `first`."""
        config, machine = self._config, self._machine
        fds = {"memory": machine.ram.fd, "counters": self.counters.fd, **fds}
        for index in range(count):
            fds[f"kick{index}"] = self._kicks[first + index]
            call = self.function.interrupts.call_fd(first + index)
            if call is not None:
                fds[f"call{index}"] = call
        settings = {
            **self.row.settings,
            "packed": config.packed,
            "transitional": config.transitional,
            **settings,
        }
        regions = tuple((r.gpa, r.size, r.offset) for r in machine.ram.memory.regions)
        if not self.row.queues:
            regions = ()  # it has no business in guest memory
        return Order(self.row.kind, name, settings, regions, fds)

    def close(self) -> None:
        """Ask its process to leave, and free what the VM process holds of the device."""
        if self.others is not None:
            self.others.close()
        self.channel.shut_down()
        self.channel.close()
        self.lasting.close()
        self.function.interrupts.close()
        self.counters.close()
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
        network: Network | None,
        *,
        peers: Peers | None = None,
        died: Callable[[str, str], None],
        parts: ExitStack,
    ) -> None:
        """Launch every device of vm.yaml and wait until all are ready.

        `died(name, how)` is called on the loop's thread when one has ended unasked; `parts`
        closes what was made, also after a failure here. Raises ConfigError, HostError.
        """
        self._died, self._spawner, self._paused = died, spawner, False
        self._devices: dict[str, Device] = {}
        #: Called on the loop's thread with the name of a device of which a process has ended, and
        #: how; another one has its place.
        self.on_replaced: Callable[[str, str], None] = lambda name, how: None
        #: Called on the loop's thread with the name of a device and a word it has said.
        self.on_event: Callable[[str, str], None] = lambda name, word: None
        spawner.on_death = self._ended
        #: The CD-ROM drive, if there is one.
        self.drive = drive = open_drive(config.cdrom, parts)
        for row in rows(config, parts, drive, network, peers):
            failed, hand = partial(self._failed, row.name), partial(self._hand, row.name)
            device = Device(row, config, machine, loop, failed=failed, spawner=spawner, hand=hand)
            device.channel.on_event = partial(self._said, row.name)
            device.channel.revive = partial(self._revive, device)
            parts.callback(device.close)
            self._devices[row.name] = device
        waits = [device.launch(spawner) for device in self._devices.values()]
        for ready in waits:
            ready()
        if drive is not None:
            drive.send = partial(self.set, drive.name)
        spawner.watch(loop)
        if peers is not None:
            peers.hand = self.set
            peers.begin()

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
                "counters": device.counters.read(),
                "lives": device.lasting.lives,
                **({"pairs": device.others.facts()} if device.others else {}),
                **device.row.facts,
                **self._network(device),
            }
            for device in self._devices.values()
        ]

    def _network(self, device: Device) -> dict[str, Any]:
        """Return what a network device has counted; null if it does not tell."""
        if device.row.kind != "vionet" or not device.channel.alive:
            return {}
        try:
            return {"network": self.set(device.name, "counters", None)}
        except PyvmError:
            return {"network": None}

    def alive(self, name: str) -> bool:
        """Whether there is such a device, and a process behind it."""
        return name in self._devices and self._devices[name].channel.alive

    def pause(self) -> None:
        """Have every device finish and leave guest memory alone. The vCPUs are parked."""
        self._paused = True
        self._tell(ImsgType.PAUSE)

    def revive(self) -> None:
        """Have new processes take the place of those that have died and can be replaced."""
        for device in self._devices.values():
            self._revive(device)

    def unpause(self) -> None:
        """Let every device go on."""
        self._paused = False
        self._tell(ImsgType.UNPAUSE)

    def set(self, name: str, setting: str, value: Any, fd: int = -1) -> Any:
        """Change something about a device at run time, with a copy of `fd` if there is one.

        Raises HostError in the device's words.
        """
        device = self._devices.get(name)
        if device is None:
            known = ", ".join(self._devices)
            raise HostError(f"there is no device {name}", hint=f"there are: {known}")
        if fd >= 0 and not SPECS[device.row.kind].descriptors:
            raise HostError("takes no descriptor while it runs", device=name)
        if fd >= 0 and not _at_once(fd):
            raise HostError("the descriptor could make it wait", device=name, hint="O_NONBLOCK")
        request = json.dumps({"name": setting, "value": value}).encode()
        if len(request) > DATA_MAX:  # no fault of the device
            raise HostError(f"no setting takes a value of {len(request)} bytes", device=name)
        passed = fd if fd >= 0 else None
        try:
            answer = json.loads(self._call(device, ImsgType.SETTING, request, passed))
        except (ValueError, RecursionError) as err:  # a compromised device may say anything
            raise HostError("answered nonsense", device=name) from err
        if not isinstance(answer, dict) or "value" not in answer:
            what = answer.get("error") if isinstance(answer, dict) else None
            raise HostError(str(what or "answered nonsense"), device=name)
        return answer["value"]

    def _call(
        self, device: Device, what: ImsgType, data: bytes = b"", fd: int | None = None
    ) -> bytes:
        """Make a call; again, if another process has to take a device's place. ChannelError."""
        channel = device.channel
        self._revive(device)
        for _ in range(CALL_ATTEMPTS - 1):
            generation = channel.generation
            try:
                return channel.call(what, data, fd)
            except ChannelError:
                if not self._revive(device):
                    raise
                if channel.generation == generation:  # it is busy
                    raise
        return channel.call(what, data, fd)

    def _tell(self, what: ImsgType) -> None:
        for device in self._devices.values():
            if not device.lost:
                try:
                    self._call(device, what)
                except ChannelError as err:  # _failed() knows
                    log.error(str(err), device.name)

    def _hand(self, name: str, value: list[int], fd: int) -> None:
        """Give a device's first process a connection, but to none that comes later."""
        request = json.dumps({"name": "pair", "value": value}).encode()
        answer = self._devices[name].channel.call(ImsgType.SETTING, request, fd)
        if b'"error"' in answer:
            raise HostError(answer.decode("utf-8", "replace"), device=name)

    def _said(self, name: str, word: str) -> None:
        others = self._devices[name].others
        if others is not None:
            others.said(word)
        else:
            self.on_event(name, word)

    def _failed(self, name: str, why: str) -> None:
        """A device's channel is no good any more: end what may still run behind it."""
        device = self._devices[name]
        if device.process is not None:
            device.process.cause = device.process.cause or why
            device.process.kill()  # its end comes back as _ended()
        self._revive(device)

    def _ended(self, process: DeviceProcess) -> None:
        """A device process has ended unasked; its parent has told us how."""
        device = self._devices.get(process.name)
        if device is None:
            for one in self._devices.values():
                if one.others is not None and one.others.ended(process):
                    self._revive(one)
            return
        if process is device.process:
            device.channel.hang_up()
            self._revive(device)
        if not device.lost:
            how = f"process {process.pid} {process.end}"
            log.limited(f"{device.name} ended", f"{how}: another has its place", device.name)
            self.on_replaced(device.name, how)

    def _lost(self, device: Device, process: DeviceProcess, how: str) -> None:
        """Nobody serves a device any more."""
        if device.others is not None:
            device.others.stop()
        device.channel.close()
        device.lost = f"process {process.pid} {how}"
        log.error(f"device lost: {device.lost}", device.name)
        self._died(device.name, device.lost)

    def _revive(self, device: Device) -> bool:
        """Have new processes take the place of a device's, if the first one has died.

        Returns whether there is one.
        """
        lasting, old = device.lasting, device.process
        if old is None or device.lost or device.channel.alive:
            return device.channel.alive

        def launch() -> None:
            device.launch(self._spawner, {"resumes": True, "paused": self._paused})()

        done = device.counters.read(), device.channel.answered
        if lasting.revive(device.stop, launch, done):
            return device.channel.alive
        if lasting.lingers:  # its end comes back as _ended()
            what = "a process that was killed waits for the host; another comes when it has ended"
            log.limited(f"{device.name} lingers", what, device.name)
        else:
            self._lost(device, old, f"{old.end}; {lasting.cause}")
        return False


def _at_once(fd: int) -> bool:
    """Whether a file is read and written without waiting for somebody else."""
    mode = os.fstat(fd).st_mode
    direct = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
    return direct or bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)
