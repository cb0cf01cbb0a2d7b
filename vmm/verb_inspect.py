"""pyvmctl inspect: all that is known of one VM."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE, HostError
from vmm import safefile, survey
from vmm.table import say_json
from vmm.usage import PROGRAM, Verb, name_argument, verbs
from vmm.verb_status import facts

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from vmm.survey import VmInfo


def _arguments(to: ArgumentParser) -> None:
    name_argument(to)
    to.add_argument(
        "--format",
        choices=("json", "yaml"),
        default="json",
        help="json: everything; yaml: its configuration, as a vm.yaml (default: json)",
    )
    to.add_argument(
        "--json", dest="format", action="store_const", const="json", help="as --format json"
    )


def _inspect(options: Any) -> int:
    info = survey.lookup(options.name)
    config = _config(info)
    if options.format == "json":
        say_json({**facts(info), "config": config or None})
        return EXIT_DONE
    # The tables of all keys, and YAML's writer: for this format alone.
    from config.spell import spell
    from config.vmconfyaml import write

    try:
        keys = spell(config)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise HostError("its vm.json is damaged", vm=info.name) from err
    sys.stdout.write(write(keys, f"VM {info.name}"))
    return EXIT_DONE


def _config(info: VmInfo) -> dict[str, Any]:
    """Return the configuration in effect, or in effect when it ran last."""
    try:
        dir_fd = safefile.open_dir(info.path)
    except OSError:
        return {}
    try:
        return safefile.read_json("vm.json", dir_fd)
    finally:
        os.close(dir_fd)


VERBS = verbs(
    Verb(
        name="inspect",
        summary="print everything about a VM, or the vm.yaml it amounts to",
        arguments=_arguments,
        run=_inspect,
        example=f"{PROGRAM} inspect web | jq .config.disks\n{PROGRAM} inspect --format yaml web",
        details="""\
The JSON is that of 'status --json' with the configuration in effect. The YAML
starts the same VM: what it took from a template, from defaults or from flags
stands in it, with absolute paths; what is left at its default does not.""",
    )
)
