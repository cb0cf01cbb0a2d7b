"""tools/bench compare: our block device beside qemu-storage-daemon, over vhost-user, same driver.

Per case every back end serves the same image in turn, started anew each time; the driver
(tools/viodriver) is this process. What is said of a case is the median of all turns, with the
spread, and the ratio to the best of the others, turn by turn. Figures of a back end: requests per
second, CPU time per request of all its threads, time per request (depth 1: latency), memory; of
the driver: the share of time in which it had something to do.

Placements:  pinned    driver on one CPU, back end on another
             unpinned  wherever the scheduler wants
Waits:       poll      the driver polls the used ring
             call      it sleeps until it is called
Images:      raw, qcow2 on tmpfs; direct: raw on a disk, O_DIRECT, nothing of it in the page cache

Where that is allowed both run with real-time priority, so that others on the machine disturb
less; but not for writes to `direct`: the kernel ends those in a worker of its own, of ordinary
priority, that a back end of a higher one would push aside after every single request.

Results: .cache/bench/compare.json, .md and .svg. The file systems are among them.
"""

import argparse
import itertools
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from devices.blkreq import BLK_F_FLUSH
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from tools.benches.backends import Image, Kind, Ours, Qsd, may_be_urgent, running, settle
from tools.benches.bars import Chart, draw
from tools.benches.blk import qemu_img
from tools.benches.report import RESULTS, save, spread, table
from tools.viodriver.blkload import BlkLoad, Pattern
from tools.viodriver.errors import DriverError
from tools.viodriver.vhostuser import VhostUser

MIB = 1 << 20
MEMORY = 64 * MIB
RING = 128
FEATURES = F_EVENT_IDX | F_INDIRECT_DESC | BLK_F_FLUSH
OURS = "pyvmd"


class Case(NamedTuple):
    """One thing to ask, and what is asked of our figures beside the best of the others."""

    image: str  # raw, qcow2, direct
    write: bool
    length: int
    sequential: bool
    depth: int
    iops: float  # requests per second, at least this ratio
    cpu: float = 0.0  # CPU per request, at most this ratio; 0: does not matter

    @property
    def name(self) -> str:
        """What it is called."""
        order, verb = "seq" if self.sequential else "rand", "write" if self.write else "read"
        return f"{self.image} {order}{verb} {self.length >> 10}K depth {self.depth}"


CASES = (
    Case("raw", False, 4096, False, 32, 2.0, 0.6),
    Case("raw", True, 4096, False, 32, 2.0, 0.6),
    Case("raw", False, 4096, False, 1, 1.0),
    Case("raw", True, 4096, False, 1, 1.0),
    Case("raw", False, 128 << 10, True, 8, 1.0),
    Case("raw", True, 128 << 10, True, 8, 1.0),
    Case("qcow2", False, 4096, False, 32, 1.5),
    Case("qcow2", True, 4096, False, 32, 1.5),
    Case("direct", False, 4096, False, 32, 1.0),
    Case("direct", True, 4096, False, 32, 1.0),
)
PLACEMENTS = ("pinned", "unpinned")
WAITS = ("poll", "call")


def kinds(case: Case, ours: Ours) -> list[Kind]:
    """Return who is compared in a case."""
    others: list[Kind] = [
        Qsd("threads", iothread=False),
        Qsd("io_uring", iothread=False),
        Qsd("io_uring", iothread=True),
    ]
    if case.image == "direct":
        others.append(Qsd("native", iothread=False))  # it needs O_DIRECT
    return [ours, *others]


class Way(NamedTuple):
    """How a case is run."""

    placement: str
    wait: str
    realtime: bool
    seconds: float


def measure(kind: Kind, image: Image, case: Case, way: Way) -> dict[str, float]:
    """Start a back end, drive it for a while, and return its figures."""
    cpus = sorted(os.sched_getaffinity(0))
    pinned, poll = way.placement == "pinned", way.wait == "poll"
    sock = f"{tempfile.gettempdir()}/pyvmd-compare-{os.getpid()}.sock"
    try:
        with (
            running(kind, image, sock) as program,
            VhostUser(sock, memory_size=MEMORY, queue_size=RING) as device,
        ):
            [ring] = device.start(FEATURES, arena_bytes=32 * MIB)
            disk_bytes = device.read_config(0, 8) * 512
            pattern = Pattern(case.write, case.length, case.sequential)
            load = BlkLoad(device, ring, pattern, depth=case.depth, disk_bytes=disk_bytes)
            settle(0, {cpus[0]} if pinned else set(cpus), realtime=way.realtime)
            program.settle({cpus[-1]} if pinned else set(cpus), realtime=way.realtime)
            # Maps and caches of either side fill.
            load.run(way.seconds, poll=poll)
            before = program.cpu_seconds()
            ran = load.run(way.seconds, poll=poll)
            cpu = program.cpu_seconds() - before
            memory = program.pss()
    finally:
        settle(0, set(cpus), realtime=False)
    return {
        "iops": ran.iops,
        "mib_per_s": ran.iops * case.length / MIB,
        "request_us": case.depth / ran.iops * 1e6,
        "cpu_us": cpu / ran.nr_done * 1e6,
        "kicks": ran.nr_kicks / ran.nr_done,
        "calls": ran.nr_calls / ran.nr_done,
        "driver_busy": ran.busy,
        **memory,
    }


@contextmanager
def images(options: argparse.Namespace, wanted: set[str]) -> Iterator[dict[str, Image]]:
    """Make an image of each kind, every block of it written; they go away afterwards."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    made: dict[str, Image] = {}
    places = {"raw": options.memory, "qcow2": options.memory, "direct": options.disk}
    try:
        for kind in sorted(wanted):
            path = places[kind] / f"pyvmd-compare-{os.getpid()}.{kind}"
            made[kind] = Image(path, "qcow2" if kind == "qcow2" else "raw", kind == "direct")
            with path.open("wb") as file:
                for _ in range(options.size):
                    file.write(os.urandom(MIB))
                os.fsync(file.fileno())
                if made[kind].direct:  # a cached page would have to be dropped by every write
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if kind == "qcow2":
                plain = path.with_suffix(".plain")
                path.rename(plain)
                qemu_img("convert", "-f", "raw", "-O", "qcow2", str(plain), str(path))
                plain.unlink()
        yield made
    finally:
        for image in made.values():
            image.path.unlink(missing_ok=True)
            image.path.with_suffix(".plain").unlink(missing_ok=True)


def file_system(path: Path) -> str:
    """Return the type of the file system that a directory is on, and what that stands on."""
    where, found = path.resolve(), ("", "unknown", "")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        source, mounted, kind, *_ = line.split()
        if where.is_relative_to(mounted) and len(mounted) >= len(found[0]):
            found = mounted, kind, source
    return f"{found[1]} on {found[2]}"


class Row(NamedTuple):
    """All turns of one case in one placement, with one way to wait."""

    case: Case
    placement: str
    wait: str
    turns: dict[str, list[dict[str, float]]]  # by back end, in the same order

    @property
    def best(self) -> str:
        """The fastest of the others."""
        return max((name for name in self.turns if name != OURS), key=lambda n: self.of(n, "iops"))

    def of(self, name: str, figure: str) -> float:
        """Return the median of a figure."""
        return statistics.median(turn[figure] for turn in self.turns[name])

    def ratio(self, figure: str) -> float:
        """Return ours to the best of the others, the median over turns."""
        pairs = zip(self.turns[OURS], self.turns[self.best], strict=True)
        return statistics.median(ours[figure] / other[figure] for ours, other in pairs)

    @property
    def reached(self) -> bool:
        """Whether our figures are what was asked for."""
        cpu = self.case.cpu
        return self.ratio("iops") >= self.case.iops and (not cpu or self.ratio("cpu_us") <= cpu)

    def figures(self) -> dict[str, Any]:
        """Return everything, for the JSON file."""
        return {
            "case": {**self.case._asdict(), "name": self.case.name},
            "placement": self.placement,
            "wait": self.wait,
            "back_ends": {
                name: {key: spread([turn[key] for turn in turns]) for key in turns[0]}
                for name, turns in self.turns.items()
            },
            "best_of_others": self.best,
            "iops_ratio": self.ratio("iops"),
            "cpu_ratio": self.ratio("cpu_us"),
            "reached": self.reached,
            "turns": self.turns,
        }


def run(options: argparse.Namespace) -> list[Row]:
    """Measure all that was chosen, in turn."""
    ours = Ours(options.python)
    cases = [case for case in CASES if any(part in case.name for part in options.case or [""])]
    rows = []
    with images(options, {case.image for case in cases}) as made:
        for case, placement, wait in itertools.product(
            cases, options.placement or PLACEMENTS, options.wait or WAITS
        ):
            urgent = options.realtime and not (case.image == "direct" and case.write)
            way = Way(placement, wait, urgent, options.seconds)
            compared = kinds(case, ours)
            turns: dict[str, list[dict[str, float]]] = {kind.name: [] for kind in compared}
            for turn in range(options.pairs):
                # Whoever comes first in one turn comes last in the next.
                for kind in compared if turn % 2 else compared[::-1]:
                    try:
                        turns[kind.name].append(measure(kind, made[case.image], case, way))
                    except DriverError as err:
                        raise SystemExit(
                            f"{case.name}, {placement}, {wait}: {kind.name}: {err}"
                        ) from err
            rows.append(Row(case, placement, wait, turns))
            print(f"{case.name}, {placement}, {wait}: {_said(rows[-1])}", file=sys.stderr)
    return rows


def _said(row: Row) -> str:
    return (
        f"{row.ratio('iops'):.2f} × the requests of {row.best} at {row.ratio('cpu_us'):.2f} × its"
        f" CPU per request{'' if row.reached else ': short of what was asked for'}"
    )


def report(rows: Sequence[Row]) -> str:
    """Return the table: medians, and in brackets the spread."""
    lines = []
    for row in rows:
        for name in row.turns:
            figures = row.figures()["back_ends"][name]
            ours = name == OURS
            lines.append(
                [
                    f"{row.case.name}, {row.placement}, {row.wait}" if ours else "",
                    name,
                    _spread(figures["iops"], 1e3, 0),
                    _spread(figures["cpu_us"], 1, 2),
                    f"{figures['request_us']['median']:.1f}",
                    f"{100 * figures['driver_busy']['median']:.0f}",
                    f"{figures['pss']['median']:.0f} / {figures['pss_anon']['median']:.0f}",
                    f"{row.ratio('iops'):.2f} / {row.ratio('cpu_us'):.2f}" if ours else "",
                    ("yes" if row.reached else "NO") if ours else "",
                ]
            )
    head = ["case", "back end", "k requests/s", "CPU µs", "request µs", "driver busy %"]
    return table([*head, "Pss / anon MiB", "ratio: requests / CPU", "reached"], lines)


def _spread(figure: dict[str, float], unit: float, digits: int) -> str:
    median, least, most = (figure[key] / unit for key in ("median", "min", "max"))
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Return what to draw: requests, and CPU per request, each as a share of ours."""
    titles = {"iops": "requests per second", "cpu_us": "CPU time per request"}
    made = []
    for figure, title in titles.items():
        groups = []
        for row in rows:
            one = row.of(OURS, figure)
            bars = {
                name: tuple(
                    value / one
                    for value in (
                        row.of(name, figure),
                        min(turn[figure] for turn in turns),
                        max(turn[figure] for turn in turns),
                    )
                )
                for name, turns in row.turns.items()
            }
            label = f"{row.case.name}, {row.placement}, {row.wait}"
            groups.append((label, bars))
        made.append(Chart(f"{title} ({OURS} = 1)", groups))
    return made


def _end(number: int, _frame: FrameType | None) -> None:
    """End in good order, once: back end and images go away on the way out."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Measure and report. SIGTERM and SIGHUP end it as SIGINT does, and nothing stays behind."""
    parser = argparse.ArgumentParser(
        prog="tools/bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn (default 0.5)")
    parser.add_argument(
        "--case", action="append", metavar="PART", help="cases with this in their name"
    )
    parser.add_argument("--placement", choices=PLACEMENTS, action="append", help="default: both")
    parser.add_argument("--wait", choices=WAITS, action="append", help="default: both")
    parser.add_argument("--size", type=int, default=128, metavar="MIB", help="of an image (128)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="directory on tmpfs")  # noqa: S108
    parser.add_argument("--disk", type=Path, default=RESULTS, help="directory on a disk")
    parser.add_argument("--python", default="", help="that runs ours (default: Debian's)")
    parser.add_argument(
        "--no-realtime", dest="realtime", action="store_false", help="at ordinary priority"
    )
    options = parser.parse_args(arguments)
    options.realtime = options.realtime and may_be_urgent()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    rows = run(options)
    facts = {
        "realtime": options.realtime,
        "python": Ours(options.python).python,
        "file_systems": {
            "raw, qcow2": file_system(options.memory),
            "direct": file_system(options.disk),
        },
    }
    figures = {**facts, "seconds": options.seconds, "rows": [row.figures() for row in rows]}
    saved = save("compare", figures)
    text = (
        report(rows)
        + "\n\nImages: "
        + "; ".join(f"{kind}: {where}" for kind, where in facts["file_systems"].items())
    )
    saved.with_suffix(".md").write_text(text + "\n")
    saved.with_suffix(".svg").write_text(draw(charts(rows)))
    print(text)
    print(f"\nfigures: {saved}, and .md, .svg beside it")
    return 0
