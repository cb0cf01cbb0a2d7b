"""What a guest does to its VM: from vCPU threads to decisions on the loop's thread."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from config.errors import EXIT_FAILED
from vmm import control, log
from vmm.ending import Ending

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.errors import KvmError
    from devices.loop import Loop
    from vmm.vm import VirtualMachine


class GuestWishes:
    """What the guest does to its VM: the Machine's Owner. Any thread; returns at once.

    A guest may ask for several things at once, from several vCPUs: the first counts until it is
    carried out. The vCPUs stop at their gates meanwhile, so nothing runs past the wish.
    """

    def __init__(self, vm: VirtualMachine, loop: Loop) -> None:
        self._vm, self._loop = vm, loop
        # All that a firmware says while it boots, and 10 lines a second of one that never stops.
        self._debug = log.Limited(burst=1000, seconds=0.1, keys=1)
        self._standing = threading.Lock()  # held from a wish until it is carried out

    def reset(self, reason: str) -> None:
        """Reset in place."""
        self._wish(partial(self._vm.guest_reset, reason))

    def power_off(self, reason: str) -> None:
        """The guest switched itself off."""
        self._wish(partial(self._vm.guest_power_off, reason))

    def debug_exit(self, status: int) -> None:
        """The guest ends with a status of its own."""
        self._wish(partial(self._vm.guest_exit, status))

    def failed(self, error: KvmError) -> None:
        """The VM cannot go on."""
        ending = Ending(control.CAUSE_HOST_ERROR, str(error), EXIT_FAILED)
        self._loop.call(partial(self._vm.end, ending))

    def transmit(self, data: bytes) -> None:
        """The guest wrote to its serial port."""
        self._vm.print_out(data)

    def debug_line(self, line: str) -> None:
        """The guest wrote a line to the debug console."""
        self._debug.warning("console", line, "debug")

    def _wish(self, carry_out: Callable[[], None]) -> None:
        if self._standing.acquire(blocking=False):
            self._vm.stop_vcpus()
            self._loop.call(partial(self._carry_out, carry_out))

    def _carry_out(self, wish: Callable[[], None]) -> None:
        try:
            wish()
        finally:
            self._standing.release()
