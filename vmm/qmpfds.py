"""Descriptors that a client of the control socket hands over: QMP's getfd and closefd.

A descriptor comes with the bytes of the getfd command that names it (SCM_RIGHTS), and keeps that
name until a command uses it up, closefd closes it, or the connection ends. A client holds a few
at a time. One that comes unasked, or beside another, is closed.
"""

from __future__ import annotations

import os
from typing import Final

from devices import passing
from vmm.qmp import QmpError, clip

NAMES: Final = 8  # descriptors that one client may have named and not used
BATCH: Final = 2  # received at once: one more than is welcome


class Descriptors:
    """What one client has handed over."""

    def __init__(self) -> None:
        self._arrived: list[int] = []  # with what was read last; not named yet
        self._too_many = False
        self._named: dict[str, int] = {}

    def arrive(self, fds: list[int], *, more: bool) -> None:
        """Hold what came with a read; `more`: the kernel closed some that came beside them."""
        if fds or more:
            self.drop()
            self._arrived, self._too_many = fds, more or len(fds) > 1

    def drop(self) -> None:
        """Close what has arrived and was not named by a command that came with it."""
        passing.close(self._arrived)
        self._arrived, self._too_many = [], False

    def name(self, name: str) -> None:
        """Name what has arrived, and close what had that name. Raises QmpError."""
        why = self._objection(name)
        if why:
            self.drop()
            raise QmpError(why)
        if name in self._named:
            os.close(self._named[name])
        self._named[name] = self._arrived.pop()

    def take(self, name: str) -> int:
        """Return the descriptor of that name, which is the caller's now. Raises QmpError."""
        try:
            return self._named.pop(name)
        except KeyError:
            raise QmpError(f"no file descriptor is named '{clip(name)}'") from None

    def close(self) -> None:
        """Close all there is: the connection has ended."""
        self.drop()
        passing.close(self._named.values())
        self._named.clear()

    def _objection(self, name: str) -> str:
        if self._too_many:
            return "more than one file descriptor supplied via SCM_RIGHTS"
        if not self._arrived:
            return "no file descriptor supplied via SCM_RIGHTS"
        if not name or name[0].isdigit():
            return "parameter 'fdname' expects a name not starting with a digit"
        if len(self._named) >= NAMES and name not in self._named:
            return f"{NAMES} file descriptors are named already; use or close one"
        return ""
