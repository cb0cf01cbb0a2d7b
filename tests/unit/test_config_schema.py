"""The tables of vm.yaml, and the JSON Schema derived from them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import yaml

from config.errors import ConfigError
from config.keys import VM
from config.load import load_text
from config.schema import json_schema
from config.tables import NOT_BUILT, Table

if TYPE_CHECKING:
    from collections.abc import Iterator

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
}
KEYWORDS = {
    *("$schema", "$defs", "title", "description", "$ref", "if", "then", "else", "allOf", "anyOf"),
    *("not", "type", "enum", "minimum", "maximum", "multipleOf", "pattern", "minLength"),
    *("maxLength", "items", "maxItems", "uniqueItems", "required", "dependentRequired"),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "minProperties"),
}


class Yaml12(yaml.SafeLoader):
    """Reads scalars as an editor does: YAML 1.2, where yes is a word and 22:22 is text."""


Yaml12.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?[0-9]+$") if tag.endswith(":int") else rule)
        for tag, rule in rules
        if tag.split(":")[-1] in ("int", "null") or (tag.endswith(":bool") and first in "tTfF")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@pytest.fixture
def _all_built() -> Iterator[None]:
    with patch.dict(NOT_BUILT, clear=True):
        yield


def tables(table: Table = VM) -> list[Table]:
    """Return a table and all below it."""
    return [table, *(below for key in table.keys if key.below for below in tables(key.below))]


def accepts(schema: Any, value: Any, root: dict[str, Any]) -> bool:
    """Validate by the keywords of JSON Schema 2020-12 that our schema uses, and no others."""
    if isinstance(schema, bool):
        return schema
    assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS

    def sub(part: Any, inner: Any = value) -> bool:
        return accepts(part, inner, root)

    if "$ref" in schema and not sub(root["$defs"][schema["$ref"].removeprefix("#/$defs/")]):
        return False
    if "if" in schema and not sub(schema["then"] if sub(schema["if"]) else schema["else"]):
        return False
    if not all(sub(part) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(sub(part) for part in schema["anyOf"]):
        return False
    if "not" in schema and sub(schema["not"]):
        return False
    return _accepts_value(schema, value) and (
        _accepts_object(schema, value, root)
        if isinstance(value, dict)
        else not isinstance(value, list)
        or (
            len(value) <= schema.get("maxItems", 1000)
            and not (schema.get("uniqueItems") and len(set(value)) < len(value))
            and all(sub(schema.get("items", True), item) for item in value)
        )
    )


def _accepts_value(schema: dict[str, Any], value: Any) -> bool:
    names = schema.get("type", [])
    types = tuple(t for name in ([names] if isinstance(names, str) else names) for t in TYPES[name])
    # Python's True is an int, and equals 1; JSON's is neither.
    if types and (not isinstance(value, types) or isinstance(value, bool)):
        return False
    if "enum" in schema and (value, type(value)) not in [(v, type(v)) for v in schema["enum"]]:
        return False
    if isinstance(value, str):
        return bool(
            re.search(schema.get("pattern", ""), value)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
        )
    if isinstance(value, int) and not isinstance(value, bool):
        inside = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        return bool(inside and value % schema.get("multipleOf", 1) == 0)
    return True


def _accepts_object(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> bool:
    if not set(schema.get("required", ())) <= set(value):
        return False
    for word, needs in schema.get("dependentRequired", {}).items():
        if word in value and not set(needs) <= set(value):
            return False
    for word, inner in value.items():
        if not accepts(schema.get("propertyNames", True), word, root):
            return False
        parts = [schema["properties"][word]] if word in schema.get("properties", {}) else []
        patterns = schema.get("patternProperties", {}).items()
        parts += [part for pattern, part in patterns if re.search(pattern, word)]
        parts = parts or [schema.get("additionalProperties", True)]
        if not all(accepts(part, inner, root) for part in parts):
            return False
    least: int = schema.get("minProperties", 0)
    return len(value) >= least


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_a_table_matches_its_record(table: Table) -> None:
    """Every key has a field and every field a key; what a key refers to is a key beside it."""
    fields = sorted(set(table.make._fields) - {table.switch})
    assert sorted(key.field for key in table.keys) == fields
    names = {key.name for key in table.keys}
    for key in table.keys:
        assert {key.needs, key.excludes} <= names | {""}
        assert key.help.endswith(".")
    assert set(table.one_of) <= names


@pytest.mark.usefixtures("_all_built")
@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_every_default_can_be_written(table: Table) -> None:
    """The default that the manual shows is accepted and gives the same value."""
    shown = 0
    for key in table.keys:
        default = table.default(key)
        if default and not key.absent and default != "none":
            kind: Any = key.kind
            assert kind.read(default) == table.make._field_defaults[key.field]
            shown += 1
    assert shown or table.name in ("boot", "rng", "limits", "vhost-device")


AGREED = [
    "boot: {kernel: /k}",
    "name: web\ncpus: 2\nmemory: 512M\nboot: {kernel: k, initrd: i, cmdline: a=b}\nx-a: [b]",
    "memory: 1073741824\nboot: {kernel: k}",
    "memory: 1.5 GiB\nboot: {kernel: k}",
    "debug: {console: yes, exit: false}\nenable: off\nowner: 1000\nboot: {kernel: 12}",
    "owner: :wheel\nboot: {kernel: k}",
    "vms: {web: {boot: {kernel: k}}, x-ray: {boot: {kernel: k, x-why: 1}}}\nx-b: 1",
    # refused by both
    "memory: 1G",
    "boot: {}",
    "boot: k",
    "boot: {kernel: }",
    "boot: {kernel: ''}",
    "boot: {initrd: i}",
    "boot: {kernel: k}\nzzz: 1",
    "boot: {kernel: k}\ncpus: 1\nvcpus: 1",
    "boot: {kernel: k}\nvcpus: 33",
    "boot: {kernel: k}\nvcpus: two",
    "boot: {kernel: k}\nmemory: 512",
    "boot: {kernel: k}\nmemory: 1048577",
    "boot: {kernel: k}\nmemory: 512MX",
    "boot: {kernel: k}\nenable: 1",
    "boot: {kernel: k}\nname: 7up",
    "boot: {kernel: k}\nowner: a b",
    "boot: {kernel: k}\ndebug: [console]",
    "vms: {}",
    "vms: {7up: {boot: {kernel: k}}}",
    "vms: {web: {name: web, boot: {kernel: k}}}",
    "vms: {web: {boot: {kernel: k}}}\nvcpus: 1",
    # keys of devices to come: accepted by both once they are built, refused by both until then
    "boot: {firmware: seabios, order: [cdrom, disk]}",
    "boot: {kernel: k, firmware: seabios}",
    "boot: {kernel: k, order: [disk]}",
    "boot: {firmware: seabios, order: [disk, disk]}",
    "boot: {firmware: seabios, initrd: i}",
    "boot: {kernel: k}\ndisks: [{path: a, format: raw, block-size: 4096, serial: 0123, queues: 2}]",
    "boot: {kernel: k}\ndisks: [{path: a}]",
    "boot: {kernel: k}\ndisks: {path: a, format: raw}",
    "boot: {kernel: k}\ndisks: [{path: a, format: raw, cache: writethrough}]",
    "boot: {kernel: k}\nrng: {rate: 1M/s}\njail: off\npacked: true\ntransitional: no",
    "boot: {kernel: k}\nrng: {rate: 1M}",
    "boot: {kernel: k}\njail: maybe",
    "boot: {kernel: k}\nvmmci: false",
    "boot: {kernel: k}\nvmmci: 3",
    "boot: {kernel: k}\nvmmci: {ack-timeout: 3s, shutdown-timeout: 120}",
    "boot: {kernel: k}\nvmmci: {ack-timeout: 3 s}",
    "boot: {kernel: k}\nvmmci: {ack-timeout: 0}",
]


@pytest.mark.parametrize("built", [False, True], ids=["now", "all-built"])
@pytest.mark.parametrize("text", AGREED)
def test_the_schema_agrees_with_the_decoder(text: str, *, built: bool) -> None:
    """An editor marks what `pyvmctl start` refuses, and nothing that it accepts."""
    with patch.dict(NOT_BUILT, clear=built):
        schema = json_schema()
        try:
            load_text(text, "web.yaml")
            good = True
        except ConfigError:
            good = False
        assert accepts(schema, yaml.load(text, Yaml12), schema) is good  # noqa: S506 - a SafeLoader


def test_the_agreement_has_both_sides() -> None:
    """The list above holds files that are right and files that are wrong."""
    good = 0
    for text in AGREED:
        try:
            load_text(text, "web.yaml")
            good += 1
        except ConfigError:
            pass
    assert 5 <= good <= len(AGREED) - 20
