"""QEMU's own qmp-shell, unchanged, typed at by a person: it drives a VM with a guest that runs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Final

import pexpect
import pytest

from tests.guestvm import TREE, pyvmctl
from tests.kvm.lab import GUESTS
from tools.guest.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm

HELLO: Final = f"{TREE}/config/examples/hello.yaml"
SHELL: Final = os.path.join(os.path.dirname(sys.executable), "qmp-shell")
PROMPT: Final = r"\(QEMU\) "
DEADLINE: Final = 30  # seconds


class Shell:
    """One qmp-shell on a terminal, connected to the VM `hello`."""

    def __init__(self, runtime_dir: str) -> None:
        if not os.path.exists(SHELL):
            pytest.skip("no qmp-shell: the PyPI package qemu.qmp is not installed")
        home = os.path.dirname(runtime_dir)  # where it keeps its history
        self.terminal = pexpect.spawn(
            SHELL,
            [f"{runtime_dir}/hello/control.sock"],
            env={**os.environ, "HOME": home, "TERM": "dumb"},
            timeout=DEADLINE,
            encoding="utf-8",
        )
        self.terminal.expect("Welcome to the QMP low-level shell!")
        self.terminal.expect(r"Connected to QEMU [0-9.]+")
        self.terminal.expect(PROMPT)

    def say(self, line: str, *expected: str) -> None:
        """Type a command; each of `expected` is shown after it, in any order."""
        self.terminal.sendline(line)
        missing = list(expected)
        while missing:
            del missing[self.terminal.expect(missing)]
        self.terminal.expect(PROMPT)

    def event(self, name: str, reason: str = "") -> None:
        """Press return until an event is shown: the shell looks for new ones only then."""
        deadline = time.monotonic() + DEADLINE
        wanted = re.compile(rf"'event': '{name}'")
        while time.monotonic() < deadline:
            self.terminal.sendline("")
            self.terminal.expect(PROMPT)
            shown = self.terminal.before or ""
            if wanted.search(shown) and reason in shown:
                return
        raise AssertionError(f"no event {name} {reason}")

    def close(self) -> None:
        """Hang up."""
        self.terminal.close(force=True)


@pytest.fixture
def shell(runtime_dir: str) -> Iterator[Shell]:
    """A qmp-shell on a VM that runs."""
    done = pyvmctl("start", HELLO)
    assert done.returncode == 0, done.stderr
    made = None
    try:
        made = Shell(runtime_dir)
        yield made
    finally:
        if made is not None:
            made.close()
        pyvmctl("stop", "-a", "-f")


def status() -> str:
    """What pyvmctl says the VM is."""
    return pyvmctl("status", "hello").stdout.split()[-2]


def test_it_asks(shell: Shell) -> None:
    """Commands and their answers, and an error for one that is not there."""
    shell.say("query-commands", '"name": "system_powerdown"', '"name": "quit"')
    shell.say("query-status", '"status": "running"')
    shell.say("query-name", '"name": "hello"')
    shell.say("no-such-command", "the command 'no-such-command' has not been found")
    shell.say("eject force=7", "parameter 'force' must be a boolean|parameter 'id' is missing")


def test_it_stops_and_goes_on(shell: Shell) -> None:
    """With the events that tell of it."""
    shell.say("stop", '{"return": {}}')
    shell.event("STOP")
    assert status() == "paused"
    shell.say("cont", '{"return": {}}')
    shell.event("RESUME")
    assert status() == "running"


def test_it_resets(shell: Shell) -> None:
    """The guest boots anew, in the same process."""
    shell.say("system_reset", '{"return": {}}')
    shell.event("RESET", "host-qmp-system-reset")
    assert status() == "running"


def test_it_presses_the_power_button(shell: Shell) -> None:
    """To which the guest does not listen, and that is the answer."""
    shell.say("system_powerdown", "the guest does not listen to its power button")
    assert status() == "running"


def test_a_guest_that_listens_powers_off(runtime_dir: str) -> None:
    """Its own power-off is the end of the VM."""
    guest = {"kernel": f"{GUESTS}/stopping.bin", "cmdline": "b"}
    with open(f"{runtime_dir}/hello.yaml", "w") as file:
        json.dump({"name": "hello", "memory": "16M", "boot": guest}, file)
    assert pyvmctl("start", f"{runtime_dir}/hello.yaml").returncode == 0
    made = None
    try:
        console = Console(f"{runtime_dir}/hello/console.sock")
        console.expect("ready\n")
        console.close()
        made = Shell(runtime_dir)
        made.terminal.sendline("system_powerdown")
        made.terminal.expect(re.escape('{"return": {}}'))
        done = pyvmctl("wait", "--json", "--timeout", "60", "hello")
        assert (done.returncode, json.loads(done.stdout)["exit"]["how"]) == (0, "guest-poweroff")
    finally:
        if made is not None:
            made.close()
        pyvmctl("kill", "-a")


def test_it_ends_the_vm(shell: Shell) -> None:
    """As `stop -f` does; how it ended tells so."""
    shell.say("quit", '{"return": {}}')
    done = pyvmctl("wait", "--json", "--timeout", "60", "hello")
    assert (done.returncode, json.loads(done.stdout)["exit"]["how"]) == (0, "forced")
