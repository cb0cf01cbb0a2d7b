"""The verbs that act on a running VM: stop, reset, pause, unpause."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError, PyvmError
from vmm import survey
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import tell
from vmm.usage import (
    PROGRAM,
    UsageError,
    Verb,
    complain,
    name_argument,
    timeout_argument,
    verbs,
)
from vmm.verb_wait import await_end

if TYPE_CHECKING:
    from argparse import ArgumentParser

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
    if options.all == bool(options.names):
        raise UsageError("name the VMs to stop, or all by -a")
    everyone = [info.name for info in survey.survey() if info.alive] if options.all else []
    status = EXIT_DONE
    for name in options.names or everyone:
        try:
            _stop_one(_running(name, "stop"), options)
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    return status


def _stop_one(info: VmInfo, options: Any) -> None:
    if options.force:
        force(info)
        tell(f"forced to terminate vm {info.id}")
        return
    _command(info, "system_powerdown")
    tell(f"stopping vm {info.name}: requested to shutdown vm {info.id}")
    if options.wait or options.timeout is not None:
        await_end(info, options.timeout)


def force(info: VmInfo) -> None:
    """End a VM without asking its guest, by ever harder means. Raises HostError."""
    try:
        with QmpClient(f"{info.path}/{CONTROL}", FORCE_SECONDS) as control:
            control.call("quit")
    except PyvmError:
        pass  # it does not answer, or is gone already: that shows below
    else:
        if survey.wait_end(info.name, FORCE_SECONDS):
            return
    for number in (signal.SIGTERM, signal.SIGKILL):
        _kill(info, number)
        if survey.wait_end(info.name, FORCE_SECONDS):
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
        raise HostError(f"cannot {verb} vm that is not running", vm=info.name)
    return info


def _command(info: VmInfo, command: str) -> None:
    with QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS) as control:
        control.call(command)


def _simple(name: str, command: str, summary: str, done: str) -> Verb:
    """Return a verb that is one command to one VM."""

    def run(options: Any) -> int:
        info = _running(options.name, name)
        _command(info, command)
        tell(f"{done} vm {info.id} successfully")
        return EXIT_DONE

    return Verb(name, summary, name_argument, run, f"{PROGRAM} {name} web")


VERBS = verbs(
    Verb(
        name="stop",
        summary="ask a VM's guest to power off, or end the VM",
        arguments=_stop_arguments,
        run=_stop,
        example=f"{PROGRAM} stop -w web\n{PROGRAM} stop -f web",
        details="Returns once the guest has been asked, by its ACPI power button. A guest may\n"
        "ignore that; -f does not ask.",
    ),
    _simple("reset", "system_reset", "reset a VM, as its reset button would", "reset"),
    _simple("pause", "stop", "halt a VM's vCPUs", "paused"),
    _simple("unpause", "cont", "let a paused VM go on", "unpaused"),
)
