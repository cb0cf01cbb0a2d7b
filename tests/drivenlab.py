"""Real devices for tests of tools/viodriver: any kind behind any transport, in processes of ours.

with Driven("vioblk", "pci", tmp_path) as driven:
    driven.device.start()
    driven.kill()
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self

from config.model import DiskConfig
from devices.images import open_disc
from tests.taplab import TapLab
from tests.vhostlab import Program
from tests.vionetlab import LLADDR, SETTINGS
from tools.viodriver.device import VirtioDevice
from tools.viodriver.pcidriver import PciDriver
from tools.viodriver.pcihost import PciHost
from tools.viodriver.private import DeviceHost
from tools.viodriver.vhostuser import VhostUser

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from tools.viodriver.transport import Transport

IMAGE_BYTES: Final = 1 << 20
DISC: Final = bytes(range(256)) * 512
SERIAL: Final = "driven-0"

#: Ways to a device; what is behind the colon says how it signals there.
PRIVATE: Final = ("private", "private:messages")
PCI: Final = ("pci", "pci:intx", "pci:messages", "pci:intx+messages")
VHOST: Final = ("vhost-user",)
TRANSPORTS: Final = (*PRIVATE, *PCI, *VHOST)
KINDS: Final = ("vioblk", "vionet", "vioscsi", "viornd")


class Driven:
    """One device, the process that serves it, and what a test needs of both."""

    def __init__(self, kind: str, way: str, directory: Path, *, packed: bool = False) -> None:
        self.stack = ExitStack()
        self.kind = kind
        # The other end of a network device: one of these.
        self._stream: socket.socket | None = None
        self._tap: TapLab | None = None
        self.image = directory / "disk.img"
        self._program: Program | None = None
        try:
            transport, _, how = way.partition(":")
            if transport == "vhost-user":
                made = self._vhost_user()
            else:
                made = self._ours(transport, how, packed=packed)
            self.device = self.stack.enter_context(VirtioDevice(made, f"{kind}0"))
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.close()

    def _ours(self, transport: str, how: str, *, packed: bool) -> Transport:
        settings, fds = self._needs()
        settings["packed"] = packed
        messages = "messages" in how
        queues = 3 if self.kind == "vionet" else 0
        try:
            if transport == "private":
                host = DeviceHost(
                    self.kind, settings, fds=fds, queues=queues, irqfd=not messages,
                    kicks=not messages,
                )  # fmt: skip
                self.process = host.process
                return host
            board = PciHost(
                self.kind, settings, fds=fds, queues=queues, irqfd=not messages,
                ioeventfd=not messages,
            )  # fmt: skip
            assert board.process is not None
            self.process = board.process
            return PciDriver(board, board.slot, msix="intx" not in how)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _needs(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Return settings and descriptors of a device; whoever gets these closes them."""
        if self.kind == "vioblk":
            self.image.write_bytes(bytes(IMAGE_BYTES))
            disk = DiskConfig(path=str(self.image), format="raw", serial=SERIAL)
            return disk._asdict(), {"image": os.open(self.image, os.O_RDWR)}
        if self.kind == "vioscsi":
            self.image.write_bytes(DISC)
            return {}, {"disc1": open_disc(str(self.image))}
        if self.kind == "vionet":
            self._stream, theirs = socket.socketpair()
            self.stack.callback(self._stream.close)
            self._stream.settimeout(20)
            theirs.setblocking(False)
            return {**SETTINGS, "backend": "stream"}, {"stream0": theirs.detach()}
        return {"rate": 0}, {}

    def _vhost_user(self) -> Transport:
        words: list[str] = []
        fds: Sequence[int] = ()
        if self.kind == "vioblk":
            self.image.write_bytes(bytes(IMAGE_BYTES))
            words = ["--blk-file", str(self.image), "--format", "raw", "--serial", SERIAL]
        elif self.kind == "vioscsi":
            self.image.write_bytes(DISC)
            words = ["--cdrom", str(self.image)]
        elif self.kind == "vionet":
            self._tap = self.stack.enter_context(TapLab())
            fds = self._tap.fds
            words = ["--tap-fd", str(fds[0]), "--mac", LLADDR]
        program = Program(self.kind, *words, "--verbose", fds=fds)
        self._program = self.stack.enter_context(program)
        return VhostUser(program.connect(), deadline=20, nr_queues=3 if fds else 0)

    # The other end of a network device.

    def send(self, frame: bytes) -> None:
        """Send a frame to the device."""
        if self._tap is not None:
            self._tap.send(frame)
            return
        assert self._stream is not None
        self._stream.sendall(len(frame).to_bytes(4) + frame)

    def receive(self) -> bytes:
        """Wait for a frame from the device."""
        if self._tap is not None:
            return self._tap.receive(1)[0].data
        assert self._stream is not None
        length = int.from_bytes(self._stream.recv(4, socket.MSG_WAITALL))
        return self._stream.recv(length, socket.MSG_WAITALL)

    # The process.

    def _pid(self) -> int:
        return self._program.device_pid() if self._program else self.process.pid

    def kill(self) -> None:
        """End the device process at once, and wait until it is gone."""
        pidfd = os.pidfd_open(self._pid())
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(20_000), "it does not end"
        finally:
            os.close(pidfd)

    def halt(self, *, on: bool = True) -> None:
        """Stop the device process, or let it go on."""
        os.kill(self._pid(), signal.SIGSTOP if on else signal.SIGCONT)
