"""How a VM ended: for exit.json, the log, the SHUTDOWN event, and whoever waits."""

from __future__ import annotations

from typing import Final, NamedTuple

EXIT_TIMEOUT: Final = 124  # as timeout(1): the guest was asked to go down, and did not in time

# Values of "how": what a script wants to know.
GUEST_POWEROFF: Final = "guest-poweroff"  # by itself
GUEST_EXIT: Final = "guest-exit"  # by the debug-exit device, with a status of its own
STOPPED: Final = "stop"  # it was asked to go down, and did
TIMEOUT: Final = "timeout"  # it was asked to go down, did not, and was ended
FORCED: Final = "forced"  # a client ended it without asking
SIGNAL: Final = "signal"  # so did a signal
RESET_STORM: Final = "reset-storm"
FAILED: Final = "failed"  # the host, or pyvmd; a VM process that left no word is "crashed"


class Ending(NamedTuple):
    """The end of one VM."""

    reason: str  # one of control.CAUSE_*
    detail: str  # in words
    status: int  # exit status of the VM process
    guest: bool = False  # whether the guest asked for it
    how: str = FAILED
