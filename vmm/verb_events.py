"""pyvmctl events: what happens to a running VM, as it happens."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from devices.lines import printable
from vmm import survey
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import say
from vmm.usage import PROGRAM, Verb, name_argument, timeout_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.survey import VmInfo

END_SECONDS: Final = 5.0  # from its last words to the end of a VM process


def _arguments(to: ArgumentParser) -> None:
    name_argument(to)
    timeout_argument(to, "end after this time (default: when the VM does)")
    to.add_argument("--json", action="store_true", help="print each event as a line of JSON")


def _events(options: Any) -> int:
    info = survey.lookup(options.name)
    if not info.alive:
        hint = f"'{PROGRAM} log {info.name}' tells what has happened"
        raise HostError("cannot follow vm that is not running", vm=info.name, hint=hint)
    with QmpClient(f"{info.path}/{CONTROL}") as control:
        for event in control.events(options.timeout):
            say(json.dumps(event) if options.json else line(event))
    if control.gone and _still_runs(info):
        raise HostError("has thrown this client out", vm=info.name, hint="others need the place")
    return EXIT_DONE


def _still_runs(info: VmInfo) -> bool:
    """Tell whether the VM lives on without us. Its network may take a while to be cleared away."""
    ended = survey.wait_end(info.name, END_SECONDS, info.pid)
    return ended is None and survey.lookup(info.name).state == "running"


def line(event: dict[str, Any]) -> str:
    """Return one event for people; its VM may lie about everything in it."""
    data = event.get("data")
    facts = data.items() if isinstance(data, dict) else ()
    words = [_time(event.get("timestamp")), str(event["event"])]
    words += [f"{key}={fact if isinstance(fact, str) else json.dumps(fact)}" for key, fact in facts]
    return printable(" ".join(words))


def _time(stamp: Any) -> str:
    """Return a QMP timestamp as the log writes its times; "-" for what is none."""
    seconds = stamp.get("seconds") if isinstance(stamp, dict) else None
    micros = stamp.get("microseconds") if isinstance(stamp, dict) else None
    if type(seconds) is not int or type(micros) is not int or not 0 <= micros < 10**6:
        return "-"
    try:
        day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "-"
    return f"{day}.{micros // 1000:03}Z"


VERBS = verbs(
    Verb(
        name="events",
        summary="show what happens to a VM, as it happens",
        arguments=_arguments,
        run=_events,
        example=f"{PROGRAM} events web\n{PROGRAM} events --json --timeout 5m web",
        details="""\
One line per event from now on, until the VM ends: STOP and RESUME (pause and
unpause), RESET, SHUTDOWN, POWERDOWN, and our own, whose names begin with
X_PYVMD. With --json each line is the event as QMP has it.""",
    )
)
