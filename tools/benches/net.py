"""tools/bench net: frames per second through one network device, and what one costs it.

The device is a real process, jailed, on a tap in a network namespace of its own; the driver
(tools/viodriver) is this process, and there is no KVM. Beside it, in turn with it, a plain loop
of os.writev or os.readv on the same kind of tap, from and to the same kind of memory: what Python
could do at best. It is a process of its own, too: the frames come from another processor's cache,
and it is woken for each round, as the device is. A round is as many frames as a ring takes, made
available with one kick; its time ends with the last of them, so it is the device's, not the
driver's.

    tx   frames that the host's stack drops behind the tap
    rx   frames that wait in the tap; `whole`: a frame has a buffer, `merged`: 4 KiB buffers

The fraction is the plain loop's CPU time per frame, or time, over the device's. Needs root.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tools.benches.report import ROOT, save, spread, table

SIZES = {"64B": 64, "1514B": 1514, "64K": 65226}
CASES = ("tx", "whole", "merged")
MEMORY = 96 << 20
GSO = 65226  # bytes: the longest TCP segment there is, in 45 pieces
BUFFER = 4096
RING = 256  # buffers


class Case(NamedTuple):
    """One thing to measure."""

    way: str  # of CASES
    size: str  # of SIZES
    code: str  # "device" or "plain"
    ring: str = "indirect"  # or "direct", "packed"

    def __str__(self) -> str:
        return f"{self.way} {self.size} {self.ring}"


def make_frame(size: int) -> tuple[bytes, bytes]:
    """Return a frame and the 10 bytes of header it needs."""
    ends = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2"
    if size < GSO:
        return (ends + b"\x88\xb5").ljust(size, b"x"), bytes(10)
    length = (size - 14).to_bytes(2)
    ip = b"\x45\0" + length + bytes.fromhex("00004000400600000a0000010a000002")
    tcp = bytes.fromhex("000100020000000000000000501003e800000000")
    header = bytes.fromhex("01013600a80522001000")
    return (ends + b"\x08\0" + ip + tcp).ljust(size, b"x"), header


def cpu_of(pid: int) -> Callable[[], float]:
    """Return a clock of the CPU time that a process has used, in seconds."""
    clock = (~pid << 3) | 2  # as clock_getcpuclockid(3) makes it
    return lambda: time.clock_gettime(clock)


class Books:
    """Sums up rounds."""

    def __init__(self, cpu: Callable[[], float]) -> None:
        self._cpu = cpu
        self.frames, self.seconds, self.cpu_seconds = 0, 0.0, 0.0

    def round(self, work: Callable[[], int]) -> None:
        """Run `work`, which returns how many frames it moved."""
        cpu, begun = self._cpu(), time.perf_counter()
        frames = work()
        self.seconds += time.perf_counter() - begun
        self.cpu_seconds += self._cpu() - cpu
        self.frames += frames

    def figures(self, size: int) -> dict[str, float]:
        """Return what a frame took."""
        return {
            "us": self.seconds / self.frames * 1e6,
            "cpu_us": self.cpu_seconds / self.frames * 1e6,
            "gbit_per_s": self.frames * size * 8e-9 / self.seconds,
            "frames_per_s": self.frames / self.seconds,
        }


def depth_of(case: Case) -> int:
    """Return how many frames a round has."""
    size = SIZES[case.size]
    if case.way == "merged":
        return min(RING, RING // -(-(size + 12) // BUFFER))
    return 64 if size == GSO else RING


def plain(case: Case, tap: Any, seconds: float) -> dict[str, float]:
    """Run the loop that everything is compared with, in a child."""
    from tools.viodriver import make_memory

    size, depth = SIZES[case.size], depth_of(case)
    memory = make_memory(MEMORY)
    frame, header = make_frame(size)
    views = [memory.view(i << 17, size + 12) for i in range(depth)]
    fd = tap.fds[0]
    parts = [view[12:] for view in views]
    for part in parts:
        part[:] = frame
    prefix = header + bytes(2)
    iovs = [[view] for view in views]
    if case.way == "merged":
        iovs = [[view[at : at + BUFFER] for at in range(0, len(view), BUFFER)] for view in views]

    def work() -> None:
        if case.way == "tx":
            for part in parts:
                os.writev(fd, [prefix, part])
        else:
            for iov in iovs:
                if os.readv(fd, iov) != size + 12:
                    raise SystemExit("a frame is missing")

    kick, call = os.eventfd(0), os.eventfd(0)
    pid = os.fork()
    if not pid:
        while True:
            os.eventfd_read(kick)
            work()
            os.eventfd_write(call, 1)
    books = Books(cpu_of(pid))

    def one_round() -> int:
        os.eventfd_write(kick, 1)
        os.eventfd_read(call)
        return depth

    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if case.way != "tx":
                for _ in range(depth):
                    tap.send(frame, header)
            books.round(one_round)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return books.figures(size)


def device(case: Case, tap: Any, seconds: float) -> dict[str, float]:
    """Run a device process."""
    from devices import features as f
    from devices import nethdr
    from devices.spec import INFLIGHT_STRIDE, SPECS
    from tests.vionetlab import SETTINGS
    from tools.viodriver.private import DeviceHost

    size = SIZES[case.size]
    frame, header = make_frame(size)
    bits = {"indirect": f.F_INDIRECT_DESC, "direct": 0, "packed": f.F_RING_PACKED}[case.ring]
    bits |= f.F_EVENT_IDX | nethdr.NET_F_CSUM | nethdr.NET_F_GUEST_CSUM
    bits |= nethdr.NET_F_HOST_TSO4 | nethdr.NET_F_GUEST_TSO4 | nethdr.NET_F_GUEST_TSO6
    bits |= nethdr.NET_F_MRG_RXBUF * (case.way == "merged")
    settings = {**SETTINGS, "packed": case.ring == "packed"}
    inflight = os.memfd_create("inflight")  # as in a VM
    os.ftruncate(inflight, INFLIGHT_STRIDE * len(SPECS["vionet"].queues))
    with DeviceHost(
        "vionet",
        settings,
        fds={"tap0": tap.fds[0]},
        memory_size=MEMORY,
        inflight=inflight,
        jail="best-effort",
    ) as host:
        os.close(inflight)
        rx, tx, _ = host.start(bits, arena_bytes=30 << 20)
        books = Books(cpu_of(host.process.pid))
        # A full ring, and in packed ones a descriptor per part.
        depth = depth_of(case)
        if case.way == "tx":
            queue, index = tx, 1
            whole = header + bytes(2) + frame
            # As Linux lays it out: all of a small frame, or its head and pages of up to 32 KiB.
            cuts = [whole] if size < GSO else [whole[:66], whole[66:32834], whole[32834:]]
            requests = [queue.place(cuts) for _ in range(depth)]
        else:
            queue, index = rx, 0
            each = size + 12 if case.way == "whole" else BUFFER
            per_frame = -(-(size + 12) // each)
            requests = [queue.place([], [each]) for _ in range(depth * per_frame)]

        def one_round() -> int:
            queue.submit(*requests)
            host.kick(index)
            done = 0
            while done < len(requests):
                found = len(queue.collect())
                done += found
                if not found and queue.enable_calls() is False and not host.wait_call(index, 10):
                    raise SystemExit(f"the device does not answer: {host.said}")
            return depth

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if index == 0:
                for _ in range(depth):
                    tap.send(frame, header)
            books.round(one_round)
        return books.figures(size)


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Run one case in this process."""
    from tests.taplab import TapLab

    with TapLab() as tap:
        tap.stop_listening()
        if case.code == "plain":
            from devices.nethdr import NET_F_GUEST_CSUM, NET_F_GUEST_TSO4
            from devices.tap import Tap

            Tap(tap.fds).offload(NET_F_GUEST_CSUM | NET_F_GUEST_TSO4)
            os.set_blocking(tap.fds[0], True)
        return (plain if case.code == "plain" else device)(case, tap, seconds)


def measure_in(case: Case, seconds: float) -> dict[str, float]:
    """Run one case in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "tools.benches.net", "--one", json.dumps([*case, seconds])],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"{case} {case.code}: {child.stderr.strip()}")
    result: dict[str, float] = json.loads(child.stdout)
    return result


def main(arguments: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench net",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a run (default 1)")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: 64B and 64K")
    parser.add_argument(
        "--ring", choices=("indirect", "direct", "packed"), action="append", help="indirect"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        *fields, seconds = json.loads(options.one)
        print(json.dumps(measure(Case(*fields), seconds)))
        return 0
    if os.geteuid():
        parser.error("taps and network namespaces need root")
    results: dict[Case, dict[str, list[dict[str, float]]]] = {}
    ways = itertools.product(
        options.case or CASES, options.size or ("64B", "64K"), options.ring or ("indirect",)
    )
    cases = [Case(way, size, "", ring) for way, size, ring in ways]
    for run, case in itertools.product(range(options.runs), cases):
        for code in ("plain", "device"):
            print(f"{run + 1}/{options.runs} {case}: {code}", file=sys.stderr, flush=True)
            figures = measure_in(case._replace(code=code), options.seconds)
            results.setdefault(case, {}).setdefault(code, []).append(figures)
    summary = {
        str(case): {
            code: {key: spread([run[key] for run in runs]) for key in runs[0]}
            for code, runs in by_code.items()
        }
        for case, by_code in results.items()
    }
    path = save("net", summary)
    print(report(summary))
    print(f"\nfigures: {path}")
    return 0


def report(summary: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the table of medians, with the spread of the CPU time."""
    rows = []
    for case, by_code in summary.items():
        for code, figures in by_code.items():
            cpu = figures["cpu_us"]
            base = by_code["plain"]
            rows.append(
                [
                    case,
                    code,
                    f"{figures['frames_per_s']['median']:.0f}",
                    f"{figures['gbit_per_s']['median']:.1f}",
                    f"{cpu['median']:.2f} ({cpu['min']:.2f}–{cpu['max']:.2f})",
                    f"{base['cpu_us']['median'] / cpu['median']:.2f}",
                    f"{base['us']['median'] / figures['us']['median']:.2f}",
                ]
            )
    head = ["case", "code", "frames/s", "Gbit/s", "CPU µs per frame", "CPU fraction", "of time"]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
