"""A network device's driver (virtio 1.2 §5.1): frames out, frames in, one pair of queues.

net = Net(device)
net.give(16)                     # receive buffers
net.send(b"frame"); net.receive(timeout=1.0)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from devices.nethdr import NET_F_MAC, NET_F_MRG_RXBUF, NET_F_STATUS
from tools.viodriver.errors import DriverError, NoAnswerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.viodriver.device import VirtioDevice
    from tools.viodriver.requests import Completion

HEADER_BYTES: Final = 12  # of every frame, both ways (§5.1.6)
BUFFER_BYTES: Final = 2048


class NetFrame(NamedTuple):
    """A frame that was received."""

    header: bytes
    data: bytes


class _Buffer(NamedTuple):
    """A buffer that the device has."""

    gpa: int
    length: int


class Net:
    """Sends and receives on pair number `pair`. Every call raises DriverError."""

    def __init__(self, device: VirtioDevice, *, pair: int = 0, timeout: float = 10.0) -> None:
        """Acquire both queues of a started device."""
        self.device, self.timeout = device, timeout
        self.rx, self.tx = device.acquire(2 * pair), device.acquire(2 * pair + 1)
        self._parts: list[bytes] = []  # of frames that have not all arrived
        self._kept: list[NetFrame] = []  # arrived, for the next who asks

    @property
    def mac(self) -> bytes:
        """The address; empty if the device does not say."""
        if not self.device.has_feature(NET_F_MAC):
            return b""
        return bytes(self.device.read_config(at, 1) for at in range(6))

    @property
    def link(self) -> bool:
        """Whether the link is up."""
        return not self.device.has_feature(NET_F_STATUS) or bool(self.device.read_config(6, 2) & 1)

    def send(self, *frames: bytes, header: bytes = bytes(HEADER_BYTES)) -> None:
        """Send frames, and wait until the device is done with them."""
        taken: list[_Buffer] = []
        for frame in frames:
            whole = header + frame
            taken.append(_Buffer(self.tx.take(whole), len(whole)))
            self.tx.start(None, 1)
            self.tx.add([taken[-1]])
        self.tx.wait(timeout=self.timeout)
        for buffer in taken:
            self.tx.give(*buffer)

    def give(self, count: int, length: int = BUFFER_BYTES) -> None:
        """Give the device `count` buffers to receive into."""
        for _ in range(count):
            buffer = _Buffer(self.rx.take(length), length)
            self.rx.start(buffer, 1)
            self.rx.add([buffer], writable=True)
        self.rx.flush()

    def poll(self) -> list[NetFrame]:
        """Return the frames that have arrived; their buffers are the queue's again."""
        self._kept += self._frames(self.rx.poll())
        found, self._kept = self._kept, []
        return found

    def receive(self, count: int = 1, *, timeout: float | None = None) -> list[NetFrame]:
        """Wait for at least `count` frames. Raises NoAnswerError; what came is kept for later."""
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while len(self._kept) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise NoAnswerError(f"{count} frames wanted, {len(self._kept)} came")
            self._kept += self._frames(self.rx.wait(1, timeout=left))
        return self.poll()

    def _frames(self, arrived: Sequence[Completion]) -> list[NetFrame]:
        for done in arrived:
            buffer: _Buffer = done.cookie
            self._parts.append(
                self.rx.ring.memory.read(buffer.gpa, min(done.written, buffer.length))
            )
            self.rx.give(*buffer)
        found: list[NetFrame] = []
        merge = self.device.has_feature(NET_F_MRG_RXBUF)
        while self._parts:
            header = self._parts[0][:HEADER_BYTES]
            if len(header) < HEADER_BYTES:
                raise DriverError(f"a frame of {len(header)} bytes: no room for its header")
            count = int.from_bytes(header[10:12], "little") if merge else 1
            if len(self._parts) < count:
                break
            data = b"".join(self._parts[: max(count, 1)])
            del self._parts[: max(count, 1)]
            found.append(NetFrame(header, data[HEADER_BYTES:]))
        return found
