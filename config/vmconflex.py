"""The words of vm.conf(5), and how it writes numbers."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from config.errors import ConfigError

MAX_TEXT: Final = 1 << 20  # characters, of a file and of what its macros make of it
MAX_TOKEN: Final = 8096
MAX_EXPANSIONS: Final = 10_000  # of macros, in one file

KEYWORDS: Final = frozenset(
    "add agentx allow boot cdrom context delay device disable disk down enable format group id "  # noqa: SIM905  reads better than a list
    "include inet6 instance interface interfaces lladdr local locked memory net owner parallel "
    "path prefix rdomain sev seves size socket staggered start switch up vm".split()
)
# A backslash before a line's end joins lines, so it is in no word.
_BARE: Final = re.compile(r"[A-Za-z0-9:_/](?:[^\s(){}!=#,\\\"']|\\(?!\n))*")
_NUMBER: Final = re.compile(r"-?[0-9]+(?=[\s),/}=]|\Z)")
_MACRO: Final = re.compile(r"\$([A-Za-z0-9_]+)")


class Token(NamedTuple):
    """One word of the file."""

    kind: str  # "word", "string", "number", "\n", "", or the character itself
    text: str
    line: int


class Lexer:
    """The words of one file."""

    def __init__(self, text: str, file: str, macros: dict[str, str], used: set[str]) -> None:
        self._text, self.file, self._at, self.line = text, file, 0, 1
        self._macros, self._used = macros, used
        self._expansions = self._inside = 0  # how many so far, and the end of the last one's value

    def next(self) -> Token:
        """Return the next word; kind "" at the end. Raises ValueError."""
        text = self._text
        while self._at < len(text):
            char = text[self._at]
            if text.startswith("\\\n", self._at):
                self._skip(2)
            elif char in " \t\r":
                self._skip(1)
            elif char == "#":
                end = self._at
                while end < len(text) and (text[end] != "\n" or text[end - 1] == "\\"):
                    end += 1
                self._skip(end - self._at)
            elif char == "$":
                text = self._expand()
            else:
                return self._token(char)
        return Token("", "the end of the file", self.line)

    def _token(self, char: str) -> Token:
        line = self.line
        if char in "\"'":
            return Token("string", self._quoted(char), line)
        for kind, rule in (("number", _NUMBER), ("word", _BARE)):
            if found := rule.match(self._text, self._at):
                if len(found[0]) > MAX_TOKEN:
                    raise ValueError(f"a word of more than {MAX_TOKEN} characters")
                self._skip(len(found[0]))
                word = kind == "word" and found[0] not in KEYWORDS
                return Token("string" if word else kind, found[0], line)
        self._skip(1)
        return Token(char, "the end of the line" if char == "\n" else char, line)

    def _quoted(self, quote: str) -> str:
        text, parts, at = self._text, [], self._at + 1
        while at < len(text) and text[at] != quote:
            if text[at] == "\\" and text[at + 1 : at + 2] in (quote, " ", "\t"):
                at += 1
            elif text[at] == "\\" and text[at + 1 : at + 2] == "\n":
                at += 2
                continue
            elif text[at] == "\n":
                at += 1
                continue
            parts.append(text[at])
            at += 1
        if at >= len(text):
            self._skip(at - self._at)
            raise ValueError("a quote that is not closed")
        self._skip(at + 1 - self._at)
        if len(parts) > MAX_TOKEN:
            raise ValueError(f"a string of more than {MAX_TOKEN} characters")
        return "".join(parts)

    def _expand(self) -> str:
        """Put a macro's value where its name stands; it is read as if it had been written there."""
        found = _MACRO.match(self._text, self._at)
        if found is None or self._at < self._inside:
            self._skip(1)
            raise ValueError("a $ without a name" if found is None else "a macro in a macro")
        name = found[1]
        self._at = found.end()
        if name not in self._macros:
            raise ValueError(f"macro '{name}' not defined")
        self._used.add(name)
        self._expansions += 1
        if self._expansions > MAX_EXPANSIONS:
            raise ConfigError(f"{self.file}:{self.line}: more than {MAX_EXPANSIONS} macros used")
        self._text = self._macros[name] + self._text[self._at :]
        self._at, self._inside = 0, len(self._macros[name])
        return self._text

    def _skip(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count


def scan_scaled(text: str) -> int:
    """Return the bytes that "512M", "1.5g" or "100" stands for. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*)(?:\.([0-9]+))?\s*([BKMGTPEbkmgtpe]?)[Bb]?\s*", text)
    if not found or not (found[1] or found[2]) or len(text) > 32:
        raise ValueError(f"'{text[:40]}' is not a size")
    shift = 10 * "BKMGTPE".index((found[3] or "B").upper())
    fraction = found[2] or ""
    scale: int = 10 ** len(fraction)
    return (int((found[1] or "0") + fraction) << shift) // scale


def load_text(path: str) -> str:
    """Return a file's text. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT + 1)
        text = data.decode()
    except OSError as err:
        raise ConfigError(f"{path}:1: cannot read it: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}:1: not UTF-8 text") from err
    if len(data) > MAX_TEXT or "\0" in text:
        raise ConfigError(f"{path}:1: not a vm.conf")
    return text
