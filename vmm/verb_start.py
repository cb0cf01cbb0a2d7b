"""pyvmctl start."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE
from config.load import MAX_FILE, load_file, load_text
from vmm import daemon, known
from vmm.startflags import flag_arguments, wanted
from vmm.starting import announce, chosen, start_all
from vmm.table import tell
from vmm.usage import PROGRAM, UsageError, Verb, json_argument, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from config.model import Config, StaggerConfig, VmConfig


def _arguments(to: ArgumentParser) -> None:
    to.add_argument(
        "file",
        metavar="FILE",
        help="the vm.yaml, - for standard input, or the name of a VM whose file is known or that "
        "flags describe",
    )
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
    flag_arguments(to)


def _start(options: Any) -> int:
    vms, stagger = _wanted(options)
    if options.foreground or options.console:
        if len(vms) != 1:
            names = ", ".join(vm.name for vm in vms)
            option = "-F" if options.foreground else "-c"
            raise UsageError(f"{option} needs exactly one VM", hint=f"name one of: {names}")
        if options.foreground:
            return daemon.run(
                vms[0], lambda started: announce([started], json=options.json), foreground=True
            )
    started, failure = start_all(vms, stagger, quiet=options.json)
    if failure and len(vms) == 1:
        raise failure
    if options.json:
        announce(started, json=True, many=len(vms) > 1)
    if options.console:
        from vmm import verb_console  # termios and the like

        return verb_console.attach(vms[0].name, just_started=True)
    return failure.exit_status if failure else EXIT_DONE


def _wanted(options: Any) -> tuple[list[VmConfig], StaggerConfig | None]:
    """Return the VMs that the command line means. Raises ConfigError, NoSuchVmError, HostError."""
    word = options.file
    if not _is_file(word):
        if options.flags:
            return [wanted((word, *options.names), options.flags)], None
        return [known.find(name)[0] for name in (word, *options.names)], None
    config = _read(word)
    for warning in config.warnings:
        tell(warning)
    vms = chosen(config, options.names, word)
    if options.flags:
        vms = [wanted((), options.flags, vms)]
    if word != "-":
        known.remember(word)
    return vms, config.staggered_start


def _is_file(word: str) -> bool:
    return word == "-" or "/" in word or word.endswith((".yaml", ".yml")) or os.path.exists(word)


def _read(file: str) -> Config:
    if file != "-":
        return load_file(file)
    data = sys.stdin.buffer.read(MAX_FILE + 1)
    return load_text(data.decode(errors="replace"), "<stdin>")


VERBS = verbs(
    Verb(
        name="start",
        summary="start the VMs of a vm.yaml, or one that flags describe",
        arguments=_arguments,
        run=_start,
        example=f"{PROGRAM} start -c vm.yaml\n{PROGRAM} start hosts.yaml web\n{PROGRAM} start web\n"
        f"{PROGRAM} start new -c -m 1G -d disk.qcow2 -r install.iso -B cdrom -L",
        details="""\
Returns once the guest runs. With -c or -F the exit status is the VM's own when
it ends. From then on the file is known, and its VMs start by their names.

A NAME that no known file has is that of a VM that the flags describe; each is
read as the key of vm.yaml would be. It needs a kernel, a disk, a disc or a
template, and it is forgotten with its end. A VM of a file takes none of these
flags but -b, for this one run.""",
    )
)
