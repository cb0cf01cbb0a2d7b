"""Reads vm.conf(5): the grammar.

All mistakes are told, one line each, in the form `file:line: text`; after one, reading goes on
with the next line.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from config.vmconf import Interface, Switch, Vm, VmConf
from config.vmconflex import KEYWORDS, Lexer, Token, load_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

MAX_INCLUDES: Final = 16  # files in files
MAX_FILES: Final = 1000  # in all, each as often as it is included
MAX_MISTAKES: Final = 100
PERMISSIONS: Final = ("boot", "memory", "interface", "disk", "cdrom", "instance")


class Stop(Exception):  # noqa: N818  not an error: the way to the next line
    """A statement cannot be read to its end."""


class Parser:
    """Reads one configuration."""

    def __init__(self, macros: Mapping[str, str]) -> None:
        """`macros` win over those of the same names in the files."""
        self._given, self._macros = dict(macros), dict(macros)
        self._used: set[str] = set()
        self._mistakes: list[str] = []
        self._remarks: list[str] = []
        self._vms: list[Vm] = []
        self._switches: list[Switch] = []
        self._options: dict[str, Any] = {}
        self._lexer = Lexer("", "", {}, set())
        self._next = Token("", "", 1)
        self._depth = self._files = 0

    def file(self, path: str) -> VmConf:
        """Return what a file says. Raises ConfigError."""
        self._read(load_text(path), path)
        if self._mistakes:
            raise ConfigError("\n".join(self._mistakes))
        unused = self._macros.keys() - self._used - self._given.keys()
        self._remarks += [f"{path}:1: macro '{name}' not used" for name in sorted(unused)]
        return VmConf(tuple(self._vms), tuple(self._switches), self._options, tuple(self._remarks))

    def _read(self, text: str, path: str) -> None:
        """Read a file's text, from within another one if need be."""
        outer = self._lexer, self._next
        self._lexer = Lexer(text, path, self._macros, self._used)
        self._depth += 1
        self._advance()
        while self._next.kind:
            try:
                self._statement()
                self._end_of_line()
            except Stop:
                self._skip_line()
        self._depth -= 1
        self._lexer, self._next = outer

    # Statements.

    def _statement(self) -> None:
        if self._next.kind == "\n":
            return
        line = self._next.line
        if self._next.kind == "string":
            name = self._string("a macro's name")
            self._expect("=")
            value = self._string("the macro's value")
            if name not in self._given:
                self._macros[name] = value
            return
        word = self._word("include", "local", "socket", "agentx", "staggered", "switch", "vm")
        if word == "include":
            self._include()
        elif word == "switch":
            self._switch(line)
        elif word == "vm":
            self._vm(line)
        else:
            self._option(word)

    def _include(self) -> None:
        path = os.path.join(os.path.dirname(self._lexer.file), self._string("a file name"))
        if self._depth > MAX_INCLUDES:
            self._fail(f"more than {MAX_INCLUDES} files in files")
        self._files += 1
        if self._files > MAX_FILES:
            self._fail(f"more than {MAX_FILES} files")
        try:
            text = load_text(path)
        except ConfigError as err:
            self._fail(str(err))
        self._read(text, path)

    def _option(self, word: str) -> None:
        if word == "local":
            if self._word("inet6", "prefix") == "inet6":
                self._options["inet6"] = self._string("a prefix") if self._has("prefix") else ""
            else:
                self._options["prefix"] = self._prefix()
        elif word == "socket":
            self._word("owner")
            self._options["socket"] = self._owner()
        elif word == "agentx":
            self._options["agentx"] = ""
            while self._next.text in ("context", "path") and self._next.kind == "word":
                self._word("context", "path")
                self._string("a name")
        else:
            self._word("start")
            self._word("parallel")
            parallel = self._number("a number of VMs")
            self._word("delay")
            self._options["stagger"] = parallel, self._number("a number of seconds")

    def _prefix(self) -> str:
        prefix = self._string("a prefix")
        if self._next.kind == "/":
            self._advance()
            prefix += f"/{self._number('a prefix length')}"
        return prefix

    def _switch(self, line: int) -> None:
        name = self._string("a switch's name")
        if any(other.name == name for other in self._switches):
            self._fail(f"switch '{name}' is there already")
        found: dict[str, Any] = {}
        self._block("a switch", lambda: self._switch_option(found))
        if "interface" not in found:
            self._note(line, f"switch '{name}' is missing interface")
        self._switches.append(Switch(name, line, **found))

    def _switch_option(self, found: dict[str, Any]) -> None:
        word = self._keyword()
        if word in ("enable", "disable"):
            found["enable"] = word == "enable"
        elif word in ("up", "down"):
            found["up"] = word == "up"
        elif word == "group":
            found["group"] = self._string("a group")
        elif word == "interface":
            found["interface"] = self._string("an interface")
        elif word == "locked":
            self._word("lladdr")
            found["locked"] = True
        elif word == "rdomain":
            found["rdomain"] = self._number("a routing domain")
        else:
            self._fail(f"'{word}' says nothing about a switch")
        self._line_end()

    def _vm(self, line: int) -> None:
        name, parent = self._string("a VM's name"), ""
        if self._has("instance"):
            parent, name = name, self._string("the instance's name")
        if any(other.name == name for other in self._vms):
            self._fail(f"vm '{name}' is there already")
        found: dict[str, Any] = {}
        self._block("a vm", lambda: self._vm_option(found))
        for several in ("disks", "interfaces"):
            found[several] = tuple(found.get(several, ()))
        self._vms.append(Vm(name, line, parent, **found))

    def _vm_option(self, found: dict[str, Any]) -> None:
        word = self._keyword()
        if word in ("enable", "disable"):
            found["enable"] = word == "enable"
        elif word == "disk":
            path = self._string("a disk")
            kind = self._string("raw or qcow2") if self._has("format") else ""
            if kind not in ("", "raw", "qcow2"):
                self._fail(f"unrecognized disk format '{kind}'")
            found.setdefault("disks", []).append((path, kind))
        elif word == "local":
            self._word("interface")
            found.setdefault("interfaces", []).append(self._interface(local=True))
        elif word == "interface":
            found.setdefault("interfaces", []).append(self._interface(local=False))
        elif word == "boot" and self._has("device"):
            self._once(found, "device", self._word("cdrom", "disk", "net"))
        elif word == "boot":
            self._once(found, "boot", self._string("a kernel or firmware"))
        elif word == "cdrom":
            self._once(found, "cdrom", self._string("an image"))
        elif word == "interfaces":
            self._once(found, "nr_interfaces", self._number("a number of interfaces"))
        elif word == "memory":
            size = self._next.kind == "number" and str(self._number("a size"))
            self._once(found, "memory", size or self._string("a size"))
        elif word == "owner":
            self._once(found, "owner", self._owner())
        elif word in ("sev", "seves"):
            found["sev"] = True
        elif word == "allow":
            self._word("instance")
            self._allow(found)
        else:
            self._fail(f"'{word}' says nothing about a vm")
        self._line_end()

    def _interface(self, *, local: bool) -> Interface:
        found: dict[str, Any] = {"local": local}
        if self._next.kind == "string":
            found["tap"] = self._string("an interface")
        if self._next.kind == "{":
            self._block("an interface", lambda: self._interface_option(found))
        else:
            while self._next.kind in ("word", ","):
                if self._next.kind == ",":
                    self._advance()
                self._interface_option(found)
        return Interface(**found)

    def _interface_option(self, found: dict[str, Any]) -> None:
        word = self._word("switch", "group", "locked", "lladdr", "rdomain", "up", "down")
        if word in ("switch", "group"):
            found[word] = self._string(f"a {word}")
        elif word == "rdomain":
            found["rdomain"] = self._number("a routing domain")
        elif word in ("up", "down"):
            found["up"] = word == "up"
        else:
            if word == "locked":
                self._word("lladdr")
                found["locked"] = True
            if self._next.kind == "string":
                found["lladdr"] = self._string("an address")

    def _allow(self, found: dict[str, Any]) -> None:
        found.setdefault("allow", ())
        if self._next.kind == "{":
            self._block("allow instance", lambda: self._permission(found))
        else:
            self._permission(found)

    def _permission(self, found: dict[str, Any]) -> None:
        word = self._word(*PERMISSIONS, "owner")
        if word == "owner":
            found["allow_owner"] = self._owner()
        elif word not in found["allow"]:
            found["allow"] += (word,)

    def _owner(self) -> str:
        return self._string("an owner")

    # Words.

    def _block(self, what: str, statement: Callable[[], None]) -> None:
        """Read statements in braces; one that cannot be read does not hide the others."""
        self._expect("{")
        while True:
            while self._next.kind in ("\n", ","):
                self._advance()
            if self._next.kind == "}":
                self._advance()
                return
            if not self._next.kind:
                self._fail(f"{what} whose {{ is not closed")
            try:
                statement()
            except Stop:
                self._skip_line(inside=True)

    def _line_end(self) -> None:
        """Check that a statement in braces is at its end."""
        if self._next.kind not in ("\n", "}"):
            self._unexpected("the end of the line")

    def _keyword(self) -> str:
        return self._word(*KEYWORDS)

    def _once(self, found: dict[str, Any], key: str, value: Any) -> None:
        if key in found:
            self._fail(f"{key.replace('nr_', '').replace('device', 'boot device')} twice")
        found[key] = value

    def _has(self, word: str) -> bool:
        """Take a keyword if it is next."""
        there = self._next.kind == "word" and self._next.text == word
        if there:
            self._advance()
        return there

    def _word(self, *words: str) -> str:
        if self._next.kind != "word" or self._next.text not in words:
            self._unexpected("a keyword" if len(words) > 10 else " or ".join(words))
        word = self._next.text
        self._advance()
        return word

    def _string(self, what: str) -> str:
        """Take a string; those beside each other are one."""
        if self._next.kind not in ("string", "number"):
            self._unexpected(what)
        text = ""
        while self._next.kind == "string" or (self._next.kind == "number" and not text):
            text += self._next.text
            self._advance()
        return text

    def _number(self, what: str) -> int:
        if self._next.kind != "number" or len(self._next.text) > 18:
            self._unexpected(what)
        value = int(self._next.text)
        if value < 0:
            self._fail(f"{value} is no number for {what}")
        self._advance()
        return value

    def _expect(self, kind: str) -> None:
        if self._next.kind != kind:
            self._unexpected(f"'{kind}'")
        self._advance()

    def _end_of_line(self) -> None:
        if self._next.kind not in ("\n", ""):
            self._unexpected("the end of the line")
        self._advance()

    def _advance(self) -> None:
        try:
            self._next = self._lexer.next()
        except ValueError as err:
            self._note(self._lexer.line, str(err))
            self._next = Token("bad", "", self._lexer.line)  # nothing expects it

    def _skip_line(self, *, inside: bool = False) -> None:
        """Go on after the next line's end, or inside braces before the closing one."""
        while self._next.kind not in ("\n", "") and not (inside and self._next.kind == "}"):
            self._advance()
        if self._next.kind == "\n" and not inside:
            self._advance()

    def _unexpected(self, expected: str) -> NoReturn:
        if self._next.kind == "bad":  # which has been told
            raise Stop
        self._fail(f"syntax error: expected {expected} (got {self._next.text[:40]!r})")

    def _fail(self, text: str) -> NoReturn:
        self._note(self._next.line, text)
        raise Stop

    def _note(self, line: int, text: str) -> None:
        self._mistakes.append(f"{self._lexer.file}:{line}: {text}")
        if len(self._mistakes) >= MAX_MISTAKES:
            raise ConfigError("\n".join(self._mistakes))


def read(path: str, macros: Mapping[str, str] | None = None) -> VmConf:
    """Return what the file at `path` says; `macros` win over those in it. Raises ConfigError."""
    return Parser(macros or {}).file(path)
