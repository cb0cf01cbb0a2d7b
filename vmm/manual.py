"""pyvmctl(1) and vm.yaml(5) in mdoc(7), made from the verbs and the tables of keys as they are."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final

from config.keys import FILE, NOT_SHARED, VM
from config.tables import Key, ListOf, MapOf, PartOf, Table
from vmm.usage import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.surface import Argument, Option, Surface

PAGES: Final = {"pyvmctl.1": "pyvmctl", "vm.yaml.5": "vm.yaml"}
DATE: Final = "$Mdocdate$"
_LINK: Final = re.compile(r"\[([^]]+)\]\([^)]*\)")  # Markdown's

_EXITS: Final = (
    ("0", "done"),
    ("1", "the operation failed"),
    ("2", "the command line or a vm.yaml is wrong"),
    ("3", "there is no such VM"),
    ("130", "interrupted"),
)
_FILES: Final = (
    (
        "/run/pyvmd/NAME/",
        "root's VMs: lock, sockets, logs, effective configuration; for their owners, too",
    ),
    ("$XDG_RUNTIME_DIR/pyvmd/NAME/", "other users' VMs"),
    ("/etc/pyvmd/vm.yaml", "root's VMs, where no file is named"),
    ("~/.config/pyvmd/vm.yaml", "other users' VMs, where no file is named"),
)
_ENVIRONMENT: Final = (
    ("PYVMD_RUNTIME_DIR", "another directory for running VMs"),
    ("NO_COLOR", "if set, no colours"),
)


def commands(verbs: list[Surface]) -> str:
    """Return pyvmctl(1)."""
    lines = [
        *_head("PYVMCTL", "1", PROGRAM, "start and control virtual machines"),
        ".Sh SYNOPSIS",
        f".Nm {PROGRAM}",
        ".Ar verb",
        ".Op Ar argument ...",
        ".Sh DESCRIPTION",
        ".Nm",
        "starts virtual machines that are described by a",
        ".Xr vm.yaml 5 ,",
        "and controls those that run.",
        "A VM is named by its name or, if it is a number, by its id.",
        "Verbs may be shortened as long as they stay unambiguous.",
        ".Pp",
        "The verbs are:",
        ".Bl -tag -width Ds",
    ]
    for verb in verbs:
        lines += _verb(verb)
        for action in verb.actions:
            lines += _verb(action)
    lines.append(".El")
    lines += _list("ENVIRONMENT", _ENVIRONMENT, "Ev")
    lines += _list("FILES", _FILES, "Pa")
    lines += _list("EXIT STATUS", _EXITS, "")
    lines += [".Sh EXAMPLES", ".Bd -literal"]
    lines += [_text(line) for verb in verbs for line in verb.example.split("\n")]
    lines += [".Ed", ".Sh SEE ALSO", ".Xr vm.yaml 5"]
    return "\n".join(lines) + "\n"


def file_format() -> str:
    """Return vm.yaml(5)."""
    lines = [
        *_head("VM.YAML", "5", "vm.yaml", "virtual machines of pyvmd"),
        ".Sh DESCRIPTION",
        "A file describes one VM with its keys at top level, or several below",
        ".Cm vms .",
        "It is YAML without tags and merge keys.",
        "Relative paths start at the directory that holds the file.",
        "Sizes are written as 512M or 2G, in powers of 1024.",
        "Keys that begin with x- are the user's own.",
    ]
    lines += _table("KEYS OF A VM", "", VM)
    lines += _table("KEYS OF A FILE OF SEVERAL VMS", "", FILE)
    lines += [
        ".Sh EXAMPLES",
        ".Bd -literal",
        "name: web",
        "vcpus: 2",
        "memory: 512M",
        "boot: {kernel: vmlinuz, initrd: initrd.img, cmdline: console=ttyS0}",
        ".Ed",
        ".Sh SEE ALSO",
        ".Xr pyvmctl 1",
    ]
    return "\n".join(lines) + "\n"


def _head(title: str, section: str, name: str, what: str) -> list[str]:
    return [
        '.\\" Generated: PYVMD_UPDATE_GOLDEN=1 pytest tests/unit/test_manual.py',
        f".Dd {DATE}",
        f".Dt {title} {section}",
        ".Os",
        ".Sh NAME",
        f".Nm {name}",
        f".Nd {what}",
    ]


def _verb(verb: Surface) -> list[str]:
    words = [
        f".It Cm {verb.name}",
        *map(_option_word, verb.options),
        *map(_argument, verb.arguments),
    ]
    lines = [" ".join(filter(None, words)), *_prose(verb.summary)]
    if verb.aliases:
        lines += ["Also:", f".Cm {' , '.join(verb.aliases)} ."]
    lines += _paragraphs(verb.details)
    told = [option for option in verb.options if "--help" not in option.words]
    if told:
        lines += [".Bl -tag -width Ds"]
        for option in told:
            flags = " , ".join(f"Fl {word[1:]}" for word in option.words)
            value = f" Ar {option.value.lower()}" if option.value and not option.choices else ""
            lines += [f".It {flags}{value}", *_prose(option.help)]
            if option.choices:
                lines += ["One of", f".Cm {' , '.join(option.choices)} ."]
        lines.append(".El")
    for argument in verb.arguments:
        if argument.help:
            lines += [".Pp", f".Ar {argument.name.lower()} :", *_prose(argument.help)]
    return lines


def _option_word(option: Option) -> str:
    if "--help" in option.words:
        return ""
    value = f" Ar {option.value.lower()}" if option.value else ""
    return f"Oo Fl {option.words[0][1:]}{value} Oc"


def _argument(argument: Argument) -> str:
    dots = " ..." if argument.many else ""
    word = f"Ar {argument.name.lower()}{dots}"
    return f"Oo {word} Oc" if argument.optional else word


def _table(title: str, path: str, table: Table) -> list[str]:
    lines = [
        f".Sh {title}" if not path else f".Ss Keys of {path.rstrip('.')}",
        ".Bl -tag -width Ds",
    ]
    keys = [table.spellings()[name] for name in table.names()]
    for key in keys:
        names = " , ".join(f"Cm {name}" for name in (key.name, *key.aliases))
        lines += [f".It {names}", *_prose(key.help), *_prose(_value(key))]
        if default := table.default(key):
            lines += _prose(f"If left out: {default}")
    lines.append(".El")
    for key in keys:
        if key.below and key.below is not VM:
            lines += _table("", f"{path}{key.name}.", key.below)
    return lines


def _value(key: Key) -> str:
    """Return what a key's value looks like, for readers."""
    if isinstance(key.kind, PartOf):
        return "A mapping with any keys of a VM but " + " and ".join(NOT_SHARED)
    if isinstance(key.kind, MapOf):
        return f"A mapping of names to {key.kind.what}"
    if isinstance(key.kind, Table):
        return "A mapping, see below"
    if isinstance(key.kind, ListOf):
        item = key.kind.item
        what = "mappings, see below" if isinstance(item, Table) else f"each {item.expects()}"
        return f"A list of at most {key.kind.most}: {what}"
    return f"The value is {key.kind.expects()}"


def _list(title: str, rows: Iterable[tuple[str, str]], macro: str) -> list[str]:
    lines = [f".Sh {title}", ".Bl -tag -width Ds"]
    for word, what in rows:
        lines += [f".It {macro} {_text(word)}" if macro else f".It {word}", *_prose(what)]
    return [*lines, ".El"]


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n\n") if text else ():
        lines += [".Pp", *_prose(paragraph)]
    return lines


def _prose(text: str) -> list[str]:
    """Return whole sentences, each on a line of its own and in pieces that fit one."""
    words = _LINK.sub(r"\1", " ".join(text.split()))
    if words.split(" ", 1)[0].isalpha():
        words = words[0].upper() + words[1:]
    if not words.endswith((".", ":")):
        words += "."
    lines = []
    for sentence in re.sub(r"([.:)]) (?=[A-Z])", r"\1\n", words).split("\n"):
        lines += textwrap.wrap(sentence, 78, break_long_words=False, break_on_hyphens=False)
    return [_text(line) for line in lines]


def _text(text: str) -> str:
    """Escape what mdoc would take for a macro, and Markdown's quotes."""
    plain = text.replace("\\", "\\e").replace("`", "").replace("\n", " ")
    return "\\&" + plain if plain.startswith((".", "'")) else plain
