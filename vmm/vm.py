"""The life of one VM: build, start, pause, reset, end. Holds the parts, does none of their work.

Everything that happens to a VM arrives here: what the guest does (GuestWishes, on vCPU threads),
what a client asks (Control's calls), what the host says (signals). Decisions are made on the
loop's thread, one at a time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import EXIT_DONE, EXIT_FAILED, HostError, PyvmError
from config.units import format_size
from devices.loop import Loop
from vmm import boot, control, log
from vmm.confine import confine
from vmm.console import Console
from vmm.control import Control
from vmm.launch import Spawner
from vmm.machine import Machine
from vmm.plug import Devices

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.errors import KvmError
    from config.model import VmConfig
    from vmm.rundir import RunDir

STORM_SECONDS: Final = 6.0  # boots closer than this count as a storm, as in vmd
STORM_LIMIT: Final = 3
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ending(NamedTuple):
    """How a VM ended, for exit.json, the log and the SHUTDOWN event."""

    reason: str  # one of control.CAUSE_*
    detail: str  # in words
    status: int  # exit status of the VM process
    guest: bool = False  # whether the guest asked for it


def run(config: VmConfig, rundir: RunDir, report: Callable[[None], None]) -> int:
    """Run one VM in this process until it ends; returns the VM's exit status.

    The process becomes `rundir.owner`'s before the guest is loaded. `report(None)` is called
    once the guest runs. Raises PyvmError if it never gets that far, with everything given back.
    """
    with ExitStack() as parts:
        vm = VirtualMachine(config, rundir, parts)
        vm.start()
        report(None)
        return vm.serve().status


class VirtualMachine:
    """One VM and its doors to the outside."""

    def __init__(self, config: VmConfig, rundir: RunDir, parts: ExitStack) -> None:
        """Build every part; `parts` closes them in reverse order, also after a failure here."""
        self.config, self._rundir = config, rundir
        self._jail = config.jail or default_jail()
        self._state = "prelaunch"
        self._ending: Ending | None = None
        self._started = self._booted = time.monotonic()
        self._resets = self._quick_boots = 0
        self._loop = loop = Loop()
        parts.callback(loop.close)
        # Before KVM is opened and before there is a second thread.
        spawner = Spawner(config.name, self._jail, rundir.owner.uid)
        parts.callback(spawner.close, loop)
        images = parts.enter_context(boot.open_images(config.boot))
        self._wishes = GuestWishes(self, loop)
        self._machine = machine = Machine(config, images, loop, self._wishes)
        parts.callback(machine.close)
        self._devices = Devices(config, machine, loop, spawner, died=self._device_lost, parts=parts)
        uart = machine.board.uart
        permitted = rundir.permitted
        self._console = Console(
            loop, rundir.listen_console(), rundir.console_log, uart.receive, permitted
        )
        parts.callback(self._console.close)
        uart.on_room = self._console.room
        self._control = Control(loop, rundir.listen_control(), self, permitted)
        parts.callback(self._control.close)

    def start(self) -> None:
        """Load the guest and let it run. Raises ConfigError, HostError, KvmError."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._signalled)
        give(self._rundir)
        report = confine(self._rundir.path, *self._rundir.owner, self._jail)
        log.info(report.summary())
        self._machine.power_on()
        self._machine.resume()
        self._rundir.running(plain(self.config))
        self._state = "running"
        cpus = f"{self.config.vcpus} vCPU{'s' if self.config.vcpus > 1 else ''}"
        log.info(f"runs with {cpus} and {format_size(self.config.memory)} of memory")

    def serve(self) -> Ending:
        """Serve guest and clients until the VM ends."""
        self._loop.run()
        ending = self._ending or Ending(control.CAUSE_HOST_ERROR, "event loop ended", EXIT_FAILED)
        self._state = "shutdown"
        (log.info if ending.status == EXIT_DONE else log.error)(f"ends: {ending.detail}")
        self._control.emit("SHUTDOWN", {"guest": ending.guest, "reason": ending.reason})
        self._rundir.write_exit(ending._asdict())
        return ending

    # What Control operates: see control.VmOperations.

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.config.name

    def status(self) -> str:
        """Return the run state in QEMU's words."""
        return self._state

    def info(self) -> dict[str, Any]:
        """Return the facts of `status --json`; sizes in bytes, times in seconds."""
        return {
            "name": self.name,
            "id": self._rundir.id,
            "pid": os.getpid(),
            "status": self._state,
            "vcpus": self.config.vcpus,
            "memory": self.config.memory,
            "memory_resident": self._machine.ram.resident(),
            "first_run": self._machine.first_run,
            "uptime": round(time.monotonic() - self._started, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "resets": self._resets,
            "exits": self._machine.exits(),
            "devices": self._devices.facts(),
            "console_viewers": self._console.viewers,
            "console_bytes_out": self._console.bytes_out,
            "console_bytes_in": self._console.bytes_in,
        }

    def pause(self) -> None:
        """Park every vCPU; no error if they are."""
        if self._state == "running":
            self._machine.pause()
            self._devices.pause()
            self._state = "paused"
            log.info("paused")
            self._control.emit("STOP")

    def resume(self) -> None:
        """Let the vCPUs go on; no error if they do."""
        if self._state == "paused":
            self._devices.unpause()
            self._machine.resume()
            self._state = "running"
            log.info("goes on")
            self._control.emit("RESUME")

    def reset(self, cause: str) -> None:
        """Reset the machine in place without asking the guest."""
        self._reset("a client's command", cause)

    def power_button(self) -> None:
        """Press the ACPI power button. Raises HostError if the guest does not listen to it."""
        self._need_running()
        if not self._machine.board.pm.power_button():
            raise HostError("the guest does not listen to its power button", vm=self.name)
        self._control.emit("POWERDOWN")

    def ctrl_alt_del(self) -> None:
        """Type Ctrl-Alt-Del. Raises HostError if the guest does not listen to its keyboard."""
        self._need_running()
        if not self._machine.board.i8042.ctrl_alt_del():
            raise HostError("the guest does not listen to its keyboard", vm=self.name)

    def send_break(self) -> None:
        """Send a BREAK on the serial line. Raises HostError if the guest has no room for it."""
        if not self._machine.board.uart.send_break():
            raise HostError("the guest does not read its serial line", vm=self.name)

    def quit(self, cause: str) -> None:
        """End the VM without asking the guest."""
        self.end(Ending(cause, "a client's command", EXIT_DONE))

    def set_device(self, device: str, setting: str, value: Any) -> Any:
        """Change something about a device at run time, in the device's own words."""
        return self._devices.set(device, setting, value)

    # Decisions; on the loop's thread.

    def end(self, ending: Ending) -> None:
        """Stop the vCPUs and leave the loop; the first ending counts."""
        if self._ending is None:
            self._ending = ending
            self._machine.poke()
            self._loop.stop()

    def print_out(self, data: bytes) -> None:
        """Show what the guest printed; any thread."""
        self._console.output(data)

    def stop_vcpus(self) -> None:
        """Stop the vCPUs at their gates, without waiting; any thread."""
        self._machine.poke()

    def guest_reset(self, reason: str) -> None:
        """The guest asked for a reset; too many in too short a time end the VM."""
        now = time.monotonic()
        self._quick_boots = self._quick_boots + 1 if now - self._booted < STORM_SECONDS else 0
        if self._quick_boots >= STORM_LIMIT:
            what = f"{STORM_LIMIT} resets, each within {STORM_SECONDS:g} s of the boot before"
            self.end(Ending(control.CAUSE_GUEST_RESET, what, EXIT_FAILED, guest=True))
        else:
            self._reset(reason, control.CAUSE_GUEST_RESET)

    def _reset(self, reason: str, cause: str) -> None:
        guest = cause == control.CAUSE_GUEST_RESET
        log.info(f"resets: {reason}")
        self._machine.power_off()
        try:
            self._machine.power_on()
        except PyvmError as err:  # an image changed under us
            self.end(Ending(control.CAUSE_HOST_ERROR, f"cannot boot again: {err}", EXIT_FAILED))
            return
        self._resets += 1
        self._booted = time.monotonic()
        self._control.emit("RESET", {"guest": guest, "reason": cause})
        if self._state != "paused":
            self._machine.resume()

    def _device_lost(self, name: str, how: str) -> None:
        self._control.emit("X_PYVMD_DEVICE_LOST", {"device": name, "reason": how})

    def _need_running(self) -> None:
        if self._state != "running":
            raise HostError(f"is {self._state}, not running", vm=self.name)

    def _signalled(self, number: int, _frame: object) -> None:
        reason = f"signal {signal.Signals(number).name}"
        ending = Ending(control.CAUSE_SIGNAL, reason, EXIT_DONE)
        self._loop.call(partial(self.end, ending))


def give(rundir: RunDir) -> None:
    """Let the VM's owner use it. Raises HostError."""
    owner = rundir.owner
    if owner == (os.geteuid(), None):
        return
    try:
        rundir.give(*owner)
    except OSError as err:
        who = f"uid {owner.uid}" + ("" if owner.gid is None else f", gid {owner.gid}")
        hint = "only root can give a VM to another user" if os.geteuid() else ""
        raise HostError(f"cannot make {who} the owner: {err.strerror}", hint=hint) from err


def default_jail() -> str:
    """Return the level of a VM that does not choose: root could do much harm, so it must hold."""
    return "required" if os.geteuid() == 0 else "best-effort"


def plain(value: Any) -> Any:
    """Return a configuration as what JSON can hold."""
    if hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


class GuestWishes:
    """What the guest does to its VM: the Machine's Owner. Any thread; returns at once.

    A guest may ask for several things at once, from several vCPUs: the first counts until it is
    carried out. The vCPUs stop at their gates meanwhile, so nothing runs past the wish.
    """

    def __init__(self, vm: VirtualMachine, loop: Loop) -> None:
        self._vm, self._loop = vm, loop
        self._standing = threading.Lock()  # held from a wish until it is carried out

    def reset(self, reason: str) -> None:
        """Reset in place."""
        self._wish(partial(self._vm.guest_reset, reason))

    def power_off(self, reason: str) -> None:
        """The guest switched itself off."""
        self._end(control.CAUSE_GUEST_SHUTDOWN, f"guest power-off ({reason})", EXIT_DONE)

    def debug_exit(self, status: int) -> None:
        """The guest ends with a status of its own."""
        self._end(control.CAUSE_GUEST_SHUTDOWN, f"guest exit with status {status}", status)

    def failed(self, error: KvmError) -> None:
        """The VM cannot go on."""
        ending = Ending(control.CAUSE_HOST_ERROR, str(error), EXIT_FAILED)
        self._loop.call(partial(self._vm.end, ending))

    def transmit(self, data: bytes) -> None:
        """The guest wrote to its serial port."""
        self._vm.print_out(data)

    def debug_line(self, line: str) -> None:
        """The guest wrote a line to the debug console."""
        log.limited("debug console", line, "debug")

    def _end(self, cause: str, reason: str, status: int) -> None:
        self._wish(partial(self._vm.end, Ending(cause, reason, status, guest=True)))

    def _wish(self, carry_out: Callable[[], None]) -> None:
        if self._standing.acquire(blocking=False):
            self._vm.stop_vcpus()
            self._loop.call(partial(self._carry_out, carry_out))

    def _carry_out(self, wish: Callable[[], None]) -> None:
        try:
            wish()
        finally:
            self._standing.release()
