"""Queues of tap interfaces: TUNSETIFF (linux/if_tun.h).

A tap that TUNSETIFF makes lives as long as one of its queues is open, in whichever process; one
that was made persistent, by its owner or root, is joined by the same request.
"""

from __future__ import annotations

import errno
import os
from fcntl import ioctl
from struct import pack, unpack_from
from typing import Final

from config.errors import HostError

DEVICE: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNGETIFF: Final = 0x800454D2
IFF_TAP: Final = 0x0002
IFF_MULTI_QUEUE: Final = 0x0100
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000

REMEDY: Final = (
    "start the VM as root, or have root make the tap for you once (ip tuntap add NAME mode tap "
    "user YOU) and give its name, or use 'type: user'"
)


def open_queues(name: str, count: int, device: str) -> list[int]:
    """Return a descriptor per queue of tap `name`, which is made if need be. Raises HostError."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE * (count > 1)
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            ioctl(fds[-1], TUNSETIFF, pack("16sH22x", name.encode(), flags))
    except OSError as err:
        for fd in fds:
            os.close(fd)
        what, hint = _explain(name, count, err)
        raise HostError(what, device=device, hint=hint) from err
    return fds


def _explain(name: str, count: int, err: OSError) -> tuple[str, str]:
    """Return what an error means, and what to do."""
    if err.filename == DEVICE:
        return f"cannot open {DEVICE}: {err.strerror}", "modprobe tun"
    if err.errno == errno.EBUSY:
        return f"tap {name} is in use by another program", "give another name, or leave 'tap' out"
    if err.errno in (errno.EPERM, errno.EACCES):
        return f"no right to make or use tap {name}", REMEDY
    if err.errno == errno.EINVAL:
        kind = "multi_queue" if count > 1 else "single-queue"
        return (
            f"interface {name} is there already, and is no {kind} tap",
            "make it with 'ip tuntap add ... mode tap multi_queue' for 'queues' of 2 and more, "
            "without multi_queue for 1, or give another name",
        )
    return f"cannot use tap {name}: {err.strerror}", ""


def name_of(fd: int, device: str) -> str:
    """Return the interface that a descriptor is a queue of. Raises HostError if it is none."""
    try:
        answer = ioctl(fd, TUNGETIFF, bytes(40))
    except OSError as err:
        what = f"descriptor {fd} is no tap: {err.strerror}"
        raise HostError(what, device=device, hint="pyvmctl must inherit it open") from err
    if not unpack_from("H", answer, 16)[0] & IFF_TAP:
        raise HostError(f"descriptor {fd} is a tun interface, not a tap", device=device)
    return bytes(answer[:16]).split(b"\0")[0].decode()
