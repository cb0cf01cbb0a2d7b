"""A device of a VM, its processes jailed, without KVM: the VM process's part and the guest's.

`vmm.plug` starts the processes and replaces them, on a loop that runs in a thread as the VM
process's does. The test is the guest: it reads and writes registers from its own thread, as a vCPU
does, kicks, and waits for calls.

    with PlugLab("viornd") as lab:
        [queue] = lab.start(features)
        lab.kill()
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Self

from config.model import BootConfig, VmConfig, VmmciConfig
from devices.guestmem import GuestMemory, Region
from devices.loop import Loop
from devices.spec import Block
from devices.viodev import CONFIG_CHANGE
from tools.viodriver import make_memfd
from tools.viodriver.private import facts
from tools.viodriver.registers import VirtioDriver
from tools.viodriver.softvm import SoftVm
from vmm.bus import Bus
from vmm.interrupts import CONFIG
from vmm.irq import Router
from vmm.launch import Spawner
from vmm.pci import PciBus
from vmm.peers import Peers
from vmm.plug import Devices

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vmm.net.network import Network

DEADLINE: Final = 10.0
MEMORY: Final = 48 << 20


class PlugLab(VirtioDriver):
    """The VM process and the guest of one device."""

    transport = "private"

    def __init__(
        self,
        name: str,
        nr_queues: int = 1,
        network: Network | None = None,
        *,
        irqfd: bool = True,
        kicks: bool = True,
        queue_pairs: bool = False,
        peers: bool = False,
        **config: Any,
    ) -> None:
        """Launch the VM's devices; `config` is more of its VmConfig, `name` that of the device.

        Without `irqfd` interrupts come as messages, without `kicks` those are register writes.
        `peers`: some of the devices are other programs'.
        """
        self.name, self.nr_queues = name, nr_queues
        self.lost = ""
        self.replaced: list[str] = []  # how processes have ended
        self.said: list[str] = []
        self._irqfd, self._rings = irqfd, kicks
        self._kicked: list[int] = []  # sources of interrupts that came as messages
        config = {"vmmci": VmmciConfig(enabled=False), **config}
        self._config = VmConfig("test", BootConfig(), **config)
        self.memory_fd = make_memfd(MEMORY)
        self.memory = GuestMemory(self.memory_fd, (Region(0, MEMORY, 0),))
        self._loop, self._parts = Loop(), ExitStack()
        self._peers = Peers(self._config, "off", self._parts, self._loop) if peers else None
        self._spawner = Spawner("test", "best-effort", queue_pairs=queue_pairs)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()
        try:
            self.on_loop(lambda: self._plug(network))
        except BaseException:
            self.close()
            raise
        self.device = self.devices._devices[name]
        self.channel, self.page = self.device.channel, self.device.counters

    def _plug(self, network: Network | None) -> None:
        """Do as the VM process at its start, on the thread of its loop."""
        vm = SoftVm()
        machine = SimpleNamespace(
            board=SimpleNamespace(pci=PciBus(Bus("port"), Bus("address"))),
            router=Router(vm),
            vm=vm,
            ram=SimpleNamespace(fd=self.memory_fd, memory=self.memory),
            ioeventfds=False,
            irqfds=self._irqfd,
        )
        self.devices = Devices(
            self._config,
            machine,  # type: ignore[arg-type]  # what devices need of one
            self._loop,
            self._spawner,
            network,
            peers=self._peers,
            died=self._died,
            parts=self._parts,
        )
        self.devices.on_replaced = self._replaced
        self.devices.on_event = self._said
        if not self._irqfd:
            self.devices._devices[self.name].channel.on_kick = self._kicked.append

    def _died(self, name: str, how: str) -> None:
        if name == self.name:
            self.lost = how

    def _said(self, name: str, word: str) -> None:
        self.said.append(word)
        if self._peers is not None:
            self._peers.said(name, word)

    def _replaced(self, name: str, how: str) -> None:
        if name == self.name:
            self.replaced.append(how)

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
        """End everything."""
        self.on_loop(self._loop.stop)
        self._thread.join()
        self._parts.close()
        self._spawner.close(self._loop)
        self._loop.close()
        os.close(self.memory_fd)

    # The VM process.

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """Run something on the thread of the loop, and return what it returns."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as err:
                done.set_exception(err)

        self._loop.call(run)
        return done.result(DEADLINE)

    def setting(self, name: str, value: Any, fd: int = -1) -> Any:
        """Change a setting of the device, or read one."""
        return self.on_loop(lambda: self.devices.set(self.name, name, value, fd))

    def pause(self) -> None:
        """Have the device leave guest memory alone."""
        self.on_loop(self.devices.pause)

    def unpause(self) -> None:
        """Let it go on."""
        self.on_loop(self.devices.unpause)

    def facts(self) -> dict[str, Any]:
        """What `status --json` tells of the device."""
        [device] = (row for row in self.on_loop(self.devices.facts) if row["name"] == self.name)
        return dict(device)

    def kill(self, number: int = 0, how: int = signal.SIGKILL) -> int:
        """Send a signal to a process of the device; return which life of it that was."""
        while not self.lost:
            found = self.told()[number]
            with suppress(ProcessLookupError):  # it is dead, and nobody has noticed yet
                if found["pid"]:  # else the next one is just being started
                    os.kill(found["pid"], how)
                    return int(found["lives"])
            time.sleep(0.001)
        raise AssertionError(self.lost)

    def told(self) -> dict[int, dict[str, Any]]:
        """What `status --json` tells of each process, 0 being the first."""
        device = self.facts()
        return {0: device, **dict(enumerate(device.get("pairs", ()), 1))}

    def wait_life(self, number: int, more_than: int) -> None:
        """Wait until there have been more of a process than that, and the latest runs."""
        end = time.monotonic() + DEADLINE
        while True:
            found = self.told()[number]
            if found["lives"] > more_than and lives(found["pid"]):
                return
            assert time.monotonic() < end, f"no process {number}: {found} {self.lost}"
            time.sleep(0.001)

    # The guest.

    @property
    def alive(self) -> bool:
        """Whether there is a device, and will be."""
        return not self.lost

    def read(self, reg: int, size: int) -> int:
        return self.channel.read(reg, size)[0]

    def write(self, reg: int, size: int, value: int) -> None:
        self.channel.write(reg, size, value)

    def kick(self, queue: int) -> None:
        if self._rings:
            os.eventfd_write(self.device._kicks[queue], 1)
        else:
            self.write(Block.NOTIFY, 2, queue)

    def wait_call(self, queue: int, timeout: float) -> bool:
        fd = self.device.function.interrupts.call_fd(CONFIG if queue == CONFIG_CHANGE else queue)
        if fd is None:
            end = time.monotonic() + timeout
            while queue not in self._kicked:
                if time.monotonic() > end:
                    return False
                time.sleep(0.001)
            self._kicked.remove(queue)
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1e3):
            return False
        os.eventfd_read(fd)
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return bool(pid) and facts(pid)["State"][0] not in "ZX"
    except OSError:
        return False
