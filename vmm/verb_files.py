"""The verbs that act on whole files of VMs: up, load, reload, forget, validate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, EXIT_USAGE, ConfigError, HostError, NoSuchVmError, PyvmError
from config.load import load_file
from vmm import known, survey
from vmm.rundir import RunDir
from vmm.starting import announce, start_all
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, UsageError, Verb, complain, json_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable

    from config.model import Config
    from vmm.survey import VmInfo


def default_file() -> str:
    """Return the file of VMs that is meant when none is named; it need not exist."""
    if os.geteuid() == 0:
        return "/etc/pyvmd/vm.yaml"
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{home}/pyvmd/vm.yaml"


# up and load


def _up_arguments(to: ArgumentParser) -> None:
    to.add_argument(
        "names", metavar="NAME", nargs="*", default=[], help="which VMs (default: all enabled)"
    )
    to.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        action="append",
        default=[],
        help="the vm.yaml; may be repeated (default: every known file)",
    )
    json_argument(to)


def _up(options: Any) -> int:
    paths = options.file or known.files() or [default_file()]
    configs = _read(paths)
    names = set(options.names)
    if unknown := names - {vm.name for config in configs for vm in config.vms}:
        where = ", ".join(paths)
        raise NoSuchVmError(f"no VM '{min(unknown)}' in {where}")
    for path in paths:
        known.remember(path)
    return _start(configs, options, names)


def _load_arguments(to: ArgumentParser) -> None:
    to.add_argument("files", metavar="FILE", nargs="+", help="vm.yaml files")
    to.add_argument("-n", dest="dry", action="store_true", help="start none of their VMs")
    json_argument(to)


def _load(options: Any) -> int:
    configs = _read(options.files)
    for path in options.files:
        known.remember(path)
    return EXIT_DONE if options.dry else _start(configs, options)


def _read(paths: Iterable[str]) -> list[Config]:
    """Read files, all before anything is done with one. Raises ConfigError with all mistakes."""
    configs, mistakes = [], []
    owner: dict[str, str] = {}
    for path in paths:
        try:
            config = load_file(path)
        except ConfigError as err:
            mistakes.append(str(err))
            continue
        for warning in config.warnings:
            tell(warning)
        mistakes += [
            f"{path}:1:1: VM {vm.name!r} is in {owner[vm.name]}, too"
            for vm in config.vms
            if owner.setdefault(vm.name, path) != path
        ]
        configs.append(config)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return configs


def _start(configs: Iterable[Config], options: Any, names: Iterable[str] = ()) -> int:
    """Start those VMs that are to run and do not. Returns the exit status."""
    running = {info.name for info in survey.survey() if info.alive}
    wanted, started, status = set(names), [], EXIT_DONE
    for config in configs:
        vms = [vm for vm in config.vms if (vm.name in wanted if wanted else vm.enable)]
        for vm in vms:
            if vm.name in running:
                tell(f"vm {vm.name} runs already")
        vms = [vm for vm in vms if vm.name not in running]
        some, failure = start_all(vms, config.staggered_start, quiet=options.json)
        started += some
        if failure:
            status = failure.exit_status
            if len(vms) == 1:
                complain(failure)
    if options.json:
        announce(started, json=True, many=True)
    return status


# reload


def _reload_arguments(to: ArgumentParser) -> None:
    to.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        help="what to read instead of the known files",
    )
    json_argument(to)


def _reload(options: Any) -> int:
    before = known.files()
    paths = options.files or before or [default_file()]
    configs = _read(paths)  # a mistake changes nothing
    known.forget(before)
    for path in paths:
        known.remember(path)
    kept = {vm.name for config in configs for vm in config.vms}
    for info in survey.survey():
        if not info.alive and info.name not in kept:
            _erase(info)
    return _start(configs, options)


# forget


def _forget_arguments(to: ArgumentParser) -> None:
    to.add_argument("names", metavar="NAME", nargs="*", default=[], help="names or ids of VMs")
    to.add_argument("-a", dest="all", action="store_true", help="all VMs that do not run")


def _forget(options: Any) -> int:
    if options.all == bool(options.names):
        raise UsageError("name the VMs to forget, or all by -a")
    infos, status = [], EXIT_DONE
    if options.all:
        infos = [info for info in survey.survey() if not info.alive]
    for name in options.names:
        try:
            infos.append(survey.lookup(name))
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    for info in infos:
        try:
            if info.alive:
                hint = f"'{PROGRAM} stop {info.name}' stops it"
                raise HostError("cannot forget a vm that runs", vm=info.name, hint=hint)
            _erase(info)
        except PyvmError as err:
            complain(err)
            status = err.exit_status
    if options.all:
        known.forget(known.files())
    return status


def _erase(info: VmInfo) -> None:
    if info.path != (own := RunDir(info.name)).path:
        raise HostError("is root's to forget", vm=info.name)
    own.erase()
    tell(f"forgot vm {info.id}: {info.name}")


# validate


def _validate_arguments(to: ArgumentParser) -> None:
    to.add_argument("files", metavar="FILE", nargs="+", help="vm.yaml files")
    json_argument(to)


def _validate(options: Any) -> int:
    status, facts = EXIT_DONE, []
    for path in options.files:
        row: dict[str, Any] = {"file": path, "vms": [], "errors": [], "warnings": []}
        try:
            config = load_file(path)
        except ConfigError as err:
            status = EXIT_USAGE
            row["errors"] = str(err).split("\n")
        else:
            row["vms"] = [vm.name for vm in config.vms]
            row["warnings"] = list(config.warnings)
        facts.append(row)
        if not options.json:
            for line in (*row["errors"], *row["warnings"]):
                tell(line)
            if not row["errors"]:
                tell(f"{path}: good: {', '.join(row['vms'])}")
    if options.json:
        say_json(facts)
    return status


VERBS = verbs(
    Verb(
        name="up",
        summary="start what is not running of the known files",
        arguments=_up_arguments,
        run=_up,
        example=f"{PROGRAM} up\n{PROGRAM} up -f hosts.yaml",
        details="""\
Running VMs stay as they are. A file becomes known by up, load and start, until
the host is booted again; each time it is read anew. Where none is known, it is
/etc/pyvmd/vm.yaml for root, ~/.config/pyvmd/vm.yaml for others.""",
    ),
    Verb(
        name="load",
        summary="make files known, and start their VMs",
        arguments=_load_arguments,
        run=_load,
        example=f"{PROGRAM} load hosts.yaml\n{PROGRAM} load -n spare.yaml",
        details="A mistake in one of the files, and nothing is done.",
    ),
    Verb(
        name="reload",
        summary="read the known files again, start what is new",
        arguments=_reload_arguments,
        run=_reload,
        example=f"{PROGRAM} reload",
        details="""\
Stopped VMs that are in none of the files are forgotten. Running VMs stay as
they are. After a mistake in one of the files nothing has changed.""",
    ),
    Verb(
        name="forget",
        summary="remove what is left of VMs that do not run",
        arguments=_forget_arguments,
        run=_forget,
        example=f"{PROGRAM} forget web\n{PROGRAM} forget -a",
        details="""\
Logs, exit status and number of a stopped VM are removed, never its disks. With
-a every file is unknown afterwards.""",
    ),
    Verb(
        name="validate",
        summary="check vm.yaml files",
        arguments=_validate_arguments,
        run=_validate,
        example=f"{PROGRAM} validate vm.yaml",
        details=f"Exit status {EXIT_USAGE} if there is a mistake in one. Nothing else is touched.",
    ),
)
