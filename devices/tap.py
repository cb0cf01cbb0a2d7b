"""A tap interface as the device's way out: one descriptor per queue pair, whole frames only.

Whoever opened it has made it IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, and IFF_MULTI_QUEUE for several
queues. Then each read and write is one frame behind the same header that a driver uses, so a
frame of 64 KiB is one system call on guest memory, and cutting it up is the kernel's business.

What belongs to the interface rather than to a queue (length of the header, offloads, carrier) is
set through the first descriptor. These are the only requests made, and seccomp knows them:
TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE and TUNSETCARRIER (linux/if_tun.h).
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from fcntl import ioctl
from functools import partial
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Final

from config.errors import HostError
from devices import nethdr as hdr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.netport import Port

TUNSETOFFLOAD: Final = 0x400454D0
TUNGETIFF: Final = 0x800454D2
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETQUEUE: Final = 0x400454D9
TUNSETVNETLE: Final = 0x400454DC
TUNSETCARRIER: Final = 0x400454E2
IFF_ATTACH_QUEUE: Final = 0x0200
IFF_DETACH_QUEUE: Final = 0x0400
# IFF_NO_PI cannot be told: TUNGETIFF has another flag in its place.
_WANTED: Final = (("being a tap", 0x0002), ("IFF_VNET_HDR", 0x4000))

# TUN_F_*: what may arrive from the interface, by what a driver accepts.
_OFFLOADS: Final = (
    (hdr.NET_F_GUEST_CSUM, 0x01),
    (hdr.NET_F_GUEST_TSO4, 0x02),
    (hdr.NET_F_GUEST_TSO6, 0x04),
    (hdr.NET_F_GUEST_ECN, 0x08),
    (hdr.NET_F_GUEST_UFO, 0x10),
    (hdr.NET_F_GUEST_USO4, 0x20),
    (hdr.NET_F_GUEST_USO6, 0x40),
)
# Each set with what a device may offer if the kernel takes it; newest first: USO needs Linux 6.2.
_USO: Final = hdr.NET_F_GUEST_USO4 | hdr.NET_F_GUEST_USO6
_PROBES: Final = (
    (_USO, hdr.NET_F_HOST_USO),
    (hdr.NET_F_GUEST_UFO, hdr.NET_F_HOST_UFO),
    (
        hdr.NET_F_GUEST_TSO4 | hdr.NET_F_GUEST_TSO6 | hdr.NET_F_GUEST_ECN,
        hdr.NET_F_HOST_TSO4 | hdr.NET_F_HOST_TSO6 | hdr.NET_F_HOST_ECN,
    ),
)

_DRAIN_MAX: Final = 4096  # frames: more than a tap holds unless somebody goes on sending


class TapPort:
    """One queue of a tap."""

    buffered = False  # what is to be read, epoll knows of
    edge = 0

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.receive = partial(os.readv, fd)
        self.send = partial(os.writev, fd)

    def attach(self, *, on: bool) -> None:
        """Have frames arrive here, or on the other queues only. Raises OSError."""
        flag = IFF_ATTACH_QUEUE if on else IFF_DETACH_QUEUE
        try:
            ioctl(self.fd, TUNSETQUEUE, pack("16xH22x", flag))
        except OSError as err:
            if err.errno != errno.EINVAL:  # so it is already: a predecessor may have left it so
                raise

    def drain(self) -> None:
        """Throw away the frames that wait to be read."""
        with suppress(OSError):
            for _ in range(_DRAIN_MAX):
                os.read(self.fd, 1)  # the rest of a frame goes with it


class Tap:
    """An interface and its queues. Raises OSError from whatever the kernel refuses."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Take over descriptors, and find out what the kernel can do. Raises HostError."""
        for fd in fds:
            os.set_blocking(fd, False)
        self._fd = fds[0]
        self._queues = [TapPort(fd) for fd in fds]
        self.ports: Sequence[Port] = self._queues
        self._attached = len(fds)
        try:
            flags = ioctl(self._fd, TUNGETIFF, bytes(40))
            [kind] = unpack_from("H", flags, 16)
            missing = [name for name, bit in _WANTED if not kind & bit]
            ioctl(self._fd, TUNSETVNETHDRSZ, pack("i", hdr.HEADER_BYTES))
            ioctl(self._fd, TUNSETVNETLE, pack("i", 1))
            self.features = self._probe()
        except OSError as err:
            raise HostError(f"this is no tap interface to use: {err.strerror}") from err
        if missing:
            raise HostError(f"the tap was opened without {', '.join(missing)}")

    def _probe(self) -> int:
        """Return the features that this kernel makes possible; all are off afterwards."""
        features = hdr.NET_F_CSUM | hdr.NET_F_GUEST_CSUM
        for guest, host in _PROBES:
            with suppress(OSError):
                self.offload(hdr.NET_F_GUEST_CSUM | guest)
                features |= guest | host
        self.offload(0)
        return features

    def offload(self, features: int) -> None:
        """Have only such frames arrive as a driver with these features can take."""
        ioctl(self._fd, TUNSETOFFLOAD, _tun_flags(features))

    def set_header(self, length: int) -> None:
        """Have a header of 10 or 12 bytes in front of each frame."""
        ioctl(self._fd, TUNSETVNETHDRSZ, pack("i", length))

    def attach(self, pairs: int) -> None:
        """Have frames arrive on the first `pairs` queues only."""
        for number, queue in enumerate(self._queues):
            if (number < pairs) != (number < self._attached):
                queue.attach(on=number < pairs)
        self._attached = pairs

    def carrier(self, up: bool) -> None:
        """Plug the cable in, or pull it: the host's side sees that, too (Linux 4.20)."""
        with suppress(OSError):
            ioctl(self._fd, TUNSETCARRIER, pack("i", up))

    def drain(self) -> None:
        """Throw away the frames that wait to be read."""
        for queue in self._queues[: self._attached]:
            queue.drain()


def _tun_flags(features: int) -> int:
    """Return TUN_F_* for a driver's features, without what the kernel would refuse as a whole.

    Everything needs CSUM, ECN one of the TSOs, and the USOs come together.
    """
    if not features & hdr.NET_F_GUEST_CSUM:
        return 0
    if not features & (hdr.NET_F_GUEST_TSO4 | hdr.NET_F_GUEST_TSO6):
        features &= ~hdr.NET_F_GUEST_ECN
    if features & _USO != _USO:
        features &= ~_USO
    return sum(bit for feature, bit in _OFFLOADS if features & feature)


def is_down(err: OSError) -> bool:
    """Tell whether a tap has only been taken down, so that it may come back."""
    return err.errno == errno.EIO
