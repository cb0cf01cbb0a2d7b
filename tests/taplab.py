"""A tap in a network namespace of its own, and somebody at its other end.

    with TapLab() as tap:                 # skips the test, loudly, where that is not possible
        device = Tap(tap.dup())           # what the device gets
        tap.send(frame)                   # the host's stack sends it out of the interface
        [frame] = tap.receive(1)          # what the device has sent

The namespace is made in a process that is gone at once; its sockets and descriptors are all that
is left of it, and it goes with them. So nothing here needs to be cleaned up.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import pytest

if TYPE_CHECKING:
    from types import TracebackType

DEADLINE: Final = 10.0
NAME: Final = b"tap0"
QUEUE_LENGTH: Final = 4000  # frames that wait for the device

_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_TAP_FLAGS: Final = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_MULTI_QUEUE: Final = 0x0100
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFTXQLEN, _SIOCGIFINDEX = 0x8913, 0x8914, 0x8943, 0x8933
_IFF_UP: Final = 1
_IFF_RUNNING: Final = 0x40
_SIOCETHTOOL, _ETHTOOL_GLINK = 0x8946, 0xA
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL: Final = 3
_HEADER: Final = 10  # bytes of the header that a packet socket has
_NO_HEADER: Final = bytes(_HEADER)
_RTM_DELLINK: Final = 17


class Frame(NamedTuple):
    """What arrived: a header as virtio's, without num_buffers, and the frame."""

    header: bytes
    data: bytes


class TapLab:
    """A tap with `queues` queues, up, and a packet socket on its host's side."""

    def __init__(self, queues: int = 1, flags: int = _TAP_FLAGS) -> None:
        if os.geteuid() or not os.path.exists("/dev/net/tun"):
            pytest.skip("taps and network namespaces need root and /dev/net/tun")
        mine, theirs = socket.socketpair()
        with mine, theirs:
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    _make(theirs, queues, flags)
                    status = 0
                finally:
                    os._exit(status)
            theirs.close()
            _, fds, _, _ = socket.recv_fds(mine, 1, queues + 3)
            _, status = os.waitpid(pid, 0)
        assert status == 0, "the tap could not be made"
        self.fds = fds[:queues]
        self._packet, self._control, self._netlink = (
            socket.socket(fileno=fd) for fd in fds[queues:]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self.fds:
            os.close(fd)
        for sock in (self._packet, self._control, self._netlink):
            sock.close()

    def dup(self) -> list[int]:
        """Return descriptors of the queues for a device that closes them itself, or never."""
        return [os.dup(fd) for fd in self.fds]

    # The other end.

    def send(self, frame: bytes, header: bytes = _NO_HEADER) -> None:
        """Send a frame to the device."""
        self._packet.send(header + frame)

    def stop_listening(self) -> None:
        """Leave what the device sends to the host's stack, which drops it."""
        self._packet.bind((NAME.decode(), 0))

    def receive(self, count: int) -> list[Frame]:
        """Wait for so many frames from the device, and for none beyond those."""
        found: list[Frame] = []
        while len(found) < count:
            assert _readable(self._packet, DEADLINE), f"{len(found)} frames of {count} came"
            found += self.pending()
        assert len(found) == count
        return found

    def pending(self) -> list[Frame]:
        """Take the frames that have come."""
        found = []
        while _readable(self._packet, 0):
            data = self._packet.recv(1 << 17)
            found.append(Frame(data[:_HEADER], data[_HEADER:]))
        return found

    # The interface.

    def set_up(self, up: bool) -> None:
        """Take the interface up or down."""
        flags = self._flags() & ~_IFF_UP | _IFF_UP * up
        fcntl.ioctl(self._control, _SIOCSIFFLAGS, struct.pack("16sH22x", NAME, flags))
        self._packet.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # "network is down"

    @property
    def running(self) -> bool:
        """Whether it is up and has a carrier."""
        value = ctypes.create_string_buffer(struct.pack("II", _ETHTOOL_GLINK, 0))
        request = struct.pack("16sQ16x", NAME, ctypes.addressof(value))
        fcntl.ioctl(self._control, _SIOCETHTOOL, request)
        return bool(struct.unpack_from("I", value, 4)[0])

    def wait_running(self) -> None:
        """Wait until what is sent arrives: the host takes note of a carrier a little later."""
        end = time.monotonic() + DEADLINE
        while not self._flags() & _IFF_RUNNING:
            assert time.monotonic() < end, "no carrier"
            time.sleep(0.001)
        self.set_up(True)  # it is; under the lock that the host holds until frames may go

    def delete(self) -> None:
        """Delete it, whoever has it open."""
        answer = fcntl.ioctl(self._control, _SIOCGIFINDEX, struct.pack("16s24x", NAME))
        [index] = struct.unpack_from("i", answer, 16)
        body = struct.pack("BxHiII", 0, 0, index, 0, 0)
        self._netlink.send(struct.pack("IHHII", 16 + len(body), _RTM_DELLINK, 1 | 4, 1, 0) + body)
        error = struct.unpack_from("i", self._netlink.recv(4096), 16)[0]
        assert error == 0, os.strerror(-error)

    def _flags(self) -> int:
        answer = fcntl.ioctl(self._control, _SIOCGIFFLAGS, struct.pack("16s24x", NAME))
        return int(struct.unpack_from("H", answer, 16)[0])


def _readable(sock: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


def _make(channel: socket.socket, queues: int, flags: int) -> None:
    """Make namespace, tap and sockets, and send them all away."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    # The host's stack must not say anything of its own.
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as file:
        file.write("1")
    if queues > 1:
        flags |= _MULTI_QUEUE
    fds = array.array("i")
    for _ in range(queues):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", NAME, flags))
        fds.append(fd)
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(control, _SIOCSIFTXQLEN, struct.pack("16si20x", NAME, QUEUE_LENGTH))
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", NAME, _IFF_UP))
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    packet.bind((NAME.decode(), _ETH_P_ALL))
    packet.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    packet.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    packet.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    everything = [*fds, packet.fileno(), control.fileno(), netlink.fileno()]
    socket.send_fds(channel, [b"x"], everything)
