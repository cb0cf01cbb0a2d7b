"""SeaBIOS and a boot sector on disks that other programs serve, on this host's own KVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends import Programs, peers, wait_until
from tests.guestvm import GuestVm, pyvmctl
from tests.kvm.test_firmware import COUNT, FIRST_HARD_DISK, boots, disk, needs_seabios, said, sector

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(400)]

BOOTED = said("the first disk, the second disk")


@pytest.fixture
def programs(runtime_dir: str) -> Iterator[Programs]:
    """Return a place for programs."""
    programs = Programs(runtime_dir)
    yield programs
    programs.close()


@needs_seabios
def test_a_boot_from_others_disks(
    tmp_path: Path, programs: Programs, start_vm: Callable[[dict[str, Any]], GuestVm]
) -> None:
    """One by qemu-storage-daemon, one by a back end of ours; both end, and the guest goes on."""
    first = disk(tmp_path / "a", sector("the first disk, ", FIRST_HARD_DISK + 1))["path"]
    second = disk(tmp_path / "b", b"", b"the second disk\n")["path"]
    programs.disk(first)
    programs.ours("ours", second)
    vm = start_vm(
        boots(
            boot={"firmware": "seabios", "order": ["disk"]},
            disks=[{"vhost-user": programs.socket(name)} for name in ("disk", "ours")],
        )
    )
    vm.console.expect(BOOTED)
    # It resets now. SeaBIOS looks for its disks again, and waits for whom it finds gone.
    programs.kill("disk")
    programs.kill("ours")
    wait_until(
        lambda: {row["state"] for row in peers(vm).values()} == {"gone"}, "both ends are noticed"
    )
    assert pyvmctl("pause", vm.name).returncode == 0
    programs.disk(first)
    programs.ours("ours", second)
    assert pyvmctl("unpause", vm.name).returncode == 0
    vm.console.expect(BOOTED)
    assert vm.wait() == 0
    assert Path(first).read_bytes()[COUNT] == 2
    log = vm.log()
    assert "queues relayed" in log
    assert "queues direct" in log
    assert log.count("again") >= 2


@needs_seabios
def test_nobody_listens(runtime_dir: str, tmp_path: Path) -> None:
    """A VM whose disk nobody serves does not start, and the error says what to do."""
    del runtime_dir
    path = tmp_path / "vm.yaml"
    path.write_text("boot: {firmware: seabios}\ndisks: [{vhost-user: none.sock}]\n")
    done = pyvmctl("start", str(path))
    assert done.returncode == 1
    assert "vioblk0: " in done.stderr
    assert "none.sock: cannot connect: No such file or directory" in done.stderr
    assert "is the program that serves it running?" in done.stderr
