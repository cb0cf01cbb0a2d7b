"""What a driver sees of a device that others serve: features, queues, configuration.

Settled when the first back end is met. Later ones must be able to take its place under a driver
that has seen it already, so they may have more but not less.

Some devices are not all the back end's. Of a network device the front end has the MAC address,
link status and the control queue (`vhostpairs`), of a file system its name. Back ends of those
have no configuration space to ask for.
"""

from __future__ import annotations

from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices.features import F_VERSION_1
from devices.vhostask import RefusedError
from devices.vhostwire import P_CONFIG, P_INFLIGHT_SHMFD, P_MQ

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.vhostfront import FrontEnd

_NET: Final = 1
_BLK: Final = 2
_SCSI: Final = 8
_FS: Final = 26

# A device's own bits (virtio 1.2 §6); between the two are those of queues and transport.
_DEVICE_BITS: Final = (1 << 24) - 1 | (1 << 64) - (1 << 50)

_NET_F_MTU: Final = 1 << 3
_NET_F_MAC: Final = 1 << 5
_NET_F_CTRL_VQ: Final = 1 << 17
_NET_F_MQ: Final = 1 << 22
_NET_F_STATUS: Final = 1 << 16
# What a driver does by the control queue (§5.1.6.5), or needs it for.
_NET_CONTROL: Final = sum(1 << bit for bit in (2, *range(17, 24), 53, 57, 60))
_NET_LINK_UP: Final = 1

_BLK_NUM_QUEUES_AT: Final = 34
_BLK_LEAST: Final = 36  # bytes: without discard, write-zeroes and what came later
_SCSI_FIXED: Final = 2  # queues beside those for requests, whose number comes first (§5.6.4)
_FS_TAG: Final = 36  # bytes, padded with 0 (§5.11.4)


class Face:
    """One device's, while back ends come and go."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.most: int = settings["queues"]  #: how many there may be
        self.offered = 0  #: by the first back end: virtio features
        self.features = 0  #: bits of this class of device, as the driver is offered them
        self.queues = 0  #: how many there are; the back end may have more
        self.config = b""
        #: Whether back ends keep an in-flight area.
        self.keeps_books = False
        #: What the driver has written to the configuration since its reset, by offset.
        self.written: dict[int, bytes] = {}

    def save(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "offered": self.offered,
            "features": self.features,
            "queues": self.queues,
            "config": self.config.hex(),
            "keeps_books": self.keeps_books,
            "written": [(offset, data.hex()) for offset, data in self.written.items()],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `save` described. Raises ConfigError if there cannot be so many queues."""
        self.offered, self.features = int(state["offered"]), int(state["features"])
        self.queues, self.keeps_books = int(state["queues"]), bool(state["keeps_books"])
        if not 0 <= self.queues <= self._settings["queues"]:
            raise ConfigError(f"{self.queues} queues")
        self.config = bytes.fromhex(state["config"])
        self.written = {int(offset): bytes.fromhex(data) for offset, data in state["written"]}

    def meet(self, link: FrontEnd) -> None:
        """Look at a back end that has been negotiated with. Raises RefusedError if it will not do.

        Also PeerError. Raises nothing about the configuration that it has, whatever that is.
        """
        count: int = self._settings["queues"]
        if link.protocol & P_MQ:
            # Back ends of network devices count pairs.
            count = link.queue_count() * (2 if self._settings["virtio_id"] == _NET else 1)
        books = bool(link.protocol & P_INFLIGHT_SHMFD)
        if not self.queues:
            self._settle(link, count, keeps_books=books)
        elif self.offered & ~link.features:
            lost = self.offered & ~link.features
            raise RefusedError(f"{link.name}: has lost the features {lost:#x}")
        elif count < self.queues:
            raise RefusedError(f"{link.name}: has {count} queues, and had {self.queues}")
        elif self.keeps_books and not books:
            raise RefusedError(f"{link.name}: keeps no in-flight area, and did")
        self.fetch(link)
        for offset, data in self.written.items():
            if self.config[offset : offset + len(data)] != data:
                link.set_config(offset, data)
        if self.written:
            self.fetch(link)

    def _settle(self, link: FrontEnd, count: int, *, keeps_books: bool) -> None:
        settings = self._settings
        if not link.features & F_VERSION_1:
            raise RefusedError(f"{link.name}: does not speak virtio 1")
        least = settings["queues"] if settings["exact"] else settings["least"]
        if count < least:
            raise RefusedError(f"{link.name}: has {count} queues, not {least}")
        self.offered, self.keeps_books = link.features, keeps_books
        self.queues = min(count, settings["queues"])
        self.features = self.offered & _DEVICE_BITS
        if settings["virtio_id"] == _NET:
            self.queues &= ~1
            self.features &= ~(_NET_CONTROL | _NET_F_MTU)
            if settings["queues"] > 2:
                self.features |= _NET_F_CTRL_VQ | _NET_F_MQ
            self.features |= _NET_F_MAC | _NET_F_STATUS | _NET_F_MTU * bool(settings["mtu"])

    def fetch(self, link: FrontEnd) -> bool:
        """Ask for the configuration; return whether it is another than it was. Raises PeerError."""
        before, length = self.config, self._settings["config_length"]
        kind = self._settings["virtio_id"]
        if kind == _NET:  # mac, status, max_virtqueue_pairs, mtu (§5.1.4)
            mac = bytes.fromhex(self._settings["lladdr"].replace(":", ""))
            rest = _NET_LINK_UP, self.queues // 2, self._settings["mtu"]
            self.config = mac + pack("<HHH", *rest)
        elif kind == _FS:  # the first queue is for urgent requests
            tag = self._settings["tag"].encode().ljust(_FS_TAG, b"\0")
            self.config = tag + pack("<I", self.queues - 1)
        elif length:
            if not link.protocol & P_CONFIG:
                raise RefusedError(f"{link.name}: has no configuration space")
            config = bytearray(self._get_config(link, length))
            if kind == _BLK:
                _limit(config, "<H", _BLK_NUM_QUEUES_AT, self.queues)
            elif kind == _SCSI:
                _limit(config, "<I", 0, self.queues - _SCSI_FIXED)
            self.config = bytes(config)
        return self.config != before

    def _get_config(self, link: FrontEnd, length: int) -> bytes:
        """Return the configuration space, which disks of before virtio 1.1 have less of."""
        try:
            return link.get_config(length)
        except RefusedError:
            if self._settings["virtio_id"] != _BLK:
                raise
            return link.get_config(_BLK_LEAST).ljust(length, b"\0")

    def describe(self) -> str:
        """Return what there is, for the log."""
        plural = "" if self.queues == 1 else "s"
        return f"{self.queues} queue{plural}, features {self.offered:#x}"


def _limit(config: bytearray, layout: str, at: int, most: int) -> None:
    """Have a number in configuration space be `most` at most."""
    (has,) = unpack_from(layout, config, at)
    pack_into(layout, config, at, min(has, most))
