"""pyvmctl console, on a terminal and on pipes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pexpect
import pytest

from tests.unit.cli_fakes import DEADLINE, TOP, log_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl


def console(*words: str, stdin: str) -> subprocess.CompletedProcess[str]:
    """Run `pyvmctl console` on pipes."""
    command = [sys.executable, "-m", "vmm.cli", "console", *words]
    return subprocess.run(
        command, cwd=TOP, input=stdin, text=True, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize("status", [0, 7])
def test_console_ends_with_the_vm(status: int, fake_vm: Callable[..., FakeVm]) -> None:
    """When the VM ends, the console says so and has the VM's own exit status."""
    fake_vm(status=status)

    done = console("web", stdin="poweroff\r")

    assert done.stdout.strip() == "poweroff"
    assert done.stderr == "terminated vm 1\n"
    assert done.returncode == status


def test_console_no_wait_leaves_at_the_end_of_input(
    fake_vm: Callable[..., FakeVm], pyvmctl: Pyvmctl
) -> None:
    """With --no-wait the VM goes on, and what was typed has arrived."""
    fake_vm()

    done = console("--no-wait", "web", stdin="hello\r")

    assert (done.returncode, done.stderr) == (0, "")
    assert console("--no-wait", "web", stdin="").returncode == 0
    assert pyvmctl("stop", "-f", "web") == 0


def test_console_of_a_stopped_vm(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A VM that is known but does not run has no console."""
    fake_vm().kill()

    assert pyvmctl("console", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: is not running ('pyvmctl start web' starts it)\n"


def test_console_break_is_a_command(fake_vm: Callable[..., FakeVm], run_root: Path) -> None:
    """`~#` on a terminal asks the control socket for a BREAK; ^] leaves."""
    fake_vm()
    client = pexpect.spawn(
        sys.executable, ["-m", "vmm.cli", "console", "web"], cwd=TOP, timeout=DEADLINE
    )
    client.expect("connected to web; \\^] leaves")
    client.expect("explains\r\n")
    client.send("~#x")
    client.expect("x")  # echoed by the fake: raw mode is on and all before has been done
    client.send("\x1d")
    client.expect("left web")
    client.expect(pexpect.EOF)
    client.close()

    assert client.exitstatus == 0
    assert "asked: break" in log_of(run_root)
