"""What the virtqueue conformance tests have in common: where things lie, and what refusal means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from config.errors import GuestError
from devices.chain import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

if TYPE_CHECKING:
    from devices.virtqueue import VirtQueue
    from tools.viodriver import PackedDriver, SplitDriver

BASE: Final = 0x1000  # of the ring
BUF: Final = 0x40000  # of buffers that a test places by hand
RAM: Final = 1 << 20
# Short names for the rows of descriptors in tests: addr, len, N | W, next.
N: Final = DESC_F_NEXT
W: Final = DESC_F_WRITE
INDIRECT: Final = DESC_F_INDIRECT


def refused(driver: SplitDriver | PackedDriver, queue: VirtQueue, complaint: str) -> None:
    """Check that pop refuses the chain on offer, keeps its position and gives nothing back."""
    before = queue.save()
    for _ in range(2):  # the second time too: nothing was skipped
        with pytest.raises(GuestError, match=complaint):
            queue.pop()
    assert queue.save() == before
    assert list(driver.used()) == []


def echo(driver: SplitDriver | PackedDriver, queue: VirtQueue, *lengths: int) -> None:
    """Pass one request of that many one-byte descriptors each through the queue."""
    for length in lengths:
        driver.add([b"x"] * length, indirect=False)
        chain = queue.pop()
        assert chain is not None
        assert chain.readable_bytes == length
        queue.push(chain.head, 0)
        assert len(driver.collect()) == 1
