"""tools/bench blk: block requests per second, and what one costs the device process.

The driver (tools/viodriver) is this process, the device a real one, jailed, started by a real
spawner; between them are shared memory and eventfds, and no KVM. Per case: requests per second,
CPU time of the device process per request, split into user and system, and interrupts per
request.

Placements:  two    driver and device on CPUs of their own
             poll   the same, and the driver polls the used ring: no interrupts
             one    both on one CPU
Waking another CPU costs tens of microseconds on some machines: only equal placements compare.

The image of cache: writeback is on tmpfs and all in memory; that of cache: none is below .cache/,
where it measures the disk there as much as us.

A qcow2 image stands beside the raw one: all its clusters are allocated, but for the pattern
allocwrite, which fills a new one from its start. What a request costs there as a multiple of what
it costs on the raw image is worked out for each run by itself, since the two follow each other.

With --base REV every case runs in turn with the code of that commit and with this tree's.
"""

import argparse
import importlib.util
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
    "allocwrite": (True, True, 128 << 10),
}
PLACEMENTS = ("two", "poll", "one")
RINGS = ("indirect", "direct", "packed")
CACHES = ("writeback", "none")
FORMATS = ("raw", "qcow2")
ALLOC_BYTES = 4 << 30  # of the disk that allocwrite fills, and how long it may
ALLOC_SECONDS = 0.3
DEADLINE = 10.0  # seconds to wait for a call


class Case(NamedTuple):
    """One thing to measure."""

    pattern: str
    depth: int
    placement: str
    ring: str
    cache: str
    format: str

    def __str__(self) -> str:
        where = f"{self.placement} {self.ring} {self.cache} {self.format}"
        return f"{self.pattern} depth {self.depth} {where}"


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
    from devices.spec import INFLIGHT_STRIDE

    # A commit to compare with may have it elsewhere.
    here = importlib.util.find_spec("tools.viodriver") is not None
    place = "tools.viodriver.private" if here else "tests.devicehost"
    host_class: Any = importlib.import_module(place).DeviceHost

    cpus = sorted(os.sched_getaffinity(0))
    device_cpu = cpus[-1]
    disk = DiskConfig(path=path, format=case.format, cache=case.cache)
    fresh, image_bytes = case.pattern == "allocwrite", ALLOC_BYTES
    if fresh:
        seconds = min(seconds, ALLOC_SECONDS)
        make_fresh(path, case.format)
    elif case.format == "raw":
        image_bytes = os.path.getsize(path)
    else:
        image_bytes = json.loads(qemu_img("info", "--output=json", path))["virtual-size"]
    bits = {"indirect": features.F_INDIRECT_DESC, "direct": 0, "packed": features.F_RING_PACKED}
    accepted = bits[case.ring] | features.F_EVENT_IDX | BLK_F_FLUSH
    # Not with devices.images, which an old tree may not have for qcow2.
    image = os.open(path, os.O_RDWR | os.O_DIRECT * (case.cache == "none"))
    books = os.memfd_create("inflight")  # as in a VM
    os.ftruncate(books, INFLIGHT_STRIDE)
    try:
        settings = {**disk._asdict(), "packed": case.ring == "packed"}
        with host_class(
            "vioblk",
            settings,
            fds={"image": image},
            memory_size=32 * MIB,
            inflight=books,
            jail="best-effort",
        ) as host:
            [queue] = host.start(accepted, arena_bytes=16 * MIB)
            os.sched_setaffinity(host.process.pid, {device_cpu})
            os.sched_setaffinity(0, {device_cpu if case.placement == "one" else cpus[0]})
            driver = Driver(host, queue, case, image_bytes)
            if case.placement == "poll":
                queue.disable_calls()
            if not fresh:
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
        os.close(books)
    return {
        "iops": driver.nr_done / took,
        "mib_per_s": driver.nr_done * PATTERNS[case.pattern][2] / took / MIB,
        "cpu_us": user + system,
        "user_us": user,
        "system_us": system,
        "calls": driver.nr_calls / driver.nr_done,
    }


def qemu_img(*arguments: str) -> str:
    """Run qemu-img; return what it prints."""
    done = subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def make_fresh(path: str, kind: str) -> None:
    """Put an empty image there."""
    Path(path).unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", kind, path, str(ALLOC_BYTES))


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
def images(
    directory: Path, size: int, kinds: Sequence[tuple[str, str]]
) -> Iterator[dict[tuple[str, str], Path]]:
    """An image per cache and format, every block allocated; they go away afterwards.

    Beside each is a path for a fresh image: the same with .fresh behind it.
    """
    places = {"writeback": Path("/dev/shm"), "none": RESULTS}  # noqa: S108
    if directory != Path():
        places = dict.fromkeys(places, directory)
    RESULTS.mkdir(parents=True, exist_ok=True)
    paths = {(cache, kind): places[cache] / f"pyvmd-bench-{cache}.{kind}" for cache, kind in kinds}
    try:
        for (_, kind), path in paths.items():
            raw = path if kind == "raw" else path.with_suffix(".tmp")
            with raw.open("wb") as image:
                for _ in range(size // MIB):
                    image.write(os.urandom(MIB))
                os.fsync(image.fileno())
            if kind != "raw":
                qemu_img("convert", "-f", "raw", "-O", kind, str(raw), str(path))
                raw.unlink()
        yield paths
    finally:
        for path in paths.values():
            for one in (path, path.with_suffix(".tmp"), fresh_path(path)):
                one.unlink(missing_ok=True)


def fresh_path(path: Path) -> Path:
    """Return where the image that allocwrite fills is."""
    return path.with_name(path.name + ".fresh")


def choose(options: argparse.Namespace) -> list[Case]:
    """Return the cases to run."""
    cases = itertools.product(
        options.pattern or [name for name in PATTERNS if name != "allocwrite"],
        options.depth or (1, 32),
        options.placement or PLACEMENTS,
        options.ring or ("indirect",),
        options.cache or ("writeback", "none"),
        options.format or FORMATS,
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
    parser.add_argument(
        "--pattern", choices=PATTERNS, action="append", help="default: all but allocwrite"
    )
    parser.add_argument("--depth", type=int, action="append", help="default: 1 and 32")
    parser.add_argument("--placement", choices=PLACEMENTS, action="append", help="default: all")
    parser.add_argument("--ring", choices=RINGS, action="append", help="default: indirect")
    parser.add_argument("--cache", choices=CACHES, action="append", help="default: both")
    parser.add_argument("--format", choices=FORMATS, action="append", help="default: both")
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
        cases = choose(options)
        kinds = sorted({(case.cache, case.format) for case in cases})
        paths = stack.enter_context(images(options.images, options.size * MIB, kinds))
        trees = {"here": ROOT}
        if options.base:
            trees = {options.base: stack.enter_context(tree_of(options.base)), **trees}
        for run, case in itertools.product(range(options.runs), cases):
            for name, tree in trees.items():
                print(f"{run + 1}/{options.runs} {name}: {case}", file=sys.stderr, flush=True)
                path = paths[case.cache, case.format]
                if case.pattern == "allocwrite":
                    path = fresh_path(path)
                figures = measure_in(tree, case, path, options.seconds)
                results.setdefault(str(case), {}).setdefault(name, []).append(figures)
    for case in cases:
        raw = results.get(str(case._replace(format="raw")), {})
        for name, runs in results[str(case)].items() if case.format != "raw" else ():
            for figures, other in zip(runs, raw.get(name, ()), strict=False):
                figures["cpu_vs_raw"] = figures["cpu_us"] / other["cpu_us"]
                figures["time_vs_raw"] = other["iops"] / figures["iops"]
    summary = {
        case: {
            name: {key: spread([run[key] for run in runs]) for key in runs[0]}
            for name, runs in by_tree.items()
        }
        for case, by_tree in results.items()
    }
    saved = save("blk", summary)
    print(report(summary))
    print(f"\nfigures: {saved}")
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
                    *(_multiple(figures.get(key)) for key in ("cpu_vs_raw", "time_vs_raw")),
                ]
            )
    head = ["case", "code", "IOPS", "MiB/s", "device CPU µs", "user", "system", "calls"]
    return table([*head, "CPU vs. raw", "time vs. raw"], rows)


def _multiple(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
