"""Prometheus' text format (version 0.0.4) of what VMs use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from vmm.survey import STATES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmm.sample import Sample
    from vmm.survey import VmInfo

# name, type, help
_FAMILIES: Final = (
    ("pyvmd_vm_state", "gauge", "1 for the state that the VM is in."),
    ("pyvmd_vm_memory_bytes", "gauge", "Guest RAM."),
    ("pyvmd_vm_memory_resident_bytes", "gauge", "Guest RAM in use."),
    ("pyvmd_vm_process_resident_bytes", "gauge", "Memory of the VM's own processes, without RAM."),
    ("pyvmd_vm_cpu_seconds_total", "counter", "CPU time of the VM process and its vCPUs."),
    ("pyvmd_vm_resets_total", "counter", "Resets of the guest."),
    ("pyvmd_vm_exits_total", "counter", "vCPU exits to the VM process, by KVM's reason."),
    ("pyvmd_device_up", "gauge", "Whether a process serves the device."),
    ("pyvmd_device_processes_total", "counter", "How many processes the device has had."),
    ("pyvmd_device_cpu_seconds_total", "counter", "CPU time of the device process."),
    ("pyvmd_device_resident_bytes", "gauge", "Memory of the device process, without guest RAM."),
    ("pyvmd_device_events_total", "counter", "What the device has counted, by its own names."),
)

_Rows = dict[str, list[tuple[dict[str, str], float]]]


def families(infos: Iterable[VmInfo], samples: Mapping[str, Sample]) -> list[dict[str, Any]]:
    """Return metrics of VMs, for JSON; `samples` has those that run."""
    rows: _Rows = {name: [] for name, _, _ in _FAMILIES}
    for info in infos:
        sample = samples.get(info.name)
        now = sample.state if sample else info.state
        for state in STATES:
            _add(rows, "pyvmd_vm_state", int(now == state), vm=info.name, state=state)
        if sample is not None and sample.answers:
            _vm(rows, sample)
    return [
        {
            "name": name,
            "type": kind,
            "help": what,
            "metrics": [{"labels": labels, "value": value} for labels, value in rows[name]],
        }
        for name, kind, what in _FAMILIES
        if rows[name]
    ]


def text(infos: Iterable[VmInfo], samples: Mapping[str, Sample]) -> str:
    """Return the same in Prometheus' format."""
    lines = []
    for family in families(infos, samples):
        name = family["name"]
        lines += [f"# HELP {name} {family['help']}", f"# TYPE {name} {family['type']}"]
        lines += [_line(name, row["labels"], row["value"]) for row in family["metrics"]]
    return "\n".join(lines) + "\n"


def _vm(rows: _Rows, sample: Sample) -> None:
    vm = sample.name
    _add(rows, "pyvmd_vm_memory_bytes", sample.memory, vm=vm)
    _add(rows, "pyvmd_vm_memory_resident_bytes", sample.resident, vm=vm)
    for process, size in (("vm", sample.process), ("spawner", sample.spawner)):
        _add(rows, "pyvmd_vm_process_resident_bytes", size, vm=vm, process=process)
    _add(rows, "pyvmd_vm_cpu_seconds_total", sample.cpu, vm=vm)
    _add(rows, "pyvmd_vm_resets_total", sample.resets, vm=vm)
    for reason, count in sample.exits.items():
        _add(rows, "pyvmd_vm_exits_total", count, vm=vm, reason=reason)
    for device in sample.devices.values():
        labels = {"vm": vm, "device": device.name}
        _add(rows, "pyvmd_device_up", int(device.up), **labels)
        _add(rows, "pyvmd_device_processes_total", device.lives, **labels)
        _add(rows, "pyvmd_device_cpu_seconds_total", device.cpu, **labels)
        _add(rows, "pyvmd_device_resident_bytes", device.resident, **labels)
        # By its word: a name given twice would spoil what all VMs say.
        words = {re.sub(r"[^A-Za-z0-9_]", "_", name): n for name, n in device.counters.items()}
        for word, count in words.items():
            _add(rows, "pyvmd_device_events_total", count, **labels, event=word)


def _add(rows: _Rows, family: str, value: float, **labels: str) -> None:
    rows[family].append((labels, value))


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    words = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{words}}} {f'{value:g}' if value < 1e6 else value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
