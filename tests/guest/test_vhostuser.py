"""A Linux guest whose devices other programs serve: qemu-storage-daemon and virtiofsd."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import pytest

from tests.backends import Programs, peers, wait_until
from tests.guestvm import IMAGES, GuestVm, linux, pyvmctl
from tools.guest.console import Console

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

Start = Callable[[dict[str, Any]], GuestVm]

FIO: Final = (
    "fio --name=v --filename=/root/v --rw=randrw --bs=4k --size=4M --numjobs=4 --iodepth=16 "
    "--offset_increment=4M --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --minimal"
)
KILLS: Final = 4


@pytest.fixture
def programs(runtime_dir: str) -> Iterator[Programs]:
    """Return a place for programs."""
    programs = Programs(runtime_dir)
    yield programs
    programs.close()


def requests(shell: Console) -> int:
    """Return how many reads and writes the guest has done on its root disk."""
    words = shell.run("cat /sys/block/vda/stat").split()
    return int(words[0]) + int(words[4])


def serving(shell: Console, enough: int) -> bool:
    """Whether that many have been done by now."""
    return requests(shell) >= enough


def test_debian_from_a_disk_of_others(
    start_vm: Start, programs: Programs, runtime_dir: str
) -> None:
    """Debian boots from qemu-storage-daemon, which is killed amid I/O, and has files."""
    root, files = f"{runtime_dir}/root.img", f"{runtime_dir}/files"
    subprocess.run(["cp", "--sparse=always", f"{IMAGES}/debian.img", root], check=True)
    os.mkdir(files)
    with open(f"{files}/big", "wb") as file:
        file.write(os.urandom(3 << 20))
    programs.disk(root)
    programs.files(files)
    cmdline = "console=ttyS0 quiet root=/dev/vda rw systemd.show_status=false"
    disks = [{"vhost-user": programs.socket("disk")}]
    config = linux(memory="512M", cmdline=cmdline, disks=disks)
    config["vhost-user"] = [{"type": "fs", "socket": programs.socket("files"), "tag": "files"}]
    vm = start_vm(config)
    shell = vm.console
    shell.expect(r"root@debian:~# ", 600)
    shell.send("PS1='/ # '\n")
    shell.shell()
    assert shell.run("findmnt -no SOURCE,FSTYPE /") == "/dev/vda ext4"

    # Files: read, written, with the contents that the host sees.
    shell.run("mount -t virtiofs files /mnt && cp /mnt/big /root && cp /root/big /mnt/back && sync")
    shell.run("mkdir /mnt/d && mv /mnt/back /mnt/d/back && umount /mnt")
    with open(f"{files}/big", "rb") as one, open(f"{files}/d/back", "rb") as other:
        assert one.read() == other.read()

    # The root disk's daemon and our front end are killed in turn, while I/O is verified.
    shell.run(f"({FIO} > /dev/shm/fio.log 2>&1; echo $? > /dev/shm/fio.end) & true")
    for count in range(KILLS):
        enough = requests(shell) + 200
        wait_until(partial(serving, shell, enough), "requests are served")
        shell.run("[ ! -e /dev/shm/fio.end ]")
        if count % 2:
            os.kill(vm.device("vioblk0")["pid"], signal.SIGKILL)
        else:
            programs.kill("disk")
            wait_until(lambda: peers(vm)["vioblk0"]["state"] == "gone", "its end is noticed")
            programs.disk(root)
        connected = {"state": "connected", "connections": 2 + count}
        wait_until(
            lambda facts=connected: facts.items() <= peers(vm)["vioblk0"].items(),  # type: ignore[misc]
            "it is connected",
        )
    shell.run("while [ ! -e /dev/shm/fio.end ]; do sleep 1; done", 600)
    assert shell.run("cat /dev/shm/fio.end; cat /dev/shm/fio.log").splitlines()[0] == "0"
    assert shell.run("dmesg | grep -cE 'I/O error|not a head'", status=None) == "0"

    for verb in ("pause", "unpause"):
        assert pyvmctl(verb, vm.name).returncode == 0
    shell.run("sync && echo 3 > /proc/sys/vm/drop_caches && cmp /root/big /root/big")
    shell.send("poweroff\n")
    assert vm.wait() == 0
