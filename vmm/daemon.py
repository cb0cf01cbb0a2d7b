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
from config.model import LimitsConfig
from vmm import cgroup, log, survey, vm
from vmm.control import CAUSE_HOST_ERROR
from vmm.ending import Ending
from vmm.owner import resolve
from vmm.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import FrameType

    from config.model import VmConfig

CANCEL_SECONDS: Final = 5.0  # for a VM process to tidy up after itself before SIGKILL

# A write of at most PIPE_BUF (4096) bytes arrives in one piece, so one read has all of it.
_REPORT_LIMIT: Final = 4000  # bytes: the exit status, then text
_ERRORS: Final = {EXIT_USAGE: ConfigError, EXIT_NO_SUCH_VM: NoSuchVmError}
_PLACES: Final = 12  # functions told of a fault of ours
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
    rundir = RunDir(config.name, resolve(config.owner, config.name))
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
        if running and isinstance(err, Exception) and not isinstance(err, PyvmError):
            log.error(f"this is a fault of pyvmd's own, at {_place(err)}")
        if not running:
            rundir.discard()
            raise
        end = Ending(CAUSE_HOST_ERROR, f"{type(err).__name__}: {err}", EXIT_FAILED)
        rundir.write_exit(end._asdict())
        rundir.close()
        raise
    rundir.close()
    return status


def _place(err: BaseException) -> str:
    """Return where it came from, the innermost function first.

    By hand: a VM process in its jail cannot import `traceback`.
    """
    frames, at = [], err.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        frames.append(f"{os.path.basename(code.co_filename)}:{at.tb_lineno} {code.co_name}")
        at = at.tb_next
    return ", ".join(frames[::-1][:_PLACES])


def start(config: VmConfig) -> Started:
    """Start a VM in a process of its own and return once its guest runs.

    Raises PyvmError if it does not come to that, with the text and class of what went wrong there.
    """
    (result,) = start_together([config])
    if isinstance(result, PyvmError):
        raise result
    return result


def start_together(configs: Sequence[VmConfig]) -> list[Started | PyvmError]:
    """Start VMs, each in a process of its own; return what became of each once all are settled.

    An error has the text and class of what went wrong in that process.
    """
    pending: list[_Birth | PyvmError] = []
    results: list[Started | PyvmError] = []
    sys.stdout.flush()  # or the children would hold a copy of what is still unwritten
    sys.stderr.flush()
    # Until all processes stand where a signal ends them in good order, signals wait. The mask is
    # inherited by the children; here it does not hold if the process has other threads.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEADLY)
    waiting: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in _DEADLY
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        for config in configs:
            if config.limits != LimitsConfig():
                with contextlib.suppress(HostError):  # the VM process says so, where it counts
                    cgroup.settle(config.limits)
            try:
                pending.append(_fork(config, handlers, mask))
            except HostError as err:
                pending.append(err)
        for number, handler in handlers.items():
            # Not by way of SIG_DFL: that would hold for a thread that has not blocked them.
            signal.signal(number, _leave if handler == signal.SIG_DFL else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for caught in waiting:
            signal.raise_signal(caught)
        while pending:
            birth = pending[0]
            results.append(_await_report(birth) if isinstance(birth, _Birth) else birth)
            pending.pop(0)
    finally:  # only in haste is there something left
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for birth in pending:
            if isinstance(birth, _Birth):
                _cancel(birth)
        _restore(handlers)
    return results


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class _Birth(NamedTuple):
    """A VM process that has not reported yet."""

    name: str
    pid: int
    reader: int  # its report comes here


def _fork(config: VmConfig, handlers: Mapping[signal.Signals, Any], mask: Iterable[int]) -> _Birth:
    """Make a VM process, with these handlers and this mask of signals. Raises HostError."""
    try:
        reader, writer = os.pipe()
    except OSError as err:
        raise HostError(f"cannot start a process: {err.strerror}", vm=config.name) from err
    try:
        pid = os.fork()
    except OSError as err:  # too many processes, too little memory
        os.close(reader)
        raise HostError(f"cannot start a process: {err.strerror}", vm=config.name) from err
    else:
        if not pid:
            _restore(handlers)
            _be_vm_process(config, writer, mask)
        return _Birth(config.name, pid, reader)
    finally:
        os.close(writer)


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


def _await_report(birth: _Birth) -> Started | PyvmError:
    """Wait for a VM process's report or its death, whichever is first."""
    # The pidfd as well: a process that the VM process has forked may hold the pipe open.
    pidfd = os.pidfd_open(birth.pid)
    try:
        _wait(None, birth.reader, pidfd)
        report = os.read(birth.reader, _REPORT_LIMIT) if _wait(0, birth.reader) else b""
    finally:
        os.close(pidfd)
    text = report[1:].decode(errors="replace")
    if report[:1] == bytes([EXIT_DONE]):
        result: Started | PyvmError = Started(birth.name, int(text), birth.pid)
    else:
        status = os.waitstatus_to_exitcode(os.waitpid(birth.pid, 0)[1])
        cgroup.remove(birth.name)  # it may have come as far as that
        if report:
            result = _ERRORS.get(report[0], HostError)(text)
        else:
            survey.survey()  # tidies up after the dead
            how = f"exit status {status}" if status >= 0 else f"killed by {_signal_name(-status)}"
            result = HostError(f"VM process died during start: {how}", vm=birth.name)
    os.close(birth.reader)
    return result


def _wait(seconds: float | None, *fds: int) -> bool:
    """Wait until one can be read or has come to its end; False if that takes too long."""
    poll = select.poll()  # with many VMs, descriptors are more than select(2) can have
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cancel(birth: _Birth) -> None:
    """End a VM process that has not reported yet; it tidies up by itself if it can."""
    os.close(birth.reader)
    try:
        pidfd = os.pidfd_open(birth.pid)
    except ProcessLookupError:  # reaped already
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        _wait(CANCEL_SECONDS, pidfd)
    finally:  # a second ^C does not wait
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # a zombie of ours is there for sure
        os.close(pidfd)
        os.waitpid(birth.pid, 0)
        survey.survey()


def _arrange_descriptors(config: VmConfig, writer: int) -> VmConfig:
    """Keep `writer` as _REPORT_FD and the taps that vm.yaml names by descriptor, nothing else.

    Returns the configuration with their new numbers. Raises HostError if one is not open.
    """
    taps, end = None, _REPORT_FD + 1
    failure: HostError | None = None
    if any(nic.tap.startswith("fd:") for nic in config.interfaces):
        from vmm.net.inherited import Inherited  # for the few who have such taps

        try:
            taps = Inherited(config)
        except HostError as err:  # which needs _REPORT_FD to be told
            failure = err
    os.dup2(writer, _REPORT_FD)
    if taps:
        config, end = taps.put(end)
    os.closerange(end, os.sysconf("SC_OPEN_MAX"))
    if failure:
        raise failure
    return config


def _be_vm_process(config: VmConfig, writer: int, mask: Iterable[int]) -> NoReturn:
    """Run the VM in this forked child, report through `writer`, and never come back."""
    status, report = EXIT_FAILED, _Report(_REPORT_FD)
    try:
        # Nothing that the caller happens to have open, a lock file say, lives on with the VM.
        config = _arrange_descriptors(config, writer)
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
