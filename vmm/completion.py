"""Completion scripts for bash, zsh and fish, made from the verbs as they are.

A script knows verbs, options and their fixed words by itself and asks `pyvmctl status -q` for the
names of VMs. Where an argument is neither, files are offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.usage import PROGRAM

if TYPE_CHECKING:
    from vmm.surface import Surface

SHELLS: Final = ("bash", "zsh", "fish")

_NAMES: Final = ("NAME", "VM")  # arguments that are a VM's name
_FILES: Final = ("FILE", "IMAGE", "ISO", "PATH", "INPUT", "BASE", "SOURCE", "TARGET")
_BASH: Final = """\
# bash completion for {program}: source it, or put it into /usr/share/bash-completion/completions

_{program}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}
    local verb=${{COMP_WORDS[1]}} words= names= files=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W '{verbs}' -- "$cur")
        return
    fi
    case "$verb $prev" in
{values}
    *)
        case $verb in
{cases}
        esac
        ;;
    esac
    case $cur in
    -*) ;;
    *) [[ -z $names ]] || words+=" $({program} status -q 2>/dev/null)" ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    if [[ -n $files && $cur != -* ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -f -- "$cur")
    fi
}}
complete -F _{program} {program}
"""
_ZSH: Final = """\
#compdef {program}
# zsh completion for {program}: put it into a directory of $fpath, as _{program}

_{program}_names() {{
    local -a names
    names=(${{(f)"$({program} status -q 2>/dev/null)"}})
    compadd -a names
}}

_{program}() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    shift words
    ((CURRENT--))
    case $verb in
{cases}
    esac
}}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _{program} "$@"
else
    compdef _{program} {program}
fi
"""


def script(shell: str, verbs: list[Surface]) -> str:
    """Return the completion script for one of SHELLS."""
    make = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return make([_merged(verb) for verb in verbs])


def _merged(verb: Surface) -> Surface:
    """Return a verb with what any of its actions takes, each once."""
    every = (verb, *verb.actions)
    options = {option.words: option for one in every for option in one.options}
    arguments = {argument.name: argument for one in every for argument in one.arguments}
    return verb._replace(options=tuple(options.values()), arguments=tuple(arguments.values()))


def _bash(verbs: list[Surface]) -> str:
    cases, values = [], []
    for verb in verbs:
        for option in (option for option in verb.options if option.choices):
            pattern = "|".join(f'"{verb.name} {word}"' for word in option.words)
            values.append(f"    {pattern}) words='{' '.join(option.choices)}' ;;")
        words = [word for option in verb.options for word in option.words]
        words += [word for argument in verb.arguments for word in argument.choices]
        words += _verb_names(verbs) if verb.name == "help" else []
        names = any(argument.name in _NAMES for argument in verb.arguments)
        files = any(_is_file(argument.name, argument.choices) for argument in verb.arguments)
        pattern = "|".join((verb.name, *verb.aliases))
        sets = f"words='{' '.join(words)}'" + " names=1" * names + " files=1" * files
        cases.append(f"        {pattern}) {sets} ;;")
    parts = {"values": "\n".join(values), "cases": "\n".join(cases)}
    return _BASH.format(program=PROGRAM, verbs=" ".join(_verb_names(verbs)), **parts)


def _zsh(verbs: list[Surface]) -> str:
    rows, cases = [], []
    for verb in verbs:
        rows += [
            f"        {_quoted(f'{name}:{verb.summary}')}" for name in (verb.name, *verb.aliases)
        ]
        lines = []
        for option in verb.options:
            told = _zsh_text(option.help)
            value = f":{option.value}:{_zsh_words(option.choices, option.value)}" * bool(
                option.value
            )
            lines += [f"{word}[{told}]{value}" for word in option.words]
        for argument in verb.arguments:
            star = "*" if argument.many else ":" if argument.optional else ""
            choices = tuple(_verb_names(verbs)) if verb.name == "help" else argument.choices
            lines.append(f"{star}:{argument.name}:{_zsh_words(choices, argument.name)}")
        cases.append(f"    {'|'.join((verb.name, *verb.aliases))})")
        cases.append("        _arguments " + " \\\n            ".join(map(_quoted, lines)))
        cases.append("        ;;")
    return _ZSH.format(program=PROGRAM, verbs="\n".join(rows), cases="\n".join(cases))


def _zsh_words(choices: tuple[str, ...], name: str) -> str:
    if choices:
        return f"({' '.join(choices)})"
    if name in _NAMES:
        return f"_{PROGRAM}_names"
    return "_files" if _is_file(name, choices) else " "


def _zsh_text(text: str) -> str:
    return "".join(f"\\{char}" if char in "[]:\\" else char for char in text)


def _fish(verbs: list[Surface]) -> str:
    lines = [
        f"# fish completion for {PROGRAM}: put it into ~/.config/fish/completions",
        "",
        f"complete -c {PROGRAM} -f",
        f"set -l verbs {' '.join(_verb_names(verbs))}",
    ]
    rest = f"complete -c {PROGRAM} -n"
    for verb in verbs:
        lines += [
            f'{rest} "not __fish_seen_subcommand_from $verbs" -a {name} -d {_quoted(verb.summary)}'
            for name in (verb.name, *verb.aliases)
        ]
    for verb in verbs:
        seen = f"{rest} '__fish_seen_subcommand_from {' '.join((verb.name, *verb.aliases))}'"
        for option in verb.options:
            forms = [
                f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
                for word in option.words
            ]
            value = ""
            if option.value:
                value = " -x" if option.choices else " -r"
                value += f" -a {_quoted(' '.join(option.choices))}" * bool(option.choices)
            lines.append(f"{seen} {' '.join(forms)}{value} -d {_quoted(option.help)}")
        for argument in verb.arguments:
            if verb.name == "help":
                lines.append(f"{seen} -a {_quoted(' '.join(_verb_names(verbs)))}")
            elif argument.choices:
                lines.append(f"{seen} -a {_quoted(' '.join(argument.choices))}")
            elif argument.name in _NAMES:
                lines.append(f"{seen} -a '({PROGRAM} status -q 2>/dev/null)'")
            elif _is_file(argument.name, argument.choices):
                lines.append(f"{seen} -F")
    return "\n".join(lines) + "\n"


def _verb_names(verbs: list[Surface]) -> list[str]:
    return [name for verb in verbs for name in (verb.name, *verb.aliases)]


def _is_file(name: str, choices: tuple[str, ...]) -> bool:
    return not choices and name in _FILES


def _quoted(text: str) -> str:
    """Return a text in single quotes, for any of the shells."""
    return "'" + text.replace("'", "'\\''") + "'"
