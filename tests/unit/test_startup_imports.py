"""What `pyvmctl start` imports: nothing outside this list, since start-up time is a promise.

One careless import costs more than all of our own code: dataclasses 12 ms, asyncio 34, pyroute2
100. A module joins the list with its cost known and its need clear.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Final

import pytest

from tests.unit.test_import_direction import ALLOWED as DIRECTION
from tests.unit.test_import_direction import within

TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Top-level names of what is not ours.
_COMMAND_LINE: Final = """
    argparse gettext locale re enum types operator functools collections keyword reprlib copyreg
    itertools warnings typing
"""
_VM_YAML: Final = "yaml datetime base64 binascii math"  # the C loader, and what it wishes for
_VM_PROCESS: Final = """
    ctypes errno fcntl grp json mmap pwd select selectors signal socket array struct threading
    contextlib bisect resource
"""
# What carries our messages, 10 ms: multiprocessing.connection, and all that it imports.
_MESSAGES: Final = """
    multiprocessing atexit bz2 fnmatch lzma pickle random shutil subprocess tempfile weakref zlib
"""
_NEARLY_NOTHING: Final = "__future__ cython_runtime encodings"
ALLOWED: Final = frozenset(
    f"{_COMMAND_LINE} {_VM_YAML} {_VM_PROCESS} {_MESSAGES} {_NEARLY_NOTHING}".split(),
)
# What devices.jail is made of; the VM process uses it for itself.
_JAIL: Final = tuple(
    f"devices.{name}"
    for name in ("landlock", "namespaces", "policy", "privileges", "seccomp", "syscalls")
)
# Where the late imports are that every detached start reaches.
START: Final = """
import sys
before = set(sys.modules)
from vmm import cli
status = cli.main(["start", sys.argv[1]])
assert status == 2, status
import json
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(script: str, *arguments: str) -> list[str]:
    """Run a script in a fresh interpreter; the modules it says it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def strangers(names: list[str]) -> list[str]:
    """The modules that have no place in the start path; of ours, the VM process's own rule."""
    return [
        name
        for name in names
        if not within(name, (*DIRECTION["vmm"], *_JAIL))
        and name != "devices"
        and name.partition(".")[0] not in ALLOWED
        and not name.startswith("_")  # the C half of a module that is judged itself
    ]


def test_start_imports_only_what_it_may() -> None:
    """Up to the point where vm.yaml is read, with the whole VM process already imported."""
    names = imported(START, "/nonexistent/vm.yaml")

    assert strangers(names) == []
    assert {"vmm.vm", "vmm.machine", "config.load"} <= set(names)  # it was the real path


def test_a_light_verb_leaves_the_machine_out() -> None:
    """`version` and the like need neither YAML nor KVM."""
    script = START.replace('["start", sys.argv[1]]', '["version"]').replace("== 2", "== 0")
    names = set(imported(script))

    assert not names & {"yaml", "vmm.vm", "vmm.kvm", "vmm.terminal", "config.load"}


@pytest.mark.parametrize(
    "name", ["dataclasses", "asyncio.events", "logging", "pathlib", "devices.vioblk", "pyroute2"]
)
def test_a_stranger_is_noticed(name: str) -> None:
    """The check itself."""
    assert strangers(["vmm.vm", "devices.spec", name]) == [name]
