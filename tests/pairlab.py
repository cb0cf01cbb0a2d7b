"""A network device of several processes, jailed, on a real tap: the VM process's part without KVM.

`vmm.plug` starts the processes and replaces them, on a loop that runs in a thread as the VM
process's does. The test is the guest: it reads and writes registers from its own thread, as a vCPU
does, kicks, and waits for calls.

    with TapLab(2) as tap, PairLab(tap) as lab:
        lab.kill(1)
        lab.send(frame, queue=3)
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

from config.model import BootConfig, NicConfig, VmConfig, VmmciConfig
from devices.features import F_RING_PACKED
from devices.guestmem import GuestMemory, Region
from devices.loop import Loop
from devices.nethdr import NET_F_MQ
from devices.spec import Block
from devices.viodev import CONFIG_CHANGE
from tests.conformance.test_net_send import tcp_frame
from tests.netdriver import FEATURES, NetDriver
from tests.vionetlab import OWN, SETTINGS
from tools.viodriver import make_memfd
from tools.viodriver.private import facts
from tools.viodriver.registers import VirtioDriver
from tools.viodriver.softvm import SoftVm
from vmm.bus import Bus
from vmm.interrupts import CONFIG
from vmm.irq import Router
from vmm.launch import Spawner
from vmm.net.network import Attached
from vmm.pci import PciBus
from vmm.plug import Devices

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tests.taplab import TapLab

DEADLINE: Final = 10.0
MEMORY: Final = 48 << 20
MQ: Final = FEATURES | NET_F_MQ
NAME: Final = "vionet0"


class PairLab(VirtioDriver, NetDriver):
    """The VM process, the guest and the host's network of one device."""

    transport = "private"

    def __init__(
        self,
        tap: TapLab,
        *,
        features: int = MQ,
        irqfd: bool = True,
        kicks: bool = True,
        msix: bool = True,
        **settings: Any,
    ) -> None:
        """Launch all processes, start the driver, and use all pairs."""
        self.tap, self.features = tap, features
        self.host = self
        self.said: list[str] = []
        self.lost = ""
        self.count = len(tap.fds)
        self.nr_queues = 2 * self.count + 1
        self._settings = {**SETTINGS, "queues": self.count, **settings}
        self._irqfd, self._rings = irqfd, kicks  # without rings, kicks are register writes
        self._kicked: list[int] = []  # sources of interrupts that came as messages
        regions = (Region(0, MEMORY, 0),)
        self.memory_fd = make_memfd(MEMORY)
        self.memory = GuestMemory(self.memory_fd, regions)
        self._spawner = Spawner("test", "best-effort", queue_pairs=True)
        self._loop = Loop()
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()
        self._parts = ExitStack()
        self._on_loop(self._plug)
        self.device = self.devices._devices[NAME]
        self.channel, self.page = self.device.channel, self.device.counters
        if msix:
            self.write(Block.MSIX, 1, 1)
        self.begin()

    def _plug(self) -> None:
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
        config = VmConfig(
            "test",
            BootConfig(),
            interfaces=(NicConfig(),),
            vmmci=VmmciConfig(enabled=False),
            packed=bool(self.features & F_RING_PACKED),
        )
        taps = {f"tap{n}": fd for n, fd in enumerate(self.tap.fds)}
        nic = Attached(NAME, self._settings, taps, {}, self.count)
        self.devices = Devices(
            config,
            machine,  # type: ignore[arg-type]  # what devices need of one
            self._loop,
            self._spawner,
            SimpleNamespace(attached=lambda: [nic]),  # type: ignore[arg-type]
            died=self._died,
            parts=self._parts,
        )
        if not self._irqfd:
            self.devices._devices[NAME].channel.on_kick = self._kicked.append

    def _died(self, name: str, how: str) -> None:
        self.lost = how

    def begin(self) -> None:
        """Reset the device, start a driver, and use all pairs."""
        self.queues = self.start(self.features, arena_bytes=4 << 20)
        if self.features & NET_F_MQ:
            assert self.command(4, 0, self.count.to_bytes(2, "little")) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._on_loop(self._loop.stop)
        self._thread.join()
        self._parts.close()
        self._spawner.close(self._loop)
        self._loop.close()
        os.close(self.memory_fd)

    # The VM process.

    def _on_loop(self, function: Callable[[], Any]) -> Any:
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
        return self._on_loop(lambda: self.devices.set(NAME, name, value, fd))

    def network(self) -> dict[str, Any]:
        """What the device has counted, as its first process tells."""
        facts: dict[str, Any] = self.setting("counters", None)
        return facts

    def pause(self) -> None:
        """Have the device leave guest memory alone."""
        self._on_loop(self.devices.pause)

    def unpause(self) -> None:
        """Let it go on."""
        self._on_loop(self.devices.unpause)

    def told(self) -> dict[int, dict[str, Any]]:
        """What `status --json` tells of each process, 0 being the first."""
        [device] = (row for row in self._on_loop(self.devices.facts) if row["name"] == NAME)
        return {0: device, **dict(enumerate(device["pairs"], 1))}

    def kill(self, number: int, how: int = signal.SIGKILL) -> int:
        """Send a signal to the process of a pair; return which life of it that was."""
        while not (found := self.told()[number])["pid"]:
            time.sleep(0.001)  # the next one is just being started
        os.kill(found["pid"], how)
        return int(found["lives"])

    def wait_life(self, number: int, more_than: int) -> None:
        """Wait until a pair has had more processes than that, and the latest runs."""
        end = time.monotonic() + DEADLINE
        while True:
            found = self.told()[number]
            if found["lives"] > more_than and found["pid"]:
                return
            assert time.monotonic() < end, f"no process for pair {number}: {found} {self.lost}"
            time.sleep(0.001)

    # The guest.

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


def send_flows(lab: PairLab, frames: int) -> None:
    """Send frames to the guest, each of another flow: the kernel says which pair one comes by.

    It hashes them with a key that each boot of the host has another of.
    """
    base = tcp_frame(100)
    for number in range(frames):
        lab.tap.send(OWN + base[6:34] + number.to_bytes(2) + base[36:])


def shared_out(lab: PairLab, frames: int) -> list[int]:
    """Send frames of many flows to the guest; return how many arrived by each pair.

    For each buffer that is used there is another one.
    """
    send_flows(lab, frames)
    found = [0] * lab.count
    end = time.monotonic() + DEADLINE
    while sum(found) < frames:
        assert time.monotonic() < end, (found, lab.page.read(), lab.said, lab.lost)
        for pair in range(lab.count):
            used = len(lab.queues[2 * pair].collect())
            lab.give(used, 512, queue=2 * pair)
            found[pair] += used
        time.sleep(0.001)
    assert sum(found) == frames
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def kill(lab: PairLab, who: tuple[int, ...]) -> None:
    """Kill the processes of these pairs at once."""
    told = lab.told()
    for number in who:
        with suppress(ProcessLookupError):  # it is dead, and nobody has noticed yet
            if told[number]["pid"]:  # else the next one is just being started
                os.kill(told[number]["pid"], signal.SIGKILL)


def settled(lab: PairLab) -> None:
    """Wait until a process that lives serves every pair."""
    wait_until(lambda: all(lives(facts["pid"]) for facts in lab.told().values()))
    assert not lab.lost


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return bool(pid) and facts(pid)["State"][0] not in "ZX"
    except OSError:
        return False
