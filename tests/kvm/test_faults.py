"""What can go wrong between pyvmctl and a running guest: the words, the status, nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from config.errors import ConfigError, HostError, KvmError
from config.model import BootConfig, VmConfig
from devices.loop import Loop
from tests.descriptors import count_before
from tests.guestvm import TREE, GuestVm, pyvmctl
from tests.kvm.lab import GUESTS
from vmm import checks, kvm, kvmabi
from vmm.boot import open_images
from vmm.control import CLIENTS
from vmm.kvmabi import Cap
from vmm.machine import Machine
from vmm.qmpclient import QmpClient

pytestmark = pytest.mark.kvm

HELLO = os.path.join(TREE, "config/examples/hello.elf")
NOBODY = 65534


def write_yaml(directory: str | Path, **keys: Any) -> str:
    """Write a vm.yaml with the hello guest, changed by `keys`; return its path."""
    path = os.path.join(directory, "vm.yaml")
    config = {"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}, **keys}
    Path(path).write_text(json.dumps(config))
    return path


def run_to_the_end(config: dict[str, Any], runtime_dir: str) -> tuple[int, str]:
    """Start a VM that ends by itself; return the status of `wait`, and the log."""
    path = write_yaml(runtime_dir, **config)
    done = pyvmctl("start", path)
    assert done.returncode == 0, done.stderr
    status = pyvmctl("wait", "vm").returncode
    return status, Path(runtime_dir, "vm/log").read_text()


def left_behind(runtime_dir: str) -> list[str]:
    """What a failed start left in the runtime directory, other than the register of ids."""
    return [name for name in os.listdir(runtime_dir) if not name.startswith((".", "vm.yaml"))]


def test_no_kvm() -> None:
    """Without /dev/kvm the error says which module to load."""
    with pytest.raises(HostError, match=r"cannot open /dev/nokvm: No such file.*kvm_intel or kvm_"):
        kvm.System("/dev/nokvm")


def test_no_permission() -> None:
    """A user who may not open /dev/kvm is told the command that helps."""
    # A private device node: the machine's own may be open to everybody.
    with tempfile.TemporaryDirectory(dir="/dev") as directory:
        os.chmod(directory, 0o755)  # noqa: S103  for `nobody`
        closed = f"{directory}/kvm"
        os.mknod(closed, 0o600 | stat.S_IFCHR, os.stat(kvm.DEVICE).st_rdev)
        checks.join_group(closed)  # `nobody` may not be able to read the modules it imports
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                kvm.System(closed)
            except HostError as err:
                os.write(writer, str(err).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader, encoding="utf-8") as words:
            text = words.read()
    assert text.startswith(f"cannot open {closed}: Permission denied")
    assert "usermod -aG kvm nobody" in text


def test_missing_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM without what we need is refused by the name of what it lacks."""
    real = kvm.System.capability
    lacks = {Cap.SIGNAL_MSI, Cap.IMMEDIATE_EXIT}
    monkeypatch.setattr(
        kvm.System, "capability", lambda self, cap: 0 if cap in lacks else real(self, cap)
    )
    with pytest.raises(KvmError, match="this host's KVM lacks SIGNAL_MSI, IMMEDIATE_EXIT"):
        kvm.System()


def test_other_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM of another API is refused, both versions named."""
    monkeypatch.setattr(kvmabi, "API_VERSION", 13)
    with pytest.raises(KvmError, match="KVM API version 12, this program speaks 13"):
        kvm.System()


def test_more_vcpus_than_kvm_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More vCPUs than KVM's limit are refused, the limit named, and no descriptor leaks."""
    monkeypatch.setattr(kvm.System, "max_vcpus", property(lambda self: 2))
    boot = BootConfig(kernel=os.path.join(GUESTS, "ports.bin"))
    before = count_before()
    loop = Loop()
    with (
        open_images(boot) as images,
        pytest.raises(ConfigError, match=r"vm: vcpus 3 is more than this host's KVM allows \(2\)"),
    ):
        Machine(VmConfig("vm", boot, 3, 1 << 24), images, loop, None)  # type: ignore[arg-type]
    loop.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("keys", "status", "words"),
    [
        ({"memory": "100G"}, 2, r"memory 102400M is more than this host has"),
        ({"memory": "0"}, 2, r"memory"),
        ({"vcpus": 0}, 2, r"vcpus"),
        ({"vcpus": 33}, 2, r"vcpus"),
        ({"boot": {"kernel": "/nowhere/vmlinuz"}}, 2, r"/nowhere/vmlinuz"),
        ({"boot": {"kernel": "/dev"}}, 2, r"/dev"),
        ({"boot": {"kernel": __file__}}, 2, r"not a kernel"),
    ],
)
def test_bad_configuration(runtime_dir: str, keys: dict[str, Any], status: int, words: str) -> None:
    """What vm.yaml got wrong is said before anything runs, and nothing is left behind."""
    done = pyvmctl("start", write_yaml(runtime_dir, **keys))
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert left_behind(runtime_dir) == []


def test_initrd_does_not_fit(runtime_dir: str) -> None:
    """An initrd larger than RAM is refused with the memory it would need."""
    initrd = Path(runtime_dir, "vm.yaml.initrd")
    with initrd.open("wb") as file:
        file.truncate(20 << 20)
    boot = {"kernel": HELLO, "initrd": str(initrd)}
    done = pyvmctl("start", write_yaml(runtime_dir, boot=boot))
    assert done.returncode == 2
    assert "initrd" in done.stderr
    assert "memory" in done.stderr
    assert left_behind(runtime_dir) == []


def test_name_is_taken(start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """A second VM of the same name is refused, the pid of the first named, the first unharmed."""
    vm = start_vm({"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}})
    done = pyvmctl("start", vm.yaml)
    assert done.returncode == 1
    assert f"already running (pid {vm.pid})" in done.stderr
    assert vm.status()["state"] == "running"


def test_starts_that_race(runtime_dir: str) -> None:
    """One wins and runs; the others say who has the VM, or is about to, and leave nothing."""
    words = [sys.executable, "-m", "vmm.cli", "start", write_yaml(runtime_dir)]
    racers = [
        subprocess.Popen(words, cwd=TREE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [racer.communicate(timeout=120)[1] for racer in racers]
    try:
        assert sorted(racer.returncode for racer in racers) == [0, 1, 1, 1], said
        lost = [text for text, racer in zip(said, racers, strict=True) if racer.returncode]
        wanted = r"pyvmctl: VM vm is (already running|being started or ended) .*\(.*\)\n"
        assert all(re.fullmatch(wanted, text) for text in lost), lost
        facts = json.loads(pyvmctl("status", "--json").stdout)
        assert [(vm["name"], vm["state"]) for vm in facts] == [("vm", "running")]
    finally:
        assert pyvmctl("kill", "vm").returncode == 0
    assert pyvmctl("forget", "-a").returncode == 0
    assert left_behind(runtime_dir) == []


def test_a_flooded_control_socket(start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """A process takes all the places there are and never stops asking; another is served."""
    vm = start_vm({"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}})
    path = f"{vm.directory}/control.sock"
    with ExitStack() as opened:
        clients = [opened.enter_context(QmpClient(path)) for _ in range(CLIENTS)]
        for client in clients:
            client._socket.setblocking(False)
            with suppress(BlockingIOError):
                while client._socket.send(b'{"execute":"query-commands"}\n' * 1000):
                    pass  # until neither side takes any more
        for verb in ("pause", "unpause", "reset", "kill"):
            done = pyvmctl(verb, "vm")
            assert done.returncode == 0, done.stderr
    assert f"uid {os.geteuid()}, process {os.getpid()}, has to make room" in vm.log()
    assert "forced to terminate" in done.stderr
    assert json.loads(pyvmctl("wait", "--json", "vm").stdout)["exit"]["how"] == "forced"


def test_internal_error(runtime_dir: str, tmp_path: Path) -> None:
    """A guest that KVM cannot run ends its VM; the log names the place."""
    code = bytearray(Path(GUESTS, "storm.bin").read_bytes())
    at = len(code) - 64 - 5
    code[at : at + 5] = b"\xe9" + (0xF8000000 - (0x100000 + at + 5)).to_bytes(4, "little")
    kernel = tmp_path / "wild.bin"
    kernel.write_bytes(code)
    status, log = run_to_the_end({"boot": {"kernel": str(kernel)}}, runtime_dir)
    assert status == 1
    assert "32-bit code at 0x0008:0xf8000000" in log


def test_disk_full_under_the_log(start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """Logs on a full disk cost log lines, not the VM."""
    vm = start_vm({"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}})
    vm.console.expect("hello>")
    subprocess.run(["prlimit", "--pid", str(vm.pid), "--fsize=1"], check=True)
    for _ in range(3):
        vm.console.send("help\r")
        vm.console.expect("triple fault")
    assert pyvmctl("reset", "vm").returncode == 0
    vm.console.expect("Hello from")
    assert vm.status()["state"] == "running"


def test_device_process_killed(start_vm: Callable[[dict[str, Any]], GuestVm]) -> None:
    """Each is named with its status, and another has its place before anybody asks again."""
    vm = start_vm({"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}})
    vm.console.expect("hello>")
    with QmpClient(f"{vm.directory}/control.sock") as client:
        for life in (1, 2, 3):
            for device in client.call("x-pyvmd-info")["devices"]:
                assert (device["state"], device["lives"]) == ("running", life)
                os.kill(device["pid"], signal.SIGKILL)
                event = next(event for event in client.events(10) if "DEVICE" in event["event"])
                assert event["event"] == "X_PYVMD_DEVICE_REPLACED"
                how = f"process {device['pid']} killed by signal 9"
                assert event["data"]["device"] == device["name"]
                assert event["data"]["reason"].startswith(how)
                assert f"{device['name']}: {how}" in vm.log()
        vm.console.send("help\r")
        vm.console.expect("triple fault")
        for verb in ("pause", "unpause", "reset"):
            for device in client.call("x-pyvmd-info")["devices"]:
                os.kill(device["pid"], signal.SIGKILL)
            assert pyvmctl(verb, "vm").returncode == 0
    vm.console.expect("Hello from")


def test_devices_whose_processes_cannot_live(
    start_vm: Callable[[dict[str, Any]], GuestVm],
) -> None:
    """They are lost, each told once with its cause; the VM lives on, and copes with the holes."""
    vm = start_vm({"name": "vm", "memory": "16M", "boot": {"kernel": HELLO}})
    vm.console.expect("hello>")
    with QmpClient(f"{vm.directory}/control.sock") as client:
        os.kill(client.call("x-pyvmd-info")["spawner"], signal.SIGKILL)
        lost = {}
        for event in client.events(20):
            if event["event"] == "X_PYVMD_DEVICE_LOST":
                assert event["data"]["device"] not in lost
                lost[event["data"]["device"]] = event["data"]["reason"]
            if len(lost) == 2:
                break
        assert sorted(lost) == ["viornd", "vmmci"]
        assert all("20 processes in a row died at once" in why for why in lost.values())
        assert {row["state"] for row in client.call("x-pyvmd-info")["devices"]} == {"lost"}
    assert "vm/viornd: device lost" in vm.log()
    vm.console.send("help\r")
    vm.console.expect("triple fault")
    assert pyvmctl("reset", "vm").returncode == 0
    vm.console.expect("Hello from")
