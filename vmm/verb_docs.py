"""The verbs that print what other programs want to know of pyvmctl: completion, manual."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE
from vmm import completion, manual
from vmm.usage import PROGRAM, Verb, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser


def _completion_arguments(to: ArgumentParser) -> None:
    to.add_argument("shell", metavar="SHELL", choices=completion.SHELLS, help="bash, zsh or fish")


def _completion(options: Any) -> int:
    from vmm.surface import surfaces  # imports every verb, us among them

    sys.stdout.write(completion.script(options.shell, surfaces()))
    return EXIT_DONE


def _manual_arguments(to: ArgumentParser) -> None:
    to.add_argument(
        "page",
        metavar="PAGE",
        nargs="?",
        default="pyvmctl.1",
        choices=tuple(manual.PAGES),
        help=f"{' or '.join(manual.PAGES)} (default: pyvmctl.1)",
    )


def _manual(options: Any) -> int:
    from vmm.surface import surfaces  # imports every verb, us among them

    if options.page == "pyvmctl.1":
        sys.stdout.write(manual.commands(surfaces()))
    else:
        sys.stdout.write(manual.file_format())
    return EXIT_DONE


VERBS = verbs(
    Verb(
        name="completion",
        summary="print a shell's completion script",
        arguments=_completion_arguments,
        run=_completion,
        example=f"{PROGRAM} completion bash >~/.pyvmctl.bash; . ~/.pyvmctl.bash\n"
        f"{PROGRAM} completion fish | source",
    ),
    Verb(
        name="manual",
        summary="print a manual page",
        arguments=_manual_arguments,
        run=_manual,
        example=f"{PROGRAM} manual | man -l -\n{PROGRAM} manual vm.yaml.5 >vm.yaml.5",
    ),
)
