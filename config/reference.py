"""docs/vm-yaml.md: the manual of vm.yaml, its tables derived from config.keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from config.keys import FILE, NOT_SHARED, VM
from config.tables import NOT_BUILT, Key, ListOf, MapOf, PartOf, Table

if TYPE_CHECKING:
    from collections.abc import Iterable

_INTRODUCTION: Final = """\
# vm.yaml

<!-- Generated: PYVMD_UPDATE_GOLDEN=1 pytest tests/unit/test_config_docs.py -->

A file describes one VM, its keys at top level:

```yaml
name: web
vcpus: 2
memory: 512M
boot:
  kernel: vmlinuz
  initrd: initrd.img
  cmdline: console=ttyS0
```

or several, by name:

```yaml
vms:
  web: {memory: 512M, boot: {kernel: vmlinuz}}
  db: {memory: 2G, boot: {kernel: vmlinuz}}
```

What they have in common is written once: `defaults:` holds for all of them, and a VM with
`instance: web` is made like `web`, which may be nothing but a template (`enable: no`):

```yaml
defaults: {boot: {kernel: vmlinuz}, memory: 1G}
staggered-start: {parallel: 2, delay: 10s}
vms:
  web: {enable: no, vcpus: 2, allow: [disk, memory]}
  web1: {instance: web, disks: [{path: web1.img, format: raw}]}
  web2: {instance: web, disks: [{path: web2.img, format: raw}], memory: 2G}
```

## Rules

- **Paths** that are relative start at the directory that holds the file. `~` is not expanded.
- **Sizes** are `512M`, `2G`, `1.5GiB`: K, M, G, T in powers of 1024, in either case. `MB` is
  refused, since it may mean 1000 or 1024; a number without unit is bytes.
- **Types come from the key**, never from YAML's guess: `no`, `0755`, `22:22` and a bare MAC address
  are text where text is due, quoted or not. `true`, `yes`, `on` mean the same.
- **Keys that begin with `x-`** are yours: notes, anchors to reuse, data for other programs.
- **Anchors and aliases** work. Merge keys (`<<`), tags (`!!int`), a second document, a repeated key
  and an unknown key are refused.
- **Limits**: 1 MiB of UTF-8 text, 20 levels, 20000 values counting every use of an alias.

All mistakes are told at once, one per line, in a form that editors and compilers' tools can follow:

```
vm.yaml:2:1: memmory: unknown key (did you mean 'memory'?)
vm.yaml:3:8: vcpus: expected an integer from 1 to 32 (got '99')
```

The exit status is 2 then. `pyvmctl schema` prints the JSON Schema; an editor with a YAML language
server uses it when the first line of the file is `# yaml-language-server: $schema=FILE`.
"""

# vm.conf(5) keyword → its place here, or why there is none.
_VM_CONF: Final = (
    ("`vm NAME`", "`name:`, or a key below `vms:`"),
    ("`enable`, `disable`", "`enable: true`, `enable: false`"),
    ("`memory SIZE`", "`memory`; never rounded: a size that does not fit is refused"),
    ("`boot PATH`", "`boot.kernel` for a kernel, `boot.firmware` for firmware"),
    (
        "`boot device WORD`",
        "`boot.order: [WORD]`; the VM comes back after the guest's reset all the same",
    ),
    ("`owner`", "`owner`"),
    ("`disk PATH format`", "`disks`, a list; the format must be given"),
    ("`cdrom PATH`", "`cdrom`"),
    ("`interface`, `interfaces N`", "`interfaces`, a list; a count alone has no place here"),
    ("`switch`, `lladdr`, `locked`, `up`, `down`", "the same words in `interfaces`; `up: no`"),
    ("`local`", "`local: true`; not beside `switch`, since a Linux bridge takes every frame"),
    ("`group`", "`group`, a number: Linux has no named groups"),
    ("`rdomain`", "none: a VRF is set up with the bridge, or with a tap that is there before"),
    ("`switch NAME`, `interface bridge0`", "`switches`, `bridge: br0`"),
    ("`vm PARENT instance CHILD`", "`CHILD: {instance: PARENT}` below `vms:`"),
    ("`allow instance`", "`allow`; not `owner`: an instance is started with its starter's rights"),
    ("`staggered start`", "`staggered-start`"),
    ("`local prefix`, `local inet6`", "`local-prefix`, `local-inet6`, best below `defaults:`"),
    ("`sev`, `seves`", "none: encrypted guests are not supported"),
    ("`socket owner`", "none: no daemon, so no common socket; each VM has its `owner`"),
    ("`agentx`", "none: there is no SNMP agent"),
    ("`include`, macros", "none: anchors repeat parts of a file"),
)


def markdown() -> str:
    """Return the whole manual page."""
    unbuilt = [
        (f"`{name.removeprefix('vm.').removeprefix('file.')}`", what)
        for name, what in NOT_BUILT.items()
    ]
    parts = [_INTRODUCTION, *_sections("Keys of a VM", "", VM)]
    parts += _sections("Keys of a file of several VMs", "", FILE)
    if unbuilt:
        text = "These are refused in this version, with a message that says so."
        parts.append(_grid("Not built yet", text, ("Key", "What it will be"), unbuilt))
    text = "Keywords of OpenBSD's vm.conf(5), and what stands for them here."
    parts.append(_grid("Coming from vm.conf", text, ("vm.conf", "vm.yaml"), _VM_CONF))
    return "\n".join(parts)


def _sections(title: str, path: str, table: Table) -> list[str]:
    """Return a table's section, then those of the tables below it."""
    keys = [table.spellings()[name] for name in table.names()]
    rows = [_row(table, key) for key in keys]
    found = [_grid(title, "", ("Key", "Value", "If left out", "Meaning"), rows)]
    for key in keys:
        if key.below:
            if isinstance(key.kind, (MapOf, PartOf)) and key.below is VM:
                continue  # shown already
            here = f"{path}{key.name}{'[]' if isinstance(key.kind, ListOf) else ''}"
            found += _sections(f"Keys of `{here}`", f"{here}.", key.below)
    return found


def _row(table: Table, key: Key) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (key.name, *key.aliases))
    alone = [name for name in table.one_of if name in table.names()] == [key.name]
    required = alone or (table.required(key) and not key.absent)
    notes = [key.help]
    if key.needs:
        notes.append(f"Needs `{key.needs}`.")
    if key.excludes in table.names():
        notes.append(f"Not beside `{key.excludes}`.")
    return names, _kind(key), "required" if required else table.default(key), " ".join(notes)


def _kind(key: Key) -> str:
    """Return what a key's value looks like."""
    if isinstance(key.kind, PartOf):
        return "a mapping with any keys of a VM but " + ", ".join(
            f"`{name}`" for name in NOT_SHARED
        )
    if isinstance(key.kind, MapOf):
        return f"a mapping of names to {key.kind.what}"
    if isinstance(key.kind, Table):
        return "a mapping, see below" + ", or `false`" * bool(key.kind.switch)
    if not isinstance(key.kind, ListOf):
        return key.kind.expects()
    item = key.kind.item
    what = "mappings, see below" if isinstance(item, Table) else f"each {item.expects()}"
    return f"a list of at most {key.kind.most}: {what}"


def _grid(title: str, text: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    grid = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([f"## {title}", "", *([text, ""] if text else []), *grid, ""])
