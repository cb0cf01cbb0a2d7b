"""One ring of a vhost-user connection, as its front end has described it so far."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from devices.virtqueue import VirtQueue


class Addresses(NamedTuple):
    """Where a ring is, by the front end's addresses; `log_gpa` is -1 if writes are not logged."""

    desc_hva: int
    used_hva: int
    avail_hva: int
    log_gpa: int


class Ring:
    """What is known of one ring; descriptors are ours, -1 where there is none."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick = self.call = self.err = -1
        self.enabled = False
        self.called = False  # while there was nobody to tell
        self.addresses: Addresses | None = None
        self.size = 0
        self.inflight: memoryview | None = None
        self.forget()

    def forget(self) -> None:
        """Be a ring that has not been started."""
        self.queue: VirtQueue | None = None
        self.base = -1  # where to begin; -1: nobody has said
        self.started = self.polled = False

    def close(self) -> None:
        """Close all descriptors."""
        for name in ("kick", "call", "err"):
            self.replace(name, -1)

    def replace(self, name: str, fd: int) -> None:
        """Put another descriptor in a place, and close what was there."""
        old = getattr(self, name)
        setattr(self, name, fd)
        if old >= 0:
            os.close(old)
