"""pyvmctl disk: what can be done to the disks of a running VM."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from config.units import format_size, parse_size
from vmm import survey
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, Verb, json_argument, name_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

COMMAND_SECONDS: Final = 10.0  # for an answer


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("action", metavar="resize", choices=("resize",), help="what to do")
    name_argument(to)
    to.add_argument("disk", metavar="DISK", type=_disk, help="its number, from 0, or vioblk0 ...")
    to.add_argument(
        "size",
        metavar="SIZE",
        type=_size,
        nargs="?",
        default=0,
        help="grow the image to this size first (default: as large as it is)",
    )
    json_argument(to)


def _disk(text: str) -> str:
    """Return the device's name. Raises what argparse turns into an error."""
    number = text.removeprefix("vioblk")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a disk such as 0 or vioblk0, got {text!r}")
    return f"vioblk{int(number)}"


def _size(text: str) -> int:
    """Return bytes. Raises what argparse turns into an error."""
    try:
        size = parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: {err}") from err
    if not size:
        raise argparse.ArgumentTypeError("a disk has at least one sector")
    return size


def _run(options: Any) -> int:
    info = survey.lookup(options.name)
    if not info.alive:
        hint = "then pyvmctl image resize does it"
        raise HostError("cannot resize a disk of vm that is not running", vm=info.name, hint=hint)
    with QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS) as control:
        size = control.call("block_resize", device=options.disk, size=options.size)
    if type(size) is not int:  # from a process that its guest may have taken over
        raise HostError("the answer is no size", vm=info.name, device=options.disk)
    if options.json:
        say_json({"vm": info.name, "device": options.disk, "size": size})
    else:
        tell(f"{info.name}/{options.disk}: {format_size(size)}")
    return EXIT_DONE


VERBS = verbs(
    Verb(
        name="disk",
        summary="resize a disk of a running VM",
        arguments=_arguments,
        run=_run,
        example=f"{PROGRAM} disk resize web 0 20G\n{PROGRAM} disk resize web vioblk1",
        details="Grows the image, tells the guest, and prints the size that the guest sees now.\n"
        "Without SIZE the disk becomes as large as its image or block device is, which\n"
        "somebody has changed before. An image is never cut.",
    ),
)
