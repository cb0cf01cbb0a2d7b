"""pyvmctl wait, and what the end of a VM means to whoever waited for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, EXIT_FAILED, HostError
from vmm import survey
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, Verb, json_argument, name_argument, timeout_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.survey import VmInfo


def await_end(info: VmInfo, seconds: float | None) -> VmInfo:
    """Wait until the VM has ended and say so. Raises HostError when the time is over before."""
    ended = survey.wait_end(info.name, seconds)
    if ended is None:
        hint = f"'{PROGRAM} stop -f {info.name}' does not ask the guest"
        raise HostError(f"still runs after {seconds:g} s", vm=info.name, hint=hint)
    tell(f"terminated vm {info.id}")
    return ended


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
        details=f"The exit status is {EXIT_DONE} after a clean end, else {EXIT_FAILED}; a guest "
        "that ends by the\ndebug-exit device gives its own.",
    )
)
