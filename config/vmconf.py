"""vm.conf(5), the configuration of OpenBSD's vmd: what it says, in its own words.

vm.conf ─► vmconflex ─► vmconfparse ─► VmConf ─► vmconfyaml ─► vm.yaml
"""

# No `from __future__ import annotations` here: see config.model.
from collections.abc import Mapping
from typing import Any, NamedTuple


class Interface(NamedTuple):
    """`interface`."""

    tap: str = ""
    local: bool = False
    switch: str = ""
    group: str = ""
    lladdr: str = ""
    locked: bool = False
    rdomain: int | None = None
    up: bool = True


class Switch(NamedTuple):
    """`switch`."""

    name: str
    line: int
    enable: bool = True
    interface: str = ""
    group: str = ""
    locked: bool = False
    rdomain: int | None = None
    up: bool = True


class Vm(NamedTuple):
    """`vm`."""

    name: str
    line: int
    parent: str = ""
    enable: bool = True
    disks: tuple[tuple[str, str], ...] = ()  # path and format, "" where none is given
    interfaces: tuple[Interface, ...] = ()
    nr_interfaces: int = 0
    boot: str = ""
    device: str = ""
    cdrom: str = ""
    memory: str = ""  # as written
    owner: str = ""
    sev: bool = False
    allow: tuple[str, ...] | None = None
    allow_owner: str = ""


class VmConf(NamedTuple):
    """A whole configuration."""

    vms: tuple[Vm, ...]
    switches: tuple[Switch, ...]
    options: Mapping[
        str, Any
    ]  # "stagger": (parallel, delay), "prefix", "inet6", "socket", "agentx"
    remarks: tuple[str, ...]  # file:line: text
