"""What really confines each process of a VM: read from /proc, where the kernel says it.

    VM process ─┬─ web/spawn ─┬─ web/viornd
                │             └─ web/vioblk0

Nothing here asks the processes, which a guest may have taken over. /proc hides some of a process
from other users than root: then a fact is None, or follows from what can be read (`_spaces`,
`_root`). Landlock shows nowhere in /proc; what a process says of it in its log when it starts,
after it has tried, is all there is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from vmm.owner import user_name
from vmm.table import Column, Paint, say, say_json, table, wants_colour

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from vmm.survey import VmInfo

COLUMNS: Final = (
    Column("PID", 7),
    Column("USER", 8),
    Column("FILTERS", 7),
    Column("NONEWPRIVS", 10),
    Column("CAPS", 10),
    Column("ROOT", 5),
    Column("FDS", 3),
    Column("PROCESS", 14),
    Column("NAMESPACES", 0),
)
STYLES: Final = {
    "FILTERS": {"0": "red"},
    "NONEWPRIVS": {"no": "red"},
    "CAPS": {"none": "green"},
    "ROOT": {"empty": "green"},
}

# Names in /proc/PID/ns, and ours.
NAMESPACES: Final = {
    "user": "user",
    "mnt": "mount",
    "pid": "pid",
    "net": "network",
    "ipc": "ipc",
    "uts": "uts",
    "cgroup": "cgroup",
}
PROCESSES: Final = 256  # of one VM; more are not looked at

_CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_IN_USE: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")
_LIMITS: Final = ("Max processes", "Max open files", "Max core file size", "Max data size")
_TITLE: Final = "pyvmd: "


def show(infos: Sequence[VmInfo], *, json: bool, colour: str, stdout: TextIO) -> None:
    """Print what confines the processes of these VMs."""
    found = [process for info in infos if info.alive for process in processes(info)]
    if json:
        say_json(found)
        return
    rows = [_row(process) for process in found]
    say(table(COLUMNS, rows, Paint(wants_colour(colour, stdout)), STYLES))
    if any("?" in cell for row in rows for cell in row):
        say("\n?: only root can read this")


def processes(info: VmInfo) -> Iterator[dict[str, Any]]:
    """Yield the facts of every process of a VM, parents first; who ends meanwhile is left out."""
    children = _children()
    waiting = [info.pid]
    for _ in range(PROCESSES):
        if not waiting:
            return
        pid = waiting.pop(0)
        found = facts(pid)
        if found is not None:
            name = info.name if pid == info.pid else _title(pid)
            yield {"process": name, **found}
        waiting += sorted(children.get(pid, []))


def facts(pid: int) -> dict[str, Any] | None:
    """Return what the kernel says of one process, None if it is gone.

    Facts that this user may not read are None; for namespaces, which of them are not ours.
    """
    status = _status(pid)
    if not status:
        return None
    return {
        "pid": pid,
        "uid": int(status["Uid"].split()[0]),
        "seccomp_filters": _filters(status),
        "no_new_privs": status.get("NoNewPrivs") == "1" if "NoNewPrivs" in status else None,
        "capabilities": {name: int(status.get(name, "0"), 16) for name in _CAPABILITY_SETS},
        "namespaces": _spaces(pid, status),
        "root_empty": _root(pid),
        "descriptors": _descriptors(pid),
        "limits": _limits(pid),
    }


def _status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status by name; {} if the process is gone, or as good as."""
    lines = (line.partition(":") for line in _read(pid, "status").splitlines())
    found = {name: text.strip() for name, _, text in lines}
    return {} if found.get("State", "Z")[0] in "ZX" else found


def _filters(status: dict[str, str]) -> int | None:
    """How many filters decide about system calls."""
    if status.get("Seccomp") == "0":
        return 0
    count = status.get("Seccomp_filters")  # Linux 5.9
    return int(count) if count is not None else None


def _spaces(pid: int, status: dict[str, str]) -> dict[str, bool | None]:
    """Which namespaces are others than ours; None where it cannot be seen."""
    found: dict[str, bool | None] = {}
    for file, name in NAMESPACES.items():
        try:
            theirs = os.stat(f"/proc/{pid}/ns/{file}").st_ino
            found[name] = theirs != os.stat(f"/proc/self/ns/{file}").st_ino
        except OSError:
            found[name] = None
    # What shows from outside, too: a second process id, another map of users, other mounts.
    if found["pid"] is None and len(status.get("NSpid", "").split()) > 1:
        found["pid"] = True
    for name, file in (("user", "uid_map"), ("mount", "mountinfo")):
        if found[name] is None and _read(pid, file) != _read("self", file):
            found[name] = True
    return found


def _root(pid: int) -> bool | None:
    """Whether there is nothing at all beneath the root of a process."""
    try:
        return not os.listdir(f"/proc/{pid}/root")
    except OSError:
        pass
    mounts = _read(pid, "mountinfo").splitlines()
    if not mounts:
        return None
    # One mount, of a file system that has room for its own root and nothing else.
    options = mounts[0].rpartition(" ")[2].split(",")
    if len(mounts) == 1 and "nr_inodes=1" in options:
        return True
    return False if len(mounts) > 1 else None


def _descriptors(pid: int) -> int | None:
    """How many descriptors are open."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        pass
    try:
        return os.stat(f"/proc/{pid}/fd").st_size or None  # a count since Linux 6.2
    except OSError:
        return None


def _limits(pid: int) -> dict[str, int | None]:
    """The hard limits that a jail sets; None is no limit."""
    found: dict[str, int | None] = {}
    for line in _read(pid, "limits").splitlines():
        for name in _LIMITS:
            if line.startswith(name):
                hard = line[len(name) :].split()[1]
                found[name[4:]] = int(hard) if hard.isdecimal() else None
    return found


def _children() -> dict[int, list[int]]:
    """Every process of the host by its parent."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            # The fields after the command's name, which may hold anything: state, parent...
            fields = _read(int(name), "stat").rpartition(")")[2].split()
            if len(fields) > 1:
                found.setdefault(int(fields[1]), []).append(int(name))
    return found


def _title(pid: int) -> str:
    """How a process calls itself."""
    words = _read(pid, "cmdline").replace("\0", " ").strip()
    return words.removeprefix(_TITLE) if words.startswith(_TITLE) else f"process {pid}"


def _read(pid: int | str, name: str) -> str:
    """A file of /proc/PID; "" if it cannot be read."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""


def _row(process: dict[str, Any]) -> list[str]:
    def known(value: object) -> str:
        return "?" if value is None else str(value)

    held = 0
    for name in _IN_USE:
        held |= process["capabilities"][name]
    spaces = process["namespaces"]
    others = [
        f"{name}?" if other is None else name
        for name, other in spaces.items()
        if other in (True, None)
    ]
    root = {True: "empty", False: "host", None: "?"}[process["root_empty"]]
    return [
        str(process["pid"]),
        user_name(process["uid"]),
        known(process["seccomp_filters"]),
        {True: "yes", False: "no", None: "?"}[process["no_new_privs"]],
        f"{held:x}" if held else "none",
        root,
        known(process["descriptors"]),
        process["process"],
        " ".join(others) or "-",
    ]
