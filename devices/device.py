"""What a device is to the process that runs it, and what that process is to the device.

A device knows its queues and its configuration space. It does not know how its driver reaches
it: registers, status, features and interrupts belong to the transport (`transport.py`). A module
of `devices/` named after a row of `spec.SPECS` holds one device and a function

    create(settings, fds, memory, host) -> Device

which takes plain values out of vm.yaml and the descriptors made for this device, and raises
PyvmError. It is called before the jail is entered: what has to be opened is opened there.

**Errors** end in one of three ways. What is wrong with a request becomes an error status in the
request. GuestError, raised anywhere in a device, means the driver broke the rules: the transport
sets NEEDS_RESET, and a reset makes the device usable again. Anything else ends the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from config.errors import ConfigError
from devices.spec import COUNTERS_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from config.errors import PyvmError
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue

DEBUG, INFO, WARNING, ERROR = range(4)  # levels of Host.log, and in a LOG message

NO_FEATURES: Final = 0


class Timer(Protocol):
    """Calls back once or repeatedly."""

    def arm(self, seconds: float, every: float = 0.0) -> None:
        """Fire once after `seconds`, then `every` seconds if not 0; replaces what was armed."""

    def disarm(self) -> None:
        """Forget what was armed."""


class Host(Protocol):
    """What the process offers its device. For the process's only thread."""

    def call(self, index: int) -> None:
        """Interrupt the driver for queue `index`; ask `queue.should_call()` first."""

    def schedule(self, index: int) -> None:
        """Have kick(index) called soon, after others had their turn."""

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""

    def checkpoint(self) -> None:
        """Write down what `Device.remember` says: the process may be killed at any instant.

        That is done after register writes and settings, before anybody hears of it, too.
        """

    def tell(self, word: str) -> None:
        """Tell the VM process that something has happened: a word of this kind of device."""

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 1) -> None:
        """Call `callback(events)` while `fd` is ready (EPOLLIN unless said); not while paused."""

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; harmless if it is not watched."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return an unarmed timer; what fires while paused is made up for afterwards."""

    def log(self, level: int, text: str) -> None:
        """Say something in the VM's log. WARNING is the guest's fault, and rate-limited."""


class Device:
    """One virtio device without its transport. For one thread; every call returns soon."""

    #: Bits of this class of device; what concerns queues and transport is not among them.
    features: int = NO_FEATURES
    #: Pairs (bit, base): a driver that accepts bit must accept base, too.
    dependencies: Sequence[tuple[int, int]] = ()
    #: Those of `features` that let a driver set what a killed process takes along, so that they
    #: are not offered where another process goes on that has not been told: behind vhost-user.
    forgetful: int = NO_FEATURES
    #: Largest size of each queue, powers of two.
    queue_sizes: Sequence[int] = ()
    #: Whether chains come back in the order they were taken, so that IN_ORDER can be offered.
    in_order = False
    #: Which bits of queues and transport may be offered; fewer where another process serves them.
    ring_features = ~0

    def __init__(self, memory: GuestMemory, host: Host) -> None:
        self.memory, self.host = memory, host
        #: What this device has done, in the order of its spec; the VM process may look at any time.
        self.totals = memoryview(bytearray(COUNTERS_SIZE)).cast("Q")

    @property
    def queue_num(self) -> int:
        """How many queues a vhost-user front end is told of; of a network device, pairs."""
        return len(self.queue_sizes)

    def begin(self) -> None:
        """Settle what the driver will see, jailed, before anybody looks. Raises PyvmError.

        Until then features and configuration may change, and queues be left out at the end.
        """

    # Configuration space.

    def config(self) -> bytes:
        """Return the configuration space as it is now, little-endian."""
        return b""

    def read_config(self, offset: int, size: int) -> bytes:
        """Return what a driver reads; what lies past the end of config() may be left out."""
        return self.config()[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a driver's write of 1, 2 or 4 bytes that lies inside config(); may ignore it."""

    # Life of a driver.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Begin to serve a driver that has set DRIVER_OK.

        `queues` stays up to date: a queue that is not enabled, or was reset, is None. Every
        enabled queue is kicked afterwards, and whenever it is enabled later. What a killed
        predecessor left in flight is in each queue's `resubmit()`, to be worked on first.
        """

    def start_queue(self, index: int, queue: VirtQueue) -> None:
        """Begin to serve a queue that joins after `activate`; it is kicked afterwards.

        Where queues start and stop one by one, as in vhost-user, all of them join so.
        """

    def stop_queue(self, index: int, queue: VirtQueue) -> None:
        """Finish, or take back, all that is in flight in a queue that is to stop for a while.

        Its position is what somebody else goes on from. It is still served until `reset_queue`,
        which follows.
        """

    def idle_kick(self, index: int, queue: VirtQueue) -> None:
        """Take note of a kick of a queue that has been started and is disabled, in vhost-user.

        What is sent may be thrown away there; nothing else may happen.
        """

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Serve queue `index`. Return True if a budget ended it, to be called again soon.

        May come at any time for any live queue, with nothing in it. Raises GuestError.
        """
        raise NotImplementedError

    def queue_enabled(self, index: int) -> None:
        """Take note that queue `index` has come, or come back, since `activate`."""

    def reset_queue(self, index: int) -> None:
        """Be done with queue `index`, which is about to go: no more access to its buffers."""

    def reset(self) -> None:
        """Return to the state before `activate`: no more access to guest memory afterwards.

        Comes at any time, also twice. The queues are reset by the caller.
        """

    def halt(self, error: PyvmError) -> None:
        """Take note that no queue is served any more until a reset: the driver broke a rule."""

    def msix(self, on: bool) -> None:
        """Take note whether interrupts are messages, for which ISR does not count.

        Only devices of which other processes serve queues are told; at first they are not.
        """

    def pause(self) -> None:
        """Finish or take back what is in flight: no access to guest memory until `unpause`."""

    def unpause(self) -> None:
        """Go on. Every queue is kicked afterwards."""

    def take_over(self) -> None:
        """Go on, instead of `unpause`, for a process that was killed: nothing else has changed."""

    # Life of the process.

    def close(self) -> None:
        """Leave everything in good order: the process ends. Not called when it is killed."""

    def setting(self, name: str, value: Any) -> Any:
        """Change something at run time; the result is plain JSON. Raises PyvmError."""
        raise ConfigError(f"there is no setting {name!r} to change at run time")

    def take(self, name: str, value: Any, fd: int) -> Any:
        """Change something at run time that comes with a descriptor, and take that over.

        It is the device's from now on, unless this raises. How many there is room for at once is
        in the device's row of `spec.SPECS`. The result is plain JSON. Raises PyvmError.
        """
        raise ConfigError(f"there is no setting {name!r} that takes a descriptor")

    def save(self) -> dict[str, Any]:
        """Return what `load` needs, as plain JSON values; the device is paused."""
        return {}

    def remember(self) -> dict[str, Any]:
        """Return what `load` needs in a process that takes the place of this one, if it is killed.

        That has the settings that this one began with.
        """
        return self.save()

    def recall(self, state: dict[str, Any]) -> None:
        """Know what a killed predecessor's `begin` has settled, from its `remember`.

        Called before `begin`, where there was one. Raises PyvmError.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` or `remember` described, before `activate`. Raises PyvmError."""
