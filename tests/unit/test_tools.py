"""The tools' command lines, and the parts of them that need no KVM and no emulated host."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest

TREE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def tool(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of the tree and return what it said."""
    command = [f"{TREE}/tools/{words[0]}", *words[1:]]
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def load(name: str) -> dict[str, Any]:
    """Return the globals of a tool that is a Python script without an extension."""
    return runpy.run_path(f"{TREE}/tools/{name}")


@pytest.mark.parametrize("name", ["setup", "check", "test", "kvmhost", "guest-image", "quickstart"])
def test_help(name: str) -> None:
    """--help explains, changes nothing, and succeeds."""
    done = tool(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: tools/{name}")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["setup", "--chek"],
        ["quickstart", "now"],
        ["test", "fuzz"],
        ["guest-image", "all"],
        ["kvmhost", "--memory", "1G"],
    ],
)
def test_a_wrong_argument_is_refused(words: list[str]) -> None:
    """A typing mistake does not start installing or testing."""
    assert tool(*words).returncode == 2


def test_kvmhost_leaves_the_commands_options_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from the first non-option on is the command's, "--" included."""
    parse = load("kvmhost")["parse_args"]
    monkeypatch.setattr(sys, "argv", ["kvmhost", "--memory", "8G", "sh", "-c", "x", "--cpus", "--"])
    args = parse()
    assert (args.memory, args.cpus) == ("8G", 1)
    assert args.command == ["sh", "-c", "x", "--cpus", "--"]
    monkeypatch.setattr(sys, "argv", ["kvmhost", "--", "--odd"])
    assert parse().command == ["--odd"]


def test_kvmhost_does_not_nest() -> None:
    """Inside a host another one is refused, and with --if-needed not needed."""
    refused = tool("kvmhost", "true", PYVMD_KVMHOST="1")
    assert refused.returncode == 125
    assert "already inside" in refused.stderr
    direct = tool("kvmhost", "--if-needed", "sh", "-c", "echo here; exit 5", PYVMD_KVMHOST="1")
    assert (direct.returncode, direct.stdout) == (5, "here\n")


def test_kvmhost_shares_each_place_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory is shared for writing unless /tmp or the work tree covers it."""
    writable = load("kvmhost")["writable_directories"]
    for here, expected in (
        (TREE, ["/tmp"]),
        ("/tmp", ["/tmp"]),
        ("/usr/share", ["/tmp", "/usr/share"]),
    ):
        monkeypatch.chdir(here)
        assert writable() == expected


def test_setup_installs_nothing_inside_a_kvmhost(tmp_path: Path) -> None:
    """The host shares the machine's files, so what is missing there is only named."""
    done = tool("setup", PYVMD_KVMHOST="1", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1
    assert "setup: missing: an up-to-date .venv (run tools/setup)" in done.stderr


UNIT = ["tests/unit", "tests/conformance"]
GUEST = {
    f"guest-{path.stem.removeprefix('test_')}": [f"tests/guest/{path.name}"]
    for path in Path(TREE, "tests/guest").glob("test_*.py")
}


@pytest.mark.parametrize(
    ("tiers", "kvm", "runs"),
    [
        (
            {"check", "kvm", "peers", "guest"},
            True,
            {"check": UNIT, "kvm": ["tests/kvm"], "peers": ["tests/peers"], **GUEST},
        ),
        (
            {"check", "kvm", "peers", "guest"},
            False,
            {"check": UNIT, "kvm": ["tests/kvm"], "peers": ["tests/peers"], **GUEST},
        ),
        ({"unit"}, True, {"unit": UNIT}),
        ({"peers"}, False, {"peers": ["tests/peers"]}),
        ({"guest"}, True, GUEST),
    ],
)
def test_no_tier_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tiers: set[str], kvm: bool, runs: dict[str, list[str]]
) -> None:
    """Without /dev/kvm the kvm tier moves to the emulated host instead of being skipped."""
    plan = load("test")["plan"]
    monkeypatch.setattr(os, "access", lambda _path, _mode: kvm)
    planned = plan(tiers)
    assert {run.name: run.paths for run in planned} == runs
    for run in planned:
        assert ("--no-skip" in run.command) == (run.paths != UNIT)
        native = run.name in ("check", "unit", "peers") or (kvm and run.name == "kvm")
        assert ("tools/kvmhost" in run.command) != native
        assert run.beside == run.name.startswith("guest-")


def test_a_host_that_froze_is_begun_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once, and in plain sight; whatever else a run ends with stands."""
    test = load("test")
    for codes, expected in (((123, 0), "0 passed, 0 failed"), ((123, 123), "0 passed, 1 failed")):
        script = tmp_path / "host"
        (tmp_path / "codes").write_text("\n".join(map(str, codes)))
        script.write_text(
            f"#!/bin/sh\ncd {tmp_path}; code=$(head -n 1 codes); sed -i 1d codes; exit $code\n"
        )
        script.chmod(0o700)
        count = test["execute"](test["Run"]("frozen", [str(script)], []), [])
        assert str(count).startswith(expected)
        assert capfd.readouterr().out.count("again, on another emulated host") == 1


def test_lines_of_what_runs_beside_others_are_marked(capfd: pytest.CaptureFixture[str]) -> None:
    """Both outputs, with the name first; the status is the command's own."""
    call = load("test")["call"]
    assert call(["sh", "-c", "echo one; echo two >&2; exit 7"], "guest-disks| ") == 7
    assert capfd.readouterr().out == "guest-disks| one\nguest-disks| two\n"


def test_a_frozen_host_is_noticed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One without a pulse is ended, one whose pulse goes on is waited for, up to its timeout."""
    kvmhost = load("kvmhost")
    watch = kvmhost["watch"]
    watch.__globals__.update(PULSE=0.05, FROZEN=0.3)
    beat = f"""
import runpy
pulse = runpy.run_path("{TREE}/tools/kvmhost")["pulse"]
pulse.__globals__["PULSE"] = 0.2
pulse("{tmp_path}/pulse")
"""
    with subprocess.Popen(["sleep", "60"]) as host:
        assert watch(host, str(tmp_path), None) == 123
        assert "the host has frozen" in capfd.readouterr().err
        with subprocess.Popen([sys.executable, "-c", beat]) as beating:
            watch.__globals__["FROZEN"] = 60
            while not (tmp_path / "pulse").exists():
                assert watch(host, str(tmp_path), 0.1) == 124
            watch.__globals__["FROZEN"] = 5
            assert watch(host, str(tmp_path), 7) == 124
            beating.kill()
        host.kill()
        assert watch(host, str(tmp_path), None) == 0


def test_there_are_as_many_hosts_as_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more waits, says for whom, and goes on when that has ended."""
    host_lock = load("kvmhost")["host_lock"]
    inside = host_lock.__wrapped__.__globals__  # of the tool
    said: Queue[str] = Queue()
    inside.update(LOCK=f"{tmp_path}/lock", say=said.put)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with ThreadPoolExecutor() as pool:
        with host_lock(), host_lock():
            third = pool.submit(lambda: host_lock().__enter__())
            assert said.get(timeout=60) == f"waiting for a kvmhost to end: process {os.getpid()}"
            assert not third.done()
        third.result(60)


def test_counts_come_from_pytests_report(tmp_path: Path) -> None:
    """Errors count as failed; a run that left no report counts nothing."""
    count_of = load("test")["count_of"]
    report = tmp_path / "report.xml"
    report.write_text('<a><testsuite errors="1" failures="2" skipped="3" tests="10"/></a>')
    assert str(count_of(str(report))) == "4 passed, 3 failed, 3 skipped"
    assert str(count_of(str(tmp_path / "none"))) == "0 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize(
    ("tier", "strict", "outcome"),
    [("kvm", True, "failed"), ("kvm", False, "skipped"), ("", True, "skipped")],
)
def test_no_skip_turns_a_skip_of_a_tier_into_a_failure(
    tier: str, strict: bool, outcome: str
) -> None:
    """What must run cannot be left out in silence; elsewhere a skip stays one."""
    item: Any = SimpleNamespace(
        get_closest_marker=lambda name: name == tier,
        config=SimpleNamespace(getoption=lambda _name: strict),
    )
    report: Any = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("f", 1, "no KVM"))
    hook = conftest.pytest_runtest_makereport(item)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome
    assert outcome == "skipped" or "no KVM" in report.longrepr
