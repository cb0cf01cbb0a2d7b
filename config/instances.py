"""VMs made from another VM of the same file (vm.conf(5): `vm PARENT instance CHILD`).

An instance has its template's keys, but never its disks: two VMs must not write to one. What it may
change beside those is the template's to say, by `allow`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.keys import VM
from config.kinds import quoted
from config.model import VmConfig
from config.nodes import BAD, Mapping, Scalar, describe, join
from config.tables import NAME, MapOf

if TYPE_CHECKING:
    from collections.abc import Mapping as Dict

    from config.decode import Decoder
    from config.nodes import Node

MAX_TEMPLATES: Final = 16  # in a row
_MAKING: Final = object()  # stands for a VM whose template is being made
_OWN: Final = ("name", "enable", "disks", "instance", "allow")  # never the template's

# A VM's key → the word of `allow` that lets an instance change it. The others are always free.
PERMISSION: Final = {
    "boot": "boot",
    "vcpus": "memory",
    "memory": "memory",
    "interfaces": "interface",
    "disks": "disk",
    "cdrom": "cdrom",
    "allow": "instance",
}


def inherited(template: VmConfig) -> dict[str, Any]:
    """Return the values of an instance that are not given in its own keys."""
    return {name: value for name, value in template._asdict().items() if name not in _OWN}


def refused(template: VmConfig, key: str, before: Any, after: Any) -> str:
    """Return why an instance may not have `after` for `key`, "" if it may.

    A value that is the template's own changes nothing and is always allowed.
    """
    word = PERMISSION.get(key)
    if word is None or template.allow is None or word in template.allow or before == after:
        return ""
    allowed = ", ".join(template.allow) or "nothing"
    return f"{template.name!r} does not let its instances change this (it allows: {allowed})"


class Items:
    """What a mapping of names to mappings becomes."""

    def __init__(self, decoder: Decoder, kind: MapOf, node: Node, path: str) -> None:
        self._decoder, self._kind, self._node, self._path = decoder, kind, node, path
        self._rows: dict[str, tuple[Scalar, Node]] = {}
        self._made: dict[str, Any] = {}

    def all(self) -> Any:
        """Return the records in the file's order, or BAD."""
        node = self._node
        if not isinstance(node, Mapping) or not node.pairs:
            got = "an empty one" if isinstance(node, Mapping) else describe(node)
            text = f"expected a mapping of names to {self._kind.what} (got {got})"
            self._decoder.error(node, self._path, text)
            return BAD
        for word, value in self._decoder.pairs(node, self._path, prefix=""):
            self._rows[word.text] = word, value
        records = tuple(self._record(name) for name in self._rows)
        return BAD if BAD in records else records

    def _record(self, name: str, depth: int = 0) -> Any:
        """Return one record; its template, if it has one, is made before it."""
        if name in self._made:
            return self._made[name]
        word, node = self._rows[name]
        here = join(self._path, word.text)
        preset: Dict[str, Any] = {"name": self._decoder.scalar(NAME, word, here)}
        template: Any = None
        fixed: tuple[str, ...] = ("name",)
        if self._kind.item is VM:
            fixed = ("name", "switches")
            self._made[name] = _MAKING
            template = self._template(node, here, depth)
            if isinstance(template, VmConfig):
                preset = {**inherited(template), **preset}
            elif template is BAD:  # what it would have had is not missing
                preset = {**{key.field: BAD for key in VM.keys if VM.required(key)}, **preset}
            preset = {**self._decoder.defaults, **preset}
        record = self._decoder.table(self._kind.item, node, here, preset, fixed=fixed)
        self._made[name] = record
        if isinstance(template, VmConfig) and isinstance(record, VmConfig):
            self._check(template, record, node, here)
        return record

    def _template(self, node: Node, path: str, depth: int) -> Any:
        """Return what a VM is made from: a VmConfig, None for nothing, or BAD."""
        if (word := _given(node, "instance")) is None:
            return None
        template: Any = BAD
        text = ""
        if word.text not in self._rows:
            text = f"no VM {quoted(word.text)} in this file"
        elif depth == MAX_TEMPLATES:
            text = f"more than {MAX_TEMPLATES} templates in a row"
        elif (template := self._record(word.text, depth + 1)) is _MAKING:
            text, template = "the VM would be made from itself", BAD
        if text:
            self._decoder.error(word, f"{path}.instance", text)
        return template

    def _check(self, template: VmConfig, vm: VmConfig, node: Node, path: str) -> None:
        """Complain about what an instance may not change."""
        spellings = VM.spellings()
        for word, _ in node.pairs if isinstance(node, Mapping) else ():
            if isinstance(word, Scalar) and (key := spellings.get(word.text)) is not None:
                before, after = getattr(template, key.field), getattr(vm, key.field)
                if why := refused(template, key.name, before, after):
                    self._decoder.error(word, join(path, word.text), why)


def _given(node: Node, key: str) -> Scalar | None:
    """Return the value of a key, if it is a word; what else is wrong with it shows later."""
    for word, value in node.pairs if isinstance(node, Mapping) else ():
        if isinstance(word, Scalar) and word.text == key and isinstance(value, Scalar):
            return value
    return None
