"""What the decoder works on: vm.yaml as a tree of nodes with positions, and the list of complaints.

Positions count from 1, in lines and characters, as editors do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from config.errors import ConfigError
from config.kinds import quoted

if TYPE_CHECKING:
    from typing import NoReturn

BAD: Final = object()  # stands for a value that was complained about
MAX_ERRORS: Final = 100  # bounds the work of did-you-mean on a file of nothing but mistakes


class Scalar(NamedTuple):
    """A word, number or quoted text, as the characters it stands for."""

    line: int
    column: int
    text: str
    quoted: bool = False

    @property
    def nothing(self) -> bool:
        """True where a value was left out or set to null."""
        return not self.quoted and self.text in ("", "~", "null", "Null", "NULL")


class Sequence(NamedTuple):
    """A list."""

    line: int
    column: int
    items: tuple[Node, ...]


class Mapping(NamedTuple):
    """Keys with values, in the file's order; keys may be of any kind and repeat."""

    line: int
    column: int
    pairs: tuple[tuple[Node, Node], ...]


Node: TypeAlias = Scalar | Sequence | Mapping


def describe(node: Node) -> str:
    """Return what a node is, to be read after "got"."""
    if isinstance(node, Scalar):
        return "nothing" if node.nothing else quoted(node.text)
    return "a list" if isinstance(node, Sequence) else "a mapping"


def join(path: str, word: str) -> str:
    """Return the path of a key; words that would blur it are quoted."""
    plain = word.isprintable() and 0 < len(word) <= 40 and " " not in word
    part = word if plain else quoted(word)
    return f"{path}.{part}" if path else part


class Report:
    """Collects the complaints about one file, so that all of them are told at once."""

    def __init__(self, file: str) -> None:
        self._file = file if file.isprintable() else quoted(file)
        self._errors: list[tuple[int, int, str]] = []
        self._warnings: list[str] = []

    def error(self, line: int, column: int, path: str, text: str) -> None:
        """Note one mistake. Raises ConfigError with all so far once there are too many."""
        self._errors.append((line, column, self._line(line, column, path, text)))
        if len(self._errors) == MAX_ERRORS:
            self.fatal(line, column, f"that makes {MAX_ERRORS} mistakes: any others are not shown")

    def warn(self, line: int, column: int, path: str, text: str) -> None:
        """Note something that works but may not be meant."""
        if len(self._warnings) < MAX_ERRORS:
            self._warnings.append(self._line(line, column, path, text))

    def fatal(self, line: int, column: int, text: str) -> NoReturn:
        """Raise ConfigError: every mistake so far, and last the one that ends the reading."""
        lines = [told for _, _, told in sorted(self._errors)]
        raise ConfigError("\n".join([*lines, self._line(line, column, "", text)]))

    def check(self) -> None:
        """Raise ConfigError, one line per mistake in the file's order, if there are any."""
        if self._errors:
            raise ConfigError("\n".join(told for _, _, told in sorted(self._errors)))

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings so far."""
        return tuple(self._warnings)

    def _line(self, line: int, column: int, path: str, text: str) -> str:
        where = f"{path}: " if path else ""
        return f"{self._file}:{line}:{column}: {where}{text}"
