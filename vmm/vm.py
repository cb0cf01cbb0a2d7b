"""The life of one VM: build, start, pause, reset, end. Holds the parts, does none of their work.

Everything that happens to a VM arrives here: what the guest does (GuestWishes, on vCPU threads),
what a client asks (Control's calls), what the host says (signals). Decisions are made on the
loop's thread, one at a time.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, EXIT_FAILED, HostError, PyvmError
from config.model import LimitsConfig
from config.spell import plain
from config.units import format_size
from devices.loop import Loop
from vmm import boot, cgroup, control, ending, log
from vmm.confine import confine
from vmm.console import Console
from vmm.control import Control
from vmm.descent import Descent
from vmm.ending import Ending
from vmm.ladder import REBOOT
from vmm.launch import Spawner
from vmm.machine import Machine
from vmm.plug import Devices
from vmm.wishes import GuestWishes

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.model import VmConfig
    from vmm.net.network import Network
    from vmm.peers import Peers
    from vmm.rundir import RunDir

STORM_SECONDS: Final = 6.0  # boots closer than this count as a storm, as in vmd
STORM_LIMIT: Final = 3
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        if config.limits != LimitsConfig():
            log.info(f"limited by the cgroup {cgroup.enter(config.name, config.limits)}")
        network = _network(config, rundir, parts)
        self._peers = _peers(config, self._jail, parts, loop)
        pairs = any(nic.queues > 1 and not nic.vhost_user for nic in config.interfaces)
        self._spawner = spawner = Spawner(
            config.name, self._jail, rundir.owner.uid, queue_pairs=pairs
        )
        parts.callback(spawner.close, loop)
        images = boot.open_boot(config.boot)
        parts.callback(images.close)
        self._wishes = GuestWishes(self, loop)
        self._machine = machine = Machine(config, images, loop, self._wishes)
        parts.callback(machine.close)
        self._devices = Devices(
            config,
            machine,
            loop,
            spawner,
            network,
            peers=self._peers,
            died=self._device_lost,
            parts=parts,
        )
        if self._peers is not None:
            self._peers.announce = self.announce
        parts.callback(machine.halt)  # while devices still have the eventfds that KVM knows
        self._devices.on_event = self._device_says
        self._devices.on_replaced = self._device_replaced
        machine.meanwhile = self._devices.revive
        self._descent = Descent(self, self._devices, machine.board, loop.timer, config.vmmci)
        if self._devices.drive is not None:
            self._devices.drive.moved = self._tray_moved
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
        end = self._ending or Ending(control.CAUSE_HOST_ERROR, "event loop ended", EXIT_FAILED)
        self._state = "shutdown"
        (log.info if end.status == EXIT_DONE else log.error)(f"ends: {end.detail}")
        self._control.emit("SHUTDOWN", {"guest": end.guest, "reason": end.reason})
        self._rundir.write_exit(end._asdict())
        return end

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
            "ladder": self._descent.step,
            "exits": self._machine.exits(),
            "spawner": self._spawner.pid,
            "devices": self._devices.facts(),
            "console_viewers": self._console.viewers,
            "console_bytes_out": self._console.bytes_out,
            "console_bytes_in": self._console.bytes_in,
        }

    def pause(self) -> None:
        """Park every vCPU; no error if they are. Raises HostError while the guest goes down."""
        if self._descent.goal:
            what = f"cannot be paused: its guest is asked to {self._descent.goal}"
            raise HostError(what, hint="and has to run for that")
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
        """Reset the machine in place without asking the guest. Raises HostError if it stops."""
        self._descent.check(REBOOT)
        self.restart("a client's command", cause)

    def ask(self, goal: str) -> dict[str, Any]:
        """Ask the guest to go down: see Descent. Return where that stands. Raises HostError.

        A paused VM goes on first, for a guest that stands still cannot go down. Asked again, or by
        a second client, nothing begins anew; a stop counts more than a reboot.
        """
        self._descent.check(goal)
        if self._state == "paused":
            self.resume()
        self._need_running()
        return self._descent.ask(goal)

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
        what = "a client's command, without asking the guest"
        self.end(Ending(cause, what, EXIT_DONE, how=ending.FORCED))

    def set_device(self, device: str, setting: str, value: Any, fd: int = -1) -> Any:
        """Change something about a device at run time, in the device's own words."""
        return self._devices.set(device, setting, value, fd)

    def move_tray(
        self, device: str, action: str, *, force: bool = False, fd: int = -1, path: str = ""
    ) -> dict[str, Any]:
        """Do one of eject, insert, load to the CD-ROM drive; return where disc and tray are now."""
        drive = self._devices.drive
        if drive is None or device != drive.name:
            raise HostError(f"there is no CD-ROM drive {device!r}", vm=self.name)
        return drive.act(action, force=force, fd=fd, path=path)

    # Decisions; on the loop's thread.

    def end(self, end: Ending) -> None:
        """Stop the vCPUs and leave the loop; the first ending counts."""
        self._descent.cancel()
        if self._ending is None:
            self._ending = end
            self._machine.poke()
            self._loop.stop()

    def print_out(self, data: bytes) -> None:
        """Show what the guest printed; any thread."""
        self._console.output(data)

    def stop_vcpus(self) -> None:
        """Stop the vCPUs at their gates, without waiting; any thread."""
        self._machine.poke()

    def guest_reset(self, reason: str) -> None:
        """The guest resets: as it was asked to, or by itself; too often, and the VM ends."""
        if self._descent.went_down(f"guest reset ({reason})", control.CAUSE_GUEST_RESET):
            return
        now = time.monotonic()
        self._quick_boots = self._quick_boots + 1 if now - self._booted < STORM_SECONDS else 0
        if self._quick_boots >= STORM_LIMIT:
            what = f"{STORM_LIMIT} resets, each within {STORM_SECONDS:g} s of the boot before"
            how = ending.RESET_STORM
            self.end(Ending(control.CAUSE_GUEST_RESET, what, EXIT_FAILED, guest=True, how=how))
        else:
            self.restart(reason, control.CAUSE_GUEST_RESET)

    def guest_power_off(self, reason: str) -> None:
        """The guest has switched itself off, by itself or as it was asked to."""
        detail, cause = f"guest power-off ({reason})", control.CAUSE_GUEST_SHUTDOWN
        if not self._descent.went_down(detail, cause):
            self.end(Ending(cause, detail, EXIT_DONE, guest=True, how=ending.GUEST_POWEROFF))

    def guest_exit(self, status: int) -> None:
        """The guest ends the VM with a status of its own."""
        detail, cause = f"guest exit with status {status}", control.CAUSE_GUEST_SHUTDOWN
        self.end(Ending(cause, detail, status, guest=True, how=ending.GUEST_EXIT))

    def restart(self, reason: str, cause: str) -> None:
        """Reset the machine in place; `cause` is one of control.CAUSE_*."""
        guest = cause == control.CAUSE_GUEST_RESET
        log.info(f"resets: {reason}")
        self._machine.power_off()
        self._descent.forget()
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

    def announce(self, event: str, data: dict[str, Any] | None = None) -> None:
        """Tell every client of the control socket."""
        self._control.emit(event, data)

    def _device_lost(self, name: str, how: str) -> None:
        self._control.emit("X_PYVMD_DEVICE_LOST", {"device": name, "reason": how})

    def _device_replaced(self, name: str, how: str) -> None:
        self._control.emit("X_PYVMD_DEVICE_REPLACED", {"device": name, "reason": how})

    def _device_says(self, device: str, word: str) -> None:
        """Act on an event of a device, which may be compromised: at worst it hurts its own VM."""
        if self._descent.said(device, word):
            return
        if self._peers is not None and self._peers.said(device, word):
            return
        if (drive := self._devices.drive) is not None and device == drive.name:
            drive.said(word)
        else:
            log.limited(f"{device} event", f"says {word!r}, which means nothing", device)

    def _tray_moved(self, tray_open: bool) -> None:
        drive = self._devices.drive
        if drive is not None:
            self._control.emit("DEVICE_TRAY_MOVED", {"id": drive.name, "tray-open": tray_open})

    def _need_running(self) -> None:
        if self._state != "running":
            raise HostError(f"is {self._state}, not running", vm=self.name)

    def _signalled(self, number: int, _frame: object) -> None:
        reason = f"signal {signal.Signals(number).name}"
        end = Ending(control.CAUSE_SIGNAL, reason, EXIT_DONE, how=ending.SIGNAL)
        self._loop.call(partial(self.end, end))


def give(rundir: RunDir) -> None:
    """Let the VM's owner use it. Raises HostError."""
    owner = rundir.owner
    if owner == (os.geteuid(), None):
        return
    try:
        rundir.give(*owner)
        if owner.gid is not None:
            os.umask(0o027)  # its members may read what is written from now on, too
    except OSError as err:
        who = f"uid {owner.uid}" + ("" if owner.gid is None else f", gid {owner.gid}")
        hint = "only root can give a VM to another user" if os.geteuid() else ""
        raise HostError(f"cannot make {who} the owner: {err.strerror}", hint=hint) from err


def _network(config: VmConfig, rundir: RunDir, parts: ExitStack) -> Network | None:
    """Have the VM's interfaces set up while everything else is built."""
    if all(nic.vhost_user for nic in config.interfaces):
        return None
    from vmm.net.network import Network  # 3 ms, for VMs that have some

    return Network(config, rundir, parts)


def _peers(config: VmConfig, level: str, parts: ExitStack, loop: Loop) -> Peers | None:
    """Get ready to connect to programs that serve devices of the VM."""
    nics, disks = config.interfaces, config.disks
    others = [config.rng.vhost_user, *(nic.vhost_user for nic in nics)]
    others += [disk.vhost_user for disk in disks]
    if not config.vhost_user and not any(others):
        return None
    from vmm.peers import Peers  # 2 ms, for VMs that have some

    return Peers(config, level, parts, loop)


def default_jail() -> str:
    """Return the level of a VM that does not choose: root could do much harm, so it must hold."""
    return "required" if os.geteuid() == 0 else "best-effort"
