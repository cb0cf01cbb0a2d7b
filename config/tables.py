"""What the tables of vm.yaml's keys are made of: config.keys and config.netkeys fill them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.kinds import Kind, Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IGNORED_PREFIX: Final = "x-"  # such keys are the user's own: notes, anchors, other tools' data

# table.key → what it will be. Refused until then; taking a line out is all that opens the key.
NOT_BUILT: Final[dict[str, str]] = {
    "vm.balloon": "the virtio memory balloon",
}

NAME: Final = Text(
    "a name of at most 63 letters, digits, '.', '-', '_' that starts with a letter",
    63,
    r"[A-Za-z][A-Za-z0-9._-]{0,62}",
)


class Key(NamedTuple):
    """One key of a mapping."""

    name: str
    kind: Kind | ListOf | MapOf | PartOf | Table
    help: str  # one or two sentences for the manual and for editors
    aliases: tuple[str, ...] = ()
    needs: str = ""  # the key that must be there, too
    excludes: str = ""  # the key that must not
    absent: str = ""  # what leaving it out means, where the default's value does not tell

    @property
    def field(self) -> str:
        """Its name in the record."""
        return self.name.replace("-", "_")

    @property
    def below(self) -> Table | None:
        """The table of its value, or of each item of its list; None if it holds scalars."""
        inner = self.kind.item if isinstance(self.kind, (ListOf, MapOf, PartOf)) else self.kind
        return inner if isinstance(inner, Table) else None


class ListOf(NamedTuple):
    """A list of at most `most` items."""

    item: Kind | Table
    most: int
    unique: bool = False


class MapOf(NamedTuple):
    """A mapping of names to items, each with its key as its `name`."""

    item: Table
    what: str  # the items, in the plural


class PartOf(NamedTuple):
    """A mapping with any keys of a table, to be taken where an item does not have its own."""

    item: Table


class Table(NamedTuple):
    """The keys of one kind of mapping, and the record it becomes."""

    name: str
    keys: tuple[Key, ...]
    make: type[Any]  # a NamedTuple class of config.model
    one_of: tuple[str, ...] = ()  # one of these keys must be there
    check: Callable[[Any], Iterator[tuple[str, str]]] | None = None  # record → (key, complaint)
    switch: str = ""  # the field that a bare `true` or `false` in the mapping's place sets

    def spellings(self) -> dict[str, Key]:
        """Return every accepted spelling with its key, without what is not built yet."""
        known: dict[str, Key] = {}
        for key in self.keys:
            if f"{self.name}.{key.name}" not in NOT_BUILT:
                known.update(dict.fromkeys((key.name, *key.aliases), key))
        return known

    def names(self) -> list[str]:
        """Return the keys without their aliases and without what is not built yet."""
        return list(dict.fromkeys(key.name for key in self.spellings().values()))

    def required(self, key: Key) -> bool:
        """Tell whether `key` must be given."""
        return key.field not in self.make._field_defaults

    def default(self, key: Key) -> str:
        """Return what leaving `key` out means, in words for the manual; "" if there are none."""
        if key.absent or self.required(key) or not isinstance(key.kind, Kind):
            return key.absent
        return key.kind.show(self.make._field_defaults[key.field])
