"""The VMM control interface of OpenBSD's vmd: asks a guest to shut down, reboot, look at the clock.

A legacy device without queues, PCI 0b5d:0777 (reference §e.6). Features: 0 TIMESYNC, 1 ACK,
2 SYNCRTC. Configuration, little-endian:

     0  4  command: read what is asked; write it back to acknowledge
     4  8  host time, seconds since 1970      reading the first byte takes the time that the
    12  8  and microseconds                   other words then show

    0 NONE   1 SHUTDOWN   2 REBOOT   3 SYNCRTC: look at the clock, it has changed

The VM process asks by the setting `command` and is told "acknowledged" once per request, and
"announced" when a guest that nobody has asked says that it goes down. How long a guest may take,
and what follows, is the VM process's business: see vmm/ladder.py. A command outlives its driver,
as in vmd, so that one that comes back finds it; the machine's reset withdraws it.
"""

from __future__ import annotations

import time
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError
from devices.clockwatch import ClockWatch
from devices.device import DEBUG, INFO, WARNING, Device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue

F_TIMESYNC: Final = 1 << 0
F_ACK: Final = 1 << 1
F_SYNCRTC: Final = 1 << 2

NONE, SHUTDOWN, REBOOT, SYNCRTC = range(4)
COMMANDS: Final = {"none": NONE, "shutdown": SHUTDOWN, "reboot": REBOOT, "syncrtc": SYNCRTC}

COMMAND: Final = 0  # offsets in configuration space
SECONDS: Final = 4
SECONDS_HIGH: Final = 8
MICROSECONDS: Final = 12
_LAYOUT: Final = Struct("<IQQ")

ASKED: Final = "asked"  # what the setting `command` answers, if it is not a reason why not
ACKNOWLEDGED: Final = "acknowledged"  # what the VM process is told
ANNOUNCED: Final = "announced"


def create(
    _settings: Mapping[str, Any], _fds: Mapping[str, int], memory: GuestMemory, host: Host
) -> Vmmci:
    """Make the device, and open what tells it of the host's clock. Raises HostError."""
    return Vmmci(memory, host)


class Vmmci(Device):
    """Holds one command, and a timerfd that wakes when the clock is set."""

    features = F_TIMESYNC | F_ACK | F_SYNCRTC

    def __init__(
        self, memory: GuestMemory, host: Host, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """`clock` tells nanoseconds since 1970."""
        super().__init__(memory, host)
        self._clock = clock
        self._command = NONE
        self._acknowledged = self._announced = False
        self._stamp = 0  # nanoseconds: the time that the registers show
        self._alone = ""  # half of the seconds that was read without the other: "low", "high"
        self._live, self._accepted = False, 0
        self._clock_watch = ClockWatch(host, self._sync_rtc)

    # Registers.

    def config(self) -> bytes:
        """Return the command and the time that was taken last."""
        seconds, nanoseconds = divmod(self._stamp, 10**9)
        return _LAYOUT.pack(self._command, seconds, nanoseconds // 1000)

    def read_config(self, offset: int, size: int) -> bytes:
        """Take the time if the read begins a look at it."""
        if offset <= SECONDS < offset + size:
            self._low_half_read()
        elif offset <= SECONDS_HIGH < offset + size:
            self._high_half_read()
        return super().read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take an acknowledgement. Some drivers write it byte by byte, the lowest first."""
        if offset == COMMAND:
            self._written(int.from_bytes(data, "little"))
        elif offset >= SECONDS:
            self.host.log(WARNING, f"write to register {offset}, which is read-only")

    def _low_half_read(self) -> None:
        """Take the time, as every read of the low half does.

        But not one that would not fit to a high half read just before: drivers that read 64 bits
        from the top down, as OpenBSD's does, get two halves of one time.
        """
        now = self._clock()
        if self._alone != "high" or self._high(now) == self._high(self._stamp):
            self._stamp = now
        self._alone = "" if self._alone == "high" else "low"
        self.host.checkpoint()  # for who reads the rest

    def _high_half_read(self) -> None:
        """Take the time unless the low half was read just before."""
        if self._alone != "low":
            self._stamp = self._clock()
        self._alone = "" if self._alone == "low" else "high"
        self.host.checkpoint()

    @staticmethod
    def _high(stamp: int) -> int:
        return stamp // 10**9 >> 32

    def _written(self, command: int) -> None:
        """Act on a command register that the driver has written."""
        if command == SYNCRTC:
            # Only its own: vmd lets it wipe out a SHUTDOWN that came between.
            if self._command == SYNCRTC:
                self._command = NONE
        elif command in (SHUTDOWN, REBOOT) and command == self._command:
            if not self._acknowledged:
                self._acknowledged = True
                self.host.tell(ACKNOWLEDGED)
        elif command == SHUTDOWN:
            # A guest says so on its way down, also when it is about to reboot.
            if self._command != REBOOT and not self._announced:
                self._announced = True
                self.host.tell(ANNOUNCED)
        else:
            asked = f"{self._command} is asked" if self._command else "nothing is asked"
            self.host.log(WARNING, f"driver wrote command {command}, but {asked}")

    # Life of a driver, and of the VM.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Begin to listen to a driver, and let it look at a command that its predecessor left."""
        del queues
        self._live, self._accepted = True, features
        if self._command and not self._acknowledged:
            self.host.config_changed()

    def reset(self) -> None:
        """Forget the driver, but not the command."""
        self._live, self._accepted = False, 0

    def unpause(self) -> None:
        """Have the guest look at the clock, which went on without it."""
        self._clock_watch.told()
        self._sync_rtc()

    def setting(self, name: str, value: Any) -> Any:
        """Set `command` to a word of COMMANDS; return ASKED, or why the guest cannot be asked."""
        if name != "command":
            return super().setting(name, value)
        command = COMMANDS.get(value) if isinstance(value, str) else None
        if command is None:
            raise ConfigError(f"command: {value!r} is none of {', '.join(COMMANDS)}")
        if command == NONE:
            self._command, self._acknowledged, self._announced = NONE, False, False
            return ASKED
        wanted = F_SYNCRTC if command == SYNCRTC else F_ACK
        if not self._live:
            return "no driver"
        if not self._accepted & wanted:
            return "the driver does not support it"
        if command == SYNCRTC:
            self._sync_rtc()
        else:
            self._ask(command)
        return ASKED

    def _ask(self, command: int) -> None:
        if command == self._command:
            if self._acknowledged:
                self.host.tell(ACKNOWLEDGED)
            return
        self._command, self._acknowledged = command, False
        self.host.config_changed()

    def _sync_rtc(self) -> None:
        """Ask a driver that can to look at the clock; one that is to go down need not."""
        if self._live and self._accepted & F_SYNCRTC and self._command in (NONE, SYNCRTC):
            self.host.log(INFO, "asks the guest to look at the clock")
            self._command = SYNCRTC
            self.host.config_changed()
        else:
            self.host.log(DEBUG, "the clock has changed, and nobody is to be told")

    # Saving.

    def save(self) -> dict[str, Any]:
        """Return command and time; the driver's part is the transport's."""
        return {
            "command": self._command,
            "acknowledged": self._acknowledged,
            "announced": self._announced,
            "stamp": self._stamp,
            "alone": self._alone,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described; what a driver has said is told again, for who missed it."""
        self._command, self._stamp = state["command"], state["stamp"]
        self._acknowledged, self._announced = state["acknowledged"], state["announced"]
        self._alone = state["alone"]
        if self._acknowledged:
            self.host.tell(ACKNOWLEDGED)
        if self._announced:
            self.host.tell(ANNOUNCED)
