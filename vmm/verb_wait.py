"""pyvmctl wait, and what the end of a VM means to whoever waited for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, EXIT_FAILED, HostError
from devices.lines import printable
from vmm import survey
from vmm.ending import EXIT_TIMEOUT
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, Verb, json_argument, name_argument, timeout_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.survey import VmInfo


def await_end(info: VmInfo, seconds: float | None, since: float | None = None) -> VmInfo:
    """Wait until the VM has ended and say so. Raises HostError when the time is over before.

    The time counts from `since` (CLOCK_MONOTONIC), by default from now.
    """
    begun = time.monotonic() if since is None else since
    left = None if seconds is None else begun + seconds - time.monotonic()
    ended = survey.wait_end(info.name, left, info.pid)
    if ended is None:
        hint = f"'{PROGRAM} stop -f {info.name}' does not ask the guest"
        raise HostError(f"still runs after {seconds:g} s", vm=info.name, hint=hint)
    tell_end(ended)
    return ended


def tell_end(ended: VmInfo) -> None:
    """Say that a VM has ended, in vmctl's words, and how, in its own."""
    tell(f"terminated vm {ended.id}")
    if detail := ended.exit.get("detail"):
        tell(f"{ended.name}: {printable(str(detail))}")


def exit_status(ended: VmInfo) -> int:
    """Return how a VM ended: 0 cleanly, the guest's own code, 1 for a crash or no record."""
    status = ended.exit.get("status")
    return status & 0xFF if isinstance(status, int) else EXIT_FAILED


def _arguments(to: ArgumentParser) -> None:
    name_argument(to)
    timeout_argument(to, "give up after this time, with exit status 1")
    json_argument(to)


def _wait(options: Any) -> int:
    ended = await_end(survey.lookup(options.name), options.timeout)
    if options.json:
        say_json({"id": ended.id, "name": ended.name, "state": ended.state, "exit": ended.exit})
    return exit_status(ended)


VERBS = verbs(
    Verb(
        name="wait",
        summary="wait until a VM has ended",
        arguments=_arguments,
        run=_wait,
        example=f"{PROGRAM} wait --timeout 5m web",
        details=f"""\
The exit status is {EXIT_DONE} after a clean end: the guest powered off by itself or
because it was asked to, or the VM was ended by 'stop -f' or a signal. It is
{EXIT_TIMEOUT} if the guest was asked to go down, was not down in time, and was ended,
and {EXIT_FAILED} after a crash or another failure. A guest that ends by the debug-exit
device gives its own. With --json, "how" is guest-poweroff, stop, timeout,
forced, signal, guest-exit, reset-storm or failed; a VM process that was killed
left none, and the state is crashed.""",
    )
)
