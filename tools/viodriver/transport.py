"""The way to one device: what all transports can do, and a driver's steps up to DRIVER_OK.

    queues = transport.start(F_EVENT_IDX)   # negotiates, sets every queue up, DRIVER_OK
    transport.kick(0); transport.wait_call(0, 1.0)
    transport.status = 0                    # a reset

What knows a transport knows no queue's contents and no kind of device. Every step of `start` can
be taken alone, and nothing here checks what is asked for: a test may ask for nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from devices.features import F_VERSION_1
from tools.viodriver.split import open_driver

if TYPE_CHECKING:
    from devices.guestmem import GuestMemory
    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver

RING_BASE: Final = 0x10000  # guest address where start() puts the first queue
ARENA_BYTES: Final = 1 << 19  # for buffers, per queue

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
READY: Final = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Transport:
    """Reaches one device. For one thread; who inherits says how, and brings the memory."""

    memory: GuestMemory
    nr_queues: int
    transport: str  #: its name: private, vhost-user, pci

    # What a transport provides.

    @property
    def status(self) -> int:
        """device_status; writing 0 resets the device."""
        raise NotImplementedError

    @status.setter
    def status(self, value: int) -> None:
        raise NotImplementedError

    def offered(self) -> int:
        """Return the features that the device offers."""
        raise NotImplementedError

    def accept(self, features: int) -> None:
        """Write the driver's features."""
        raise NotImplementedError

    def queue_size(self, index: int) -> int:
        """Return how many entries a queue may have; 0 if there is no such queue."""
        raise NotImplementedError

    def enable(self, index: int, queue: SplitDriver | PackedDriver) -> bool:
        """Tell the device where a queue is, and enable it; False if it was refused."""
        raise NotImplementedError

    def disable(self, index: int) -> bool:
        """Have the device let go of a queue, which F_RING_RESET allows; False if it has not."""
        raise NotImplementedError

    def kick(self, queue: int) -> None:
        """Tell the device that queue number `queue` has something new."""
        raise NotImplementedError

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for a call of that queue (or of viodev.CONFIG_CHANGE), and take it.

        At most `timeout` seconds; False if none came.
        """
        raise NotImplementedError

    def call_fd(self, queue: int) -> int:
        """Return an eventfd that is readable once a queue calls, or -1 where there is none."""
        raise NotImplementedError

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of the device's configuration space."""
        raise NotImplementedError

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of it."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Whether there is still a device at the other end."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what a dump tells of this transport, as plain JSON values."""
        return {}

    def close(self) -> None:
        """Let go of the device, and free what was made to reach it."""

    # A driver's way to DRIVER_OK (virtio 1.2 §3.1).

    def negotiate(self, features: int) -> bool:
        """Reset, accept `features` as they are, and set FEATURES_OK; False if it is refused."""
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        self.accept(features)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    def start(
        self, features: int = 0, *, size: int = 0, arena_bytes: int = ARENA_BYTES
    ) -> list[SplitDriver | PackedDriver]:
        """Drive the device to DRIVER_OK with VERSION_1 and `features`; return its queues.

        Each queue has `size` entries (0: what the device says), its ring and buffers one after
        another from RING_BASE on.
        """
        features |= F_VERSION_1
        assert self.negotiate(features), f"{features:#x} refused, offered {self.offered():#x}"
        queues = self.drivers(features, size=size, arena_bytes=arena_bytes)
        for index, queue in enumerate(queues):
            assert self.enable(index, queue), f"queue {index} refused"
        self.status = READY
        assert self.status == READY
        return queues

    def drivers(
        self,
        features: int,
        *,
        size: int = 0,
        max_queues: int = 0,
        align: int = 64,
        arena_bytes: int = ARENA_BYTES,
    ) -> list[SplitDriver | PackedDriver]:
        """Make the driver's side of every queue in guest memory; the device hears nothing."""
        queues: list[SplitDriver | PackedDriver] = []
        base = RING_BASE
        for index in range(min(max_queues or self.nr_queues, self.nr_queues)):
            entries = size or self.queue_size(index)
            queues.append(
                open_driver(
                    self.memory, entries, base, features, align=align, arena_bytes=arena_bytes
                )
            )
            room = 64 * entries + 3 * 4096 + arena_bytes
            base += -(-room // 4096) * 4096
        return queues
