"""A Debian of which every device is served by a back end of ours, and the other end of its cable.

with booted() as guest:
    guest.run("mount /dev/sr0 /mnt")
    guest.backends["scsi"].kill()
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from tests.guestvm import IMAGES
from tests.netns import namespace
from tests.peers import lab
from tests.peers.lab import BackEnd, Qemu, our
from tools.guest.console import ConsoleError
from vmm.qmpclient import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST: Final = "10.9.0.1"
GUEST: Final = "10.9.0.2"
PAIRS: Final = 2  # of queues of the network interface
SCRATCH: Final = 256 << 20  # bytes of the second disk
DISC: Final = 8 << 20  # bytes of the file on the CD
JOBS: Final = 4  # of fio, each in a part of the disk of its own
PATIENCE: Final = 300.0  # seconds for what takes few


def fio(file: str, size: str) -> str:
    """Return a command that writes so much in each of its jobs, and reads it again."""
    return (
        f"fio --name=v --filename={file} --rw=randwrite --bs=4k --size={size} "
        f"--offset_increment={size} --numjobs={JOBS} --ioengine=libaio --iodepth=32 --direct=1 "
        "--verify=crc32c --verify_fatal=1 --minimal"
    )


class Guest:
    """Debian, and its back ends by the names that QEMU knows the devices by."""

    def __init__(self, directory: str, net: int) -> None:
        """`net` is a network namespace with the tap and its address."""
        self.directory = directory
        self.net = net
        self.digest = ""  #: of the file on the CD
        self.backends = {
            name: BackEnd(words, f"{directory}/{name}.sock", net if name == "net" else -1)
            for name, words in self._commands().items()
        }
        paths = {name: backend.path for name, backend in self.backends.items()}
        self.words = {
            "vda": lab.blk("vda", paths["vda"]),
            "vdb": lab.blk("vdb", paths["vdb"], ",num-queues=1,packed=on"),
            "net": lab.net("net", paths["net"], PAIRS, ",mac=52:54:00:00:09:02"),
            "scsi": lab.scsi("scsi", paths["scsi"]),
            "rng": lab.rng("rng", paths["rng"]),
        }
        self.qemu: Qemu
        self._stack = ExitStack()

    def start(self, *more: str, without: str = "") -> None:
        """Start QEMU, after the one that there was, if any; `more` are words for it."""
        self.end()
        words = [word for name, words in self.words.items() if name != without for word in words]
        self.qemu = self._stack.enter_context(Qemu(self.directory, words, *more))

    def end(self) -> None:
        """End QEMU."""
        self._stack.close()

    def run(self, command: str, timeout: float = PATIENCE) -> str:
        """Run a command; return what it prints. Raises ConsoleError if it fails."""
        return self.qemu.console.run(command, timeout)

    def begin(self, command: str, log: str = "/tmp/log") -> str:
        """Run a command in the background, its output in `log`; return its process id."""
        return self.run(f"{{ {{ {command}; }} > {log} 2>&1 & }}; echo $!").splitlines()[-1]

    def repeat(self, command: str, log: str = "/tmp/log") -> str:
        """Begin a command again and again, as long as it succeeds, until finish()."""
        return self.begin(f"until [ -e /tmp/stop ]; do {command} || exit; done", log)

    def finish(self, *pids: str) -> None:
        """Have those that repeat end, all of them; the last run of each has to succeed, too."""
        self.run("touch /tmp/stop")
        for pid in pids:
            self.run(f"wait {pid}")
        self.run("rm /tmp/stop")

    def requests(self, disk: str) -> int:
        """Return how many reads and writes of a disk the guest has seen the end of."""
        fields = self.run(f"cat /sys/block/{disk}/stat").split()
        return int(fields[0]) + int(fields[4])

    def progress(self, disk: str, count: int) -> None:
        """Wait for the end of so many requests more."""
        end, deadline = self.requests(disk) + count, time.monotonic() + PATIENCE
        while self.requests(disk) < end:
            assert time.monotonic() < deadline, f"no request of {disk} ends any more"

    def plug_rng(self) -> None:
        """Put an entropy device into the running guest."""
        socket = {"type": "unix", "data": {"path": self.backends["rng"].path}}
        backend = {"type": "socket", "data": {"addr": socket, "server": False}}
        self.qemu.qmp.call("chardev-add", id="rng-c", backend=backend)
        self.qemu.qmp.call("device_add", id="rng", driver="vhost-user-rng-pci", chardev="rng-c")
        self.run("until grep -q virtio /sys/class/misc/hw_random/rng_available; do :; done")

    def unplug(self, name: str) -> None:
        """Take a device out of the running guest."""
        qmp, deadline = self.qemu.qmp, time.monotonic() + PATIENCE
        qmp.call("device_del", id=name)
        while True:
            self.run("true")  # time for the guest to see what is wanted
            try:
                qmp.call("chardev-remove", id=f"{name}-c")
                return
            except CommandError:  # it is busy as long as the device is there
                if time.monotonic() > deadline:
                    raise

    def _commands(self) -> dict[str, list[str]]:
        """Make what the back ends serve; return the command of each."""
        root, scratch = f"{self.directory}/root.qcow2", f"{self.directory}/scratch.img"
        words = ["-q", "-f", "qcow2", "-b", f"{IMAGES}/debian.img", "-F", "raw", root]
        subprocess.run(["qemu-img", "create", *words], check=True)
        with open(scratch, "wb") as file:
            file.truncate(SCRATCH)
        return {
            "vda": our("vioblk", f"--blk-file={root}", "--format=qcow2", f"--queues={lab.CPUS}"),
            "vdb": our("vioblk", f"--blk-file={scratch}", "--format=raw", "--serial=scratch-1"),
            "net": our("vionet", "--tap=tap0", f"--queues={PAIRS}"),
            "rng": our("viornd"),
            "scsi": our("vioscsi", f"--cdrom={self._burn()}"),
        }

    def _burn(self) -> str:
        """Make an ISO image of one file; return its path."""
        tree = f"{self.directory}/disc"
        os.mkdir(tree)
        data = random.Random(9).randbytes(DISC)  # noqa: S311  # any bytes will do
        self.digest = hashlib.sha256(data).hexdigest()
        with open(f"{tree}/file", "wb") as file:
            file.write(data)
        words = ["-as", "mkisofs", "-quiet", "-R", "-V", "PEER", "-o", f"{tree}.iso", tree]
        subprocess.run(["xorriso", *words], check=True, capture_output=True)
        return f"{tree}.iso"


@contextmanager
def booted() -> Iterator[Guest]:
    """Boot it; what was made for it is gone at the end."""
    with ExitStack() as stack:
        net = stack.enter_context(_cable())
        directory = tempfile.mkdtemp(prefix="peers-", dir="/dev/shm")  # short, and in memory
        stack.callback(shutil.rmtree, directory)
        guest = Guest(directory, net)
        stack.callback(_check, f"{directory}/root.qcow2")
        stack.enter_context(lab.serving(*guest.backends.values()))
        stack.callback(guest.end)
        guest.start()
        try:
            guest.qemu.login()
        except ConsoleError as err:
            err.add_note(f"QEMU says: {guest.qemu.log()}")
            for name, backend in guest.backends.items():
                err.add_note(f"{name} says: {backend.log()}")
            raise
        guest.run(f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up")
        guest.run("ethtool -L eth0 combined 2")
        yield guest


def _check(image: str) -> None:
    """Have qemu-img look at an image; back ends that were killed leave leaks in it at worst."""
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr


@contextmanager
def _cable() -> Iterator[int]:
    """Make a network namespace with a tap, and an iperf3 server in it."""
    with namespace() as ns:
        net = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        ns.run("ip", "tuntap", "add", "tap0", "mode", "tap", "multi_queue")
        ns.run("ip", "address", "add", f"{HOST}/24", "dev", "tap0")
        ns.run("ip", "link", "set", "tap0", "up")
        server = subprocess.Popen(
            ["iperf3", "-s", "-B", HOST], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    try:
        yield net
    finally:
        server.terminate()
        server.wait(lab.DEADLINE)
        os.close(net)
