"""Taps that pyvmctl has inherited as descriptors, on their way into the VM process."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from config.errors import HostError

if TYPE_CHECKING:
    from config.model import VmConfig

_AWAY: Final = 64  # beyond what is being filled


class Inherited:
    """The descriptors of every `tap: fd:N`, moved out of the way."""

    def __init__(self, config: VmConfig) -> None:
        """Copy them. Raises HostError if one is not open."""
        self._config = config
        self._copies: dict[str, int] = {}
        for number, nic in enumerate(config.interfaces):
            if nic.tap.startswith("fd:"):
                try:
                    copy = fcntl.fcntl(int(nic.tap[3:]), fcntl.F_DUPFD_CLOEXEC, _AWAY)
                except OSError as err:
                    what = f"tap: descriptor {nic.tap[3:]} is not open"
                    hint = "pyvmctl must inherit it"
                    raise HostError(what, device=f"vionet{number}", hint=hint) from err
                self._copies[nic.tap] = copy

    def put(self, first: int) -> tuple[VmConfig, int]:
        """Put them to `first` and after; return the configuration that says so, and the next."""
        places = {}
        for place, (tap, copy) in enumerate(self._copies.items(), first):
            os.dup2(copy, place, inheritable=False)
            places[tap] = f"fd:{place}"
        interfaces = tuple(
            nic._replace(tap=places.get(nic.tap, nic.tap)) for nic in self._config.interfaces
        )
        return self._config._replace(interfaces=interfaces), first + len(places)
