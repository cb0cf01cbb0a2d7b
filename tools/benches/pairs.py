"""tools/bench pairs: frames per second by two queue pairs of an interface at once, beside one.

The device is a real one of two jailed processes, on a tap in a network namespace of its own; the
driver is this process, and there is no KVM. A round is as many frames as fit each ring, made
available with one kick per queue, and ends with the last of them: by the first pair, by the
second, by both. What is sent the host's stack drops behind the tap. So `both` says what a second
process is worth where there is a CPU for it, and the driver takes its part of one. Needs root.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tools.benches.net import GSO, SIZES, make_frame
from tools.benches.report import save, spread, table

WAYS = {"first": (1,), "second": (3,), "both": (1, 3)}
DEPTHS = {"64B": 200, "1514B": 200, "64K": 28}  # frames per round and queue
SILENCE = 10.0  # seconds


def measure(lab: Any, requests: dict[int, list[Any]], seconds: float) -> float:
    """Return the frames per second that these queues take together."""
    frames, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        left = {index: len(mine) for index, mine in requests.items()}
        for index, mine in requests.items():
            lab.queues[index].submit(*mine)
            lab.kick(index)
        while any(left.values()):
            for index in requests:
                queue = lab.queues[index]
                left[index] -= (found := len(queue.collect()))
                waits = left[index] and not found and not queue.enable_calls()
                if waits and not lab.wait_call(index, SILENCE):
                    raise SystemExit(f"the device does not answer: {lab.lost}")
        frames += sum(map(len, requests.values()))
    return frames / (now - begun)


def place(lab: Any, size: str) -> dict[int, list[Any]]:
    """Lay out the frames of a round for each transmit queue, as Linux does."""
    frame, header = make_frame(SIZES[size])
    whole = header + bytes(2) + frame
    cuts = [whole] if SIZES[size] < GSO else [whole[:66], whole[66:32834], whole[32834:]]
    return {n: [lab.queues[n].place(cuts) for _ in range(DEPTHS[size])] for n in WAYS["both"]}


def main(arguments: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="tools/bench pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a run (default 0.5)")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: 64B and 64K")
    options = parser.parse_args(arguments)
    if os.geteuid():
        parser.error("taps and network namespaces need root")
    from tests.pairlab import MQ, PairLab
    from tests.taplab import TapLab

    sizes = options.size or ("64B", "64K")
    found: dict[str, list[float]] = {}
    with TapLab(2) as tap, PairLab(tap, features=MQ) as lab:
        lab.queues = lab.start(lab.features, arena_bytes=8 << 20)
        if lab.command(4, 0, b"\2\0"):
            raise SystemExit("the device does not use two pairs")
        tap.stop_listening()
        frames = {size: place(lab, size) for size in sizes}
        for run in range(options.runs):
            for size in sizes:
                for way, indices in WAYS.items():
                    print(f"{run + 1}/{options.runs} {size} {way}", file=sys.stderr, flush=True)
                    mine = {index: frames[size][index] for index in indices}
                    rate = measure(lab, mine, options.seconds)
                    found.setdefault(f"{size} {way}", []).append(rate)
    summary = {case: spread(rates) for case, rates in found.items()}
    path = save("pairs", summary)
    rows = []
    for case, figures in summary.items():
        median, low, high = (figures[key] for key in ("median", "min", "max"))
        base = summary[f"{case.split()[0]} first"]["median"]
        rows.append([case, f"{median:.0f} ({low:.0f}–{high:.0f})", f"{median / base:.2f}"])
    print(table(["case", "frames/s", "of one pair's"], rows))
    print(f"\nfigures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
