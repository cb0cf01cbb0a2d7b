"""What a driver writes about one virtqueue before it enables it, and the queue it becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.errors import GuestError
from devices.inflight import Inflight
from devices.spec import QUEUE_SIZE_MAX
from devices.virtqueue import QueueState, VirtQueue, open_queue

if TYPE_CHECKING:
    from devices.guestmem import GuestMemory


class QueueRegisters:
    """Size and addresses of one queue; `queue` is None until it is enabled."""

    __slots__ = (
        "avail_gpa",
        "default_size",
        "desc_gpa",
        "in_order",
        "inflight",
        "queue",
        "size",
        "used_gpa",
    )

    def __init__(
        self, default_size: int, inflight: memoryview | None = None, *, in_order: bool = False
    ) -> None:
        """Make a queue that is not enabled; `inflight` and `in_order` are as in open_queue()."""
        self.default_size, self.inflight, self.in_order = default_size, inflight, in_order
        self.queue: VirtQueue | None = None
        self.clear()

    def clear(self) -> None:
        """Return to the first values, and let go of the ring."""
        if self.queue is not None:
            self.queue.reset()
            self.queue = None
        self.size = self.default_size
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0

    def reset(self) -> None:
        """Forget everything for good, also what a killed predecessor left to be taken over."""
        self.clear()
        if self.inflight is not None:
            Inflight(self.inflight, 1, packed=False).void()  # whatever queue it holds

    def resize(self, size: int, *, packed: bool) -> None:
        """Take a driver's wish; one that cannot be leaves 0, and then the queue is no queue.

        What the driver reads is a power of 2 unless the ring is packed, or 0 (§4.1.4.3.1).
        """
        possible = size <= QUEUE_SIZE_MAX and (packed or not size & (size - 1))
        self.size = size if possible else 0

    def open(self, memory: GuestMemory, features: int) -> VirtQueue:
        """Enable the queue. Raises GuestError, not enabled, on a bad size or address."""
        if not self.size:
            raise GuestError("a size that cannot be was written")
        if not (self.desc_gpa and self.avail_gpa and self.used_gpa):
            raise GuestError("an address is 0")
        self.queue = queue = open_queue(
            memory,
            self.size,
            self.desc_gpa,
            self.avail_gpa,
            self.used_gpa,
            features=features,
            inflight=self.inflight,
            in_order=self.in_order,
        )
        return queue

    def save(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "size": self.size,
            "desc_gpa": self.desc_gpa,
            "avail_gpa": self.avail_gpa,
            "used_gpa": self.used_gpa,
            "enabled": self.queue is not None,
            "cursors": None if self.queue is None else list(self.queue.save()),
        }

    def load(self, state: dict[str, Any], memory: GuestMemory, features: int) -> None:
        """Become what `save` described. Raises GuestError if that cannot be.

        Without cursors an enabled queue goes on where its in-flight area says: so it is when the
        process that had it was killed, and nobody knows its latest cursors.
        """
        self.size, self.desc_gpa = state["size"], state["desc_gpa"]
        self.avail_gpa, self.used_gpa = state["avail_gpa"], state["used_gpa"]
        if state["enabled"]:
            queue = self.open(memory, features)
            if state["cursors"] is not None:
                queue.load(QueueState(*state["cursors"]))
