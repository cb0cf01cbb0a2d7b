"""pyvmctl console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from vmm import sockets, survey
from vmm.qmpclient import QmpClient
from vmm.rundir import CONSOLE, CONTROL
from vmm.terminal import ConsoleClient, End
from vmm.usage import PROGRAM, Verb, name_argument, verbs
from vmm.verb_wait import exit_status, tell_end

if TYPE_CHECKING:
    from argparse import ArgumentParser

CONNECT_SECONDS: Final = 5.0
BREAK_SECONDS: Final = 2.0
END_SECONDS: Final = 5.0  # from the end of the console to the end of the VM process


def _arguments(to: ArgumentParser) -> None:
    name_argument(to)
    to.add_argument(
        "--no-wait",
        action="store_true",
        help="leave at the end of standard input instead of waiting for the VM to end",
    )


def _console(options: Any) -> int:
    return attach(options.name, wait=not options.no_wait)


def attach(word: str, *, wait: bool = True, just_started: bool = False) -> int:
    """Connect the user to a VM's console until one of them ends it; returns the exit status.

    A VM that was just started may have ended already, which is an end like any other.
    """
    info = survey.lookup(word)
    if not info.alive and not just_started:
        raise HostError(
            "is not running", vm=info.name, hint=f"'{PROGRAM} start {info.name}' starts it"
        )

    def send_break() -> None:
        with QmpClient(f"{info.path}/{CONTROL}", BREAK_SECONDS) as control:
            control.call("x-pyvmd-send-break")

    try:
        console = sockets.connect(f"{info.path}/{CONSOLE}", CONNECT_SECONDS)
    except (FileNotFoundError, ConnectionError):
        pass  # it has just ended, or will be said to go on without a console
    except OSError as err:
        what = f"cannot connect to its console: {err.strerror or err}"
        raise HostError(what, vm=info.name) from err
    else:
        with console:
            end = ConsoleClient(console, info.name, send_break, wait=wait).run()
        if end is End.DETACHED:
            return EXIT_DONE
    ended = survey.wait_end(info.name, END_SECONDS, info.pid)
    if ended is None:
        raise HostError("the console is closed, but the VM still runs", vm=info.name)
    tell_end(ended)
    return exit_status(ended)


VERBS = verbs(
    Verb(
        name="console",
        summary="attach to a VM's console",
        arguments=_arguments,
        run=_console,
        example=f"{PROGRAM} console web\necho poweroff | {PROGRAM} console web",
        details="""\
On a terminal every key goes to the guest; ^] leaves, and so does ~. at the
start of a line, where ~? shows all escapes. From a pipe or file the bytes go as
they are; when they end, the guest's output is still shown until the VM ends,
unless --no-wait is given. The exit status is 0 after leaving, and the VM's own
when it ends.""",
    )
)
