"""tools/bench blk: block requests per second, and what one costs the device process.

The driver (tests/driver.py) is this process, the device a real one, jailed, started by a real
spawner; between them are shared memory and eventfds, and no KVM. Per case: requests per second,
CPU time of the device process per request, split into user and system, and interrupts per
request.

Placements:  two    driver and device on CPUs of their own
             poll   the same, and the driver polls the used ring: no interrupts
             one    both on one CPU
Waking another CPU costs tens of microseconds on some machines: only equal placements compare.

The image of cache: writeback is on tmpfs and all in memory; that of cache: none is below .cache/,
where it measures the disk there as much as us.

With --base REV every case runs in turn with the code of that commit and with this tree's.
"""

import argparse
import io
import itertools
import json
import os
import select
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tools.benches.report import RESULTS, ROOT, save, spread, table

MIB = 1 << 20
PATTERNS = {
    "randread": (False, False, 4096),
    "randwrite": (True, False, 4096),
    "seqread": (False, True, 128 << 10),
    "seqwrite": (True, True, 128 << 10),
}
PLACEMENTS = ("two", "poll", "one")
RINGS = ("indirect", "direct", "packed")
CACHES = ("writeback", "none")
DEADLINE = 10.0  # seconds to wait for a call


class Case(NamedTuple):
    """One thing to measure."""

    pattern: str
    depth: int
    placement: str
    ring: str
    cache: str

    def __str__(self) -> str:
        return f"{self.pattern} depth {self.depth} {self.placement} {self.ring} {self.cache}"


class Driver:
    """Keeps `depth` requests with the device and measures."""

    def __init__(self, host: Any, queue: Any, case: Case, image_bytes: int) -> None:
        from devices.blkreq import HEADER

        write, self._sequential, self._length = PATTERNS[case.pattern]
        self._host, self._queue, self._poll = host, queue, case.placement == "poll"
        header = HEADER.pack(int(write), 0, 0)
        shape = ([header, self._length], [1]) if write else ([header], [self._length, 1])
        self._requests = [queue.place(*shape) for _ in range(case.depth)]
        # The sector in each header: a request is made once, and asked again and again.
        self._sectors = {
            request: host.memory.view(request.segments[0].gpa + 8, 8).cast("Q")
            for request in self._requests
        }
        dice = Random(1)  # noqa: S311  # the same places in every run
        nr_places = image_bytes // self._length
        places = list(range(nr_places))
        if not self._sequential:
            places = [dice.randrange(nr_places) for _ in range(1 << 16)]
        self._places = itertools.cycle(place * self._length // 512 for place in places)
        self._waiter = select.poll()
        self._waiter.register(host.events["call0"], select.POLLIN)
        self.nr_done = self.nr_calls = 0

    def run(self, seconds: float) -> None:
        """Go on for so long; nothing is outstanding afterwards."""
        queue, end = self._queue, time.monotonic() + seconds
        self._submit(self._requests)
        while queue.outstanding:
            done = [used.request for used in queue.collect()]
            if not done:
                self._wait()
                continue
            self.nr_done += len(done)
            if time.monotonic() < end:
                self._submit(done)

    def _submit(self, requests: Sequence[Any]) -> None:
        for request in requests:
            self._sectors[request][0] = next(self._places)
        self._queue.submit(*requests)
        if self._queue.kick_needed():
            self._host.kick(0)

    def _wait(self) -> None:
        if self._poll or self._queue.enable_calls():
            return
        if not self._waiter.poll(DEADLINE * 1e3):
            raise SystemExit("the device does not answer")
        os.eventfd_read(self._host.events["call0"])
        self.nr_calls += 1
        self._queue.disable_calls()


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Return user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def measure(case: Case, path: str, seconds: float) -> dict[str, float]:
    """Run one case with the code of the working directory; return its figures."""
    from config.model import DiskConfig
    from devices import features
    from devices.blkreq import BLK_F_FLUSH
    from tests.devicehost import DeviceHost
    from vmm.images import open_disk

    cpus = sorted(os.sched_getaffinity(0))
    device_cpu = cpus[-1]
    disk = DiskConfig(path=path, format="raw", cache=case.cache)
    bits = {"indirect": features.F_INDIRECT_DESC, "direct": 0, "packed": features.F_RING_PACKED}
    accepted = bits[case.ring] | features.F_EVENT_IDX | BLK_F_FLUSH
    image = open_disk(disk, "bench")
    try:
        settings = {**disk._asdict(), "packed": case.ring == "packed"}
        with DeviceHost(
            "vioblk", settings, fds={"image": image}, memory_size=32 * MIB, jail="best-effort"
        ) as host:
            [queue] = host.start(accepted, arena_bytes=16 * MIB)
            os.sched_setaffinity(host.process.pid, {device_cpu})
            os.sched_setaffinity(0, {device_cpu if case.placement == "one" else cpus[0]})
            driver = Driver(host, queue, case, os.path.getsize(path))
            if case.placement == "poll":
                queue.disable_calls()
            driver.run(min(seconds / 4, 0.3))  # warm up
            driver.nr_done = driver.nr_calls = 0
            before, begun = cpu_seconds(host.process.pid), time.monotonic()
            driver.run(seconds)
            took = time.monotonic() - begun
            user, system = (
                (after - was) / driver.nr_done * 1e6
                for was, after in zip(before, cpu_seconds(host.process.pid), strict=True)
            )
    finally:
        os.close(image)
    return {
        "iops": driver.nr_done / took,
        "mib_per_s": driver.nr_done * PATTERNS[case.pattern][2] / took / MIB,
        "cpu_us": user + system,
        "user_us": user,
        "system_us": system,
        "calls": driver.nr_calls / driver.nr_done,
    }


@contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The files of a commit, in a directory that goes away; nothing is checked out."""
    archive = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    with tempfile.TemporaryDirectory(prefix="pyvmd-bench-") as path:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(path, filter="data")
        yield Path(path)


def measure_in(tree: Path, case: Case, path: Path, seconds: float) -> dict[str, float]:
    """Run one case in a process of its own: this file, with all other code from `tree`."""
    child = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([*case, str(path), seconds])],
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=False,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"{case}: {child.stderr.strip()}")
    result: dict[str, float] = json.loads(child.stdout)
    return result


@contextmanager
def images(directory: Path, size: int) -> Iterator[dict[str, Path]]:
    """An image for each kind of cache, every block allocated; they go away afterwards."""
    paths = {"writeback": Path("/dev/shm/pyvmd-bench.img"), "none": RESULTS / "blk.img"}  # noqa: S108
    if directory != Path():
        paths = {cache: directory / f"pyvmd-bench-{cache}.img" for cache in paths}
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        for path in paths.values():
            with path.open("wb") as image:
                for _ in range(size // MIB):
                    image.write(os.urandom(MIB))
                os.fsync(image.fileno())
        yield paths
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def choose(options: argparse.Namespace) -> list[Case]:
    """Return the cases to run."""
    cases = itertools.product(
        options.pattern or PATTERNS,
        options.depth or (1, 32),
        options.placement or PLACEMENTS,
        options.ring or ("indirect",),
        options.cache or ("writeback", "none"),
    )
    # A disk is slower than any way of waiting for it.
    wanted = [Case(*case) for case in cases]
    return [case for case in wanted if case.cache == "writeback" or case.placement == "two"]


def main(arguments: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench blk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a run (default 1)")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="default: all")
    parser.add_argument("--depth", type=int, action="append", help="default: 1 and 32")
    parser.add_argument("--placement", choices=PLACEMENTS, action="append", help="default: all")
    parser.add_argument("--ring", choices=RINGS, action="append", help="default: indirect")
    parser.add_argument("--cache", choices=CACHES, action="append", help="default: both")
    parser.add_argument("--images", type=Path, default=Path(), help="directory for both images")
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="of an image (64)")
    parser.add_argument("--base", metavar="REV", help="compare with this commit")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        *fields, path, seconds = json.loads(options.one)
        print(json.dumps(measure(Case(*fields), path, seconds)))
        return 0
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        paths = stack.enter_context(images(options.images, options.size * MIB))
        trees = {"here": ROOT}
        if options.base:
            trees = {options.base: stack.enter_context(tree_of(options.base)), **trees}
        for run, case in itertools.product(range(options.runs), choose(options)):
            for name, tree in trees.items():
                print(f"{run + 1}/{options.runs} {name}: {case}", file=sys.stderr, flush=True)
                figures = measure_in(tree, case, paths[case.cache], options.seconds)
                results.setdefault(str(case), {}).setdefault(name, []).append(figures)
    summary = {
        case: {
            name: {key: spread([run[key] for run in runs]) for key in runs[0]}
            for name, runs in by_tree.items()
        }
        for case, by_tree in results.items()
    }
    path = save("blk", summary)
    print(report(summary))
    print(f"\nfigures: {path}")
    return 0


def report(summary: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the table of medians, with the spread of the CPU time."""
    rows = []
    for case, by_tree in summary.items():
        for name, figures in by_tree.items():
            cpu = figures["cpu_us"]
            rows.append(
                [
                    case,
                    name,
                    f"{figures['iops']['median']:.0f}",
                    f"{figures['mib_per_s']['median']:.0f}",
                    f"{cpu['median']:.2f} ({cpu['min']:.2f}–{cpu['max']:.2f})",
                    f"{figures['user_us']['median']:.2f}",
                    f"{figures['system_us']['median']:.2f}",
                    f"{figures['calls']['median']:.3f}",
                ]
            )
    head = ["case", "code", "IOPS", "MiB/s", "device CPU µs", "user", "system", "calls"]
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
