"""pyvmctl start."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, PyvmError
from config.load import MAX_FILE, load_file, load_text
from vmm import daemon, runroot
from vmm.table import say_json, tell
from vmm.usage import PROGRAM, UsageError, Verb, complain, json_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from config.model import Config, VmConfig


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("file", metavar="FILE", help="the vm.yaml; - reads standard input")
    to.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        default=[],
        help="which of its VMs (default: all but those with 'enable: no')",
    )
    how = to.add_mutually_exclusive_group()
    how.add_argument("-c", dest="console", action="store_true", help="attach the console")
    how.add_argument(
        "-F", dest="foreground", action="store_true", help="stay in the foreground, log to stderr"
    )
    json_argument(to)


def _start(options: Any) -> int:
    config = _read(options.file)
    for warning in config.warnings:
        tell(warning)
    vms = _chosen(config, options.names, options.file)
    if options.foreground or options.console:
        if len(vms) != 1:
            names = ", ".join(vm.name for vm in vms)
            option = "-F" if options.foreground else "-c"
            raise UsageError(f"{option} needs exactly one VM", hint=f"name one of: {names}")
        if options.foreground:
            return daemon.run(
                vms[0], lambda started: _announce([started], options), foreground=True
            )
    status = _start_all(vms, options)
    if options.console:
        from vmm import verb_console  # termios and the like

        return verb_console.attach(vms[0].name, just_started=True)
    return status


def _read(file: str) -> Config:
    if file != "-":
        return load_file(file)
    data = sys.stdin.buffer.read(MAX_FILE + 1)
    return load_text(data.decode(errors="replace"), "<stdin>")


def _chosen(config: Config, names: list[str], file: str) -> list[VmConfig]:
    """Return the VMs to start, in the file's order."""
    known = {vm.name: vm for vm in config.vms}
    for name in names:
        if name not in known:
            raise UsageError(f"no VM '{name}' in {file}", hint=f"there are: {', '.join(known)}")
    vms = [vm for vm in config.vms if vm.name in names or (vm.enable and not names)]
    if not vms:
        hint = f"name the one to start: {', '.join(known)}"
        raise UsageError(f"no VM in {file} is enabled", hint=hint)
    return vms


def _start_all(vms: list[VmConfig], options: Any) -> int:
    """Start one after the other; one that fails does not keep the others from starting."""
    started, status = [], EXIT_DONE
    for vm in vms:
        try:
            started.append(daemon.start(vm))
        except PyvmError as err:
            if len(vms) == 1:
                raise
            complain(err)
            status = err.exit_status
    _announce(started, options, many=len(vms) > 1)
    return status


def _announce(started: list[daemon.Started], options: Any, *, many: bool = False) -> None:
    if options.json:
        facts = [
            {
                "id": vm.id,
                "name": vm.name,
                "pid": vm.pid,
                "control": f"{runroot.root()}/{vm.name}/control.sock",
                "console": f"{runroot.root()}/{vm.name}/console.sock",
            }
            for vm in started
        ]
        say_json(facts if many else facts[0])
        return
    for vm in started:
        tell(f"started vm {vm.id} successfully: {vm.name}, pid {vm.pid}")


VERBS = verbs(
    Verb(
        name="start",
        summary="start the VMs of a vm.yaml",
        arguments=_arguments,
        run=_start,
        example=f"{PROGRAM} start -c vm.yaml\n{PROGRAM} start hosts.yaml web db",
        details="Returns once the guest runs. With -c or -F the exit status is the VM's own when\n"
        "it ends.",
    )
)
