"""Who may import whom, read from the sources: config ← devices ← vmm, and nothing slow.

The rules keep a device's code out of the process that holds the VM, and start-up short.
"""

from __future__ import annotations

import ast
import os
import sys
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# What each package may import of ours; a package name covers all its modules.
_VMM: Final = (
    "config",
    *(
        f"devices.{name}"
        for name in ("spec", "viodev", "guestmem", "loop", "jail", "lines", "passing", "title")
    ),
    *(
        f"devices.{name}" for name in ("images", "bases", "imageuser", "tun")
    ),  # who opens things: both
    "devices.qcow2head",  # what an image says of its backing file, and nothing that does I/O
    "vmm",
)
ALLOWED: Final = {
    "config": ("config",),
    "devices": ("config", "devices"),
    "vmm": _VMM,
    # In the process it forks, it becomes the spawner.
    "vmm.launch": ("config", "devices", "vmm"),
    # The image tool works, with the devices' own code, on images that no VM has.
    "vmm.imagetool": (
        *_VMM,
        "devices.raw",
        *(f"devices.qcow2{part}" for part in ("", "check", "create")),
    ),
}
YAML_READERS: Final = ("config.load", "config.vmconfyaml")
NETLINK: Final = "vmm.net"  # the helper process that sets interfaces up
SLOW: Final = {  # ms over a bare interpreter; see also test_startup_imports.py
    "asyncio": 34,
    "dataclasses": 12,
    "importlib": 16,
    "logging": 10,
    "pathlib": 8,
    "subprocess": 9,
    "tempfile": 9,
}


def imports(source: str) -> Iterator[str]:
    """Every module that a source file names in an import, late and typing-only ones included.

    `from a import b` gives both a and a.b: which of them is the module, the text does not say.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether `module` is one of `packages` or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def violations(name: str, source: str) -> list[str]:
    """What the module `name` imports against the rules."""
    allowed = ALLOWED.get(name) or ALLOWED[name.partition(".")[0]]
    bad = []
    for module in imports(source):
        top = module.partition(".")[0]
        if not top:
            bad.append(f"{module}: relative imports hide the direction")
        elif top in ALLOWED:
            # `from devices import spec` names "devices" as well: judged by "devices.spec" alone.
            if not within(module, allowed) and module != "devices":
                bad.append(f"{module}: against config ← devices ← vmm")
        elif top == "yaml":
            if not within(name, YAML_READERS):
                bad.append(f"{module}: only {' and '.join(YAML_READERS)} know YAML")
        elif top == "pyroute2":
            if not within(name, (NETLINK,)):
                bad.append(f"{module}: only {NETLINK} may spend the 100 ms")
        elif top in SLOW:
            bad.append(f"{module}: costs {SLOW[top]} ms of start-up")
        elif top not in sys.stdlib_module_names:
            bad.append(f"{module}: no dependency of ours")
    return bad


def modules() -> list[str]:
    """Every module of the three packages, as dotted names."""
    found = []
    for package in ALLOWED:
        for directory, _, files in os.walk(os.path.join(TOP, package)):
            for file in files:
                if file.endswith(".py"):
                    path = os.path.relpath(os.path.join(directory, file), TOP)
                    found.append(path[:-3].replace(os.sep, "."))
    return sorted(found)


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_direction(name: str) -> None:
    """Arrows point one way; of devices, vmm sees only what both sides of the wire share."""
    with open(os.path.join(TOP, name.replace(".", os.sep) + ".py")) as file:
        assert violations(name, file.read()) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("config.model", "from devices.spec import SPECS", "config ←"),
        ("config.model", "import vmm", "config ←"),
        ("devices.vioblk", "def f():\n    from vmm.kvm import Vm", "config ←"),
        ("vmm.vm", "from devices import vioblk", "config ←"),
        ("vmm.vm", "import devices.virtqueue as v", "config ←"),
        ("vmm.vm", "from . import kvm", "relative"),
        ("vmm.vm", "import yaml", "know YAML"),
        ("config.units", "from yaml import parse", "know YAML"),
        ("vmm.launch", "if 1:\n    import pyroute2.iproute", "100 ms"),
        ("devices.tap", "from pyroute2 import IPRoute", "100 ms"),
        ("vmm.vm", "import dataclasses", "12 ms"),
        ("vmm.vm", "from importlib.resources import files", "16 ms"),
        ("vmm.vm", "import requests", "no dependency"),
    ],
)
def test_each_rule_is_noticed(name: str, source: str, complaint: str) -> None:
    """The check itself: one offence, named by its rule."""
    assert complaint in " ".join(violations(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("config.load", "import yaml\nfrom config.model import VmConfig"),
        ("devices.vioblk", "from config.errors import GuestError\nfrom devices import viodev"),
        ("vmm.channel", "from devices import spec, viodev\nfrom devices.guestmem import Region"),
        ("vmm.net", "from pyroute2 import IPRoute"),
        ("vmm.net.switch", "import pyroute2"),
    ],
)
def test_what_is_allowed_passes(name: str, source: str) -> None:
    """The check itself: imports along the arrows are no offence."""
    assert violations(name, source) == []
