"""What can go wrong for a driver."""

from __future__ import annotations


class DriverError(Exception):
    """The device does not do what a driver may expect, or was asked for what it cannot do."""


class DeviceGoneError(DriverError):
    """There is nobody at the other end any more."""


class NoAnswerError(DriverError):
    """The device is there and does not answer in time."""


class NoRoomError(DriverError):
    """The ring, or the arena for buffers, is full: collect first."""
