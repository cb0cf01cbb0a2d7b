"""pyvmctl status."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, NoSuchVmError, PyvmError
from vmm import safefile, survey
from vmm.owner import user_name
from vmm.qmpclient import QmpClient
from vmm.rundir import CONSOLE, CONTROL
from vmm.table import STATUS_COLUMNS, Paint, say, say_json, scaled, table, wants_colour
from vmm.usage import (
    PROGRAM,
    Verb,
    colour_argument,
    complain,
    json_argument,
    verbs,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.survey import VmInfo

ANSWER_SECONDS: Final = 3.0  # a VM that does not answer by then is shown as "unknown"

_STYLES: Final = {
    "STATE": {"running": "green", "paused": "yellow", "crashed": "red", "unknown": "red"}
}


def _arguments(to: ArgumentParser) -> None:
    to.add_argument(
        "names", metavar="NAME", nargs="*", default=[], help="names or ids (default: all VMs)"
    )
    to.add_argument("-r", dest="running", action="store_true", help="running VMs only")
    to.add_argument("-q", "--quiet", action="store_true", help="print names only")
    to.add_argument(
        "--jail",
        action="store_true",
        help="show what confines each process, as the kernel tells it",
    )
    json_argument(to)
    colour_argument(to)


def _status(options: Any) -> int:
    infos, status = [], EXIT_DONE
    for name in options.names:
        try:
            infos.append(survey.lookup(name))
        except NoSuchVmError as err:
            complain(err)
            status = err.exit_status
    if not options.names:
        infos = survey.survey(shared=True)
    infos = [info for info in infos if info.alive or not options.running]
    # As vmctl: running VMs first, then by number.
    infos.sort(key=lambda info: (not info.alive, info.id))
    if options.quiet:
        for info in infos:
            say(info.name)
        return status
    if options.jail:
        from vmm import jailview  # reads much of /proc; nobody else asks

        jailview.show(infos, json=options.json, colour=options.color, stdout=sys.stdout)
        return status
    found = [facts(info) for info in infos]
    if options.json:
        say_json(found[0] if len(options.names) == 1 and found else found)
        return status
    paint = Paint(wants_colour(options.color, sys.stdout))
    say(table(STATUS_COLUMNS, [_row(vm) for vm in found], paint, _STYLES))
    return status


def facts(info: VmInfo) -> dict[str, Any]:
    """Return what is known of a VM, for JSON: sizes in bytes; null where there is no answer.

    Every file and answer of a VM may come from a process that its guest has taken over, so each
    value's type is checked before it is used.
    """
    config, uid = _files(info)
    live = _ask(info) if info.alive else {}
    owner = config.get("owner")
    return {
        "id": info.id,
        "name": info.name,
        "state": info.state_word(live),
        "pid": info.pid or None,
        "vcpus": _number(config.get("vcpus")),
        "memory": _number(config.get("memory")),
        "memory_resident": _number(live.get("memory_resident")) or _resident(info.pid),
        "owner": owner if isinstance(owner, str) and owner else user_name(uid),
        "control": f"{info.path}/{CONTROL}" if info.alive else None,
        "console": f"{info.path}/{CONSOLE}" if info.alive else None,
        "path": info.path,
        "exit": info.exit or None,
        "live": live or None,
    }


def _files(info: VmInfo) -> tuple[dict[str, Any], int]:
    """The VM's configuration, {} if we may not read it, and the uid that its directory has."""
    try:
        dir_fd = safefile.open_dir(info.path)
    except OSError:
        return {}, os.geteuid()
    try:
        return safefile.read_json("vm.json", dir_fd), os.fstat(dir_fd).st_uid
    finally:
        os.close(dir_fd)


def _ask(info: VmInfo) -> dict[str, Any]:
    """Ask the VM process itself; {} if it does not answer in time."""
    try:
        with QmpClient(f"{info.path}/{CONTROL}", ANSWER_SECONDS) as control:
            answer = control.call("x-pyvmd-info")
    except PyvmError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _resident(pid: int) -> int | None:
    """Resident bytes of a process, None if there is none."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _row(vm: dict[str, Any]) -> list[str]:
    def size(value: int | None) -> str:
        return "-" if value is None else scaled(value)

    return [
        str(vm["id"]),
        str(vm["pid"] or "-"),
        str(vm["vcpus"] or "-"),
        size(vm["memory"]),
        size(vm["memory_resident"]) if vm["pid"] else "-",
        "console" if vm["console"] else "-",
        vm["owner"],
        vm["state"],
        vm["name"],
    ]


VERBS = verbs(
    Verb(
        name="status",
        summary="list VMs",
        arguments=_arguments,
        run=_status,
        example=f"{PROGRAM} status\n{PROGRAM} status --json web",
        details="""\
STATE is running, paused, stopping, stopped, crashed (the VM process died
without a word), or unknown (it does not answer). CURMEM is the memory in use.
With --json a single NAME gives one object, anything else a list. Those VMs of
root's that you may use are among yours.

With --jail there is a line per process: how many seccomp FILTERS decide about
its system calls, its capabilities (in its own user namespace, if it has one),
whether its ROOT is empty, open descriptors, and the namespaces that are not
yours. Landlock does not show from outside: see the VM's log.""",
    )
)
