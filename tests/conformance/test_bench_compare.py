"""tools/bench compare measures both sides with the same driver, and says what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.vhostlab import TOP
from tools.benches.backends import Image, Ours, Program, Qsd, running
from tools.benches.bars import Chart, draw
from tools.benches.compare import CASES, Row, file_system, report
from tools.viodriver.vhostuser import VhostUser

SVG = "{http://www.w3.org/2000/svg}"


def turn(iops: float, cpu: float) -> dict[str, float]:
    """Figures of one turn."""
    rest = ("mib_per_s", "request_us", "kicks", "calls", "driver_busy", "pss", "pss_anon")
    return {"iops": iops, "cpu_us": cpu, **dict.fromkeys(rest, 0.5)}


@pytest.fixture
def row() -> Row:
    turns = {
        "pyvmd": [turn(200, 1), turn(300, 2), turn(600, 3)],
        "QSD threads": [turn(50, 9), turn(60, 9), turn(70, 9)],
        "QSD io_uring": [turn(100, 4), turn(100, 4), turn(200, 4)],
    }
    return Row(CASES[0], "pinned", "poll", turns)


def test_the_ratio_is_turn_by_turn_and_to_the_best(row: Row) -> None:
    """Medians of ratios, not ratios of medians."""
    assert row.best == "QSD io_uring"
    assert row.ratio("iops") == 3
    assert row.ratio("cpu_us") == 0.5
    assert row.reached
    assert not row._replace(case=row.case._replace(cpu=0.4)).reached
    assert not row._replace(case=row.case._replace(iops=3.5)).reached
    assert row._replace(case=row.case._replace(cpu=0.0)).reached


def test_the_table(row: Row) -> None:
    """A line per back end; ratio and verdict in ours."""
    lines = report([row]).splitlines()
    assert len(lines) == 2 + 3
    assert "raw randread 4K depth 32, pinned, poll" in lines[2]
    assert "3.00 / 0.50" in lines[2]
    assert "0 (0–1)" in lines[2]


def test_the_picture() -> None:
    """It is XML; a bar per back end and chart, as long as its value is large; words are escaped."""
    groups = [("a & b", {"x": (1.0, 0.5, 2.0), "y": (4.0, 4.0, 4.0)})]
    picture = ElementTree.fromstring(draw([Chart("<t>", groups), Chart("u", groups)]))  # noqa: S314
    bars = [float(bar.attrib["width"]) for bar in picture.iter(f"{SVG}rect")][3:]
    assert len(bars) == 4
    assert bars[1] == pytest.approx(4 * bars[0])
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"a & b", "<t>", "u", "x", "y"} <= set(words)


@pytest.mark.parametrize("kind", [Ours(sys.executable), Qsd("threads", iothread=True)])
def test_what_a_back_end_uses(kind: Ours | Qsd, tmp_path: Path) -> None:
    """All its processes, their time and their memory."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    image = Image(tmp_path / "disk.img", "raw", False)
    with running(kind, image, f"{tmp_path}/s") as program, VhostUser(f"{tmp_path}/s") as device:
        device.start()
        assert program.processes()[0] == program.pid
        assert (len(program.processes()) > 1) == isinstance(kind, Ours)
        assert program.cpu_seconds() > 0
        assert 0 < program.pss()["pss_anon"] < program.pss()["pss"] < 200


def test_time_of_a_process_that_does_nothing() -> None:
    """It does not grow."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        program = Program(process.pid)
        before = program.cpu_seconds()
        assert program.cpu_seconds() == pytest.approx(before, abs=0.01)
        process.kill()


def test_a_whole_run(tmp_path: Path) -> None:
    """One case, one turn: a table, JSON, Markdown and a picture."""
    done = subprocess.run(
        [
            *(sys.executable, "tools/bench", "compare", "--no-realtime", "--memory", tmp_path),
            *("--pairs", "1", "--seconds", "0.02", "--size", "2", "--python", sys.executable),
            *("--case", "raw randread 4K depth 32", "--placement", "unpinned", "--wait", "call"),
        ],
        cwd=TOP,
        env={**os.environ, "PYVMD_CACHE": str(tmp_path)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=110,
    )
    table = (tmp_path / "bench/compare.md").read_text()
    assert table in done.stdout
    figures = json.loads((tmp_path / "bench/compare.json").read_text())["figures"]
    [row] = figures["rows"]
    assert set(row["back_ends"]) == {
        *("pyvmd", "QSD threads", "QSD io_uring", "QSD io_uring iothread")
    }
    for turns in row["turns"].values():
        assert len(turns) == 1
        assert turns[0]["iops"] > 0
        assert turns[0]["cpu_us"] > 0
        assert 0 <= turns[0]["driver_busy"] <= 1
    ElementTree.fromstring((tmp_path / "bench/compare.svg").read_text())  # noqa: S314
    assert f"direct: {file_system(tmp_path)}" in table
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_by_a_signal_it_leaves_nothing(number: int, tmp_path: Path) -> None:
    """Neither images nor sockets nor back ends."""
    with subprocess.Popen(
        [
            *(sys.executable, "tools/bench", "compare", "--no-realtime", "--memory", tmp_path),
            *("--pairs", "1", "--seconds", "100", "--size", "2", "--python", sys.executable),
            *("--case", "raw randread 4K depth 32", "--placement", "unpinned", "--wait", "poll"),
        ],
        cwd=TOP,
        env={**os.environ, "PYVMD_CACHE": str(tmp_path), "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
    ) as bench:
        socket = f"{tmp_path}/pyvmd-compare-{bench.pid}.sock"
        end = time.monotonic() + 60
        while f"{socket}\n" not in Path("/proc/net/unix").read_text():
            assert bench.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        [back_end] = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        bench.send_signal(number)
        bench.wait(60)
    assert bench.returncode in (128 + number, -number)
    assert not Path(f"/proc/{back_end}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]
    assert list((tmp_path / "bench").iterdir()) == []


def test_the_file_system_of_a_directory() -> None:
    """The innermost mount counts."""
    assert file_system(Path("/proc/self")) == "proc on proc"
