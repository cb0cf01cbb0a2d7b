"""An entropy device's driver (virtio 1.2 §5.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.viodriver.requests import RequestQueue


def read_random(queue: RequestQueue, length: int, *, timeout: float = 10.0) -> bytes:
    """Return bytes of entropy: 1 to `length`, as many as the device gives. Raises DriverError."""
    buffer = queue.take(length)
    queue.start(None, 1)
    queue.add([(buffer, length)], writable=True)
    [done] = queue.wait(timeout=timeout)
    data = queue.ring.memory.read(buffer, min(done.written, length))
    queue.give(buffer, length)
    return data
