"""The virtio state machine: status, features, queues, interrupts (virtio 1.2 §2.1 to §2.6, §3.1).

What a driver does to a device, without the register layouts through which it does it: those are
`virtio.py` and `legacy.py`. The rules that a driver can break are enforced here: what is out of
turn is dropped and logged, and nothing a driver writes raises. One exception, that is none: the
device may raise GuestError while it starts, as it may at any time.

    0 ── ACKNOWLEDGE ── DRIVER ── FEATURES_OK ── DRIVER_OK ──► queues are served
                                    (not legacy)        └─ GuestError ──► NEEDS_RESET, queues stop
    from anywhere: 0 written ──► reset
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from config.errors import GuestError
from devices.device import DEBUG, WARNING
from devices.features import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    LEGACY_RING_FEATURES,
)
from devices.queueregs import QueueRegisters
from devices.viodev import CONFIG_CHANGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from config.errors import PyvmError
    from devices.device import Device
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue

ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 0x40  # the only bit that is the device's
FAILED: Final = 0x80
DRIVER_BITS: Final = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# Each bit a driver sets, and the bits that must be there before it (§3.1.1).
_ORDER: Final = (
    (FAILED, 0),
    (ACKNOWLEDGE, 0),
    (DRIVER, ACKNOWLEDGE),
    (FEATURES_OK, ACKNOWLEDGE | DRIVER),
    (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
)

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

FEATURE_WINDOWS: Final = 4  # 32-bit windows a driver can see; what it sets beyond counts as one


class Door(Protocol):
    """What the state machine needs of the process around it."""

    def interrupt(self, source: int) -> None:
        """Interrupt for a queue or CONFIG_CHANGE; the ISR bit is set already."""

    def schedule(self, index: int) -> None:
        """Have queue `index` served soon, as if it had been kicked."""

    def checkpoint(self) -> None:
        """Write down what is so now: the process may be killed at any instant.

        That is done after register writes, too.
        """

    def log(self, level: int, text: str) -> None:
        """Say something in the VM's log, rate-limited."""


class Transport:
    """One device as its driver sees it. For one thread."""

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        door: Door,
        *,
        packed: bool = False,
        inflight: Sequence[memoryview | None] = (),
    ) -> None:
        """Offer `device`. `inflight` has one in-flight area per queue, or none."""
        self.device = device
        self._memory, self._door = memory, door
        ring = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET | F_VERSION_1
        ring |= F_RING_PACKED * packed | F_IN_ORDER * device.in_order
        self.offered = device.features | ring & device.ring_features
        legacy_ring = LEGACY_RING_FEATURES if device.queue_sizes else 0
        self.legacy_offered = device.features & 0xFFFF_FFFF | legacy_ring
        areas = inflight or [None] * len(device.queue_sizes)
        self.registers = [
            QueueRegisters(size, area, in_order=device.in_order)
            for size, area in zip(device.queue_sizes, areas, strict=True)
        ]
        #: The queues being served, by index: all None unless DRIVER_OK.
        self.live: list[VirtQueue | None] = [None] * len(self.registers)
        self.status = self.isr = self.generation = 0
        self._config_news = False  # changed since the driver last read any of it
        self.accepted = 0  # as written; what counts is `features`
        self.features = 0  # negotiated: 0 before FEATURES_OK, or DRIVER_OK of a legacy driver
        self.legacy = False  # whether the driver began with the legacy registers

    # Status and features.

    def write_status(self, value: int, *, legacy: bool = False) -> None:
        """Take a driver's write to device_status; `legacy` tells through which registers."""
        if value == 0:
            self.reset()
            return
        if self.status & DRIVER_BITS & ~value:
            # Bits only go away by reset (§2.1.1).
            self._complain(f"driver tried to clear status bits {self.status:#x} with {value:#x}")
        if not self.status & (FEATURES_OK | DRIVER_OK):
            self.legacy = legacy
        ignored = FEATURES_OK if self.legacy else 0
        for bit, before in _ORDER:
            if not value & ~self.status & bit & ~ignored:
                continue
            if ~self.status & before & ~ignored:
                self._complain(f"status bit {bit:#x} out of turn: it is {self.status:#x}")
                return
            if bit == FEATURES_OK and not self._negotiate():
                return
            self.status |= bit
            if bit == DRIVER_OK:
                self._activate()

    def accept(self, window: int, value: int) -> None:
        """Take 32 feature bits from the driver; too late once they are settled (§3.1.1)."""
        if self.status & (FEATURES_OK | DRIVER_OK):
            self._complain(f"features {value:#x} written after they were settled")
            return
        shift = 32 * min(window, FEATURE_WINDOWS)
        self.accepted = self.accepted & ~(0xFFFF_FFFF << shift) | value << shift

    def _negotiate(self) -> bool:
        """Settle the features of a modern driver, or refuse (§2.2.2, §6.2)."""
        wrong = []
        if self.accepted & ~self.offered:
            wrong.append(f"{self.accepted & ~self.offered:#x} was not offered")
        if not self.accepted & F_VERSION_1:
            wrong.append("VERSION_1 is missing")
        wrong += [
            f"{bit:#x} needs {base:#x}"
            for bit, base in self.device.dependencies
            if self.accepted & bit and not self.accepted & base
        ]
        if wrong:
            self._complain(f"features {self.accepted:#x} refused: {', '.join(wrong)}")
            return False
        self.features = self.accepted
        return True

    def _activate(self) -> None:
        """DRIVER_OK: hand the enabled queues to the device and look into each of them once."""
        if self.legacy:
            self._settle_legacy()
        self._door.log(DEBUG, f"driver is ready, features {self.features:#x}")
        self.live[:] = [registers.queue for registers in self.registers]
        self.device.activate(self.features, self.live)
        self._schedule_all()

    def _settle_legacy(self) -> None:
        """Old drivers may write features after queue addresses: what that opened, open again."""
        self.features = self.accepted & self.legacy_offered
        for index, registers in enumerate(self.registers):
            if registers.queue is not None and registers.queue.features != self.features:
                registers.queue = None
                self.enable_queue(index)

    def early_kick(self, index: int) -> None:
        """Take a kick of a queue that is not served.

        Old drivers, Linux before 3.17 among them, use their queues before DRIVER_OK, and wait
        for ever if the device does not (§3.1.2). So a legacy driver's first kick counts as one.
        """
        if self.legacy and self.status & DRIVER and not self.status & (DRIVER_OK | NEEDS_RESET):
            registers = self.registers[index]
            if registers.queue is not None:
                self._door.log(DEBUG, "driver uses a queue before DRIVER_OK")
                self.status |= DRIVER_OK
                self._door.checkpoint()
                self._activate()

    def fail(self, error: PyvmError) -> None:
        """The driver broke a rule: stop serving it, and ask it for a reset (§2.1.2)."""
        self._complain(f"needs a reset: {error.what}")
        self.status |= NEEDS_RESET
        self.live[:] = [None] * len(self.live)
        self.device.halt(error)
        self._door.checkpoint()
        if self.status & DRIVER_OK:
            self.isr |= ISR_CONFIG
            self._door.interrupt(CONFIG_CHANGE)

    def reset(self) -> None:
        """Return to power-on. From here on neither device nor queues touch guest memory."""
        self.device.reset()
        self.live[:] = [None] * len(self.live)
        for registers in self.registers:
            registers.reset()
        self.status = self.isr = self.accepted = self.features = 0
        self.legacy = False

    # Queues.

    def enable_queue(self, index: int) -> bool:
        """Map queue `index` as its registers say; return False, told in the log, if they are wrong.

        The driver reads back that the queue is not enabled.
        """
        registers = self.registers[index]
        features = self.accepted & self.legacy_offered if self.legacy else self.features
        try:
            if not self.legacy and not self.status & FEATURES_OK:
                raise GuestError("features are not settled")
            registers.open(self._memory, features)
        except GuestError as err:
            self._complain(f"queue {index} stays disabled: {err.what}")
            return False
        if self.status & DRIVER_OK and not self.status & NEEDS_RESET:
            self.live[index] = registers.queue
            self.device.queue_enabled(index)
            self._door.schedule(index)
        return True

    def reset_queue(self, index: int) -> None:
        """Let go of one queue; its registers return to their defaults (§2.6.1)."""
        self.device.reset_queue(index)
        self.live[index] = None
        self.registers[index].reset()

    def notify(self, index: int) -> None:
        """Take a kick that came as a register write; a queue that is not there is nobody's."""
        if 0 <= index < len(self.live):
            self._door.schedule(index)
        else:
            self._complain(f"kick for queue {index}, which is not there")

    def _schedule_all(self) -> None:
        for index, queue in enumerate(self.live):
            if queue is not None:
                self._door.schedule(index)

    # Interrupts and configuration.

    def take_isr(self) -> int:
        """Return ISR and clear it, as a driver's read does."""
        isr, self.isr = self.isr, 0
        return isr

    @property
    def has_news(self) -> bool:
        """Whether a driver may not have heard of a change of the configuration, or of a fault."""
        return self._config_news or bool(self.isr & ISR_CONFIG or self.status & NEEDS_RESET)

    def config_changed(self) -> None:
        """The device changed its configuration space: tell the driver."""
        self._config_news = True
        self._door.checkpoint()
        if self.status & DRIVER_OK:
            self.isr |= ISR_CONFIG
            self._door.interrupt(CONFIG_CHANGE)

    def read_config(self, offset: int, size: int) -> int:
        """Read configuration space; bytes past its end are 0."""
        if self._config_news:
            # Once per change that a driver comes across: 8 bits that counted every change would
            # be back where they were after 256 (§4.1.4.3.1).
            self._config_news = False
            self.generation = (self.generation + 1) & 0xFF
        return int.from_bytes(self.device.read_config(offset, size), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space, if the device has any there."""
        before = self.device.config()
        if offset + size > len(before):
            self._complain(f"configuration write at {offset:#x}, past its end")
            return
        self.device.write_config(offset, value.to_bytes(size, "little"))
        if self.device.config() != before:
            self._config_news = True

    # Saving.

    def save(self, *, killed: bool = False) -> dict[str, Any]:
        """Return everything as plain JSON values; the device is paused, nothing in flight.

        `killed`: or it runs, and this is for when it is killed next. Then where its queues are is
        in their in-flight areas.
        """
        queues = [registers.save() for registers in self.registers]
        if killed:
            for saved in queues:
                saved["cursors"] = None
        return {
            "status": self.status,
            "legacy": self.legacy,
            "accepted": self.accepted,
            "features": self.features,
            "isr": self.isr,
            "generation": self.generation,
            "config_news": self._config_news,
            "queues": queues,
            "device": self.device.remember() if killed else self.device.save(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described, in a fresh process. Raises GuestError if it cannot be.

        Everything that could have been lost in between happens again: every queue is looked
        into, and what ISR says is interrupted for.
        """
        for name in ("status", "legacy", "accepted", "features", "isr", "generation"):
            setattr(self, name, state[name])
        self._config_news = state["config_news"]
        self.device.load(state["device"])
        for registers, saved in zip(self.registers, state["queues"], strict=True):
            registers.load(saved, self._memory, self.features)
        if self.status & DRIVER_OK and not self.status & NEEDS_RESET:
            self.live[:] = [registers.queue for registers in self.registers]
            self.device.activate(self.features, self.live)
            self._schedule_all()
        if self.isr & ISR_CONFIG:
            self._door.interrupt(CONFIG_CHANGE)

    def _complain(self, text: str) -> None:
        self._door.log(WARNING, text)
