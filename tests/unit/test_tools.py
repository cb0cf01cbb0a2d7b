"""The tools' command lines, and the parts of them that need no KVM and no emulated host."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
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


@pytest.mark.parametrize(
    ("tiers", "kvm", "runs"),
    [
        (
            {"check", "kvm", "guest"},
            True,
            {"check": UNIT, "kvm": ["tests/kvm"], "guest": ["tests/guest"]},
        ),
        (
            {"check", "kvm", "guest"},
            False,
            {"check": UNIT, "guest": ["tests/kvm", "tests/guest"]},
        ),
        ({"unit"}, True, {"unit": UNIT}),
        ({"guest"}, True, {"guest": ["tests/guest"]}),
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
        assert ("--no-skip" in run.command) == (run.name in {"kvm", "guest"})


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
