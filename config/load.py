"""vm.yaml → Config. The only module that imports yaml.

YAML is read as events, not as Python values: an event still has its position, its tag as written
and its text as written, and nothing is built from a hostile file before the limits are checked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import yaml

from config.decode import Decoder
from config.kinds import quoted
from config.model import Config
from config.nodes import Mapping, Report, Scalar, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from config.nodes import Node

MAX_FILE: Final = 1 << 20  # bytes
MAX_DEPTH: Final = 20  # nested lists and mappings; the deepest key of ours is at 5
MAX_NODES: Final = 20_000  # after aliases are replaced by what they stand for

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is 8 times as fast


def load_file(path: str) -> Config:
    """Return what the file at `path` says. Relative paths in it start at its own directory.

    Raises ConfigError with a line `file:line:column: key.path: text` for every mistake in it,
    or one such line if it cannot be read at all.
    """
    report = Report(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        report.fatal(1, 1, f"cannot read it: {getattr(err, 'strerror', None) or err}")
    return load_bytes(data, path)


def load_bytes(data: bytes, name: str) -> Config:
    """Return what the bytes of a file say; see load_text()."""
    report = Report(name)
    if len(data) > MAX_FILE:
        report.fatal(1, 1, f"larger than {MAX_FILE} bytes: not a vm.yaml")
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        line, column = _place(data[: err.start].decode())
        report.fatal(line, column, f"not UTF-8 text (byte {data[err.start]:#04x}): a binary file?")
    return load_text(text, name)


def load_text(text: str, name: str) -> Config:
    """Return what `text` says; `name` is its file name, for messages and for relative paths.

    A file for a single VM may leave out its name if the file's name without ending is a valid one.
    Raises ConfigError as load_file() does.
    """
    report = Report(name)
    _check_text(text, report)
    root = _compose(text.removeprefix("\ufeff"), report)
    directory = os.path.realpath(os.path.dirname(name))
    stem = os.path.splitext(os.path.basename(name))[0]
    file = Decoder(report, directory).file(root, stem)
    report.check()
    return Config(file.vms, report.warnings(), file.staggered_start)


def _check_text(text: str, report: Report) -> None:
    """Refuse what no YAML parser needs to see."""
    if len(text) > MAX_FILE:
        report.fatal(1, 1, f"larger than {MAX_FILE} characters: not a vm.yaml")
    nul = text.find("\0")
    if nul >= 0:
        report.fatal(*_place(text[:nul]), "a NUL character: a binary file?")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        report.fatal(*_place(text[: err.start]), "not valid Unicode")


def _compose(text: str, report: Report) -> Node:
    """Return the tree of the only document in `text`."""
    events: Any = yaml.parse(text, Loader=_LOADER)
    try:
        return _Composer(events, report).document()
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        context = f" {err.context}" if err.context else ""
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        row = text.split("\n")[line - 1 : line]
        tab = any(part[column - 1 : column] == "\t" for part in row)
        hint = " (indent with spaces, not tabs)" if tab else ""
        report.fatal(line, column, f"YAML syntax error{context}: {err.problem}{hint}")
    except yaml.reader.ReaderError:
        at = next((i for i, char in enumerate(text) if not _is_yaml(char)), 0)
        report.fatal(*_place(text[:at]), f"the character {text[at : at + 1]!r} is not allowed")
    except (yaml.YAMLError, ValueError, OverflowError) as err:
        # The parser in Python lets chr() and int() complain about escapes and directives.
        report.fatal(1, 1, f"YAML syntax error: {' '.join(str(err).split())}")
    finally:
        events.close()


class _Composer:
    """Builds nodes from parser events, within the limits."""

    def __init__(self, events: Iterator[yaml.Event], report: Report) -> None:
        self._events = events
        self._report = report
        self._anchors: dict[str, tuple[Node, int]] = {}  # with the number of nodes in it
        self._nodes = 0

    def document(self) -> Node:
        """Return the root node; an empty document gives an empty Scalar."""
        root: Node = Scalar(1, 1, "")
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                root = self._node(next(self._events), 0)
                break
        next(self._events, None)  # the document's end
        after = next(self._events, None)
        if isinstance(after, yaml.DocumentStartEvent):
            self._report.fatal(*_mark(after), "a second document: one file holds one")
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        line, column = _mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._nodes
        self._count(1, line, column)
        if depth > MAX_DEPTH:
            self._report.fatal(line, column, f"nested deeper than {MAX_DEPTH} levels")
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(line, column, event.value, quoted=bool(event.style))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Sequence(line, column, tuple(self._children(depth)))
        else:
            flat = list(self._children(depth))
            node = Mapping(line, column, tuple(zip(flat[::2], flat[1::2], strict=True)))
        self._properties(event, node, self._nodes - before)
        return node

    def _children(self, depth: int) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                return
            yield self._node(event, depth + 1)

    def _properties(self, event: Any, node: Node, size: int) -> None:
        """Refuse a tag, remember an anchor: only now, so that no node can contain itself."""
        if event.tag is not None:
            text = f"the tag {quoted(event.tag)}: tags are not supported, leave it out"
            self._report.error(node.line, node.column, "", text)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, size)

    def _alias(self, event: Any) -> Node:
        line, column = _mark(event)
        if (anchored := self._anchors.get(event.anchor)) is None:
            text = f"the alias {quoted(event.anchor)} has no anchor before it"
            self._report.fatal(line, column, text)
        node, size = anchored
        self._count(size, line, column)
        return node

    def _count(self, nodes: int, line: int, column: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            text = f"more than {MAX_NODES} values, counting each use of an alias"
            self._report.fatal(line, column, text)


def _mark(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _place(before: str) -> tuple[int, int]:
    """Return the line and column of the character after `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _is_yaml(char: str) -> bool:
    """Tell whether YAML 1.1 §5.1 allows `char` in a file."""
    code = ord(char)
    if code < 0xA0:
        return char in "\t\n\r\x85" or 0x20 <= code < 0x7F
    return code not in (0xFFFE, 0xFFFF)
