"""JSON Schema (draft 2020-12) of vm.yaml, derived from the tables of config.keys.

For editors: a file that the schema accepts can still be refused by the decoder, which also looks
at duplicate keys, at lengths in bytes and at values that must fit each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.keys import FILE, NOT_SHARED, VM
from config.kinds import Bool
from config.tables import IGNORED_PREFIX, NAME, Key, ListOf, MapOf, PartOf, Table

if TYPE_CHECKING:
    from config.kinds import Kind


def json_schema() -> dict[str, Any]:
    """Return the schema of a whole file: many VMs below `vms`, or the keys of a single one."""
    parts = {table.name: _object(table) for table in _tables_below(FILE) if table is not VM}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vm.yaml of pyvmd",
        "type": "object",
        "if": {"required": ["vms"]},
        "then": _object(FILE),
        "else": {"$ref": "#/$defs/single-vm"},
        "$defs": {"single-vm": _object(VM, "instance"), "vm": _part(VM, "name"), **parts},
    }


def _tables_below(table: Table) -> list[Table]:
    found = []
    for key in table.spellings().values():
        if key.below:
            found += [key.below, *_tables_below(key.below)]
    return found


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping that allows these properties and the user's own keys, no others."""
    return {
        "type": "object",
        "properties": properties,
        "patternProperties": {f"^{IGNORED_PREFIX}": True},
        "additionalProperties": False,
    }


def _part(table: Table, *omit: str) -> dict[str, Any]:
    """Return a mapping in which nothing must be given, since it may come from somewhere else."""
    form = _object(table, *omit)
    for rule in ("required", "anyOf", "dependentRequired"):
        form.pop(rule, None)
    return form


def _object(table: Table, *omit: str) -> dict[str, Any]:
    spellings = {word: key for word, key in table.spellings().items() if key.name not in omit}
    form = _closed({word: _property(table, word, key) for word, key in spellings.items()})
    # A single VM takes its name from the file's, so `name` is never required.
    required = [key.name for key in spellings.values() if table.required(key) and key.kind != NAME]
    one_of = [name for name in table.one_of if name in spellings]
    if len(one_of) == 1:
        required += one_of
    elif one_of:
        form["anyOf"] = [{"required": [name]} for name in one_of]
    if required:
        form["required"] = required
    if needs := {word: [key.needs] for word, key in spellings.items() if key.needs in spellings}:
        form["dependentRequired"] = needs
    pairs = [(word, key.name) for word, key in spellings.items() if word != key.name]
    pairs += [(word, key.excludes) for word, key in spellings.items() if key.excludes in spellings]
    if pairs:
        form["allOf"] = [{"not": {"required": list(pair)}} for pair in pairs]
    return form


def _property(table: Table, word: str, key: Key) -> dict[str, Any]:
    default = table.default(key)
    tail = f" Default: {default}." if default and key.name not in table.one_of else ""
    text = key.help + tail if word == key.name else f"Another word for {key.name}."
    return {**_value(key.kind), "description": text}


def _value(kind: Kind | ListOf | MapOf | PartOf | Table) -> dict[str, Any]:
    if isinstance(kind, MapOf):
        return {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": f"^{NAME.pattern}$"},
            "additionalProperties": _value(kind.item),
        }
    if isinstance(kind, PartOf):
        return _part(kind.item, *NOT_SHARED)
    if isinstance(kind, Table):
        form: dict[str, Any] = {"$ref": f"#/$defs/{kind.name}"}
        return {"anyOf": [form, Bool().json_schema()]} if kind.switch else form
    if isinstance(kind, ListOf):
        form = {"type": "array", "maxItems": kind.most, "items": _value(kind.item)}
        return form | ({"uniqueItems": True} if kind.unique else {})
    return kind.json_schema()
