"""All verbs with their options and arguments, as data: for completions and the manual."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from vmm import cli
from vmm.usage import Verb, parser


class Option(NamedTuple):
    """One option of a verb."""

    words: tuple[str, ...]  # "-f", "--file"
    value: str  # what its argument is called, "" if it takes none
    choices: tuple[str, ...]
    help: str


class Argument(NamedTuple):
    """One argument of a verb that is no option."""

    name: str  # "FILE", "NAME"
    many: bool
    optional: bool
    choices: tuple[str, ...]
    help: str


class Surface(NamedTuple):
    """One verb."""

    name: str
    aliases: tuple[str, ...]
    summary: str
    details: str
    example: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]
    actions: tuple[Surface, ...] = ()  # of a verb whose first word is one


def surfaces() -> list[Surface]:
    """Return every verb in the order of the help; imports the modules of all of them."""
    return [_surface(cli.load(name)) for name in cli.VERBS]


def _surface(verb: Verb) -> Surface:
    actions = parser(verb)._actions  # argparse offers no other way to see them
    arguments = [_argument(action) for action in actions if not action.option_strings]
    if verb.actions:
        arguments.append(Argument("ACTION", False, False, tuple(verb.actions), "what to do"))
    return Surface(
        verb.name,
        tuple(alias for alias, name in cli.ALIASES.items() if name == verb.name),
        verb.summary,
        verb.details,
        verb.example,
        tuple(_option(action) for action in actions if action.option_strings),
        tuple(arguments),
        tuple(_surface(action) for action in verb.actions.values()),
    )


def _option(action: argparse.Action) -> Option:
    value = "" if action.nargs == 0 else _metavar(action)
    return Option(tuple(action.option_strings), value, _choices(action), action.help or "")


def _argument(action: argparse.Action) -> Argument:
    many, optional = action.nargs in ("*", "+"), action.nargs in ("*", "?")
    return Argument(_metavar(action), many, optional, _choices(action), action.help or "")


def _metavar(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def _choices(action: argparse.Action) -> tuple[str, ...]:
    return tuple(str(choice) for choice in action.choices or ())
