"""Eventfds that a program has which nobody here wrote."""

from __future__ import annotations

import os
import select
from contextlib import suppress


def signal_if_room(fd: int, value: int) -> None:
    """Add to an eventfd that another program has, too.

    That may have made it one that blocks, and filled it: then whoever listens has been told.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        with suppress(BlockingIOError):
            os.eventfd_write(fd, value)
