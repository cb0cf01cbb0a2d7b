"""pyvmctl import: a vm.conf of OpenBSD's vmd becomes a vm.yaml."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, ConfigError, HostError
from config.load import load_text
from config.vmconfparse import read
from config.vmconfyaml import convert, write
from vmm.table import tell
from vmm.usage import PROGRAM, UsageError, Verb, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("file", metavar="FILE", help="the vm.conf")
    to.add_argument(
        "-o", dest="output", metavar="FILE", help="write to this new file, not to standard output"
    )
    to.add_argument(
        "-D",
        dest="macros",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="define a macro, whatever the file says; may be repeated",
    )


def _import(options: Any) -> int:
    found = convert(read(options.file, _macros(options.macros)), options.file)
    for remark in found.remarks:
        tell(remark)
    text = write(found.content, options.file)
    _check(text, options.output or "vm.yaml")
    if options.output is None:
        sys.stdout.write(text)
        return EXIT_DONE
    try:
        with open(options.output, "x") as file:
            file.write(text)
    except OSError as err:
        raise HostError(f"cannot write {options.output}: {err.strerror}") from err
    return EXIT_DONE


def _macros(words: Iterable[str]) -> dict[str, str]:
    macros = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"-D {word}: expected NAME=VALUE")
        macros[name] = value
    return macros


def _check(text: str, name: str) -> None:
    """Refuse to write what `start` would not read: names and values that only vmd takes."""
    try:
        load_text(text, os.path.abspath(name))
    except ConfigError as err:
        raise ConfigError(f"{err}\nno vm.yaml can say this: change the vm.conf") from err


VERBS = verbs(
    Verb(
        name="import",
        summary="turn a vm.conf(5) of vmd into a vm.yaml",
        arguments=_arguments,
        run=_import,
        example=f"{PROGRAM} import /etc/vm.conf >vm.yaml",
        details="""\
Everything in the grammar of vm.conf(5) is read. What has no counterpart, and
what had to be guessed, is said on standard error.""",
    )
)
