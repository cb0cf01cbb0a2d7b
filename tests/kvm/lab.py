"""Runs a bare-metal guest on the machine in this process, and notes what it does.

The guests are tests/kvm/guests/*.S. No pyvmctl, no sockets: the loop runs here, in the test.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from config.model import BootConfig, DebugConfig, VmConfig
from devices.loop import Loop
from vmm.boot import open_boot
from vmm.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from config.errors import KvmError

GUESTS = os.path.join(os.path.dirname(__file__), "guests")
DEADLINE = 60.0  # seconds; guests take milliseconds, SeaBIOS three seconds


class Lab:
    """A machine with one guest. It is the machine's Owner: every wish is noted, resets obeyed."""

    def __init__(
        self, guest: str = "", *, vcpus: int = 1, memory: int = 16 << 20, firmware: str = ""
    ) -> None:
        """Prepare a machine that boots a guest by its name, or else firmware."""
        self.loop = Loop()
        self.lines: list[str] = []  # debug console
        self.serial = bytearray()
        self.resets: list[str] = []
        self.status: int | None = None
        self.powered_off = ""
        self.error: KvmError | None = None
        self._overdue = False
        kernel = os.path.join(GUESTS, f"{guest}.bin") if guest else ""
        boot = BootConfig(kernel=kernel, firmware=firmware)
        config = VmConfig("lab", boot, vcpus, memory, DebugConfig(console=True, exit=True))
        self._images = open_boot(boot)
        self.machine = Machine(config, self._images, self.loop, self)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Power on and serve until the guest ends, or `until` says so after some event."""
        self.machine.power_on()
        self.machine.resume()
        self.serve(until)

    def serve(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until the guest has ended or `until` holds. Fails after DEADLINE."""
        deadline = self.loop.timer(self._late)
        deadline.arm(DEADLINE)
        while not (self.ended or until() or self._overdue):
            self.loop.run()  # ends after every event
        deadline.close()
        assert not self._overdue, f"guest hangs: {self.lines} {bytes(self.serial)!r}"

    @property
    def ended(self) -> bool:
        """Whether the guest has ended in any way."""
        return bool(self.status is not None or self.powered_off or self.error)

    def close(self) -> None:
        """Give everything back."""
        self.machine.close()
        self._images.close()
        self.loop.close()

    def _late(self) -> None:
        self._overdue = True
        self.loop.stop()

    # The machine's Owner.

    def reset(self, reason: str) -> None:
        self.machine.poke()
        self.loop.call(partial(self._reset, reason))

    def _reset(self, reason: str) -> None:
        self.resets.append(reason)
        self.machine.power_off()
        self.machine.power_on()
        self.machine.resume()
        self.loop.stop()

    def power_off(self, reason: str) -> None:
        self.powered_off = reason
        self.loop.call(self.loop.stop)

    def debug_exit(self, status: int) -> None:
        self.status = status
        self.loop.call(self.loop.stop)

    def failed(self, error: KvmError) -> None:
        self.error = error
        self.loop.call(self.loop.stop)

    def transmit(self, data: bytes) -> None:
        self.serial += data
        self.loop.call(self.loop.stop)

    def debug_line(self, line: str) -> None:
        self.lines.append(line)


@contextmanager
def lab(
    guest: str = "", *, vcpus: int = 1, memory: int = 16 << 20, firmware: str = ""
) -> Iterator[Lab]:
    """A Lab that is closed at the end."""
    bench = Lab(guest, vcpus=vcpus, memory=memory, firmware=firmware)
    try:
        yield bench
    finally:
        bench.close()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Spin until another thread has made `condition` true. Fails after DEADLINE."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.001)
