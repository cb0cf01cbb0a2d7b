"""pyvmctl cdrom: the disc in the drive of a running VM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from devices.images import open_disc
from vmm import survey
from vmm.cdrom import NAME
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, Verb, group, json_argument, name_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

COMMAND_SECONDS: Final = 10.0  # for an answer
_FDNAME: Final = "disc"


def _eject_arguments(to: ArgumentParser) -> None:
    name_argument(to)
    _common(to)


def _insert_arguments(to: ArgumentParser) -> None:
    name_argument(to)
    to.add_argument(
        "disc",
        metavar="ISO",
        nargs="?",
        help="image or block device (default: close the tray with the disc that lies on it)",
    )
    _common(to)


def _common(to: ArgumentParser) -> None:
    to.add_argument(
        "-f", "--force", action="store_true", help="even if the guest has locked the tray"
    )
    json_argument(to)


def _eject(options: Any) -> int:
    with _control(options) as control:
        return _tell(options, control.call("eject", id=NAME, force=options.force))


def _insert(options: Any) -> int:
    if options.disc is None:
        with _control(options) as control:
            return _tell(options, control.call("blockdev-close-tray", id=NAME))
    fd = open_disc(options.disc)  # with the caller's rights
    try:
        with _control(options) as control:
            control.pass_fd(_FDNAME, fd)
            wanted = {"path": os.path.abspath(options.disc), "force": options.force}
            return _tell(
                options, control.call("x-pyvmd-change-medium", id=NAME, fdname=_FDNAME, **wanted)
            )
    finally:
        os.close(fd)


def _control(options: Any) -> QmpClient:
    info = survey.lookup(options.name)
    if not info.alive:
        what = "cannot change the disc of a VM that is not running"
        raise HostError(what, vm=info.name, hint="vm.yaml says what it starts with")
    return QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS)


def _tell(options: Any, facts: Any) -> int:
    """Show where disc and tray are now."""
    medium = facts.get("medium", 0) if isinstance(facts, dict) else 0
    if not isinstance(medium, str | None):  # from a process that its guest may have taken over
        raise HostError("the answer does not tell what is in the drive", vm=options.name)
    if options.json:
        say_json({"vm": options.name, "device": NAME, **facts})
    else:
        tray = "tray open" if facts.get("tray_open") is True else "tray closed"
        tell(f"{options.name}/{NAME}: {medium or 'no disc'}, {tray}")
    return EXIT_DONE


_ACTIONS: Final = {
    "eject": Verb(
        name="cdrom eject",
        summary="open the tray and take the disc away",
        arguments=_eject_arguments,
        run=_eject,
        example=f"{PROGRAM} cdrom eject web\n{PROGRAM} cdrom eject --force web",
        details="A guest that uses the disc has locked the tray. It is asked to let go then, and\n"
        "--force takes the disc away all the same: what is still read from it fails.",
    ),
    "insert": Verb(
        name="cdrom insert",
        summary="put a disc in, instead of the one there is",
        arguments=_insert_arguments,
        run=_insert,
        example=f"{PROGRAM} cdrom insert web debian.iso\n{PROGRAM} cdrom insert web",
        details="The image is opened by you, with your rights, and handed to the VM.",
    ),
}

VERBS = verbs(
    group(
        "cdrom",
        "change the disc in a VM's drive",
        "A VM has a drive if its vm.yaml has `cdrom`.",
        _ACTIONS,
    )
)
