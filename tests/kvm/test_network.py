"""Networks of real VMs by the real pyvmctl: set up, seen, and gone, however the VM ends.

The guest is the hand-made one that needs no driver. Each test is in a network namespace.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from devices import tun
from tests.guestvm import TREE, pyvmctl
from tests.kvm.lab import DEADLINE, wait_for
from tests.netns import Namespace, namespace
from vmm.net import programs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kvm

ALL: Final[dict[str, Any]] = {
    "interfaces": [
        {"local": True, "nat": True, "ports": ["2222:22"]},
        {"switch": "lan", "queues": 2},
    ],
    "switches": {"lan": {}},
}


@pytest.fixture
def ns(runtime_dir: str) -> Iterator[Namespace]:
    """A namespace; whatever VM a test leaves behind is ended."""
    with namespace() as made:
        yield made
        pyvmctl("stop", "-a", "-f")


@pytest.fixture
def write(runtime_dir: str) -> Callable[..., str]:
    """Writes the vm.yaml of a small VM; returns its path."""

    def make(name: str = "net", **keys: Any) -> str:
        path = f"{runtime_dir}/{name}.yaml"
        boot = {"kernel": f"{TREE}/config/examples/hello.elf"}
        with open(path, "w") as file:
            json.dump({"name": name, "memory": "16M", "boot": boot, **keys}, file)
        return path

    return make


def start(file: str) -> int:
    """Start a VM; return its pid."""
    done = pyvmctl("start", "--json", file)
    assert done.returncode == 0, done.stderr
    pid: int = json.loads(done.stdout)["pid"]
    return pid


def devices(name: str = "net") -> dict[str, dict[str, Any]]:
    """Return what `status --json` says of a VM's devices."""
    live = json.loads(pyvmctl("status", "--json", name).stdout)["live"]
    return {device["name"]: device for device in live["devices"]}


def end(pid: int, number: signal.Signals) -> None:
    """Send a signal to a VM process, and wait until it has ended."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, number)
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)


def is_up(ns: Namespace) -> None:
    """Check that all of ALL is there."""
    links = ns.links()
    assert set(links) == {"vm-lan", "vm1if0", "vm1if1"}
    assert links["vm1if1"]["master"] == "vm-lan"
    assert ns.addresses("vm1if0") == ["100.64.1.2/31"]
    assert ns.tables() == ["pyvmd", "pyvmd_vm1if0"]


def test_all_is_there_while_the_vm_runs_and_gone_after_stop(
    ns: Namespace, write: Callable[..., str]
) -> None:
    """Slots are in vmd's order, the device processes know their taps."""
    start(write(**ALL))
    is_up(ns)
    found = devices()
    assert list(found) == ["viornd", "vionet0", "vionet1", "vmmci"]
    assert found["vionet0"]["addresses"] == ["100.64.1.3"]
    assert (found["vionet1"]["tap"], found["vionet1"]["bridge"]) == ("vm1if1", "vm-lan")
    assert pyvmctl("stop", "-f", "net").returncode == 0
    assert ns.untouched()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_is_gone_after_a_signal(
    ns: Namespace, write: Callable[..., str], number: signal.Signals
) -> None:
    """Nobody has to ask for it; a start right afterwards finds a clean host."""
    file = write(**ALL)
    end(start(file), number)
    wait_for(ns.untouched, "clearing away")
    start(file)
    is_up(ns)


def test_a_start_right_after_a_kill_waits_for_the_clearing(
    ns: Namespace, write: Callable[..., str]
) -> None:
    """The new VM's network is not taken for the old one's."""
    file = write(**ALL)
    for _ in range(2):
        end(start(file), signal.SIGKILL)
    start(file)
    is_up(ns)
    assert devices()["vionet0"]["state"] == "running"


def test_a_start_that_fails_late_leaves_nothing(
    ns: Namespace, write: Callable[..., str], runtime_dir: str
) -> None:
    """The network was complete when the kernel turned out to be none."""
    file = write(**{**ALL, "boot": {"kernel": "/dev/null"}})
    assert pyvmctl("start", file).returncode != 0
    assert ns.untouched()
    assert not os.path.exists(f"{runtime_dir}/net")


def test_a_killed_device_process_is_replaced(ns: Namespace, write: Callable[..., str]) -> None:
    """Its tap, the link that was taken down and the rules are there still."""
    start(write(**ALL))
    assert pyvmctl("nic", "link", "net", "vionet0", "down").returncode == 0
    os.kill(devices()["vionet0"]["pid"], signal.SIGKILL)
    wait_for(lambda: devices()["vionet0"]["lives"] == 2, "another process")
    found = devices()["vionet0"]
    assert (found["state"], found["network"]["link"]) == ("running", False)
    assert pyvmctl("nic", "link", "net", "vionet0", "up").returncode == 0
    assert devices()["vionet1"]["state"] == "running"
    assert "pyvmd_vm1if0" in ns.tables()


def test_each_queue_pair_has_a_process_and_gets_another(
    ns: Namespace, write: Callable[..., str]
) -> None:
    """One that is killed is replaced, and shown; the device's first process, too."""
    start(write(**ALL))
    (pair,) = devices()["vionet1"]["pairs"]
    assert (pair["name"], pair["state"], pair["lives"]) == ("vionet1.1", "running", 1)
    assert "pairs" not in devices()["vionet0"]
    os.kill(pair["pid"], signal.SIGKILL)
    wait_for(lambda: devices()["vionet1"]["pairs"][0]["lives"] == 2, "another process")
    wait_for(lambda: devices()["vionet1"]["pairs"][0]["pid"] > 0, "its readiness")
    found = devices()["vionet1"]
    assert found["state"] == "running"
    assert "vionet1.1" in pyvmctl("status", "--jail", "net").stdout
    assert "vionet1.1" in pyvmctl("stats", "-d", "0.1", "net").stdout
    assert pyvmctl("pause", "net").returncode == pyvmctl("unpause", "net").returncode == 0
    assert pyvmctl("nic", "link", "net", "vionet1", "down").returncode == 0
    assert pyvmctl("reset", "net").returncode == 0
    for lives, verb in ((2, "status"), (3, "pause"), (4, "unpause"), (5, "reset")):
        found = devices()["vionet1"]
        os.kill(found["pid"], signal.SIGKILL)
        with suppress(ProcessLookupError):  # it has ended with the first
            if found["pairs"][0]["pid"]:  # else it is just being started
                os.kill(found["pairs"][0]["pid"], signal.SIGKILL)
        assert pyvmctl(verb, "net").returncode == 0
        wait_for(lambda n=lives: devices()["vionet1"]["lives"] >= n, "another process")  # type: ignore[misc]
    found = devices()["vionet1"]
    assert (found["state"], found["network"]["link"]) == ("running", False)
    assert pyvmctl("nic", "link", "net", "vionet1", "up").returncode == 0


def test_errors_reach_the_user(ns: Namespace, write: Callable[..., str]) -> None:
    """One line that names VM, device, thing and remedy."""
    file = write(interfaces=[{"switch": "up"}], switches={"up": {"bridge": "br9"}})
    done = pyvmctl("start", file)
    assert done.returncode == 1
    assert done.stderr == (
        "pyvmctl: vionet0: switch up: there is no bridge br9 (as root: ip link add br9 type "
        "bridge; or leave 'bridge' out, and one is made)\n"
    )


def test_a_tap_that_pyvmctl_inherits(ns: Namespace, write: Callable[..., str]) -> None:
    """Whatever its number, also that of the starter's own report; one that is not open is told."""
    [fd] = tun.open_queues("mine", 1, "x")
    try:
        for number in (3, 7):
            file = write(interfaces=[{}, {"tap": f"fd:{number}"}])
            command = f'exec "$0" -m vmm.cli start {file} {number}<&{fd}'
            if number != fd:
                command += f" {fd}<&-"
            done = subprocess.run(
                ["bash", "-c", command, sys.executable],
                cwd=TREE,
                pass_fds=[fd],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert devices()["vionet1"]["tap"] == "mine"
            pyvmctl("stop", "-f", "net")
    finally:
        os.close(fd)
    done = pyvmctl("start", write(interfaces=[{"tap": "fd:9"}]))
    assert done.returncode == 1
    assert "vionet0: tap: descriptor 9 is not open (pyvmctl must inherit it)" in done.stderr


@pytest.fixture
def uplink(ns: Namespace) -> None:
    """A default route, which passt wants to see."""
    if not programs.find("passt"):
        pytest.skip("passt is not installed")
    for words in (
        "link add up0 type bridge",
        "address add 192.0.2.2/24 dev up0",
        "link set up0 up",
        "route add default via 192.0.2.1",
    ):
        ns.run("ip", *words.split())


def passts() -> list[str]:
    """Return the command lines of all passt processes of this namespace that run."""
    found = []
    here = os.stat("/proc/self/ns/net").st_ino
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
            if words[0].endswith("passt") and os.stat(f"/proc/{pid}/ns/net").st_ino == here:
                found.append(" ".join(words[1:]).strip())
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("uplink")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_passt_lives_as_long_as_its_vm(
    ns: Namespace, write: Callable[..., str], number: signal.Signals
) -> None:
    """It listens for the guest, and ends by itself."""
    pid = start(write(interfaces=[{"type": "user", "ports": ["127.0.0.1:2222:22", "53:53/udp"]}]))
    [words] = passts()
    assert words == ("--fd 3 --quiet --no-map-gw --tcp-ports 127.0.0.1/2222:22 --udp-ports 53:53")
    nic = devices()["vionet0"]
    assert (nic["type"], nic["tap"]) == ("user", "")
    os.kill(nic["pid"], signal.SIGKILL)
    wait_for(lambda: devices()["vionet0"]["lives"] == 2, "another process")
    assert devices()["vionet0"]["network"]["link"] is True
    with socket.create_connection(("127.0.0.1", 2222), 10):
        pass
    os.kill(pid, number)
    wait_for(lambda: not passts(), "the end of passt")


@pytest.mark.usefixtures("uplink")
def test_passts_reason_reaches_the_user(ns: Namespace, write: Callable[..., str]) -> None:
    """A port that another program has."""
    with socket.create_server(("127.0.0.1", 2222)):
        done = pyvmctl("start", write(interfaces=[{"type": "user", "ports": ["2222:22"]}]))
    assert done.returncode == 1
    assert "vionet0: passt does not start:" in done.stderr
    assert "a port of 'ports' is in use" in done.stderr
    assert not passts()


def test_what_there_is_can_be_seen_and_changed(ns: Namespace, write: Callable[..., str]) -> None:
    """`net`, `nic status`, `nic link`, `nic rate`; the host's interface shows the cable."""
    start(write(**ALL))
    found = json.loads(pyvmctl("net", "--json").stdout)
    assert [tap["name"] for tap in found["taps"]] == ["vm1if0", "vm1if1"]
    assert found["bridges"][0]["switch"] == "lan"
    assert found["tables"] == ["pyvmd", "pyvmd_vm1if0"]
    [lease] = found["leases"]
    assert (lease["vm"], lease["nic"], lease["given"]) == ("net", "vionet0", 0)
    assert (lease["addresses"], lease["lladdr"]) == (["100.64.1.3"], found["taps"][0]["lladdr"])
    text = pyvmctl("net").stdout
    assert "bridge vm-lan (switch lan): vm1if1\n" in text
    assert "nft table inet pyvmd_vm1if0\n" in text
    assert f"lease 100.64.1.3 (net/vionet0, {lease['lladdr']}): not asked for yet\n" in text

    assert devices()["vionet0"]["network"]["link"] is True
    done = pyvmctl("nic", "link", "net", "0", "down")
    assert done.stderr == "net/vionet0: link down\n"
    wait_for(lambda: "NO-CARRIER" in ns.links()["vm1if0"]["flags"], "loss of carrier")
    facts = json.loads(pyvmctl("nic", "status", "net", "vionet0", "--json").stdout)
    assert facts["link"] is False
    assert pyvmctl("nic", "link", "net", "0", "up").stderr == "net/vionet0: link up\n"
    wait_for(lambda: "NO-CARRIER" not in ns.links()["vm1if0"]["flags"], "carrier")
    done = pyvmctl("nic", "rate", "net", "1", "--rx-rate", "10M/s", "--tx-pps", "none")
    assert done.stderr == "net/vionet1: rx_rate 10M/s, tx_pps none\n"
    assert pyvmctl("nic", "rate", "net", "1").returncode == 2
    assert "there is no device vionet7" in pyvmctl("nic", "link", "net", "7", "up").stderr


def test_a_capture_is_a_file_that_others_read(
    ns: Namespace, write: Callable[..., str], runtime_dir: str
) -> None:
    """It ends with the VM, or with ^C; nothing of the guest's stands still for it."""
    start(write(**ALL))
    for end in ("^C", "the VM"):
        path = f"{runtime_dir}/{end}.pcapng"
        words = [sys.executable, "-m", "vmm.cli", "pcap", "net", "0", "-w", path]
        with subprocess.Popen(words, cwd=TREE, stderr=subprocess.PIPE, text=True) as client:
            wait_for(lambda path=path: os.path.exists(path) and os.path.getsize(path) > 0, "head")  # type: ignore[misc]
            capture = devices()["vionet0"]["network"]["capture"]
            assert capture["active"] is True
            if end == "^C":
                client.send_signal(signal.SIGINT)
            else:
                pyvmctl("stop", "-f", "net")
            _, said = client.communicate(timeout=60)
        assert client.returncode == 0, said
        assert ("0 frames captured, 0 lost" in said) == (end == "^C")
        assert ns.run("tcpdump", "-r", path) == ""
