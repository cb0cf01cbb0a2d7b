"""The verbs that act on a running VM: stop, kill, reboot, pause, unpause."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError, NoSuchVmError, PyvmError
from vmm import survey
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import tell
from vmm.usage import (
    PROGRAM,
    UsageError,
    Verb,
    complain,
    timeout_argument,
    verbs,
)
from vmm.verb_wait import await_end

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from vmm.survey import VmInfo

COMMAND_SECONDS: Final = 10.0  # for an answer
FORCE_SECONDS: Final = 3.0  # each: the QMP command and its effect, then SIGTERM, then SIGKILL


def _stop_arguments(to: ArgumentParser) -> None:
    to.add_argument("names", metavar="NAME", nargs="*", default=[], help="names or ids of VMs")
    to.add_argument("-a", dest="all", action="store_true", help="stop all running VMs")
    to.add_argument("-f", dest="force", action="store_true", help="end at once, without the guest")
    to.add_argument("-w", dest="wait", action="store_true", help="wait until the VM has ended")
    timeout_argument(to, "wait this long at most; implies -w")


def _stop(options: Any) -> int:
    asked: list[VmInfo] = []
    begun = time.monotonic()
    status = each(options, "stop", lambda info: _stop_one(info, options, asked))
    for info in asked if options.wait or options.timeout is not None else ():
        try:
            await_end(info, options.timeout, begun)
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    return status


def each(options: Any, verb: str, act: Callable[[VmInfo], None]) -> int:
    """Do something to each of the named VMs, or to all; the status is that of the last failure."""
    if options.all == bool(options.names):
        raise UsageError(f"name the VMs to {verb}, or all by -a")
    everyone = [info.name for info in survey.survey() if info.alive] if options.all else []
    status = EXIT_DONE
    for name in options.names or everyone:
        try:
            info = _running(name, verb)
            try:
                act(info)
            except NoSuchVmError as err:  # it was there a moment ago
                hint = f"'{PROGRAM} wait {info.name}' tells how"
                raise HostError("has just ended", vm=info.name, hint=hint) from err
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    return status


def _stop_one(info: VmInfo, options: Any, asked: list[VmInfo]) -> None:
    """End a VM, or ask its guest; many can go down at the same time, so nobody waits here."""
    if options.force:
        _force_one(info)
        return
    command(info, "x-pyvmd-stop")
    tell(f"stopping vm {info.name}: requested to shutdown vm {info.id}")
    asked.append(info)


def _force_one(info: VmInfo) -> None:
    force(info)
    tell(f"forced to terminate vm {info.id}")


def _reboot_arguments(to: ArgumentParser) -> None:
    to.add_argument("names", metavar="NAME", nargs="*", default=[], help="names or ids of VMs")
    to.add_argument("-a", dest="all", action="store_true", help="reboot all running VMs")
    to.add_argument("-f", dest="force", action="store_true", help="reset at once, as 'reset' does")
    to.add_argument("-w", dest="wait", action="store_true", help="wait until it boots again")
    timeout_argument(to, "wait this long at most; implies -w")


def _reboot(options: Any) -> int:
    """Ask all of them before the first is waited for."""
    asked: list[tuple[VmInfo, QmpClient]] = []
    begun = time.monotonic()
    with ExitStack() as open_clients:

        def ask(info: VmInfo) -> None:
            control = QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS)
            open_clients.enter_context(control)
            control.call("system_reset" if options.force else "x-pyvmd-reboot")
            tell(f"rebooting vm {info.name}: requested to reboot vm {info.id}")
            asked.append((info, control))

        status = each(options, "reboot", ask)
        for info, control in asked if options.wait or options.timeout is not None else ():
            try:
                _await_reset(info, control, options.timeout, begun)
            except PyvmError as err:
                complain(err)
                status = err.exit_status
    return status


def _await_reset(info: VmInfo, control: QmpClient, seconds: float | None, begun: float) -> None:
    """Wait for the RESET that was asked for. Raises HostError when the time is over, or the VM."""
    # Never 0: what has been said while another VM was waited for is read all the same.
    left = None if seconds is None else max(begun + seconds - time.monotonic(), 0.1)
    last = ""
    for event in control.events(left):
        last = str(event["event"])
        if last == "RESET":
            tell(f"rebooted vm {info.id}")
            return
    if seconds is None or control.gone or last == "SHUTDOWN":
        hint = f"see '{PROGRAM} log {info.name}'"
        raise HostError("has ended instead of rebooting", vm=info.name, hint=hint)
    hint = f"'{PROGRAM} reset {info.name}' does not ask the guest"
    raise HostError(f"has not rebooted after {seconds:g} s", vm=info.name, hint=hint)


def force(info: VmInfo) -> None:
    """End a VM without asking its guest, by ever harder means. Raises HostError."""
    try:
        with QmpClient(f"{info.path}/{CONTROL}", FORCE_SECONDS) as control:
            control.call("quit")
    except PyvmError:
        pass  # it does not answer, or is gone already: that shows below
    else:
        if survey.wait_end(info.name, FORCE_SECONDS, info.pid):
            return
    for number in (signal.SIGTERM, signal.SIGKILL):
        _kill(info, number)
        if survey.wait_end(info.name, FORCE_SECONDS, info.pid):
            return
    raise HostError(f"VM process {info.pid} outlives SIGKILL", vm=info.name, hint="see its log")


def _kill(info: VmInfo, number: signal.Signals) -> None:
    """Send a signal to the VM process, if that still is the process of that number."""
    try:
        pidfd = os.pidfd_open(info.pid)
    except OSError:
        return
    try:
        # Checked after the descriptor was opened, so the number cannot have changed its process.
        if not _holds_lock(info):
            raise HostError(f"process {info.pid} is not it: not killed", vm=info.name)
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    except PermissionError as err:
        raise HostError("you may not stop this VM", vm=info.name) from err
    finally:
        os.close(pidfd)


def _holds_lock(info: VmInfo) -> bool:
    """Whether the process of `info` has the VM's lock, by the kernel's own word.

    The pid file is the owner's to write, and root must not be led to kill another process.
    """
    inode = os.stat(f"{info.path}/lock", follow_symlinks=False).st_ino
    with open("/proc/locks") as locks:
        # "1: FLOCK  ADVISORY  WRITE 4711 00:1b:33 0 EOF": kind, pid, and device:inode
        fields = [line.split() for line in locks]
    return any(
        "FLOCK" in row and row[-4] == str(info.pid) and row[-3].endswith(f":{inode}")
        for row in fields
        if len(row) >= 4
    )


def _running(word: str, verb: str) -> VmInfo:
    """Return a VM that a process has. Raises NoSuchVmError, HostError."""
    info = survey.lookup(word)
    if not info.alive:
        how = verb in ("stop", "kill")
        hint = f"wait {info.name}' tells how it ended" if how else f"start {info.name}' starts it"
        hint = f"'{PROGRAM} {hint}"
        raise HostError(f"cannot {verb} vm that is not running", vm=info.name, hint=hint)
    return info


def command(info: VmInfo, name: str) -> None:
    """Run one command without arguments. Raises NoSuchVmError, HostError."""
    with QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS) as control:
        control.call(name)


def _simple(name: str, summary: str, act: Callable[[VmInfo], None]) -> Verb:
    """Return a verb that does one thing to each of some VMs."""

    def arguments(to: ArgumentParser) -> None:
        to.add_argument("names", metavar="NAME", nargs="*", default=[], help="names or ids of VMs")
        to.add_argument("-a", dest="all", action="store_true", help=f"{name} all running VMs")

    def run(options: Any) -> int:
        return each(options, name, act)

    return Verb(name, summary, arguments, run, f"{PROGRAM} {name} web")


def _pause(info: VmInfo) -> None:
    command(info, "stop")
    tell(f"paused vm {info.id} successfully")


def _unpause(info: VmInfo) -> None:
    command(info, "cont")
    tell(f"unpaused vm {info.id} successfully")


VERBS = verbs(
    Verb(
        name="stop",
        summary="ask a VM's guest to power off, or end the VM",
        arguments=_stop_arguments,
        run=_stop,
        example=f"{PROGRAM} stop -w web\n{PROGRAM} stop -f web",
        details="""\
Returns once the guest has been asked. It is asked by its vmmci driver if that
listens, else by the ACPI power button, else by Ctrl-Alt-Del. What it does not
take note of within vmmci.ack-timeout (3 s) is followed by the next way; a guest
that takes note and is not down after vmmci.shutdown-timeout (2 min) is ended.
The VM's log tells every step, and 'wait' how it ended. A paused VM goes on, to
be able to shut down. -f does not ask.""",
    ),
    _simple("kill", "end VMs without asking their guests, as 'stop -f' does", _force_one),
    Verb(
        name="reboot",
        summary="ask a VM's guest to reboot, or reset the VM",
        arguments=_reboot_arguments,
        run=_reboot,
        example=f"{PROGRAM} reboot -w web\n{PROGRAM} reboot -f web",
        details="""\
The guest is asked as by 'stop', with the same times. Whether it powers off or
resets, the VM starts over in place: same process, same devices, same console. A
guest that is not down in time is reset.""",
    ),
    _simple("pause", "halt a VM's vCPUs", _pause),
    _simple("unpause", "let a paused VM go on", _unpause),
)
