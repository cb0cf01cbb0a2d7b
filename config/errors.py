"""Every error pyvmd raises on purpose, and the exit status pyvmctl gives it.

An error says what happened, where, and what to do. The cause stays attached with
``raise ... from err``.
"""

from __future__ import annotations

from typing import Final

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2  # usage or configuration error
EXIT_NO_SUCH_VM: Final = 3


class PyvmError(Exception):
    """web/vioblk0: cannot open disk a.img: Permission denied (give the image mode 0660)."""

    exit_status = EXIT_FAILED

    def __init__(self, what: str, *, vm: str = "", device: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.vm, self.device, self.hint = what, vm, device, hint

    def __str__(self) -> str:
        where = "/".join(part for part in (self.vm, self.device) if part)
        head = f"{where}: {self.what}" if where else self.what
        return f"{head} ({self.hint})" if self.hint else head


class ConfigError(PyvmError):
    """The user's words are wrong: vm.yaml, a command line. `what` may hold many lines."""

    exit_status = EXIT_USAGE


class NoSuchVmError(PyvmError):
    """No VM of that name or id."""

    exit_status = EXIT_NO_SUCH_VM


class HostError(PyvmError):
    """The host refused something this VM needs; the VM cannot start or go on."""


class KvmError(HostError):
    """KVM refused an ioctl or gave up on the guest."""


class GuestError(PyvmError):
    """The guest broke a device's rules: NEEDS_RESET for that device, the VM lives on."""
