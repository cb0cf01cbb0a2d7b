"""Nodes → model: the walk along the tables of config.keys.

Never stops at a mistake: a value that cannot be read becomes BAD, its neighbours are still looked
at, and the caller learns from the report.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from config.instances import Items
from config.keys import FILE, NOT_SHARED, VM
from config.kinds import Bool, Path, closest
from config.model import FileConfig
from config.netkeys import SWITCH
from config.nodes import BAD, Mapping, Scalar, Sequence, describe, join
from config.tables import IGNORED_PREFIX, NAME, NOT_BUILT, ListOf, MapOf, PartOf, Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Mapping as Dict

    from config.kinds import Kind
    from config.nodes import Node, Report

_FIXED: Final = {
    "name": "the name stands before the colon already",
    "switches": "belongs to the file: give it beside 'vms'",
    "instance": "there is no other VM in this file: put both below 'vms'",
}


class Decoder:
    """Decodes one file. `directory` is absolute: where relative paths start."""

    def __init__(self, report: Report, directory: str) -> None:
        self._report = report
        self._directory = directory
        self.defaults: dict[str, Any] = {}  # for the VMs of this file

    def file(self, root: Node, stem: str) -> FileConfig:
        """Return what a whole file says; `stem` names a single VM that has no `name:`.

        The result means something only if the report has no errors.
        """
        if isinstance(root, Scalar) and root.nothing:
            self.error(root, "", "the file is empty (a VM needs at least 'boot')")
            return FileConfig(())
        if not isinstance(root, Mapping):
            self.error(root, "", _expected_table(VM, root))
            return FileConfig(())
        if any(isinstance(word, Scalar) and word.text == "vms" for word, _ in root.pairs):
            # What VMs are made with comes first, wherever it stands.
            pairs = sorted(root.pairs, key=_made_before)
            file = self.table(FILE, root._replace(pairs=tuple(pairs)), "", {})
        else:
            vm = self.table(
                VM, root, "", {"name": stem} if _is_name(stem) else {}, fixed=("instance",)
            )
            file = BAD if vm is BAD else FileConfig((vm,))
        return FileConfig(()) if file is BAD else file

    def table(
        self,
        table: Table,
        node: Node,
        path: str,
        preset: Dict[str, object],
        fixed: tuple[str, ...] = (),
    ) -> Any:
        """Return the record that a mapping stands for, or BAD.

        `preset` holds values for keys that are not given; the keys `fixed` may not be given.
        """
        if table.switch and isinstance(node, Scalar) and not node.nothing:
            on = self.scalar(Bool(), node, path)
            return BAD if on is BAD else table.make(**{table.switch: on})
        if not isinstance(node, Mapping):
            self.error(node, path, _expected_table(table, node))
            return BAD
        spellings = table.spellings()
        given: dict[str, Scalar] = {}  # the key's own name → where it stands
        values: dict[str, Any] = dict(preset)
        meant: dict[str, Scalar] = {}  # as `given`, for words that were refused
        for word, value in self.pairs(node, path):
            here = join(path, word.text)
            key = spellings.get(word.text)
            if key is None:
                meant[self._unknown(table, word, here)] = word
            elif key.name in fixed:
                self.error(word, here, _FIXED[key.name])
            elif key.name in given:
                self.error(word, here, f"duplicate key: it means the same as {key.name!r}")
            else:
                given[key.name] = word
                values[key.field] = self._value(key.kind, value, here)
        self._presence(table, node, path, meant | given, values)
        if meant or BAD in values.values():
            return BAD
        record = table.make(**values)
        for name, complaint in table.check(record) if table.check else ():
            self.error(given.get(name, node), join(path, name), complaint)
        return record

    def _part(self, table: Table, node: Node, path: str) -> dict[str, Any]:
        """Return the values of a mapping in which nothing need be given."""
        if not isinstance(node, Mapping):
            self.error(node, path, _expected_table(table, node))
            return {}
        spellings = table.spellings()
        values: dict[str, Any] = {}
        for word, value in self.pairs(node, path):
            here = join(path, word.text)
            key = spellings.get(word.text)
            if key is None:
                self._unknown(table, word, here)
            elif key.name in NOT_SHARED:
                self.error(word, here, "cannot be the same for all")
            elif key.field in values:
                self.error(word, here, f"duplicate key: it means the same as {key.name!r}")
            else:
                values[key.field] = self._value(key.kind, value, here)
        return values

    def pairs(
        self, node: Mapping, path: str, prefix: str = IGNORED_PREFIX
    ) -> Iterator[tuple[Scalar, Node]]:
        """Yield the pairs with a usable key, complain about the others.

        Keys with `prefix` are the user's own and skipped; not among VM names, so that a VM may be
        called x-ray.
        """
        first: dict[str, int] = {}
        for word, value in node.pairs:
            if not isinstance(word, Scalar):
                self.error(word, path, f"a key must be a word (got {describe(word)})")
            elif word.text in first:
                line = first[word.text]
                self.error(word, join(path, word.text), f"duplicate key (first on line {line})")
            elif word.text == "<<" and not word.quoted:
                text = "merge keys are not supported: repeat the keys"
                self.error(word, join(path, "<<"), text)
            elif not (prefix and word.text.startswith(prefix)):
                first[word.text] = word.line
                yield word, value

    def _unbuilt(self, table: str, word: Scalar, here: str) -> bool:
        """Complain about a key that is in NOT_BUILT; return False if it is not."""
        if f"{table}.{word.text}" not in NOT_BUILT:
            return False
        self.error(word, here, "not built yet in this version")
        return True

    def _unknown(self, table: Table, word: Scalar, here: str) -> str:
        """Complain about a key that is not in `table`; return the key that was probably meant."""
        if self._unbuilt(table.name, word, here):
            return word.text
        if word.text == here and self._unbuilt("file", word, here):
            return word.text
        if table is VM and word.text in FILE.spellings():
            text = "belongs to a file of several VMs: give it beside 'vms'"
            self.error(word, here, text)
            return word.text
        spellings = table.spellings()
        for name in table.names():
            below = spellings[name].below
            if below and word.text in below.spellings():
                self.error(word, here, f"unknown key (it belongs below {name!r})")
                return name
        likely = closest(word.text, spellings)
        hint = f"did you mean {likely!r}?" if likely else f"allowed: {', '.join(table.names())}"
        self.error(word, here, f"unknown key ({hint})")
        return spellings[likely].name if likely else ""

    def _presence(
        self,
        table: Table,
        node: Mapping,
        path: str,
        given: Dict[str, Scalar],
        values: dict[str, Any],
    ) -> None:
        """Complain about keys that are missing, and about keys that do not go together."""
        spellings = table.spellings()
        missing = []
        for key in table.keys:
            if table.required(key) and key.field not in values:
                values[key.field] = BAD
                if key.name not in given:
                    missing.append(repr(key.name))
        if table.one_of and not any(name in given for name in table.one_of):
            missing.append(" or ".join(repr(name) for name in table.one_of if name in spellings))
        for name in missing:
            self.error(node, path, f"missing key {name}")
        for key in map(spellings.__getitem__, table.names()):
            if (word := given.get(key.name)) is None:
                continue
            here = join(path, word.text)
            if key.needs and key.needs not in given and not missing:
                self.error(word, here, f"needs the key {key.needs!r} beside it")
            if key.excludes in given and key.excludes in spellings:
                self.error(word, here, f"not allowed beside {key.excludes!r}")

    def _value(self, kind: Kind | ListOf | MapOf | PartOf | Table, node: Node, path: str) -> Any:
        if isinstance(kind, Table):
            return self.table(kind, node, path, {})
        if isinstance(kind, ListOf):
            return self._list(kind, node, path)
        if isinstance(kind, MapOf):
            items = Items(self, kind, node, path).all()
            if kind.item is SWITCH:
                self.defaults = {**self.defaults, "switches": items}
            return items
        if isinstance(kind, PartOf):
            self.defaults = self._part(kind.item, node, path)
            return None
        return self.scalar(kind, node, path)

    def _list(self, kind: ListOf, node: Node, path: str) -> Any:
        if not isinstance(node, Sequence):
            self.error(node, path, f"expected a list (got {describe(node)})")
            return BAD
        if len(node.items) > kind.most:
            self.error(node.items[kind.most], path, f"more than {kind.most} items")
            return BAD
        values: list[Any] = []
        for index, item in enumerate(node.items):
            here = f"{path}[{index}]"
            value = self._value(kind.item, item, here)
            if kind.unique and value is not BAD and value in values:
                self.error(item, here, f"{describe(item)} is in the list already")
            values.append(value)
        return BAD if BAD in values else tuple(values)

    def scalar(self, kind: Kind, node: Node, path: str) -> Any:
        """Return what one word means, or BAD."""
        if not isinstance(node, Scalar) or node.nothing:
            self.error(node, path, f"expected {kind.expects()} (got {describe(node)})")
            return BAD
        try:
            value = kind.read(node.text)
        except ValueError as err:
            self.error(node, path, str(err))
            return BAD
        if remark := kind.remark(node.text):
            self._report.warn(node.line, node.column, path, remark)
        if isinstance(kind, Path) and value not in kind.words:
            return self._resolve(str(value))
        return value

    def _resolve(self, name: str) -> str:
        """Return an absolute path.

        Only leading ".." are taken off, from a directory that is free of symbolic links: "a/.."
        need not be "." when a is a link.
        """
        directory = self._directory
        while name.startswith(("../", "./")):
            head, _, name = name.partition("/")
            directory = os.path.dirname(directory) if head == ".." else directory
        return os.path.join(directory, name)

    def error(self, node: Node, path: str, text: str) -> None:
        """Note one mistake."""
        self._report.error(node.line, node.column, path, text)


def _made_before(pair: tuple[Node, Node]) -> int:
    """Order the keys of a file: `defaults`, `switches`, then what is made with them."""
    text = pair[0].text if isinstance(pair[0], Scalar) else ""
    return {"defaults": 0, "switches": 1}.get(text, 2)


def _is_name(text: str) -> bool:
    try:
        NAME.read(text)
    except ValueError:
        return False
    return True


def _expected_table(table: Table, node: Node) -> str:
    names = ", ".join(table.names())
    return f"expected a mapping with keys such as {names} (got {describe(node)})"
