"""Descriptors that come over a Unix socket (SCM_RIGHTS in unix(7)).

They are in this process's table before anybody has looked at them: whoever receives closes what
it does not want. None is inherited by a program.
"""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def receive(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], bool]:
    """Receive up to `size` bytes and `most` descriptors; also tell whether there were more.

    The kernel closes those beyond `most`, and those there is no room for in the table. One system
    call, recvmsg(2), so that a jailed process can do it. Raises OSError.
    """
    fds = array.array("i")
    data, control, flags, _ = sock.recvmsg(
        size, socket.CMSG_LEN(most * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), bool(flags & socket.MSG_CTRUNC)


def close(fds: Iterable[int]) -> None:
    """Close what was received."""
    for fd in fds:
        os.close(fd)
