"""From pyvmctl to the VM process: fork, let go of the terminal, report back once the guest runs.

The starter waits for one report. It gets it, or the VM process dies and that is the report, or the
user gives up (^C) and then the VM process is ended; in no case is anything left half started.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from config.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_SUCH_VM,
    EXIT_USAGE,
    ConfigError,
    HostError,
    NoSuchVmError,
    PyvmError,
)
from vmm import log, survey, vm
from vmm.control import CAUSE_HOST_ERROR
from vmm.owner import resolve
from vmm.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from config.model import VmConfig

CANCEL_SECONDS: Final = 5.0  # for a VM process to tidy up after itself before SIGKILL

# A write of at most PIPE_BUF (4096) bytes arrives in one piece, so one read has all of it.
_REPORT_LIMIT: Final = 4000  # bytes: the exit status, then text
_ERRORS: Final = {EXIT_USAGE: ConfigError, EXIT_NO_SUCH_VM: NoSuchVmError}
_DEADLY: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPORT_FD: Final = 3  # in the VM process, and the only descriptor that it inherits beyond 2


class Started(NamedTuple):
    """A VM whose guest runs."""

    name: str
    id: int
    pid: int


def run(config: VmConfig, started: Callable[[Started], None], *, foreground: bool) -> int:
    """Be the VM process; returns the VM's exit status. `started` is called once the guest runs.

    Raises PyvmError if it never gets that far, with nothing left behind. Signals that end a
    process do so by SystemExit until the VM handles them itself.
    """
    _leave_on_signals()
    rundir = RunDir(config.name, resolve(config.owner))
    rundir.take()
    running = False

    def report(_: None) -> None:
        nonlocal running
        running = True
        started(Started(config.name, rundir.id, os.getpid()))

    try:
        log.setup(rundir.vm_log, vm=config.name, stderr=foreground)
        status = vm.run(config, rundir, report)
    except BaseException as err:
        if running or not foreground:  # else the caller says it on the same terminal
            log.error(f"{'ends' if running else 'does not start'}: {err or type(err).__name__}")
        if not running:
            rundir.discard()
            raise
        ending = vm.Ending(CAUSE_HOST_ERROR, f"{type(err).__name__}: {err}", EXIT_FAILED)
        rundir.write_exit(ending._asdict())
        rundir.close()
        raise
    rundir.close()
    return status


def start(config: VmConfig) -> Started:
    """Start a VM in a process of its own and return once its guest runs.

    Raises PyvmError if it does not come to that, with the text and class of what went wrong there.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()  # or the child would hold a copy of what is still unwritten
    sys.stderr.flush()
    # Until both processes stand where a signal ends them in good order, signals wait.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEADLY)
    try:
        pid = os.fork()
    except OSError as err:  # too many processes, too little memory
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reader)
        os.close(writer)
        raise HostError(f"cannot start a process: {err.strerror}", vm=config.name) from err
    if not pid:
        _be_vm_process(config, writer, mask)
    handlers = _leave_on_signals()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writer)
        return _await_report(config.name, pid, reader)
    except (KeyboardInterrupt, SystemExit):
        _cancel(pid)
        raise
    finally:
        os.close(reader)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave_on_signals() -> dict[signal.Signals, Any]:
    """Let signals that end a process do so by an exception; returns the handlers before.

    ^C has its own exception already, and a signal that is ignored (nohup) stays so.
    """
    return {
        number: signal.signal(number, _leave)
        for number in _DEADLY
        if signal.getsignal(number) == signal.SIG_DFL
    }


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _await_report(name: str, pid: int, reader: int) -> Started:
    """Wait for the child's report or its death, whichever is first."""
    # The pidfd as well: a process that the child has forked may hold the pipe open.
    pidfd = os.pidfd_open(pid)
    try:
        select.select([reader, pidfd], [], [])
        readable, _, _ = select.select([reader], [], [], 0)
        report = os.read(reader, _REPORT_LIMIT) if readable else b""
    finally:
        os.close(pidfd)
    if not report:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        survey.survey()  # tidies up after the dead
        how = f"exit status {status}" if status >= 0 else f"killed by {_signal_name(-status)}"
        raise HostError(f"VM process died during start: {how}", vm=name)
    text = report[1:].decode(errors="replace")
    if report[0] == EXIT_DONE:
        return Started(name, int(text), pid)
    os.waitpid(pid, 0)
    raise _ERRORS.get(report[0], HostError)(text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cancel(pid: int) -> None:
    """End a VM process that has not reported yet; it tidies up by itself if it can."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:  # reaped already
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        select.select([pidfd], [], [], CANCEL_SECONDS)
    finally:  # a second ^C does not wait
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # a zombie of ours is there for sure
        os.close(pidfd)
        os.waitpid(pid, 0)
        survey.survey()


def _be_vm_process(config: VmConfig, writer: int, mask: Iterable[int]) -> NoReturn:
    """Run the VM in this forked child, report through `writer`, and never come back."""
    status, report = EXIT_FAILED, _Report(_REPORT_FD)
    try:
        # Nothing that the caller happens to have open, a lock file say, lives on with the VM.
        os.dup2(writer, _REPORT_FD)
        os.closerange(_REPORT_FD + 1, os.sysconf("SC_OPEN_MAX"))
        os.setsid()
        _leave_on_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

        def started(what: Started) -> None:
            os.chdir("/")  # hold no file system but those of the VM's own files
            os.dup2(null, 2)
            os.close(null)
            report.send(EXIT_DONE, str(what.id))

        status = run(config, started, foreground=False)
    except PyvmError as err:
        status = err.exit_status
        report.send(status, str(err))
    except SystemExit as err:  # told to end while starting
        status = err.code if isinstance(err.code, int) else EXIT_FAILED
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException as err:
        import traceback  # a fault of ours: rare enough

        text = "".join(traceback.format_exception(err)).rstrip()
        log.error(text)
        report.send(EXIT_FAILED, f"internal error in the VM process\n{text}")
    finally:
        # Neither exit handlers nor buffers of the starter are ours to run or flush.
        os._exit(status & 0xFF)


class _Report:
    """The one word to the starter, who may be gone. Later words go nowhere."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, status: int, text: str) -> None:
        """Tell the exit status so far, and the text that explains it."""
        if self._fd >= 0:
            message = bytes([status]) + text.encode(errors="replace")[: _REPORT_LIMIT - 1]
            with contextlib.suppress(OSError):
                os.write(self._fd, message)
            os.close(self._fd)
            self._fd = -1
