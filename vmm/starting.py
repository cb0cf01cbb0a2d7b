"""Starting VMs of a file: which ones, a few at a time, and what is said about it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from config.errors import PyvmError
from vmm import daemon, runroot
from vmm.table import say_json, tell
from vmm.usage import UsageError, complain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from config.model import Config, StaggerConfig, VmConfig


def chosen(config: Config, names: Sequence[str], file: str) -> list[VmConfig]:
    """Return the VMs to start, in the file's order: those named, or else those enabled.

    Raises UsageError.
    """
    known = {vm.name: vm for vm in config.vms}
    for name in names:
        if name not in known:
            raise UsageError(f"no VM '{name}' in {file}", hint=f"there are: {', '.join(known)}")
    vms = [vm for vm in config.vms if vm.name in names or (vm.enable and not names)]
    if not vms:
        hint = f"name the one to start: {', '.join(known)}"
        raise UsageError(f"no VM in {file} is enabled", hint=hint)
    return vms


def start_all(
    vms: Sequence[VmConfig], stagger: StaggerConfig | None, *, quiet: bool
) -> tuple[list[daemon.Started], PyvmError | None]:
    """Start VMs a few at a time; return those that run, and why the last of the others does not.

    One that fails does not keep the others from starting. As many are started together as
    `stagger` says, or as there are CPUs; only with `stagger` is there a pause between groups. With
    `quiet` nothing is said about those that run.
    """
    started, failure = [], None
    together = (stagger.parallel if stagger else 0) or os.cpu_count() or 1
    for first in range(0, len(vms), together):
        if stagger and first:
            time.sleep(stagger.delay)
        group = vms[first : first + together]
        for vm in group if len(group) > 1 else ():
            runroot.vm_id(vm.name)  # in the file's order, not in that of a race
        for result in daemon.start_together(group):
            if isinstance(result, PyvmError):
                failure = result
                if len(vms) > 1:
                    complain(result)
            else:
                started.append(result)
                if not quiet:
                    _tell(result)
    return started, failure


def announce(started: Sequence[daemon.Started], *, json: bool, many: bool = False) -> None:
    """Say which VMs run now."""
    if not json:
        for vm in started:
            _tell(vm)
        return
    facts = [
        {
            "id": vm.id,
            "name": vm.name,
            "pid": vm.pid,
            "control": f"{runroot.root()}/{vm.name}/control.sock",
            "console": f"{runroot.root()}/{vm.name}/console.sock",
        }
        for vm in started
    ]
    say_json(facts if many else facts[0])


def _tell(vm: daemon.Started) -> None:
    tell(f"started vm {vm.id} successfully: {vm.name}, pid {vm.pid}")
