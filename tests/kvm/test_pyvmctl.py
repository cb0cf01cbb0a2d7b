"""pyvmctl end to end: the real command, the real VM process, bare-metal guests on this KVM."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any, Final

import pexpect
import pytest

from tests.guestvm import TREE, pyvmctl
from tests.kvm.lab import GUESTS
from tests.unit.test_startup_imports import strangers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kvm

HELLO: Final = f"{TREE}/config/examples/hello.yaml"
PORTS_STATUS: Final = 0x10 << 1 | 1  # the guest writes 0x10, isa-debug-exit makes it this
PROMPT: Final = "hello> "
DEADLINE: Final = 60  # seconds; also inside tools/kvmhost, where everything takes ten times as long


@pytest.fixture(autouse=True)
def vms_end(runtime_dir: str) -> Iterator[str]:
    """End whatever VM a test leaves behind."""
    yield runtime_dir
    pyvmctl("stop", "-a", "-f")


def on_terminal(*words: str) -> pexpect.spawn:
    """Run pyvmctl on a terminal."""
    return pexpect.spawn(
        sys.executable, ["-m", "vmm.cli", *words], cwd=TREE, timeout=DEADLINE, encoding="utf-8"
    )


def finish(client: pexpect.spawn) -> int:
    """Wait for the end of a command on a terminal; its exit status."""
    client.expect(pexpect.EOF)
    client.close()
    status: int = client.exitstatus
    return status


def start(file: str = HELLO) -> dict[str, Any]:
    """Start a VM, detached; what `start --json` says."""
    done = pyvmctl("start", "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def status(name: str = "hello") -> dict[str, Any]:
    """What `status --json` says."""
    facts: dict[str, Any] = json.loads(pyvmctl("status", "--json", name).stdout)
    return facts


@pytest.fixture
def guest_yaml(runtime_dir: str) -> Callable[[str], str]:
    """Makes a vm.yaml for one of the hand-made guests; they end by the debug-exit port."""

    def make(guest: str) -> str:
        path = f"{runtime_dir}/{guest}.yaml"
        with open(path, "w") as file:
            json.dump(
                {
                    "name": guest,
                    "memory": "16M",
                    "boot": {"kernel": f"{GUESTS}/{guest}.bin"},
                    "debug": {"console": True, "exit": True},
                },
                file,
            )
        return path

    return make


def test_a_day_of_a_vm() -> None:
    """Start, status, console, leave, attach again with what was printed, power off, status."""
    started = start()
    row = pyvmctl("status").stdout.splitlines()[1].split()
    assert row[:4] == ["1", str(started["pid"]), "1", "16.0M"]
    assert row[-4:] == ["console", status()["owner"], "running", "hello"]

    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)  # printed before anybody was there to see it
    client.send("first\r")
    client.expect_exact("hello does not know: first")
    client.expect_exact(PROMPT)
    client.send("\r~.")
    client.expect_exact("left hello")
    assert finish(client) == 0
    assert status()["state"] == "running"

    client = on_terminal("console", "hello")
    client.expect_exact("hello does not know: first")
    client.expect_exact(PROMPT)
    client.send("poweroff\r")
    client.expect_exact("terminated vm 1")
    assert finish(client) == 0

    assert pyvmctl("status").stdout.splitlines()[1].split()[-1] == "hello"
    assert (status()["state"], status()["pid"]) == ("stopped", None)
    assert pyvmctl("wait", "hello").returncode == 0
    assert "ends: guest power-off" in pyvmctl("log", "hello").stdout


def test_start_c_attaches_and_ends_with_the_guest() -> None:
    """`start -c` shows the guest at once and has the VM's exit status."""
    client = on_terminal("start", "-c", HELLO)
    client.expect_exact("started vm 1 successfully: hello")
    client.expect_exact(PROMPT)
    client.send("poweroff\r")
    assert finish(client) == 0


def test_reboot_in_the_guest_stays_the_same_vm() -> None:
    """A guest's reset is a reset in place: same process, new greeting, the console stays."""
    pid = start()["pid"]
    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)
    client.send("reboot\r")
    client.expect_exact("Hello from a guest")
    client.send("\x1d")
    assert finish(client) == 0
    assert status()["pid"] == pid
    assert status()["live"]["resets"] == 1


def test_two_viewers_see_the_same() -> None:
    """Several consoles at once: both show the output, either may type."""
    start()
    one, two = on_terminal("console", "hello"), on_terminal("console", "hello")
    one.expect_exact(PROMPT)
    two.expect_exact(PROMPT)
    one.send("from one\r")
    two.expect_exact("hello does not know: from one")
    two.send("from two\r")
    one.expect_exact("hello does not know: from two")
    one.send("\x1d")
    two.send("\x1d")
    assert (finish(one), finish(two)) == (0, 0)


def test_pause_and_unpause() -> None:
    """A paused guest answers nothing; what was typed meanwhile is answered afterwards."""
    start()
    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)
    assert pyvmctl("pause", "hello").stderr == "paused vm 1 successfully\n"
    assert status()["state"] == "paused"
    client.send("late\r")
    assert client.expect_exact(["hello does not know", pexpect.TIMEOUT], timeout=0.3) == 1

    assert pyvmctl("unpause", "hello").stderr == "unpaused vm 1 successfully\n"
    client.expect_exact("hello does not know: late")
    assert status()["state"] == "running"
    client.close(force=True)


def test_reset_verb() -> None:
    """`reset` is the reset button: the guest starts over, the process stays."""
    pid = start()["pid"]
    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)
    assert pyvmctl("reset", "hello").returncode == 0
    client.expect_exact("Hello from a guest")
    assert status()["pid"] == pid
    client.close(force=True)


def test_stop_f_and_a_second_start() -> None:
    """`stop -f` ends the VM with its process; the name can be started again at once."""
    first = start()
    ended = os.pidfd_open(first["pid"])
    assert pyvmctl("stop", "-f", "hello").stderr == "forced to terminate vm 1\n"
    assert select.select([ended], [], [], 0)[0]
    os.close(ended)

    second = start()
    assert (second["id"], second["pid"] == first["pid"]) == (1, False)
    done = pyvmctl("start", HELLO)
    assert done.returncode == 1
    assert f"VM hello is already running (pid {second['pid']})" in done.stderr


def test_kill_9_of_the_vm_process(runtime_dir: str) -> None:
    """A viewer is told, status says crashed, nothing of the running VM is left, start works."""
    pid = start()["pid"]
    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)

    os.kill(pid, signal.SIGKILL)

    client.expect_exact("terminated vm 1")
    assert finish(client) == 1
    assert status()["state"] == "crashed"
    left = set(os.listdir(f"{runtime_dir}/hello"))
    assert not left & {"pid", "control.sock", "console.sock"}
    start()
    assert status()["state"] == "running"


def test_kill_9_of_the_console_client() -> None:
    """The terminal is cooked again though the client could do nothing; the VM does not notice."""
    start()
    client = on_terminal("console", "hello")
    client.expect_exact(PROMPT)
    assert not termios.tcgetattr(client.child_fd)[3] & termios.ISIG

    client.kill(signal.SIGKILL)

    deadline = time.monotonic() + DEADLINE
    while not termios.tcgetattr(client.child_fd)[3] & termios.ISIG:
        assert time.monotonic() < deadline, "the terminal stays raw"
        select.select([], [], [], 0.005)
    assert termios.tcgetattr(client.child_fd)[3] & termios.ICANON
    client.close(force=True)
    assert status()["state"] == "running"


def test_a_guest_ends_with_its_own_status(guest_yaml: Callable[[str], str]) -> None:
    """What a guest writes to debug-exit is the status of `start -F` and of `wait`."""
    done = pyvmctl("start", "-F", guest_yaml("ports"))
    assert done.returncode == PORTS_STATUS, done.stderr
    assert f"guest exit with status {PORTS_STATUS}" in done.stderr
    assert pyvmctl("wait", "ports").returncode == PORTS_STATUS


def test_a_reset_storm_ends_the_vm(guest_yaml: Callable[[str], str]) -> None:
    """A guest that resets again and again is stopped, and that is a failure."""
    done = pyvmctl("start", "-F", guest_yaml("storm"))
    assert done.returncode == 1
    assert "resets" in done.stderr
    assert pyvmctl("wait", "storm").returncode == 1


def test_foreground_ends_by_signal_in_good_order(runtime_dir: str) -> None:
    """-F under a service manager: SIGTERM ends the VM with status 0 and nothing left running."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmm.cli", "start", "-F", HELLO],
        cwd=TREE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "started vm 1" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        _, rest = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert "SIGTERM" in rest
    assert "control.sock" not in os.listdir(f"{runtime_dir}/hello")


def test_a_missing_kernel_leaves_nothing(runtime_dir: str) -> None:
    """A start that fails in the VM process says why here, and no directory stays behind."""
    path = f"{runtime_dir}/bad.yaml"
    with open(path, "w") as file:
        file.write("name: bad\nboot: {kernel: not-there}\n")
    done = pyvmctl("start", path)
    assert done.returncode in (1, 2)
    assert "not-there" in done.stderr
    assert not os.path.exists(f"{runtime_dir}/bad")
    assert pyvmctl("status", "bad").returncode == 3


def test_the_whole_start_imports_only_what_it_may(guest_yaml: Callable[[str], str]) -> None:
    """As tests/unit/test_startup_imports.py, but through a whole life, late imports included."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom vmm import cli\n"
        "status = cli.main(['start', '-F', sys.argv[1]])\n"
        "print(status, *sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, guest_yaml("ports")],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    code, *names = done.stdout.split()
    assert int(code) == PORTS_STATUS
    assert strangers(names) == []


def test_doctor_examines_this_host() -> None:
    """With a usable /dev/kvm a VM can be started, and each fact is something JSON can hold."""
    done = pyvmctl("doctor", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["can_start"] is True
    assert isinstance(report["stock_kernels"], bool)
    assert report["checks"]["kvm"]["value"]["api_version"] == 12
    assert report["checks"]["memory"]["value"] > 0

    lines = pyvmctl("doctor").stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(report["checks"])
