"""Model → vm.yaml: what a file would say to mean a configuration that is given as plain data.

The inverse of config.decode, along the same tables. What is left at its default is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.keys import VM
from config.kinds import Bool, Int
from config.model import PortConfig
from config.netkinds import Port
from config.tables import Key, ListOf, MapOf, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

_MISSING: Final = object()
_RESOLVED: Final = "instance"  # what it stood for is in the other keys


def plain(value: Any) -> Any:
    """Return a configuration as what JSON can hold."""
    if hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def spell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping of vm.yaml for a VM, given what plain() makes of its VmConfig.

    Raises KeyError, TypeError, ValueError or AttributeError if that is something else.
    """
    return _table(VM, {key: value for key, value in config.items() if key != _RESOLVED})


def _table(table: Table, record: Mapping[str, Any]) -> dict[str, Any]:
    spellings = table.spellings()
    found = {}
    for key in map(spellings.__getitem__, table.names()):
        value = record.get(key.field, _MISSING)
        if value is not _MISSING and value != _default(table, key):
            found[key.name] = _value(key.kind, value)
    return found


def _default(table: Table, key: Key) -> Any:
    return plain(table.make._field_defaults.get(key.field, _MISSING))


def _value(kind: Any, value: Any) -> Any:
    if isinstance(kind, Table):
        return False if kind.switch and not value[kind.switch] else _table(kind, value)
    if isinstance(kind, ListOf):
        return [_value(kind.item, item) for item in value]
    if isinstance(kind, MapOf):
        items = {item["name"]: _table(kind.item, item) for item in value}
        for item in items.values():
            item.pop("name", None)
        return items
    if isinstance(kind, Port):
        return kind.show(PortConfig(**value))
    if isinstance(kind, (Bool, Int)):
        return value
    word: str = kind.show(value)
    return word
