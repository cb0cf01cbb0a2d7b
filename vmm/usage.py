"""How pyvmctl's verbs are declared, and the command-line words they share.

One `Verb` holds what the parser and the help need; only the wanted verb's parser is ever built,
since building all of them costs more than parsing.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from config.errors import ConfigError
from vmm.table import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from config.errors import PyvmError

PROGRAM: Final = "pyvmctl"

_WIDTH: Final = 80  # columns of help text when COLUMNS does not say
_UNITS: Final = {"s": 1, "m": 60, "h": 3600}


class UsageError(ConfigError):
    """A command line that means nothing. Exit status 2."""


class Verb(NamedTuple):
    """One command of pyvmctl."""

    name: str
    summary: str  # one line of `pyvmctl help`
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Any], int]  # takes the parsed arguments, returns the exit status
    example: str
    details: str = ""  # what --help says beyond the summary
    actions: Mapping[str, Verb] = {}  # what its first word chooses from; "" for a plain verb


def verbs(*declared: Verb) -> dict[str, Verb]:
    """Return the verbs of one module by name, where `cli.load` looks for them."""
    return {verb.name: verb for verb in declared}


def group(name: str, summary: str, details: str, actions: dict[str, Verb]) -> Verb:
    """Return a verb whose first word is one of `actions`, named `name` and that word."""

    def run(_options: Any) -> int:
        raise UsageError(f"{name}: which action?", hint=f"one of {', '.join(actions)}")

    return Verb(
        name=name,
        summary=summary,
        arguments=lambda to: None,
        run=run,
        example="\n".join(action.example.split("\n")[0] for action in actions.values()),
        details=details,
        actions=actions,
    )


def choose(verb: Verb, words: list[str]) -> tuple[Verb, list[str]]:
    """Return which action of a group `words` begin with, if any, and what is left of them.

    An action may be shortened as a verb may. Raises UsageError.
    """
    if not verb.actions or not words or words[0].startswith("-"):
        return verb, words
    word, *rest = words
    found = [word] if word in verb.actions else [a for a in verb.actions if a.startswith(word)]
    if len(found) == 1:
        return verb.actions[found[0]], rest
    what = f"{word!r} is ambiguous: {', '.join(found)}" if found else f"no action {word!r}"
    raise UsageError(f"{verb.name}: {what}", hint=f"see '{PROGRAM} {verb.name} --help'")


class _Plain(str):
    """A word that is no option, whatever it begins with."""


class _Parser(argparse.ArgumentParser):
    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse options and names in any order; what follows `--` is names. Raises UsageError.

        argparse itself loses a `--` when options and names mix.
        """
        end = words.index("--") if "--" in words else len(words)
        names = [_Plain(word) for word in words[end + 1 :]]
        return self.parse_intermixed_args([*words[:end], *names])

    def _parse_optional(self, arg_string: str) -> Any:
        return None if isinstance(arg_string, _Plain) else super()._parse_optional(arg_string)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see '{self.prog} --help'")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help text of a known width: asking the terminal would import shutil, 4 ms per start."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, width=int(columns) if columns.isdecimal() else _WIDTH)


def _details(verb: Verb) -> str:
    """Return what --help says beyond the summary, a group's actions first."""
    if not verb.actions:
        return verb.details
    width = max(8, *map(len, verb.actions))
    rows = [f"  {word:<{width}} {action.summary}" for word, action in verb.actions.items()]
    told = ["", f"'{PROGRAM} {verb.name} ACTION --help' explains an action."]
    return "\n".join(["actions:", *rows, *told, *(("", verb.details) if verb.details else ())])


def parser(verb: Verb) -> _Parser:
    """Build the parser of one verb. Parsing raises UsageError."""
    text = verb.summary[0].upper() + verb.summary[1:] + "."
    details = _details(verb)
    indented = "\n".join(f"  {line}" for line in verb.example.splitlines())
    made = _Parser(
        prog=f"{PROGRAM} {verb.name}",
        usage=f"{PROGRAM} {verb.name} ACTION [ARGUMENT...]" if verb.actions else None,
        description=f"{text}\n\n{details}" if details else text,
        epilog=f"example:\n{indented}",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    verb.arguments(made)
    return made


def name_argument(to: argparse.ArgumentParser) -> None:
    """One VM."""
    to.add_argument("name", metavar="NAME", help="the VM's name or id")


def json_argument(to: argparse.ArgumentParser) -> None:
    """Output for programs."""
    to.add_argument("--json", action="store_true", help="print JSON for programs")


def colour_argument(to: argparse.ArgumentParser) -> None:
    """Colour on or off."""
    to.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colour the output (default: on a terminal, unless NO_COLOR is set)",
    )


def timeout_argument(to: argparse.ArgumentParser, help_text: str) -> None:
    """A deadline in seconds, or with a unit."""
    to.add_argument("--timeout", metavar="TIME", type=seconds, help=help_text)


def seconds(text: str) -> float:
    """Read a time: `30`, `1.5`, `90s`, `5m`, `2h`. Raises what argparse turns into an error."""
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not number.replace(".", "", 1).isdecimal() or not number.isascii():
        raise argparse.ArgumentTypeError(f"expected a time such as 30, 1.5, 5m or 2h, got {text!r}")
    return float(number) * unit


def complain(err: PyvmError) -> None:
    """Say on standard error what went wrong.

    The complaints about a file keep their form `file:line:column: text`, which editors read.
    """
    of_a_file = isinstance(err, ConfigError) and not isinstance(err, UsageError)
    for line in (str(err) if of_a_file else f"{PROGRAM}: {err}").split("\n"):
        tell(line)
