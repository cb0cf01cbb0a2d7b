"""The driver of a network device's processes, and both ends of what it sends and receives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devices import nethdr as hdr
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC
from devices.viodev import ImsgType
from tools.viodriver.private import DEADLINE

if TYPE_CHECKING:
    from tests.taplab import TapLab
    from tools.viodriver import PackedDriver, SplitDriver

FEATURES = (
    F_EVENT_IDX
    | F_INDIRECT_DESC
    | hdr.NET_F_MRG_RXBUF
    | hdr.NET_F_CSUM
    | hdr.NET_F_HOST_TSO4
    | hdr.NET_F_GUEST_CSUM
    | hdr.NET_F_GUEST_TSO4
    | hdr.NET_F_STATUS
    | hdr.NET_F_CTRL_VQ
    | hdr.NET_F_CTRL_RX
    | hdr.NET_F_CTRL_GUEST_OFFLOADS
)
HEADER = bytes(12)


class NetDriver:
    """Queues of a device that `host` leads to, and its tap."""

    host: Any  # a DeviceHost, or what is like one
    tap: TapLab
    queues: list[SplitDriver | PackedDriver]

    def send(self, *frames: bytes, head: bytes = HEADER, queue: int = 1) -> None:
        """Send frames, and wait until all are back."""
        driver = self.queues[queue]
        driver.enable_calls()
        for frame in frames:
            driver.add([head + frame[:54], frame[54:]])
        self.host.kick(queue)
        while driver.outstanding:
            driver.collect()
            if driver.outstanding and not driver.enable_calls():
                assert self.host.wait_call(queue, DEADLINE), self.host.said

    def give(self, count: int, length: int = 4096, queue: int = 0) -> None:
        """Give receive buffers."""
        for _ in range(count):
            self.queues[queue].add([], [length])
        self.host.kick(queue)

    def receive(self, nr_buffers: int, queue: int = 0) -> bytes:
        """Wait for so many buffers, and return what is in them, each without 12 bytes."""
        driver, data, count = self.queues[queue], b"", 0
        while count < nr_buffers:
            for used in driver.collect():
                data += driver.data(used.request, used.written)[12 if not data else 0 :]
                count += 1
            if count < nr_buffers and not driver.enable_calls():
                assert self.host.wait_call(queue, DEADLINE), self.host.said
        return data

    def command(self, kind: int, command: int, data: bytes) -> int:
        """Make a control command, and return its ack."""
        driver = self.queues[-1]
        driver.enable_calls()
        driver.add([bytes([kind, command]), data], [1])
        self.host.kick(len(self.queues) - 1)
        while not (found := driver.collect()):  # a call may be one too many
            assert self.host.wait_call(len(self.queues) - 1, DEADLINE), self.host.said
        [used] = found
        return int(driver.data(used.request)[0])

    def set(self, name: str, value: Any) -> Any:
        """Change a setting."""
        return self.host.ask(ImsgType.SETTING, {"name": name, "value": value})

    def counters(self) -> dict[str, Any]:
        """What the device has counted."""
        facts: dict[str, Any] = self.set("counters", None)["value"]
        return facts

    @property
    def complaints(self) -> list[str]:
        """What it has said that somebody should read."""
        while self.host.listen():
            pass
        return [line for line in self.host.said if line[0] in "23"]
