"""tools/bench density: many tiny VMs on one host.

Starts N VMs of one file by one command, and takes them down again. Each is the hello guest with
4 MiB of RAM and its entropy device: a VM process, a spawner and a device process. Memory is the
processes' proportional set size (smaps_rollup: private pages, and their part of shared ones)
without guest RAM, which is counted in its own column; what the kernel holds for KVM is the
difference that free memory shows beyond that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benches.report import ROOT, save, spread, table

HELLO = ROOT / "config/examples/hello.elf"
RAM = "4M"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="tools/bench density", description=__doc__)
    parser.add_argument("--vms", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--runs", type=int, default=3, help="how often (default: 3)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pyvmd-", dir="/run") as scratch:
        os.environ["PYVMD_RUNTIME_DIR"] = scratch
        runs = [measure(Path(scratch), options.vms) for _ in range(options.runs)]
    figures = {name: spread([run[name] for run in runs]) for name in runs[0]}
    print(f"{options.vms} VMs, {options.runs} runs\n")
    rows = [
        (name, *(f"{values[part]:.1f}" for part in ("median", "min", "max")))
        for name, values in figures.items()
    ]
    print(table(("per VM", "median", "min", "max"), rows))
    print(f"\n{save('density', {'vms': options.vms, **figures})}")
    return 0


def measure(scratch: Path, count: int) -> dict[str, float]:
    """Start `count` VMs, look at them, and end them; milliseconds and KiB per VM."""
    names = "".join(f"  v{number}: {{}}\n" for number in range(count))
    defaults = f"defaults: {{boot: {{kernel: {HELLO}}}, memory: {RAM}}}\n"
    (scratch / "many.yaml").write_text(f"{defaults}vms:\n{names}")
    free = available()
    took = {}
    try:
        took["start, ms"] = pyvmctl("start", str(scratch / "many.yaml"))
        held = free - available()
        pss, ram = memory(scratch)
        for verb in ("pause", "unpause"):
            took[f"{verb}, ms"] = pyvmctl(verb, "-a")
    finally:
        took["stop -f, ms"] = pyvmctl("stop", "-a", "-f")
    sizes = {"processes, KiB": pss, "guest RAM in use, KiB": ram, "host memory, KiB": held}
    return {name: value / count for name, value in {**took, **sizes}.items()}


def pyvmctl(*words: str) -> float:
    """Run one command; return how many milliseconds it took."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "vmm.cli", *words], cwd=ROOT, check=True, stderr=-3)
    return (time.monotonic() - start) * 1000


def memory(scratch: Path) -> tuple[float, float]:
    """Return KiB of all our processes, without guest RAM, and of guest RAM that is in use."""
    status = subprocess.run(
        [sys.executable, "-m", "vmm.cli", "status", "--json"], cwd=ROOT, check=True, stdout=-1
    )
    vms: list[dict[str, Any]] = json.loads(status.stdout)
    ram = sum(vm["memory_resident"] for vm in vms) / 1024
    groups = {os.getpgid(vm["pid"]) for vm in vms}
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.getpgid(int(entry.name)) in groups:
                    rows = (entry / "smaps_rollup").read_text().splitlines()
                    total += next(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
            except OSError:
                continue  # it has ended
    return total - ram, ram


def available() -> float:
    """Return KiB of memory that the host could give."""
    rows = Path("/proc/meminfo").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("MemAvailable:"))
