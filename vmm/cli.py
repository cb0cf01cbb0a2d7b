"""pyvmctl: finds the verb, runs it, and turns what happens into an exit status.

0 done, 1 failed, 2 usage or configuration error, 3 no such VM; 130 after ^C. Data goes to standard
output, everything said to the user to standard error.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from config.errors import EXIT_DONE, PyvmError
from vmm.usage import PROGRAM, UsageError, Verb, choose, complain, parser

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE

# Verb → the module that holds it, imported when it is asked for. In the order of the help.
VERBS: Final = {
    "start": "vmm.verb_start",
    "up": "vmm.verb_files",
    "load": "vmm.verb_files",
    "reload": "vmm.verb_files",
    "forget": "vmm.verb_files",
    "validate": "vmm.verb_files",
    "status": "vmm.verb_status",
    "inspect": "vmm.verb_inspect",
    "stats": "vmm.verb_stats",
    "top": "vmm.verb_stats",
    "metrics": "vmm.verb_stats",
    "console": "vmm.verb_console",
    "log": "vmm.verb_log",
    "events": "vmm.verb_events",
    "stop": "vmm.verb_control",
    "kill": "vmm.verb_control",
    "wait": "vmm.verb_wait",
    "reboot": "vmm.verb_control",
    "reset": "vmm.verb_reset",
    "pause": "vmm.verb_control",
    "unpause": "vmm.verb_control",
    "import": "vmm.verb_import",
    "disk": "vmm.verb_disk",
    "cdrom": "vmm.verb_cdrom",
    "create": "vmm.verb_create",
    "image": "vmm.verb_image",
    "net": "vmm.verb_net",
    "nic": "vmm.verb_net",
    "pcap": "vmm.verb_net",
    "doctor": "vmm.verb_host",
    "schema": "vmm.verb_host",
    "completion": "vmm.verb_docs",
    "manual": "vmm.verb_docs",
    "version": "vmm.verb_host",
    "help": "vmm.verb_help",
}
ALIASES: Final = {
    "show": "status",
    "stat": "status",  # vmctl's users shorten it so
    "ls": "status",
    "ps": "status",
    "list": "status",
    "resume": "unpause",
    "restart": "reboot",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pyvmctl with `arguments`, by default the process's own. Returns the exit status."""
    _open_standard_streams()
    try:
        return run(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:  # of standard output: PyvmError stands for every other pipe
        _silence()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except PyvmError as err:
        complain(err)
        return err.exit_status


def run(arguments: list[str]) -> int:
    """Run one command line. Raises PyvmError, BrokenPipeError, KeyboardInterrupt."""
    if not arguments:
        raise UsageError("which verb?", hint=f"'{PROGRAM} help' lists them")
    word, *rest = arguments
    if word in ("-h", "--help"):
        word = "help"
    elif word in ("-V", "--version"):
        word = "version"
    elif word.startswith("-"):
        raise UsageError(f"{word}: options come after the verb", hint=f"see '{PROGRAM} help'")
    verb, rest = choose(load(resolve(word)), rest)
    try:
        options = parser(verb).parse_words(rest)
    except SystemExit:  # --help has printed and wants to leave
        return EXIT_DONE
    return verb.run(options)


def resolve(word: str) -> str:
    """Return the verb that `word` names: itself, an alias, or a prefix of only one verb's names.

    Raises UsageError.
    """
    names = {**{name: name for name in VERBS}, **ALIASES}
    if word in names:
        return names[word]
    found = {verb for name, verb in names.items() if name.startswith(word)}
    if len(found) == 1:
        return found.pop()
    if found:
        raise UsageError(f"verb {word!r} is ambiguous: {', '.join(sorted(found))}")
    raise UsageError(f"no verb {word!r}", hint=f"'{PROGRAM} help' lists them")


def load(name: str) -> Verb:
    """Import the module of a verb and return its declaration."""
    verb: Verb = __import__(VERBS[name], fromlist=[name]).VERBS[name]
    return verb


def _open_standard_streams() -> None:
    """Make sure that descriptors 0 to 2 are taken, and that sys has a stream for each.

    Started with one of them closed, the first socket we open would become somebody's standard
    output. Opened in order, each gets its own number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as we live


def _silence() -> None:
    """Let Python's last flush of standard output go nowhere: its reader has left."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
