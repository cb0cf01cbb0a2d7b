"""tools/bench boot: what it costs to boot, beside QEMU's machines on the same host.

Exits to user space until the guest's init has printed its marker, by reason (tracepoint
kvm:kvm_userspace_exit), hardware exits (kvm:kvm_exit) and CPU time of the monitor, for pyvmd and
for QEMU's microvm, pc and q35 with the same kernel, initrd and command line. Where this machine's
KVM cannot run stock kernels that part runs inside tools/kvmhost: counts and ratios hold there,
times do not.

Then, on this machine's own KVM: `pyvmctl start` of the hello guest, from exec to its first
KVM_RUN.
"""

import argparse
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tools.benches.report import ROOT, save, spread, table
from vmm.qmpclient import QmpClient

GUEST = Path(os.environ.get("PYVMD_CACHE", ROOT / ".cache")) / "guest"
KERNEL, INITRD = GUEST / "vmlinuz", GUEST / "initramfs.cpio.gz"
MARKER = b"pyvmd-guest: init"
CMDLINE = "console=ttyS0 panic=-1"
MEMORY = 256  # MiB
TRACEFS = Path("/sys/kernel/tracing")
DEADLINE = 150.0  # seconds for one boot; emulated hosts are slow
# include/uapi/linux/kvm.h
REASONS = {2: "io", 6: "mmio", 5: "hlt", 8: "shutdown", 10: "intr", 26: "ioapic_eoi"}


class Counters:
    """Histograms of two KVM tracepoints, counted by the kernel itself."""

    def __init__(self) -> None:
        self._events = {
            "user": (TRACEFS / "events/kvm/kvm_userspace_exit", "hist:keys=reason"),
            "hardware": (TRACEFS / "events/kvm/kvm_exit", "hist:keys=exit_reason"),
        }
        for event, trigger in self._events.values():
            (event / "trigger").write_text(trigger)

    def read(self) -> dict[str, dict[str, int]]:
        """Return counts by reason, for both tracepoints."""
        row = re.compile(r"reason: *(0x)?([0-9a-f]+) *\} hitcount: *(\d+)")
        counts: dict[str, dict[str, int]] = {}
        for name, (event, _) in self._events.items():
            found = counts[name] = {}
            for base, reason, count in row.findall((event / "hist").read_text()):
                number = int(reason, 16 if base else 10)
                key = REASONS.get(number, str(number)) if name == "user" else str(number)
                found[key] = found.get(key, 0) + int(count)
        return counts

    def close(self) -> None:
        """Stop counting."""
        for event, trigger in self._events.values():
            (event / "trigger").write_text(f"!{trigger}")


def qemu(machine: str) -> list[str]:
    """Return the command line of QEMU with one of its machines and nothing optional."""
    return [
        *("qemu-system-x86_64", "-enable-kvm", "-cpu", "host", "-M", machine),
        *("-m", str(MEMORY), "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-kernel", str(KERNEL), "-initrd", str(INITRD)),
        *("-append", CMDLINE),
    ]


def pyvmctl(environment: dict[str, str], *words: str) -> str:
    """Run one pyvmctl command; return its standard output."""
    command = [sys.executable, "-m", "vmm.cli", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
    ).stdout.decode()


@contextmanager
def run_qemu(machine: str) -> Iterator[tuple[int, int]]:
    """A QEMU that boots the guest: its pid and a descriptor of its serial output."""
    child = subprocess.Popen(qemu(machine), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        yield child.pid, child.stdout.fileno()
    finally:
        child.terminate()
        child.wait()


@contextmanager
def run_pyvmd(scratch: str, environment: dict[str, str]) -> Iterator[tuple[int, int]]:
    """The same with pyvmd: the VM process and a connection to its console."""
    config = Path(scratch, "bench.yaml")
    boot = {"kernel": str(KERNEL), "initrd": str(INITRD), "cmdline": CMDLINE}
    config.write_text(json.dumps({"name": "bench", "memory": f"{MEMORY}M", "boot": boot}))
    started = json.loads(pyvmctl(environment, "start", "--json", str(config)))
    try:
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(started["console"])
            yield started["pid"], console.fileno()
    finally:
        pyvmctl(environment, "stop", "-f", "-w", "bench")


def boot(monitor: AbstractContextManager[tuple[int, int]]) -> dict[str, Any]:
    """Boot once; return the counters at the moment the marker appears."""
    counters = Counters()
    try:
        with monitor as (pid, output):
            seen = b""
            end = time.monotonic() + DEADLINE
            while MARKER not in seen:
                left = end - time.monotonic()
                ready = left > 0 and select.select([output], [], [], left)[0]
                data = os.read(output, 65536) if ready else b""
                if not data:
                    raise SystemExit(f"no marker in {DEADLINE:g} s, but {seen[-300:]!r}")
                seen = seen[-1000:] + data
            return {**counters.read(), "cpu_seconds": cpu_seconds(pid)}
    finally:
        counters.close()


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its living descendants."""
    total = 0.0
    pids = [pid]
    while pids:
        pid = pids.pop()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    return round(total, 2)


def exits(runs: int) -> int:
    """Measure on this host, interleaved; print JSON."""
    machines = ("microvm", "pc", "q35")
    results: dict[str, list[dict[str, Any]]] = {}
    with scratch_runtime() as (scratch, environment):
        for _ in range(runs):
            monitors = {"pyvmd": run_pyvmd(scratch, environment)}
            monitors |= {f"QEMU {machine}": run_qemu(machine) for machine in machines}
            for name, monitor in monitors.items():
                print(f"booting {name}", file=sys.stderr, flush=True)
                results.setdefault(name, []).append(boot(monitor))
    print(json.dumps(results))
    return 0


@contextmanager
def scratch_runtime() -> Iterator[tuple[str, dict[str, str]]]:
    """A directory for one bench, which is also pyvmctl's runtime directory."""
    with tempfile.TemporaryDirectory(prefix="pyvmd-bench-", dir="/run") as scratch:
        yield scratch, {**os.environ, "PYVMD_RUNTIME_DIR": scratch}


def first_run(runs: int) -> list[float]:
    """Return milliseconds from exec of `pyvmctl start` to the first KVM_RUN, per run."""
    hello = ROOT / "config/examples/hello.yaml"
    times = []
    with scratch_runtime() as (_, environment):
        for _ in range(runs):
            begun = time.monotonic()
            started = json.loads(pyvmctl(environment, "start", "--json", str(hello)))
            try:
                with QmpClient(started["control"]) as client:
                    times.append((client.call("x-pyvmd-info")["first_run"] - begun) * 1e3)
            finally:
                pyvmctl(environment, "stop", "-f", "-w", "hello")
    return times


def main(arguments: Sequence[str]) -> int:
    """Run both parts and report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench boot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=3, help="boots of each monitor (default 3)")
    parser.add_argument("--starts", type=int, default=15, help="starts of hello (default 15)")
    parser.add_argument("--exits-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.exits_here:
        return exits(options.runs)
    subprocess.run([ROOT / "tools/guest-image"], check=True, stdout=sys.stderr)
    command = [f"{ROOT}/tools/bench", "boot", "--exits-here", f"--runs={options.runs}"]
    if subprocess.run([sys.executable, "-m", "vmm.probe"], cwd=ROOT, check=False).returncode:
        print("this KVM cannot run stock kernels: counting inside tools/kvmhost", file=sys.stderr)
        command = [f"{ROOT}/tools/kvmhost", *command]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    results = json.loads(output[output.index("{") :])
    starts = spread(first_run(options.starts))
    path = save("boot", {"exits": results, "first_run_ms": starts})
    print(report(results))
    print(
        f"\npyvmctl start to first KVM_RUN: {starts['median']:.0f} ms "
        f"({starts['min']:.0f}–{starts['max']:.0f}, {starts['runs']} runs)"
    )
    print(f"figures: {path}")
    return 0


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of medians."""

    def median(name: str, pick: Any) -> float:
        return spread([pick(run) for run in results[name]])["median"]

    rows = []
    ours = median("pyvmd", lambda run: sum(run["user"].values()))
    for name in results:
        total = median(name, lambda run: sum(run["user"].values()))
        io = median(name, lambda run: run["user"].get("io", 0))
        hardware = median(name, lambda run: sum(run["hardware"].values()))
        cpu = median(name, lambda run: run["cpu_seconds"])
        ratio = f"{ours / total:.2f}"
        rows.append([name, f"{total:.0f}", f"{io:.0f}", ratio, f"{hardware:.0f}", f"{cpu:.1f}"])
    head = ["until init", "exits to user", "of them I/O", "pyvmd ÷ it", "hardware exits", "CPU s"]
    return table(head, rows)
