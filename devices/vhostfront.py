"""vhost-user from the front end's side: asks a back end to be a virtio device.

    front = FrontEnd(connect(path))
    front.negotiate()                     owner, what the back end offers, protocol features
    front.accept(features)                virtio features, once the driver has chosen
    front.share(regions)                  guest memory
    front.start_queue(0, ring, kick=…, call=…); front.enable_queue(0)
    base = front.stop_queue(0)            the back end has done with the ring; where it stands

Every call is one question, or several, and returns when they are answered. Where the back end can
acknowledge (REPLY_ACK) it has to, so an error is told by the call that caused it. No path is
looked at after connect(), and a socket from elsewhere is as good.

Raises PeerError; see vhostask.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

from devices import vhostwire
from devices.vhostask import Asker, BackChannel, RefusedError
from devices.vhostwire import (
    CONFIG_MAX,
    F_PROTOCOL_FEATURES,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INBAND_NOTIFICATIONS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    P_STATUS,
    REGIONS_MAX,
    VRING_INDEX,
    VRING_NO_FD,
    Front,
    Wire,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

DEADLINE: Final = 5.0  # seconds for an answer, unless the owner says otherwise
INFLIGHT_MAX: Final = 64 << 20  # bytes of an in-flight area

#: Protocol features to agree on if the back end offers them; in-band notifications are for those
#: who cannot pass an eventfd, and have to be asked for.
PROTOCOL: Final = (
    P_MQ
    | P_LOG_SHMFD
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_CONFIG
    | P_INFLIGHT_SHMFD
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS
    | P_STATUS
)
_INBAND_NEEDS: Final = P_BACKEND_REQ | P_REPLY_ACK


class MemoryRegion(NamedTuple):
    """One stretch of guest memory; in bytes, page aligned."""

    gpa: int
    size: int
    hva: int  # by which rings are named; any address of ours that names no other byte
    offset: int  # where it starts in the file
    fd: int  # of the file; stays the caller's


class Ring(NamedTuple):
    """Where a queue lives; addresses are HVAs, inside of a region."""

    size: int  # entries
    base: int  # split: next avail index; packed: see `vhost-user` on GET_VRING_BASE
    desc: int
    avail: int
    used: int
    log: int | None = None  # GPA of the used ring, to log what is written to it


class InflightArea(NamedTuple):
    """Where a back end notes what it has begun; whoever has it closes `fd`."""

    fd: int
    size: int  # bytes
    offset: int  # in the file
    queues: int
    queue_size: int


class FrontEnd(Asker):
    """A conversation with one back end. For one thread."""

    def __init__(self, wire: Wire, deadline: float = DEADLINE) -> None:
        """Take over `wire`; `deadline` is in seconds, for each answer."""
        super().__init__(wire, deadline)
        self.features = 0  #: virtio features that the back end offers
        self._has_protocol = False

    # Before a driver comes.

    def negotiate(self, protocol: int = PROTOCOL) -> None:
        """Become the owner, and settle the protocol features among `protocol`."""
        offered = self.ask_u64(Front.GET_FEATURES)
        self.features = offered & ~F_PROTOCOL_FEATURES
        self._has_protocol = bool(offered & F_PROTOCOL_FEATURES)
        if self._has_protocol:
            agreed = self.ask_u64(Front.GET_PROTOCOL_FEATURES) & protocol
            if agreed & _INBAND_NEEDS != _INBAND_NEEDS:
                agreed &= ~P_INBAND_NOTIFICATIONS
            # Not acknowledged: that is only agreed on once this has arrived.
            self.send(Front.SET_PROTOCOL_FEATURES, vhostwire.U64.pack(agreed))
            self.protocol = agreed
        self.tell(Front.SET_OWNER)

    def queue_count(self) -> int:
        """Return how many queues the back end has at most. Needs MQ."""
        return self.ask_u64(Front.GET_QUEUE_NUM)

    def accept(self, features: int) -> None:
        """Settle the virtio features."""
        agreed = features | F_PROTOCOL_FEATURES * self._has_protocol
        self.tell(Front.SET_FEATURES, vhostwire.U64.pack(agreed))

    def open_back_channel(self) -> BackChannel:
        """Give the back end a socket to ask on. Needs BACKEND_REQ."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.tell(Front.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.back = BackChannel(Wire(ours, self.name), self.protocol)
        return self.back

    # Guest memory.

    def share(self, regions: Sequence[MemoryRegion]) -> None:
        """Let the back end reach `regions`, and nothing that was shared before.

        More than eight need CONFIGURE_MEM_SLOTS, and are added to what is there.
        """
        if len(regions) > REGIONS_MAX:
            most = self.region_count()
            if len(regions) > most:
                raise RefusedError(f"{self.name}: takes {most} memory regions, not {len(regions)}")
            for region in regions:
                self.add_region(region)
            return
        table = vhostwire.MEM_TABLE.pack(len(regions), 0)
        table += b"".join(map(_pack_region, regions))
        self.tell(Front.SET_MEM_TABLE, table, tuple(region.fd for region in regions))
        if not self.protocol & P_REPLY_ACK:
            self.ask_u64(Front.GET_FEATURES)  # answered once the table is in force

    def region_count(self) -> int:
        """Return how many regions the back end takes. Needs CONFIGURE_MEM_SLOTS."""
        return self.ask_u64(Front.GET_MAX_MEM_SLOTS)

    def add_region(self, region: MemoryRegion) -> None:
        """Share one more region. Needs CONFIGURE_MEM_SLOTS."""
        payload = vhostwire.MEM_SLOT.pack(0) + _pack_region(region)
        self.tell(Front.ADD_MEM_REG, payload, (region.fd,))

    def remove_region(self, region: MemoryRegion) -> None:
        """Take one region away. Needs CONFIGURE_MEM_SLOTS."""
        self.tell(Front.REM_MEM_REG, vhostwire.MEM_SLOT.pack(0) + _pack_region(region))

    # The device.

    def get_config(self, size: int, offset: int = 0) -> bytes:
        """Return `size` bytes of configuration space, at most 256. Needs CONFIG.

        Some back ends know no offset but 0, nor more than the bytes of their own structure; they
        refuse, which raises RefusedError.
        """
        if not 0 < size <= CONFIG_MAX:
            raise ValueError(f"configuration of {size} bytes")
        head = vhostwire.CONFIG.pack(offset, size, 0)
        payload = self.ask(Front.GET_CONFIG, head + bytes(size)).payload
        if len(payload) <= vhostwire.CONFIG.size:
            raise RefusedError(f"{self.name}: has no {size} bytes of configuration at {offset}")
        if payload[:8] != head[:8] or len(payload) != len(head) + size:
            raise self.wrong("answers with another part of its configuration")
        return payload[len(head) :]

    def set_config(self, offset: int, data: bytes, *, migrating: bool = False) -> None:
        """Write to configuration space. Needs CONFIG; refused where it is read-only."""
        head = vhostwire.CONFIG.pack(offset, len(data), int(migrating))
        self.tell(Front.SET_CONFIG, head + data)

    def status(self) -> int:
        """Return the device status. Needs STATUS."""
        return self.ask_u64(Front.GET_STATUS)

    def set_status(self, status: int) -> None:
        """Write the device status. Needs STATUS."""
        self.tell(Front.SET_STATUS, vhostwire.U64.pack(status))

    def reset_device(self) -> None:
        """Stop all queues and return the device to its first state. Needs RESET_DEVICE."""
        self.tell(Front.RESET_DEVICE)

    def disown(self) -> None:
        """Give up being the owner (RESET_OWNER); no modern front end does."""
        self.tell(Front.RESET_OWNER)

    # Queues.

    def start_queue(
        self, index: int, ring: Ring, *, kick: int = -1, call: int = -1, err: int = -1
    ) -> None:
        """Start queue `index`, disabled if there are protocol features; see enable_queue.

        `kick`, `call` and `err` are eventfds that stay the caller's. Without `kick` the back end
        polls the ring, or waits for kick(); without `call` it does not interrupt.
        """
        number = vhostwire.VRING_STATE
        flags = 0 if ring.log is None else vhostwire.VRING_LOG_USED
        address = (index, flags, ring.desc, ring.used, ring.avail, ring.log or 0)
        self.tell(Front.SET_VRING_NUM, number.pack(index, ring.size))
        self.tell(Front.SET_VRING_BASE, number.pack(index, ring.base))
        self.tell(Front.SET_VRING_ADDR, vhostwire.VRING_ADDR.pack(*address))
        self.set_fd(Front.SET_VRING_ERR, index, err)
        self.set_fd(Front.SET_VRING_CALL, index, call)
        self.set_fd(Front.SET_VRING_KICK, index, kick)  # the one that starts it

    def set_fd(self, request: Front, index: int, fd: int) -> None:
        """Set one eventfd of a queue, by its SET_VRING_KICK, CALL or ERR; -1: none."""
        if not 0 <= index <= VRING_INDEX:
            raise ValueError(f"queue {index}")
        none = VRING_NO_FD * (fd < 0)
        self.tell(request, vhostwire.U64.pack(index | none), () if none else (fd,))

    def enable_queue(self, index: int, *, on: bool = True) -> None:
        """Let a queue have effects, or not. Without protocol features every queue has."""
        if self._has_protocol:
            self.tell(Front.SET_VRING_ENABLE, vhostwire.VRING_STATE.pack(index, int(on)))

    def stop_queue(self, index: int) -> int:
        """Stop queue `index`; return the base to start it from again."""
        asked = vhostwire.VRING_STATE.pack(index, 0)
        reply = self.ask(Front.GET_VRING_BASE, asked, size=len(asked))
        queue, base = vhostwire.VRING_STATE.unpack(reply.payload)
        if queue != index:
            raise self.wrong(f"stops queue {queue}, not {index}")
        return int(base)

    def kick(self, index: int) -> None:
        """Kick a queue by message. Needs INBAND_NOTIFICATIONS."""
        self.tell(Front.VRING_KICK, vhostwire.VRING_STATE.pack(index, 0))

    # What outlives a back end.

    def get_inflight(self, queues: int, queue_size: int) -> InflightArea:
        """Have the back end make an in-flight area. Needs INFLIGHT_SHMFD."""
        asked = vhostwire.INFLIGHT.pack(0, 0, queues, queue_size)
        reply = self.ask(Front.GET_INFLIGHT_FD, asked, fds=1)
        payload = reply.payload.ljust(vhostwire.INFLIGHT.size, b"\0")  # the padding may be missing
        whole = vhostwire.INFLIGHT_LEAST <= len(reply.payload) <= vhostwire.INFLIGHT.size
        size, offset, nr_queues, entries = vhostwire.INFLIGHT.unpack_from(payload)
        area = InflightArea(reply.fds[0], size, offset, nr_queues, entries)
        if not whole or not 0 < size <= INFLIGHT_MAX or offset > INFLIGHT_MAX:
            os.close(area.fd)
            raise self.wrong(f"makes an in-flight area of {size} bytes at {offset}")
        return area

    def set_inflight(self, area: InflightArea) -> None:
        """Give a back end the area of its predecessor. Needs INFLIGHT_SHMFD."""
        self.tell(Front.SET_INFLIGHT_FD, vhostwire.INFLIGHT.pack(*area[1:]), (area.fd,))

    def set_log(self, fd: int, size: int, offset: int = 0) -> None:
        """Have writes to guest memory logged, a bit per page of 4 KiB. Needs LOG_SHMFD.

        In force for features that include F_LOG_ALL, and for rings with `log`.
        """
        self.ask(Front.SET_LOG_BASE, vhostwire.LOG.pack(size, offset), (fd,))

    def set_log_fd(self, fd: int) -> None:
        """Have an eventfd signalled when the log has changed."""
        self.tell(Front.SET_LOG_FD, fds=(fd,))


def _pack_region(region: MemoryRegion) -> bytes:
    return vhostwire.MEM_REGION.pack(region.gpa, region.size, region.hva, region.offset)
