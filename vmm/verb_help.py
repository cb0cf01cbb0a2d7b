"""pyvmctl help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.errors import EXIT_DONE
from vmm.table import say
from vmm.usage import PROGRAM, UsageError, Verb, choose, parser, verbs

if TYPE_CHECKING:
    from argparse import ArgumentParser


def _arguments(to: ArgumentParser) -> None:
    to.add_argument("verb", metavar="VERB", nargs="?", help="explain this verb")
    to.add_argument("action", metavar="ACTION", nargs="?", help="and this action of it")


def _help(options: Any) -> int:
    from vmm import cli  # it imports us

    if options.verb:
        verb = cli.load(cli.resolve(options.verb))
        if options.action:
            verb, rest = choose(verb, [options.action])
            if rest:
                raise UsageError(f"{verb.name} has no actions")
        say(parser(verb).format_help().rstrip("\n"))
        return EXIT_DONE
    lines = [
        f"usage: {PROGRAM} VERB [ARGUMENT...]",
        "",
        "Starts and controls virtual machines; each is described by a vm.yaml.",
        "",
        "verbs:",
    ]
    width = max(map(len, cli.VERBS))
    for name in cli.VERBS:
        also = [alias for alias, verb in cli.ALIASES.items() if verb == name]
        note = f" (also: {', '.join(also)})" if also else ""
        lines.append(f"  {name:<{width}} {cli.load(name).summary}{note}")
    lines += [
        "",
        "A verb may be shortened as long as it stays unambiguous.",
        "A VM is named by its name or, if it is a number, by its id.",
        f"'{PROGRAM} VERB --help' explains a verb.",
        "",
        "exit status: 0 done, 1 failed, 2 usage or vm.yaml error, 3 no such VM",
        "example:",
        f"  {PROGRAM} start -c vm.yaml",
    ]
    say("\n".join(lines))
    return EXIT_DONE


VERBS = verbs(
    Verb(
        name="help",
        summary="list the verbs, or explain one",
        arguments=_arguments,
        run=_help,
        example=f"{PROGRAM} help start",
    )
)
