"""pyvmctl events: a stream of what the VM tells, which may be anything."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli_fakes import DEADLINE, TOP
from vmm import verb_events
from vmm.qmpclient import QmpClient
from vmm.verb_events import line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_events_come_as_they_happen_and_end_with_the_vm(
    words: list[str], pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """Each is on its line at once; the stream ends with the VM, status 0."""
    fake_vm()
    following = subprocess.Popen(
        [sys.executable, "-m", "vmm.cli", "events", *words, "web"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    deadline = time.monotonic() + DEADLINE
    while not select.select([following.stdout], [], [], 0)[0]:  # it may not listen yet
        assert time.monotonic() < deadline
        assert pyvmctl("reset", "web") == 0
    first = following.stdout.readline()
    assert pyvmctl("stop", "-f", "web") == 0
    following.communicate(timeout=DEADLINE)
    assert following.returncode == 0
    if words:
        event = json.loads(first)
        assert (event["event"], event["data"]["reason"]) == ("RESET", "host-qmp-system-reset")
    else:
        stamp, rest = first.rstrip().split(" ", 1)
        assert stamp.endswith("Z")
        assert rest == "RESET guest=false reason=host-qmp-system-reset"


def test_events_end_after_a_time(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Nothing happened, and that is no failure."""
    fake_vm()

    assert pyvmctl("events", "--timeout", "0.05", "web") == 0
    assert pyvmctl.out == ""


def test_events_of_a_vm_that_does_not_run(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """There will be none: a failure at once."""
    fake_vm()
    assert pyvmctl("stop", "-f", "web") == 0

    assert pyvmctl("events", "web") == 1
    assert "web: cannot follow vm that is not running" in pyvmctl.err
    assert pyvmctl("events", "ghost") == 3


def test_who_is_thrown_out_does_not_take_it_for_the_end(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM runs on: a failure, with its reason."""
    fake_vm()

    def none(control: QmpClient, _seconds: float | None) -> Iterator[dict[str, Any]]:
        control.gone = True
        return iter(())

    monkeypatch.setattr(QmpClient, "events", none)
    monkeypatch.setattr(verb_events, "END_SECONDS", 0.05)
    assert pyvmctl("events", "web") == 1
    assert "web: has thrown this client out (others need the place)" in pyvmctl.err


STAMP = {"seconds": 1_795_486_625, "microseconds": 425_449}


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ({"event": "STOP", "timestamp": STAMP}, "2026-11-24T02:17:05.425Z STOP"),
        (
            {"event": "E", "data": {"a": "x y", "b": 1, "c": [True]}, "timestamp": STAMP},
            "2026-11-24T02:17:05.425Z E a=x y b=1 c=[true]",
        ),
        ({"event": "E"}, "- E"),
        ({"event": 7, "data": "no", "timestamp": 3}, "- 7"),
        ({"event": "E", "timestamp": {"seconds": 1 << 70, "microseconds": 0}}, "- E"),
        ({"event": "E", "timestamp": {"seconds": True, "microseconds": 0}}, "- E"),
        ({"event": "E", "timestamp": {"seconds": 1, "microseconds": 10**6}}, "- E"),
        ({"event": "a\x1b[2Jb", "data": {"\n": "\r"}}, "- a\\x1b[2Jb \\n=\\r"),
    ],
)
def test_a_line_cannot_be_broken(event: dict[str, Any], shown: str) -> None:
    """A VM process that its guest has taken over steers no terminal and breaks nothing."""
    assert line(event) == shown
