"""`pyvmctl stop` and `reboot` against guests that obey, ignore, misunderstand and misbehave.

Real VMs by the real command line; the guest is tests/kvm/guests/stopping.S, which plays a vmmci
driver, a power button's, a keyboard's, or nobody's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.errors import HostError
from tests.guestvm import TREE, pyvmctl
from tests.kvm.lab import GUESTS, wait_for
from vmm.qmpclient import QmpClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.guestvm import GuestVm

pytestmark = pytest.mark.kvm

LONG: Final = "60s"  # longer than any guest here takes, also on a slow host
SHORT: Final = "0.2s"  # for what never comes


@pytest.fixture
def start(start_vm: Callable[[dict[str, Any]], GuestVm]) -> Callable[..., GuestVm]:
    """Return a function that starts a guest of one behaviour and waits until it is ready."""

    def begin(mode: str, *, ack: str = LONG, down: str = LONG, **keys: Any) -> GuestVm:
        config = {
            "name": "vm",
            "memory": "16M",
            "boot": {"kernel": f"{GUESTS}/stopping.bin", "cmdline": mode},
            "vmmci": {"ack-timeout": ack, "shutdown-timeout": down},
            **keys,
        }
        vm = start_vm(config)
        vm.console.expect("ready\n" if mode != "s" else "halts\n")
        return vm

    return begin


def ended(vm: GuestVm) -> tuple[int, str, str]:
    """Wait for the end: exit status, how, and in whose words."""
    status = vm.wait()
    facts = json.loads(pyvmctl("wait", "--json", vm.name).stdout)
    return status, facts["exit"].get("how", ""), facts["exit"].get("detail", "")


def steps(vm: GuestVm) -> list[str]:
    """Return the ladder's steps in the log, without times and details."""
    lines = [line.split(" ", 2)[2] for line in vm.log().splitlines()]
    return [
        line.split(": ")[2] for line in lines if line.startswith(("vm: stop: ", "vm: reboot: "))
    ]


# A guest that does as it is asked.


@pytest.mark.parametrize("mode", ["g", "j"])
def test_stop_by_vmmci(mode: str, start: Callable[..., GuestVm]) -> None:
    """The driver is asked to shut down, acknowledges, and powers off: status 0, "stop"."""
    vm = start(mode)
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    vm.console.expect("command 1\n")
    assert ended(vm) == (0, "stop", "guest power-off (ACPI S5), as asked to stop")
    assert steps(vm) in (["vmmci asked", "vmmci taken"], ["vmmci asked"])  # it was that quick
    wrong = [line for line in vm.log().splitlines() if "driver wrote command" in line]
    assert len(wrong) == (3 if mode == "j" else 0)


def test_stop_by_power_button(start: Callable[..., GuestVm]) -> None:
    """Without a driver, a guest that listens to its power button is asked by that."""
    vm = start("b")
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    vm.console.expect("button\n")
    assert ended(vm)[:2] == (0, "stop")
    assert steps(vm) == ["vmmci unable", "power button asked"]


def test_stop_by_ctrl_alt_del(start: Callable[..., GuestVm]) -> None:
    """Without either, by the keyboard; that resets the guest, which ends the VM."""
    vm = start("k", vmmci=False)
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    vm.console.expect("delete\n")
    assert ended(vm) == (0, "stop", "guest reset (i8042), as asked to stop")
    assert steps(vm) == ["vmmci unable", "power button unable", "Ctrl-Alt-Del asked"]


def test_stop_of_a_guest_that_always_resets(start: Callable[..., GuestVm]) -> None:
    """Old guests cannot power off: asked to stop, their reset is the end, as in vmd."""
    vm = start("o")
    assert pyvmctl("stop", "vm").returncode == 0
    assert ended(vm)[:2] == (0, "stop")


@pytest.mark.parametrize(
    ("mode", "command"), [("g", "command 2\n"), ("o", "command 2\n"), ("b", "button\n"), ("k", "")]
)
def test_reboot(mode: str, command: str, start: Callable[..., GuestVm]) -> None:
    """Whatever the guest was asked by, and whether it resets or powers off: it boots again.

    In place: same process, same device processes. And it can be asked again.
    """
    vm = start(mode)
    before = vm.status()
    for count in (1, 2):
        assert pyvmctl("reboot", "-w", "vm").stderr.endswith("\nrebooted vm 1\n")
        vm.console.expect(f"{command}boot\n" if command else "boot\n")
        vm.console.expect("ready\n")
        assert vm.status()["live"]["resets"] == count
    after = vm.status()
    assert after["pid"] == before["pid"]
    pids = [[row["pid"] for row in facts["live"]["devices"]] for facts in (before, after)]
    assert pids[0] == pids[1]
    assert (after["state"], after["live"]["ladder"]) == ("running", None)


# A guest that does not.


def test_a_guest_that_never_acknowledges(start: Callable[..., GuestVm]) -> None:
    """Nobody takes note in time: after the last way the VM is ended, status 124, "timeout"."""
    vm = start("n", ack=SHORT)
    done = pyvmctl("stop", "-w", "vm")
    assert done.returncode == 0
    assert done.stderr.endswith("vm: asked to stop, but the guest took note of nothing\n")
    assert ended(vm)[:2] == (124, "timeout")
    assert steps(vm) == [
        "vmmci asked",
        "vmmci ignored",
        "power button unable",
        "Ctrl-Alt-Del asked",
        "Ctrl-Alt-Del ignored",
    ]


def test_a_guest_that_acknowledges_and_hangs(start: Callable[..., GuestVm]) -> None:
    """It took note, so nothing else is tried; when its time is up it is ended."""
    vm = start("h", down=SHORT)
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    assert ended(vm)[:2] == (124, "timeout")
    assert steps(vm) == ["vmmci asked", "vmmci taken", "vmmci overdue"]


def test_a_guest_that_acknowledges_something_else(start: Callable[..., GuestVm]) -> None:
    """The wrong command is no acknowledgement."""
    vm = start("w", ack=SHORT)
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    assert ended(vm)[:2] == (124, "timeout")
    assert steps(vm)[:2] == ["vmmci asked", "vmmci ignored"]
    assert "driver wrote command 2, but 1 is asked" in vm.log()


def test_a_driver_that_goes_away_half_way(start: Callable[..., GuestVm]) -> None:
    """Status 0 after the acknowledgement withdraws nothing: the time goes on."""
    vm = start("u")
    assert pyvmctl("stop", "vm").returncode == 0
    vm.console.expect("gone\n")
    facts = vm.status()
    assert facts["state"] == "stopping"
    assert facts["live"]["ladder"] == {"goal": "stop", "way": "vmmci", "state": "taken"}
    assert pyvmctl("stop", "-f", "vm").returncode == 0


def test_a_guest_that_hangs_is_rebooted_all_the_same(start: Callable[..., GuestVm]) -> None:
    """Asked to reboot, a guest that is not down in time is reset, where vmd would end it."""
    vm = start("h", down=SHORT)
    assert pyvmctl("reboot", "-w", "vm").returncode == 0
    vm.console.expect("ready\n")
    assert vm.status()["state"] == "running"
    assert "resets: asked to reboot, but the guest took note and was not down" in vm.log()


def test_a_guest_that_resets_again_and_again(start: Callable[..., GuestVm]) -> None:
    """The reset it was asked for is one; those that follow are a storm, and end the VM."""
    vm = start("l")
    assert pyvmctl("reboot", "vm").returncode == 0
    assert ended(vm)[:2] == (1, "reset-storm")


def test_a_guest_that_goes_down_by_itself(start: Callable[..., GuestVm]) -> None:
    """It announces that, and halts: without soft-off there is no more that it can do."""
    vm = start("s", ack="5s")  # by then the console is attached
    assert ended(vm) == (0, "guest-poweroff", "guest power-off (vmmci)")


def test_a_guest_that_is_still_booting(start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """Nobody listens yet: the VM ends, and nobody waits for ever."""
    vm = start_vm(
        {
            "name": "vm",
            "memory": "16M",
            "boot": {"kernel": f"{GUESTS}/stopping.bin", "cmdline": "d"},
            "vmmci": {"ack-timeout": SHORT},
        }
    )
    assert pyvmctl("stop", "vm").returncode == 0
    assert ended(vm)[:2] == (124, "timeout")


# Others who have a say.


def test_stop_twice_and_by_two_clients(start: Callable[..., GuestVm]) -> None:
    """The second stop begins nothing anew, and both clients see the end."""
    vm = start("h")
    words = [sys.executable, "-m", "vmm.cli", "stop", "-w", "vm"]
    clients = [
        subprocess.Popen(words, cwd=TREE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for client in clients:
        assert client.stderr is not None
        assert "requested to shutdown" in client.stderr.readline()
    vm.console.expect("command 1\n")
    assert pyvmctl("stop", "vm").returncode == 0
    assert vm.status()["state"] == "stopping"
    refused = {verb: pyvmctl(verb, "vm").stderr for verb in ("reset", "reboot", "pause")}
    assert refused["reset"] == refused["reboot"]
    assert refused["reset"].startswith("pyvmctl: vm: is being stopped (start it again when ")
    assert "cannot be paused: its guest is asked to stop (and has to" in refused["pause"]
    wait_for(lambda: steps(vm)[1:] == ["vmmci taken"], "the acknowledgement")
    assert pyvmctl("stop", "-f", "vm").returncode == 0
    assert [client.wait(60) for client in clients] == [0, 0]
    for client in clients:
        assert client.stderr is not None
        client.stderr.close()
    assert ended(vm)[:2] == (0, "forced")
    assert steps(vm) == ["vmmci asked", "vmmci taken"]


def test_stop_while_it_reboots(start: Callable[..., GuestVm]) -> None:
    """Stop counts more: the guest that was to boot again when it is down ends the VM."""
    vm = start("h", down="3s")
    assert pyvmctl("reboot", "vm").returncode == 0
    vm.console.expect("command 2\n")
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    assert ended(vm)[:2] == (124, "timeout")


def test_stop_of_a_paused_vm(start: Callable[..., GuestVm]) -> None:
    """It goes on, to be able to go down; what it is asked last is what it finds."""
    vm = start("g")
    assert pyvmctl("pause", "vm").returncode == 0
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    assert ended(vm)[:2] == (0, "stop")


def test_unpause_tells_the_guest_of_the_clock(start: Callable[..., GuestVm]) -> None:
    """SYNCRTC, which the driver acknowledges: then the next one can come."""
    vm = start("g")
    for _ in range(2):
        assert pyvmctl("pause", "vm").returncode == 0
        assert pyvmctl("unpause", "vm").returncode == 0
        vm.console.expect("command 3\n")
    assert pyvmctl("stop", "-w", "vm").returncode == 0
    assert ended(vm)[:2] == (0, "stop")


def test_stop_f_while_it_stops(start: Callable[..., GuestVm]) -> None:
    """Somebody who has lost patience need not wait."""
    vm = start("h")
    assert pyvmctl("stop", "vm").returncode == 0
    vm.console.expect("command 1\n")
    assert pyvmctl("stop", "-f", "vm").returncode == 0
    assert ended(vm)[:2] == (0, "forced")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_vm_process_killed_while_it_stops(
    number: signal.Signals, start: Callable[..., GuestVm]
) -> None:
    """Whoever waits hears of it, nothing is left of the run, and device processes are gone."""
    vm = start("h")
    live = vm.status()["live"]
    pids = [live["spawner"], *(row["pid"] for row in live["devices"])]
    processes = [os.pidfd_open(pid) for pid in pids]
    assert pyvmctl("stop", "vm").returncode == 0
    vm.console.expect("command 1\n")
    os.kill(vm.pid, number)
    assert vm.wait() == (1 if number == signal.SIGKILL else 0)
    assert vm.status()["state"] == ("crashed" if number == signal.SIGKILL else "stopped")
    assert "control.sock" not in os.listdir(vm.directory)
    for process in processes:
        assert select.select([process], [], [], 60)[0]  # it has ended
        os.close(process)
    assert pyvmctl("forget", "vm").returncode == 0
    assert not os.path.exists(vm.directory)


def test_the_device_process_killed(start: Callable[..., GuestVm]) -> None:
    """Before and after it has asked: the next one knows driver and command."""
    vm = start("g")
    with QmpClient(f"{vm.directory}/control.sock") as client:

        def kill() -> None:
            rows = client.call("x-pyvmd-info")["devices"]
            os.kill(next(row["pid"] for row in rows if row["name"] == "vmmci"), signal.SIGKILL)

        kill()
        assert client.call("x-pyvmd-stop")["way"] == "vmmci"
        with suppress(HostError, ProcessLookupError):  # it may be down by now
            kill()
    assert ended(vm) == (0, "stop", "guest power-off (ACPI S5), as asked to stop")
    assert steps(vm) in (["vmmci asked", "vmmci taken"], ["vmmci asked"])


def test_the_device_lost(start: Callable[..., GuestVm]) -> None:
    """A guest that can no longer be asked by it is asked otherwise."""
    vm = start("h", ack=SHORT, down=SHORT)
    with QmpClient(f"{vm.directory}/control.sock") as client:
        os.kill(client.call("x-pyvmd-info")["spawner"], signal.SIGKILL)
        lost = (event for event in client.events(60) if event["event"] == "X_PYVMD_DEVICE_LOST")
        assert {next(lost)["data"]["device"] for _ in range(2)} == {"viornd", "vmmci"}
        assert client.call("x-pyvmd-stop")["way"] == "Ctrl-Alt-Del"
        told = [
            (event["data"]["way"], event["data"]["state"])
            for event in client.events(0.1)
            if event["event"] == "X_PYVMD_LADDER"
        ]
    assert told[0] == ("vmmci", "unable")
    assert ended(vm)[1] == "timeout"


def test_powerdown_is_the_button_alone(start: Callable[..., GuestVm]) -> None:
    """QMP's own command keeps QEMU's meaning: no ladder, an error if nobody listens."""
    vm = start("b")
    with QmpClient(f"{vm.directory}/control.sock") as client:
        client.call("system_powerdown")
    assert ended(vm)[:2] == (0, "guest-poweroff")
    assert steps(vm) == []


def test_without_the_device_there_is_none(start: Callable[..., GuestVm]) -> None:
    """`vmmci: false`: no process, and the guest finds no such function."""
    vm = start("g", vmmci=False)
    assert [row["name"] for row in vm.status()["live"]["devices"]] == ["viornd"]
