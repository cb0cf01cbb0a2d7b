"""Fifty VMs of one file: started a few at a time, listed, paused, unpaused, stopped."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.guestvm import pyvmctl
from tests.kvm.lab import GUESTS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(600)]

COUNT: Final = 50
NAMES: Final = [f"v{number:02}" for number in range(COUNT)]


@pytest.fixture
def many(runtime_dir: str) -> Iterator[str]:
    """Return a file with fifty VMs; they end with the test."""
    path = f"{runtime_dir}/many.yaml"
    with open(path, "w") as file:
        boot = f"{{kernel: {GUESTS}/stopping.bin, cmdline: g}}"  # it powers off when it is asked
        file.write(f"defaults: {{boot: {boot}, memory: 4M, vmmci: {{ack-timeout: 60s}}}}\n")
        file.write("staggered-start: {parallel: 10, delay: 0.1s}\nvms:\n")
        file.writelines(f"  {name}: {{}}\n" for name in NAMES)
    yield path
    pyvmctl("stop", "-a", "-f")


def states() -> dict[str, list[dict[str, Any]]]:
    """Return all VMs by their state."""
    found: dict[str, list[dict[str, Any]]] = {}
    for vm in json.loads(pyvmctl("status", "--json").stdout):
        found.setdefault(vm["state"], []).append(vm)
    return found


def alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie that init has not looked at yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_fifty_vms(many: str, runtime_dir: str) -> None:
    """Each is a VM of its own, and all answer; nothing of them is left running."""
    done = pyvmctl("start", "--json", many)
    assert (done.returncode, done.stderr) == (0, "")
    started = json.loads(done.stdout)
    assert sorted(vm["name"] for vm in started) == NAMES
    pids = {vm["pid"] for vm in started}
    assert len(pids) == COUNT

    assert {state: len(vms) for state, vms in states().items()} == {"running": COUNT}
    for verb, state in (("pause", "paused"), ("unpause", "running")):
        done = pyvmctl(verb, "-a")
        assert (done.returncode, len(done.stderr.splitlines())) == (0, COUNT), done.stderr
        assert {state: len(vms) for state, vms in states().items()} == {state: COUNT}

    done = pyvmctl("stop", "-a", "-w")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    asked = "requested to shutdown"
    assert [asked in line for line in lines] == [True] * COUNT + [False] * 2 * COUNT
    assert {state: len(vms) for state, vms in states().items()} == {"stopped": COUNT}
    assert {vm["exit"]["how"] for vm in states()["stopped"]} == {"stop"}
    assert not [pid for pid in pids if alive(pid)]

    assert pyvmctl("forget", "-a").returncode == 0
    assert [name for name in os.listdir(runtime_dir) if name in NAMES] == []
