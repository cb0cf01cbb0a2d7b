"""vhost-user from the back end's side: what each message of a front end does.

    socket ─► vhostwire ─► Conversation ─┬─► vhostrings: rings ─► device
                                         ├─► vhostmem: regions
                                         └─► configuration, status, features

**Answers.** A message that fails has changed nothing. With REPLY_ACK the front end is told, if it
asked for that; without, it would go on in the belief that all is well, so the connection ends. An
error that a guest can cause, as a ring outside of memory, never ends it.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from config.errors import GuestError, HostError, PyvmError
from devices import vhostwire
from devices.device import DEBUG, WARNING
from devices.features import (
    F_ANY_LAYOUT,
    F_IN_ORDER,
    F_NOTIFY_ON_EMPTY,
    RING_FEATURES,
)
from devices.vhostarea import make_inflight, map_area, split_inflight
from devices.vhostlog import DirtyLog
from devices.vhostmem import SLOTS_MAX, Regions
from devices.vhostring import Addresses
from devices.vhostwire import (
    CONFIG,
    CONFIG_MAX,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FRONT,
    INFLIGHT,
    MEM_REGION,
    MEM_SLOT,
    MEM_TABLE,
    NEED_REPLY,
    REPLY,
    U64,
    VRING_ADDR,
    VRING_INDEX,
    VRING_NO_FD,
    VRING_STATE,
    Back,
    Front,
    Message,
    PeerError,
    misshapen,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.vhostrings import Rings
    from devices.vhostwire import Wire

#: What is offered of the protocol, whatever the device.
PROTOCOL: Final = (
    vhostwire.P_MQ
    | vhostwire.P_LOG_SHMFD
    | vhostwire.P_REPLY_ACK
    | vhostwire.P_BACKEND_REQ
    | vhostwire.P_CONFIG
    | vhostwire.P_INFLIGHT_SHMFD
    | vhostwire.P_RESET_DEVICE
    | vhostwire.P_INBAND_NOTIFICATIONS
    | vhostwire.P_CONFIGURE_MEM_SLOTS
    | vhostwire.P_STATUS
)
_INBAND_NEEDS: Final = vhostwire.P_BACKEND_REQ | vhostwire.P_REPLY_ACK
NEEDS_RESET: Final = 0x40  # in the device status (virtio 1.2 §2.1)
_MIGRATING: Final = 1  # a flag of SET_CONFIG


class Conversation:
    """One connection. For one thread."""

    def __init__(self, wire: Wire, rings: Rings, log: Callable[[int, str], None]) -> None:
        """Take over `wire`; close() gives back all that came through it."""
        self._wire, self._rings, self._log = wire, rings, log
        self._device = rings.device
        self._protocol = self._status = 0
        self._back: socket.socket | None = None
        rings.bells.tell_call = self._tell_call
        rings.bells.tell_error = self._tell_error
        device = self._device
        self.offered = device.features & ~device.forgetful | F_PROTOCOL_FEATURES
        self.offered |= RING_FEATURES & ~(0 if device.in_order else F_IN_ORDER)
        self.offered |= F_NOTIFY_ON_EMPTY | F_ANY_LAYOUT | F_LOG_ALL
        # Monitors complain of one who has a configuration where they expect none.
        self._protocol_offered = PROTOCOL if device.config() else PROTOCOL & ~vhostwire.P_CONFIG
        self._handlers: Mapping[int, Callable[[bytes, list[int]], bytes | None]] = {
            Front.GET_FEATURES: lambda _, __: U64.pack(self.offered),
            Front.SET_FEATURES: self._set_features,
            Front.SET_OWNER: lambda _, __: None,
            Front.RESET_OWNER: lambda _, __: None,  # as the specification recommends
            Front.SET_MEM_TABLE: self._set_mem_table,
            Front.SET_LOG_BASE: self._set_log_base,
            Front.SET_LOG_FD: self._set_log_fd,
            Front.SET_VRING_NUM: self._set_vring_num,
            Front.SET_VRING_ADDR: self._set_vring_addr,
            Front.SET_VRING_BASE: self._set_vring_base,
            Front.GET_VRING_BASE: self._get_vring_base,
            Front.SET_VRING_KICK: self._set_vring_kick,
            Front.SET_VRING_CALL: self._set_vring_call,
            Front.SET_VRING_ERR: self._set_vring_err,
            Front.GET_PROTOCOL_FEATURES: lambda _, __: U64.pack(self._protocol_offered),
            Front.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Front.GET_QUEUE_NUM: lambda _, __: U64.pack(self._device.queue_num),
            Front.SET_VRING_ENABLE: self._set_vring_enable,
            Front.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Front.GET_CONFIG: self._get_config,
            Front.SET_CONFIG: self._set_config,
            Front.GET_INFLIGHT_FD: self._get_inflight_fd,
            Front.SET_INFLIGHT_FD: self._set_inflight_fd,
            Front.RESET_DEVICE: self._reset_device,
            Front.VRING_KICK: self._vring_kick,
            Front.GET_MAX_MEM_SLOTS: lambda _, __: U64.pack(SLOTS_MAX),
            Front.ADD_MEM_REG: self._add_mem_reg,
            Front.REM_MEM_REG: self._rem_mem_reg,
            Front.SET_STATUS: self._set_status,
            Front.GET_STATUS: self._get_status,
        }

    def readable(self, _events: int = 0) -> None:
        """Serve one message, if it is there as a whole. Raises PeerError at the end."""
        message = self._wire.receive()
        if message is None:
            return
        fds = list(message.fds)
        try:
            self._serve(message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _serve(self, message: Message, fds: list[int]) -> None:
        """Do what a message asks, and answer; descriptors that were taken leave `fds`."""
        request = message.request
        wanted = bool(message.flags & NEED_REPLY and self._protocol & vhostwire.P_REPLY_ACK)
        payload: bytes | None = None
        refused = False  # and not the error: its traceback would keep what it has to do with
        try:
            if why := misshapen(message, FRONT, self._protocol):
                raise HostError(why)
            if message.flags & REPLY:
                raise HostError(f"request {request} is an answer, and nobody has asked")
            handler = self._handlers.get(request)
            if handler is None:
                raise HostError(f"request {request} is not for this kind of device")
            payload = handler(message.payload, fds)
        except PeerError:
            raise
        except PyvmError as err:
            what = f"{_name(request)}: {err.what}"
            if not wanted and not isinstance(err, GuestError):
                raise PeerError(f"{self._wire.name}: {what}") from err
            self._log(WARNING, what)
            refused = True
        if payload is None and wanted:
            payload = U64.pack(int(refused))
        if payload is not None:
            made = request == Front.GET_INFLIGHT_FD and not refused
            sent = tuple(fds) if made else ()
            self._wire.send(Message(request, REPLY, payload, sent))

    def close(self) -> None:
        """Hang up, and close all descriptors."""
        self._rings.close()
        if self._back is not None:
            self._back.close()
            self._back = None
        self._wire.close()

    # Features and status.

    def _set_features(self, payload: bytes, _fds: list[int]) -> None:
        (features,) = U64.unpack(payload)
        if features & ~self.offered:
            raise HostError(f"features {features & ~self.offered:#x} were not offered")
        if features & F_LOG_ALL and not self._protocol & vhostwire.P_LOG_SHMFD:
            raise HostError("F_LOG_ALL without LOG_SHMFD: there will be no log")
        self._rings.set_features(features)
        self._log(DEBUG, f"features {features:#x}")

    def _set_protocol_features(self, payload: bytes, _fds: list[int]) -> None:
        (features,) = U64.unpack(payload)
        if unknown := features & ~self._protocol_offered:
            raise HostError(f"protocol features {unknown:#x} were not offered")
        inband = features & vhostwire.P_INBAND_NOTIFICATIONS
        if inband and features & _INBAND_NEEDS != _INBAND_NEEDS:
            raise PeerError(f"{self._wire.name}: in-band notifications without what they need")
        self._protocol = features

    def _set_status(self, payload: bytes, _fds: list[int]) -> None:
        (status,) = U64.unpack(payload)
        if status > 0xFF:
            raise HostError(f"device status {status:#x}")
        if not status:
            self._rings.reset()
        self._status = status & ~NEEDS_RESET

    def _get_status(self, _payload: bytes, _fds: list[int]) -> bytes:
        return U64.pack(self._status | NEEDS_RESET * self._rings.broken)

    def _reset_device(self, _payload: bytes, _fds: list[int]) -> None:
        self._rings.reset()
        self._status = 0

    # Memory.

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        count, _ = MEM_TABLE.unpack_from(payload)
        rows = payload[MEM_TABLE.size :]
        if len(rows) != count * MEM_REGION.size or len(fds) != count:
            what = f"{len(rows)} bytes and {len(fds)} descriptors"
            raise HostError(f"a table of {count} memory regions in {what}")
        regions = Regions()
        for at, fd in enumerate(fds):
            regions = regions.with_region(rows[MEM_REGION.size * at :][: MEM_REGION.size], fd)
        self._rings.set_regions(regions)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        regions = self._rings.regions or Regions()
        self._rings.set_regions(regions.added(payload[MEM_SLOT.size :], fds[0]))

    def _rem_mem_reg(self, payload: bytes, _fds: list[int]) -> None:
        regions = self._rings.regions or Regions()
        self._rings.set_regions(regions.without_region(payload[MEM_SLOT.size :]))

    def _set_log_base(self, payload: bytes, fds: list[int]) -> bytes:
        size, offset = vhostwire.LOG.unpack(payload)
        self._rings.set_log(DirtyLog(map_area(fds[0], offset, size, "a log")))
        return U64.pack(0)

    def _set_log_fd(self, _payload: bytes, fds: list[int]) -> None:
        self._rings.set_log_fd(fds.pop())

    def _get_inflight_fd(self, payload: bytes, fds: list[int]) -> bytes:
        """Make in-flight areas, and use them: not every front end sends them back at once."""
        _, _, queues, entries = INFLIGHT.unpack(payload.ljust(INFLIGHT.size, b"\0"))
        self._check_queues(queues)
        fd, size = make_inflight(queues, entries)
        fds.append(fd)
        self._rings.set_inflight(
            split_inflight(map_area(fd, 0, size, "an in-flight area"), queues, entries)
        )
        return INFLIGHT.pack(size, 0, queues, entries)[: len(payload)]

    def _set_inflight_fd(self, payload: bytes, fds: list[int]) -> None:
        size, offset, queues, entries = INFLIGHT.unpack(payload.ljust(INFLIGHT.size, b"\0"))
        self._check_queues(queues)
        if offset % 8:
            raise HostError(f"an in-flight area at {offset:#x}")
        area = map_area(fds[0], offset, size, "an in-flight area")
        self._rings.set_inflight(split_inflight(area, queues, entries))

    def _check_queues(self, queues: int) -> None:
        if not 0 < queues <= len(self._rings.rings):
            raise HostError(f"in-flight areas for {queues} queues of {len(self._rings.rings)}")

    # Rings.

    def _set_vring_num(self, payload: bytes, _fds: list[int]) -> None:
        self._rings.set_size(*VRING_STATE.unpack(payload))

    def _set_vring_base(self, payload: bytes, _fds: list[int]) -> None:
        self._rings.set_base(*VRING_STATE.unpack(payload))

    def _get_vring_base(self, payload: bytes, _fds: list[int]) -> bytes:
        index, _ = VRING_STATE.unpack(payload)
        return VRING_STATE.pack(index, self._rings.stop(index))

    def _set_vring_addr(self, payload: bytes, _fds: list[int]) -> None:
        index, flags, desc, used, avail, log_gpa = VRING_ADDR.unpack(payload)
        logged = log_gpa if flags & vhostwire.VRING_LOG_USED else -1
        self._rings.set_addresses(index, flags, Addresses(desc, used, avail, logged))

    def _set_vring_enable(self, payload: bytes, _fds: list[int]) -> None:
        index, on = VRING_STATE.unpack(payload)
        if on > 1:
            raise HostError(f"ring {index} enabled with {on}")
        if not self._rings.features & F_PROTOCOL_FEATURES:  # also when none are settled yet
            self._log(DEBUG, "SET_VRING_ENABLE without F_PROTOCOL_FEATURES")
        self._rings.enable(index, on=bool(on))

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        index = self._ring_fd(payload, fds)
        self._rings.set_kick(index, fds.pop() if fds else -1)

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        index = self._ring_fd(payload, fds)
        self._rings.set_call(index, fds.pop() if fds else -1)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        index = self._ring_fd(payload, fds)
        self._rings.set_error(index, fds.pop() if fds else -1)

    def _ring_fd(self, payload: bytes, fds: list[int]) -> int:
        """Return the ring that a message with or without a descriptor is about."""
        (number,) = U64.unpack(payload)
        if number & ~(VRING_INDEX | VRING_NO_FD):
            raise HostError(f"ring and flags {number:#x}")
        if bool(number & VRING_NO_FD) == bool(fds):
            raise HostError(f"flags {number & VRING_NO_FD:#x} with {len(fds)} descriptors")
        return self._rings.ring(number & VRING_INDEX).index

    def _vring_kick(self, payload: bytes, _fds: list[int]) -> None:
        index, reserved = VRING_STATE.unpack(payload)
        if reserved:
            raise HostError(f"kick of ring {index} with {reserved}")
        self._rings.kick(index)

    # Configuration.

    def _get_config(self, payload: bytes, _fds: list[int]) -> bytes:
        offset, size, _ = CONFIG.unpack_from(payload)
        if offset + size > CONFIG_MAX or len(payload) not in (CONFIG.size, CONFIG.size + size):
            return b""  # how an error is told
        return payload[: CONFIG.size] + self._config(offset, size)

    def _config(self, offset: int, size: int) -> bytes:
        """Return a part of the configuration space, zeroes behind its end."""
        return self._device.config()[offset : offset + size].ljust(size, b"\0")

    def _set_config(self, payload: bytes, _fds: list[int]) -> None:
        """Take a write; one that is migrated is taken as far as it can be."""
        offset, size, flags = CONFIG.unpack_from(payload)
        data, end = payload[CONFIG.size :], len(self._device.config())
        if size != len(data) or offset + size > end or flags & ~_MIGRATING:
            raise HostError(f"{len(data)} bytes of configuration, {size} at {offset:#x}")
        whole = size in (1, 2, 4)
        for at in (0,) if whole else range(size):
            self._device.write_config(offset + at, data if whole else data[at : at + 1])
        if not flags and self._config(offset, size) != data:
            raise HostError(f"configuration at {offset:#x} cannot be set to {data.hex()}")

    # The back channel.

    def _set_backend_req_fd(self, _payload: bytes, fds: list[int]) -> None:
        if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            raise HostError("the back channel is no socket")
        if self._back is not None:
            self._back.close()
        self._back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fds.pop())

    def config_changed(self) -> None:
        """Tell the front end that the configuration space has changed."""
        if self._protocol & vhostwire.P_CONFIG:
            self._tell(Back.CONFIG_CHANGE, b"")

    def _tell_call(self, index: int) -> bool:
        if not self._protocol & vhostwire.P_INBAND_NOTIFICATIONS:
            return False
        return self._tell(Back.VRING_CALL, VRING_STATE.pack(index, 0))

    def _tell_error(self, index: int) -> bool:
        if not self._protocol & vhostwire.P_INBAND_NOTIFICATIONS:
            return False
        return self._tell(Back.VRING_ERR, VRING_STATE.pack(index, 0))

    def _tell(self, request: Back, payload: bytes) -> bool:
        """Send a message that nobody answers; one who does not listen is told nothing more."""
        if self._back is None:
            return False
        data = vhostwire.HEADER.pack(request, vhostwire.VERSION, len(payload)) + payload
        try:
            sent = self._back.sendmsg([data], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as err:
            sent, why = 0, err.strerror
        else:
            why = "takes no more"
        if sent < len(data):
            self._log(WARNING, f"the back channel is given up: {why}")
            self._back.close()
            self._back = None
        return sent == len(data)


def _name(request: int) -> str:
    return Front(request).name if request in Front.__members__.values() else f"request {request}"
