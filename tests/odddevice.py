"""A device for tests of what a device process does for any device.

The spawner is a fork of the process that runs the tests, so what is patched before the fork is
what it runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from devices import policy, viornd
from devices.device import Device
from devices.spec import SPECS
from tools.viodriver.private import DeviceHost

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import pytest

    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.virtqueue import VirtQueue


class Odd(Device):
    """Two queues; what it does when kicked is said in its settings."""

    queue_sizes = (16, 16)

    def __init__(self, memory: GuestMemory, host: Host, settings: Mapping[str, Any]) -> None:
        super().__init__(memory, host)
        self.settings = settings
        self.kicks = [0, 0]
        self.taken: list[int] = []
        self.timer = host.timer(lambda: self.count(0))
        self.alarm = os.eventfd(0, os.EFD_NONBLOCK)
        host.watch(self.alarm, self.alarmed)

    def count(self, index: int) -> None:
        """Show a visit in configuration space."""
        self.kicks[index] += 1

    def alarmed(self, _events: int) -> None:
        os.eventfd_read(self.alarm)
        self.count(1)

    def config(self) -> bytes:
        return b"".join(kicks.to_bytes(4, "little") for kicks in self.kicks)

    def kick(self, index: int, queue: VirtQueue) -> bool:
        self.count(index)
        if self.settings.get("raise"):
            raise ZeroDivisionError("divided by the guest")
        return bool(self.settings.get("greedy"))

    def setting(self, name: str, value: Any) -> Any:
        if name == "timer":
            self.timer.arm(value)
        elif name == "alarm":
            os.eventfd_write(self.alarm, 1)
        else:
            self.host.config_changed()
        return None

    def take(self, name: str, value: Any, fd: int) -> Any:
        if name != "keep":
            return super().take(name, value, fd)
        self.taken.append(fd)
        while len(self.taken) > value:
            os.close(self.taken.pop(0))
        return os.read(fd, 100).decode()


def open_odd(patch: pytest.MonkeyPatch, *, descriptors: int = 0, **settings: Any) -> DeviceHost:
    """Run the odd device in a process of its own, with room for `descriptors`."""
    row = policy.DEVICES["viornd"]
    if descriptors:
        patch.setitem(SPECS, "viornd", SPECS["viornd"]._replace(descriptors=descriptors))
        row = row._replace(calls=(*row.calls, *policy.TAKES))
        patch.setitem(policy.DEVICES, "viornd", row)

    def create(settings: Mapping[str, Any], _fds: object, memory: GuestMemory, host: Host) -> Odd:
        return Odd(memory, host, settings)

    patch.setattr(viornd, "create", create)
    return DeviceHost("viornd", settings, queues=2, jail="best-effort")
