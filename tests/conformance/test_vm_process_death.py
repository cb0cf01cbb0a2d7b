"""A VM process killed with SIGKILL: what the next look at its runtime directory finds and does."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError, NoSuchVmError
from vmm import survey
from vmm.qmpclient import QmpClient
from vmm.rundir import RunDir

if TYPE_CHECKING:
    from pathlib import Path


def vm_process() -> int:
    """Fork a process that has VM web, with sockets and all, and hangs; return its pid."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)  # should the test fail to end us
            rundir = RunDir("web")
            rundir.take()
            doors = [rundir.listen_control(), rundir.listen_console()]
            rundir.running({"name": "web"})
            os.write(done, b"x")
            while doors:
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(done)
    return pid


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The directory of a VM that was killed a moment ago."""
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(tmp_path / "run"))
    pid = vm_process()
    assert survey.lookup("web").pid == pid
    with pytest.raises(HostError, match=rf"already running \(pid {pid}\)"):
        RunDir("web").take()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return str(tmp_path / "run" / "web")


def test_status_finds_it_crashed_and_cleans_up(killed: str) -> None:
    """The survey says crashed, removes sockets and pid, and writes the end down."""
    info = survey.lookup("web")
    assert (info.state, info.pid, info.exit["reason"]) == ("crashed", 0, "crashed")
    assert sorted(os.listdir(killed)) == ["exit.json", "lock", "vm.json"]


def test_control_clients_are_told_it_does_not_run(killed: str) -> None:
    """A socket nobody listens on means: not running."""
    with pytest.raises(NoSuchVmError, match="VM web is not running"):
        QmpClient(f"{killed}/control.sock")


def test_the_next_start_works_at_once(killed: str) -> None:
    """No command is needed in between, and the number is the same."""
    rundir = RunDir("web")
    rundir.take()
    rundir.listen_control().close()
    rundir.running({"name": "web"})
    assert rundir.id == 1
    assert survey.lookup("web").state == "running"
    rundir.close()


def test_waiting_notices_the_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wait_end() returns when the process dies, without a word from it."""
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(tmp_path / "run"))
    pid = vm_process()
    assert survey.wait_end("web", 0.02) is None
    killer = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
    killer.start()
    info = survey.wait_end("web", 10.0)
    killer.join()
    os.waitpid(pid, 0)
    assert info is not None
    assert info.state == "crashed"
