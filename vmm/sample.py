"""What a VM uses at one moment, and from two such moments, how much per second.

The VM process says how often its vCPUs have exited and what its devices have carried; CPU time and
memory of processes are the kernel's own word. A VM process may have been taken over by its guest,
so each value is checked before it is used.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import NoSuchVmError, PyvmError
from vmm.qmpclient import GoneError, QmpClient
from vmm.rundir import CONTROL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.survey import VmInfo

ANSWER_SECONDS: Final = 3.0
MAX_ROWS: Final = 256  # devices of a VM, reasons of exits, counters of a device
_HERTZ: Final = os.sysconf("SC_CLK_TCK")
_WORD: Final = 64  # characters of a name


class DeviceSample(NamedTuple):
    """One device."""

    name: str
    up: bool  # whether a process serves it
    cpu: float  # seconds of CPU time
    resident: int  # bytes, without the guest RAM that it has touched
    counters: dict[str, int]  # "rx_bytes": all since its start
    lives: int = 1  # how many processes it has had


class Sample(NamedTuple):
    """One VM."""

    name: str
    state: str  # one of survey.STATES; "unknown" if it does not answer
    at: float  # CLOCK_MONOTONIC
    cpu: float  # seconds of CPU time of the VM process, its vCPUs included
    memory: int  # bytes of guest RAM
    resident: int  # bytes of it in use
    process: int  # bytes that the VM process has beside it
    spawner: int  # and the spawner
    resets: int
    exits: dict[str, int]  # by KVM's name for the reason
    devices: dict[str, DeviceSample]

    @property
    def answers(self) -> bool:
        """Whether the VM process has said something; otherwise what it would have said is 0."""
        return self.state != "unknown"


def take(info: VmInfo) -> Sample:
    """Look at a running VM, also at one that does not answer. Raises NoSuchVmError if it ends."""
    facts: dict[str, Any] = {}
    try:
        with QmpClient(f"{info.path}/{CONTROL}", ANSWER_SECONDS) as control:
            said = control.call("x-pyvmd-info")
            facts = said if isinstance(said, dict) else {}
    except (NoSuchVmError, GoneError):
        raise
    except PyvmError:
        pass  # it hangs, or its user is not this one
    devices = facts.get("devices")
    rows = devices if isinstance(devices, list) else []
    cpu, process = _process(info.pid)
    return Sample(
        name=info.name,
        state=info.state_word(facts),
        at=time.monotonic(),
        cpu=cpu,
        memory=_number(facts.get("memory")),
        resident=_number(facts.get("memory_resident")),
        process=process,
        spawner=_process(_number(facts.get("spawner")))[1],
        resets=_number(facts.get("resets")),
        exits=_numbers(facts.get("exits")),
        devices={device.name: device for device in _devices(rows)},
    )


def take_all(infos: list[VmInfo]) -> list[Sample]:
    """Look at those of some VMs that still run."""
    samples = []
    for info in infos:
        try:
            samples.append(take(info))
        except PyvmError:
            continue
    return samples


def per_second(before: Sample | None, now: Sample) -> dict[str, Any]:
    """Return what `stats --json` says of a VM; rates since `before`, over its life if that is None.

    CPU is in percent of one CPU.
    """
    if before is None or now.at <= before.at:
        before, seconds = None, 0.0
    else:
        seconds = now.at - before.at

    def rate(new: float, old: float) -> float | None:
        return round(max(new - old, 0) / seconds, 3) if seconds else None

    def percent(new: float, old: float) -> float | None:
        value = rate(new * 100, old * 100)
        return None if value is None else round(value, 1)

    old_devices: Mapping[str, DeviceSample] = before.devices if before else {}
    devices = []
    for device in now.devices.values():
        old = old_devices.get(device.name)
        counters = old.counters if old else {}
        devices.append(
            {
                "name": device.name,
                "up": device.up,
                "lives": device.lives,
                "cpu_percent": percent(device.cpu, old.cpu) if old else None,
                "cpu_seconds": device.cpu,
                "resident": device.resident,
                "counters": device.counters,
                "per_second": {
                    name: rate(value, counters.get(name, 0))
                    for name, value in device.counters.items()
                }
                if old
                else {},
            }
        )
    total = sum(now.exits.values())
    return {
        "name": now.name,
        "state": now.state,
        "cpu_percent": percent(now.cpu, before.cpu) if before else None,
        "cpu_seconds": now.cpu,
        "memory": now.memory,
        "memory_resident": now.resident,
        "resident": now.process,
        "spawner_resident": now.spawner,
        "resets": now.resets,
        "exits": now.exits,
        "exits_per_second": rate(total, sum(before.exits.values())) if before else None,
        "devices": devices,
    }


def _devices(rows: list[Any]) -> Iterator[DeviceSample]:
    """Yield every device, and behind it the processes that serve queue pairs of it."""
    for row in rows[:MAX_ROWS]:
        device = _device(row)
        if device is None:
            continue
        yield device
        pairs = row.get("pairs")
        for pair in pairs[:MAX_ROWS] if isinstance(pairs, list) else ():
            if (process := _device(pair)) is not None:
                yield process


def _device(row: Any) -> DeviceSample | None:
    name = _text(row.get("name")) if isinstance(row, dict) else ""
    if not name:
        return None
    pid = _number(row.get("pid"))
    cpu, resident = _process(pid)
    counters: dict[str, int] = {}
    said = row.get("counters")
    for way, value in list(said.items())[:MAX_ROWS] if isinstance(said, dict) else ():
        if isinstance(value, dict):
            counters.update(
                {f"{way}_{word}": n for word, n in _numbers(value).items() if _text(way)}
            )
        elif _text(way) and type(value) is int:
            counters[way] = _number(value)
    return DeviceSample(name, pid > 0, cpu, resident, counters, _number(row.get("lives")))


def _process(pid: int) -> tuple[float, int]:
    """Return CPU seconds and resident bytes of a process, zeroes if there is none.

    Without what it has mapped of shared memory, which is guest RAM.
    """
    if not pid:
        return 0.0, 0
    try:
        with open(f"/proc/{pid}/stat") as file:
            # "4711 (comm, with anything) S 1 ...": fields 14 and 15 (proc(5))
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/status") as file:
            rows = [line.split() for line in file if line.startswith(("RssAnon:", "RssFile:"))]
        resident = sum(int(row[1]) << 10 for row in rows)  # "RssAnon:  1234 kB"
        return (int(fields[11]) + int(fields[12])) / _HERTZ, resident
    except (OSError, ValueError, IndexError):
        return 0.0, 0


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def _numbers(value: Any) -> dict[str, int]:
    rows = list(value.items())[:MAX_ROWS] if isinstance(value, dict) else []
    return {
        word: number
        for word, number in rows
        if _text(word) and type(number) is int and 0 <= number < 1 << 63
    }


def _text(value: Any) -> str:
    """Return a short word of harmless characters, else nothing."""
    good = isinstance(value, str) and 0 < len(value) <= _WORD and value.isprintable()
    return value if good and value.isascii() and '"' not in value and "\\" not in value else ""
