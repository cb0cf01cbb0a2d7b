"""pyvmctl reset: one VM's reset button, and vmctl's meaning beside it: everything from scratch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, PyvmError
from vmm import known, survey
from vmm.rundir import RunDir
from vmm.table import tell
from vmm.usage import PROGRAM, Verb, complain, verbs
from vmm.verb_control import command, each, force

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from vmm.survey import VmInfo


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("names", metavar="NAME", nargs="*", default=[], help="names or ids of VMs")
    to.add_argument("-a", dest="all", action="store_true", help="reset all running VMs")


def _reset(options: Any) -> int:
    act = WORDS.get(options.names[0]) if len(options.names) == 1 and not options.all else None
    if act and all(info.name != options.names[0] for info in survey.survey()):
        return act()
    return each(options, "reset", _press)


def _press(info: VmInfo) -> None:
    command(info, "system_reset")
    tell(f"reset vm {info.id} successfully")


def _vms() -> int:
    """End every VM and forget it, its file and its number. One that fails keeps none else."""
    status = EXIT_DONE
    for info in survey.survey():
        try:
            if info.alive:
                force(info)
                tell(f"forced to terminate vm {info.id}")
            RunDir(info.name).erase()
            tell(f"forgot vm {info.id}: {info.name}")
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    known.forget(known.files())
    return status


def _switches() -> int:
    """Remove bridges of ours that no interface is on, and rules for interfaces that are gone."""
    from vmm.net import keeper  # for this word alone

    keeper.sweep()
    tell("removed switches that nobody uses")
    return EXIT_DONE


def _all() -> int:
    status = _vms()
    return status if os.geteuid() else _switches() or status  # others have no bridges


WORDS: Final[dict[str, Callable[[], int]]] = {"vms": _vms, "switches": _switches, "all": _all}

VERBS = verbs(
    Verb(
        name="reset",
        summary="reset a VM, as its reset button would, or everything",
        arguments=_arguments,
        run=_reset,
        example=f"{PROGRAM} reset web\n{PROGRAM} reset vms",
        details="""\
A word in place of NAMEs means more, unless a VM has it for its name:
  vms       end all VMs at once, without their guests, and forget them, their
            numbers and their files; never their disks
  switches  remove bridges that were made for a switch and that nobody uses
  all       both""",
    )
)
