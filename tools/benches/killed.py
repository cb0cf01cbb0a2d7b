"""tools/bench killed: how long a guest waits for a device whose process is killed.

Each device is a real one, jailed, plugged in and replaced as in a VM; the driver is this process,
and there is no KVM. A turn: a request that comes back (what it costs when nobody dies), then
SIGKILL and the same request at once, until it comes back; and the same with a register read, as a
vCPU makes it. An interface is killed with a frame to send, vmmci has registers only. Needs root.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tools.benches.report import save, spread, table

SILENCE = 10.0  # seconds
IMAGE = 64 << 20  # bytes
DEVICES = ("viornd", "vioblk raw", "vioblk qcow2", "vionet", "vioscsi", "vmmci")
READY = 0x14  # the register device_status, of whatever interface: what is read does not matter here


def plugged(device: str, directory: Path, parts: ExitStack) -> tuple[Any, Callable[[], None]]:
    """Return a device that is driven, and what makes a request and waits for it."""
    from config.model import DiskConfig, NicConfig, VmmciConfig
    from devices.blkreq import BLK_F_FLUSH, HEADER, T_IN
    from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
    from devices.qcow2create import create
    from tests.pluglab import PlugLab
    from tests.taplab import TapLab
    from tests.vionetlab import SETTINGS, frame_of
    from vmm.net.network import Attached

    ring = F_EVENT_IDX | F_INDIRECT_DESC
    kind, _, form = device.partition(" ")
    cuts: tuple[list[bytes], list[int]] = ([], [64])
    index = 0
    if kind == "vioblk":
        path = directory / f"disk.{form}"
        with path.open("w+b") as image:
            if form == "qcow2":
                create(image.fileno(), IMAGE)
            else:
                image.truncate(IMAGE)
        lab = PlugLab("vioblk0", disks=(DiskConfig(str(path), form),))
        cuts, ring = ([HEADER.pack(T_IN, 0, 0)], [4096, 1]), ring | BLK_F_FLUSH
    elif kind == "vionet":
        tap = parts.enter_context(TapLab(1))
        tap.stop_listening()
        nic = Attached("vionet0", {**SETTINGS, "queues": 1}, {"tap0": tap.fds[0]}, {}, 1)
        network: Any = SimpleNamespace(attached=lambda: [nic])
        lab = PlugLab("vionet0", 3, network, interfaces=(NicConfig(),))
        cuts, index = ([bytes(12), frame_of(60)], []), 1
    elif kind == "vioscsi":
        lab = PlugLab("vioscsi", 3, cdrom="empty")
        cuts, index = ([b"\1" + bytes(50)], [108]), 2  # TEST UNIT READY
    elif kind == "vmmci":
        lab = PlugLab("vmmci", 0, vmmci=VmmciConfig())
    else:
        lab = PlugLab("viornd")
    parts.enter_context(lab)
    if kind == "vmmci":
        return lab, lambda: None
    queue = lab.start(ring)[index]
    request = queue.place(*cuts)

    def ask() -> None:
        queue.submit(request)
        lab.kick(index)
        while not queue.collect():
            if not queue.enable_calls() and not lab.wait_call(index, SILENCE):
                raise SystemExit(f"{device} does not answer: {lab.lost}")

    return lab, ask


def turns(lab: Any, ask: Callable[[], None], count: int) -> Iterator[dict[str, float]]:
    """Kill it again and again; yield how long everything took, in milliseconds."""

    def look() -> None:
        lab.read(READY, 1)

    def took(what: Callable[[], None]) -> float:
        begun = time.perf_counter()
        what()
        return (time.perf_counter() - begun) * 1e3

    for _ in range(count):
        found = {"request": took(ask), "register": took(look)}
        for word, what in (("request, killed", ask), ("register, killed", look)):
            life = lab.kill()
            found[word] = took(what)
            lab.wait_life(0, life)
        yield found


def main(arguments: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench killed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=30, help="kills of each device (default 30)")
    parser.add_argument("--device", choices=DEVICES, action="append", help="default: all")
    options = parser.parse_args(arguments)
    if os.geteuid():
        parser.error("taps, and jails as VMs of root have them, need root")
    from vmm import log

    log.setup()  # nowhere: each process has much to say of its jail
    summary: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for device in options.device or DEVICES:
        print(device, file=sys.stderr, flush=True)
        with ExitStack() as parts:
            directory = Path(parts.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
            lab, ask = plugged(device, directory, parts)
            found = list(turns(lab, ask, options.runs))
        summary[device] = {word: spread([turn[word] for turn in found]) for word in found[0]}
        cells = []
        for word, figures in summary[device].items():
            values = [turn[word] for turn in found]
            high = statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
            known = device != "vmmci" or "register" in word
            cells.append(f"{figures['median']:.2f} ({high:.1f})" if known else "-")
        rows.append([device, *cells])
    words = ("request", "register", "request, killed", "register, killed")
    print(table(["milliseconds, median (95 %)", *words], rows))
    print(f"\nfigures: {save('killed', summary)}")
    return 0
