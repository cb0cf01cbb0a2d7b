"""A device and its driver's life: negotiate, start, acquire queues, stop, and what it looks like.

    with VirtioDevice(VhostUser("/run/blk.sock")) as device:
        device.start(F_EVENT_IDX | F_INDIRECT_DESC)      # of these what the device offers
        queue = device.acquire(0)                        # a RequestQueue, nobody else's
        …
        device.release(queue)

A device that was stopped, or reset itself into NEEDS_RESET, can be started again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from config.errors import PyvmError
from devices import features as ring_features
from devices.features import F_RING_RESET, F_VERSION_1
from tools.viodriver.errors import DeviceGoneError, DriverError
from tools.viodriver.requests import RequestQueue
from tools.viodriver.transport import (
    ACKNOWLEDGE,
    ARENA_BYTES,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    READY,
)

if TYPE_CHECKING:
    from types import TracebackType

    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.split import SplitDriver
    from tools.viodriver.transport import Transport

STATUS_NAMES: Final = {
    ACKNOWLEDGE: "ACKNOWLEDGE",
    DRIVER: "DRIVER",
    DRIVER_OK: "DRIVER_OK",
    FEATURES_OK: "FEATURES_OK",
    NEEDS_RESET: "DEVICE_NEEDS_RESET",
    FAILED: "FAILED",
}
_FEATURE_NAMES: Final = {
    value: name.removeprefix("F_")
    for name, value in vars(ring_features).items()
    if name.startswith("F_")
}
CONFIG_DUMPED: Final = 64  # bytes of configuration space in a dump


class VirtioDevice:
    """Whatever is behind a transport. For one thread."""

    def __init__(self, transport: Transport, name: str = "") -> None:
        """Take over the transport: it is closed with the device."""
        self.transport, self.name = transport, name or transport.transport
        self.features = 0  #: those agreed on; 0 before start()
        self._rings: list[SplitDriver | PackedDriver] = []
        self._acquired: dict[int, RequestQueue] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of device and transport, in whatever state they are."""
        self._rings.clear()
        self._acquired.clear()
        self.transport.close()

    # Life cycle.

    def start(
        self,
        wanted: int = 0,
        *,
        required: int = 0,
        max_queues: int = 0,
        size: int = 0,
        arena_bytes: int = ARENA_BYTES,
    ) -> int:
        """Reset the device, and drive it to DRIVER_OK; return the features agreed on.

        These are VERSION_1, `required`, and of `wanted` what is offered. Up to `max_queues`
        queues (0: all) of `size` entries (0: as many as may be), each with `arena_bytes` for
        buffers, are made and enabled. Raises DriverError if the device does not offer what is
        required or refuses a step, and is left FAILED; DeviceGoneError.
        """
        required |= F_VERSION_1
        transport = self.transport
        try:
            self.stop()
            offered = transport.offered()
            if required & ~offered:
                lacking = ", ".join(feature_names(required & ~offered))
                raise self._fail(f"does not offer {lacking}")
            features = required | wanted & offered
            if not transport.negotiate(features):
                raise self._fail(f"refuses features {features:#x}")
            rings = transport.drivers(
                features, size=size, max_queues=max_queues, arena_bytes=arena_bytes
            )
            for index, ring in enumerate(rings):
                if not transport.enable(index, ring):
                    raise self._fail(f"refuses queue {index}")
            transport.status = READY
            if transport.status != READY:
                raise self._fail(f"has status {transport.status:#x}")
        except PyvmError as err:
            raise self._gone(err) from err
        self.features, self._rings = features, rings
        return features

    def stop(self) -> None:
        """Reset the device: it has done with all memory afterwards, and queues are nobody's.

        Whoever has acquired one finds with `abandon` what was lost. Raises DeviceGoneError.
        """
        try:
            self.transport.status = 0
            status = self.transport.status
        except PyvmError as err:
            raise self._gone(err) from err
        if status:
            wrong = DriverError if self.alive else DeviceGoneError
            raise wrong(f"{self.name}: has status {status:#x} after a reset")
        self.features = 0
        self._rings = []
        self._acquired.clear()

    @property
    def status(self) -> int:
        """device_status."""
        return self.transport.status

    @property
    def alive(self) -> bool:
        """Whether there is still a device at the other end."""
        return self.transport.alive

    def has_feature(self, bit: int) -> bool:
        """Whether a feature, as a mask, was agreed on."""
        return bool(self.features & bit)

    # Queues.

    @property
    def nr_queues(self) -> int:
        """Count the queues that were started."""
        return len(self._rings)

    def acquire(self, index: int) -> RequestQueue:
        """Return queue `index`, which is the caller's until release(). Raises DriverError."""
        if not 0 <= index < len(self._rings):
            raise DriverError(f"{self.name}: has no queue {index} started")
        if index in self._acquired:
            raise DriverError(f"{self.name}: queue {index} is somebody's already")
        self._acquired[index] = RequestQueue(self.transport, index, self._rings[index])
        return self._acquired[index]

    def find_and_acquire(self, start: int = 0) -> RequestQueue:
        """Return the first queue from `start` on that is nobody's. Raises DriverError."""
        for index in range(start, len(self._rings)):
            if index not in self._acquired:
                return self.acquire(index)
        raise DriverError(f"{self.name}: no queue is free from {start} on")

    def is_acquired(self, index: int) -> bool:
        """Whether a queue is somebody's."""
        return index in self._acquired

    def release(self, queue: RequestQueue) -> None:
        """Give a queue back. Raises DriverError if it is not acquired, or the device is using it.

        One that was lost by stop() needs no release.
        """
        if self._acquired.get(queue.index) is not queue:
            raise DriverError(f"{self.name}: queue {queue.index} is not acquired")
        if queue.outstanding:
            raise DriverError(f"queue {queue.index}: {queue.outstanding} requests are out")
        queue.abandon()
        del self._acquired[queue.index]

    def reset_queue(self, queue: RequestQueue) -> list[Any]:
        """Reset and enable one queue, which needs F_RING_RESET; return the cookies it lost."""
        if not self.has_feature(F_RING_RESET):
            raise DriverError(f"{self.name}: RING_RESET was not agreed on")
        index, old = queue.index, queue.ring
        if not self.transport.disable(index):
            raise self._fail(f"does not reset queue {index}")
        lost = queue.abandon()
        fresh = old.again()
        if not self.transport.enable(index, fresh):
            raise self._fail(f"refuses queue {index}")
        queue.ring = self._rings[index] = fresh
        return lost

    # Configuration space.

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        try:
            return self.transport.read_config(offset, size)
        except PyvmError as err:
            raise self._gone(err) from err

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes."""
        try:
            self.transport.write_config(offset, size, value)
        except PyvmError as err:
            raise self._gone(err) from err

    # What it looks like.

    def dump(self, *, config_bytes: int = CONFIG_DUMPED) -> dict[str, Any]:
        """Return device and queues as plain JSON values; README.md says what each means.

        Works on a dead device, too: what only that could tell is null.
        """
        alive = self.transport.alive
        offered = status = None
        config: str | None = None
        if alive:
            try:
                offered, status = self.transport.offered(), self.transport.status
                config = bytes(self.read_config(at, 1) for at in range(config_bytes)).hex()
            except (PyvmError, DriverError):
                alive, offered, status, config = False, None, None, None
        return {
            "name": self.name,
            "transport": self.transport.transport,
            "alive": alive,
            "status": None if status is None else status_names(status),
            "offered": None if offered is None else feature_names(offered),
            "features": feature_names(self.features),
            "config": config,
            "queues": [self._dump_queue(index) for index in range(len(self._rings))],
            "facts": self.transport.facts(),
        }

    def _dump_queue(self, index: int) -> dict[str, Any]:
        queue = self._acquired.get(index)
        shown = queue or RequestQueue(self.transport, index, self._rings[index])
        return {**shown.dump(), "acquired": queue is not None}

    def _fail(self, what: str) -> DriverError:
        """Give up on the device (§3.1.1); return what to raise."""
        if self.transport.alive:
            self.transport.status = self.transport.status | FAILED
        return DriverError(f"{self.name}: {what}")

    def _gone(self, err: PyvmError) -> DriverError:
        if not self.transport.alive:
            return DeviceGoneError(f"{self.name}: {err}")
        return DriverError(f"{self.name}: {err}")


def status_names(status: int) -> list[str]:
    """Return the bits of device_status by name; those without one as hex."""
    return _names(status, STATUS_NAMES)


def feature_names(features: int) -> list[str]:
    """Return feature bits: those of all devices by name, a device's own as bit numbers."""
    return [
        _FEATURE_NAMES.get(1 << bit, str(bit))
        for bit in range(features.bit_length())
        if features >> bit & 1
    ]


def _names(value: int, known: dict[int, str]) -> list[str]:
    return [
        known.get(1 << bit, hex(1 << bit)) for bit in range(value.bit_length()) if value >> bit & 1
    ]
