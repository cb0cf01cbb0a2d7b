"""The verbs that show what VMs use: stats, top, metrics."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from vmm import sample, survey
from vmm.table import Column, Paint, say, say_json, scaled, table, wants_colour
from vmm.usage import (
    PROGRAM,
    Verb,
    colour_argument,
    json_argument,
    seconds,
    verbs,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable, Iterator

    from vmm.sample import Sample
    from vmm.survey import VmInfo

_COLUMNS: Final = (
    Column("CPU%", 6),
    Column("MEM", 6),
    Column("RSS", 6),
    Column("EXITS/s", 8),
    Column("IN/s", 7),
    Column("OUT/s", 7),
    Column("STATE", 8),
    Column("NAME", 0),
)
_STYLES: Final = {
    "STATE": {"running": "green", "paused": "yellow", "unknown": "red", "lost": "red"}
}
# What a guest gets, and what it gives, by the devices' own names.
_IN: Final = ("rx_bytes", "read_bytes")
_OUT: Final = ("tx_bytes", "write_bytes")
_CLEAR: Final = "\x1b[H\x1b[J"
_SCREEN: Final = ("\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l")  # the other screen, no cursor


def _names(to: ArgumentParser) -> None:
    to.add_argument(
        "names", metavar="NAME", nargs="*", default=[], help="names or ids (default: all that run)"
    )


def _stats_arguments(to: ArgumentParser) -> None:
    _names(to)
    to.add_argument(
        "-d",
        "--delay",
        metavar="TIME",
        type=seconds,
        default=1.0,
        help="how long to look, for the rates (default: 1s)",
    )
    json_argument(to)
    colour_argument(to)


def _stats(options: Any) -> int:
    before, now = _two(options.names, options.delay)
    facts = [sample.per_second(before.get(one.name), one) for one in now]
    if options.json:
        say_json(facts[0] if len(options.names) == 1 and facts else facts)
    else:
        say(_table(facts, wants_colour(options.color, sys.stdout)))
    return EXIT_DONE


def _top_arguments(to: ArgumentParser) -> None:
    _names(to)
    to.add_argument(
        "-d",
        "--delay",
        metavar="TIME",
        type=seconds,
        default=2.0,
        help="between looks (default: 2s)",
    )
    to.add_argument(
        "-n",
        dest="count",
        metavar="N",
        type=int,
        default=0,
        help="look N times (default: for ever)",
    )
    to.add_argument("--json", action="store_true", help="print each look as a line of JSON")
    colour_argument(to)


def _top(options: Any) -> int:
    """Show a screen until q or ^C; on anything but a terminal, one table after the other."""
    colour = wants_colour(options.color, sys.stdout)
    live = not options.json and sys.stdout.isatty() and sys.stdin.isatty()
    before: dict[str, Sample] = {}
    number = 0
    with _Screen(enabled=live) as screen:
        while True:
            now = sample.take_all(_running(options.names))
            facts = [sample.per_second(before.get(one.name), one) for one in now]
            screen.show(json.dumps(facts) if options.json else _table(facts, colour))
            before = {one.name: one for one in now}
            number += 1
            if number == options.count or screen.wait(options.delay):
                return EXIT_DONE


def _metrics_arguments(to: ArgumentParser) -> None:
    _names(to)
    json_argument(to)


def _metrics(options: Any) -> int:
    from vmm import metrics  # regular expressions, for this verb alone

    infos = [survey.lookup(name) for name in options.names] or survey.survey(shared=True)
    samples = {one.name: one for one in sample.take_all([info for info in infos if info.alive])}
    if options.json:
        say_json(metrics.families(infos, samples))
    else:
        say(metrics.text(infos, samples).rstrip("\n"))
    return EXIT_DONE


def _running(names: Iterable[str]) -> list[VmInfo]:
    """Return VMs that run. Raises NoSuchVmError, HostError."""
    infos = [survey.lookup(name) for name in names]
    for info in infos:
        if not info.alive:
            raise HostError(
                "is not running", vm=info.name, hint=f"'{PROGRAM} start {info.name}' starts it"
            )
    return infos or [info for info in survey.survey(shared=True) if info.alive]


def _two(names: Iterable[str], delay: float) -> tuple[dict[str, Sample], list[Sample]]:
    infos = _running(names)
    before = {one.name: one for one in sample.take_all(infos)}
    if before:
        time.sleep(delay)
    return before, sample.take_all(infos)


def _table(facts: Iterable[dict[str, Any]], colour: bool) -> str:
    rows = [row for vm in facts for row in _rows(vm)]
    return table(_COLUMNS, rows, Paint(colour), _STYLES)


def _rows(vm: dict[str, Any]) -> Iterator[list[str]]:
    known = vm["state"] != "unknown"
    yield [
        _percent(vm["cpu_percent"]),
        scaled(vm["memory_resident"]) if known else "-",
        scaled(vm["resident"]),
        f"{vm['exits_per_second']:.0f}" if known and vm["exits_per_second"] is not None else "-",
        "-",
        "-",
        vm["state"],
        vm["name"],
    ]
    if vm["spawner_resident"]:
        yield ["-", "-", scaled(vm["spawner_resident"]), "-", "-", "-", "", "  spawner"]
    for device in vm["devices"]:
        yield [
            _percent(device["cpu_percent"]),
            "-",
            scaled(device["resident"]),
            "-",
            _flow(device["per_second"], _IN),
            _flow(device["per_second"], _OUT),
            "" if device["up"] else "lost",
            f"  {device['name']}",
        ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _flow(rates: dict[str, float | None], names: Iterable[str]) -> str:
    found = [rates[name] for name in names if rates.get(name) is not None]
    return scaled(int(sum(rate or 0 for rate in found))) if found else "-"


class _Screen:
    """A terminal's other screen, given back at the end; or a plain stream of tables."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    def __enter__(self) -> _Screen:
        if self._enabled:
            import termios  # only where there is a terminal
            import tty

            self._saved = termios.tcgetattr(0)
            tty.setcbreak(0)
            os.write(1, _SCREEN[0].encode())
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            import termios  # only where there is a terminal

            os.write(1, _SCREEN[1].encode())
            termios.tcsetattr(0, termios.TCSANOW, self._saved)

    def show(self, text: str) -> None:
        """Show a table; what does not fit on the screen is left out."""
        if not self._enabled:
            say(text)
            return
        lines = os.get_terminal_size(1).lines
        shown = text.split("\n")[: max(lines - 2, 1)]
        stamp = time.strftime("%H:%M:%S")
        body = "\n".join(shown)
        os.write(1, f"{_CLEAR}{PROGRAM} top  {stamp}  (q leaves)\n{body}".encode())

    def wait(self, delay: float) -> bool:
        """Wait; return True if the user wants to leave."""
        if not self._enabled:
            time.sleep(delay)
            return False
        deadline = time.monotonic() + delay
        while (left := deadline - time.monotonic()) > 0:
            if select.select([0], [], [], left)[0] and os.read(0, 1) in (b"q", b"Q", b""):
                return True
        return False


VERBS = verbs(
    Verb(
        name="stats",
        summary="show what VMs and their devices use",
        arguments=_stats_arguments,
        run=_stats,
        example=f"{PROGRAM} stats\n{PROGRAM} stats --json web",
        details="""\
CPU% is in percent of one CPU. MEM is guest RAM in use. RSS is what a process
has in memory beside that: the VM's own, the spawner that its devices are forked
from, and theirs; much of it is one and the same. IN and OUT are bytes per
second as the guest sees them. A VM that does not answer is 'unknown'.""",
    ),
    Verb(
        name="top",
        summary="show what VMs use, again and again",
        arguments=_top_arguments,
        run=_top,
        example=f"{PROGRAM} top\n{PROGRAM} top -n 3 -d 5s web",
        details="""\
On a terminal q leaves. The columns are those of stats. With --json each look is
a line, a list of what 'stats --json' says of each VM.""",
    ),
    Verb(
        name="metrics",
        summary="print metrics of VMs in Prometheus' text format",
        arguments=_metrics_arguments,
        run=_metrics,
        example=f"{PROGRAM} metrics >/var/lib/node_exporter/pyvmd.prom",
        details="""\
For the textfile collector of node_exporter and whatever reads the format. With
--json the same as a list of families, each with its metrics.""",
    ),
)
