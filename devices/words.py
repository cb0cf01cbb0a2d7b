"""What a device process says: LOG messages that neither flood nor block, and its last words."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Final

from config.errors import PyvmError
from devices.bucket import TokenBucket
from devices.device import ERROR, WARNING
from devices.viodev import Channel, ChannelError, ImsgType, MsgType, ViodevMsg

RATE: Final = 1.0  # warnings per second, for a guest can cause as many as it likes
BURST: Final = 20
TEXT_MAX: Final = 1024  # characters


class Words:
    """The voice of one device process, on its async channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._bucket, self._unsaid = TokenBucket(RATE, BURST), 0
        self._writable = select.poll()
        self._writable.register(channel.fileno(), select.POLLOUT)

    def say(self, level: int, text: str) -> None:
        """Send a LOG message. Raises ChannelError.

        WARNING is what a guest can cause, and limited; anything is dropped rather than waited
        for. What was not said is counted, and told with the next warning.
        """
        if level == WARNING:
            if self._bucket.wait() > 0:
                self._unsaid += 1
                return
            self._bucket.take(1)
        if not self._writable.poll(0):
            self._unsaid += 1
            return
        if level == WARNING and self._unsaid:
            text = f"{text} (and {self._unsaid} more since the last one)"
            self._unsaid = 0
        send(self._channel, level, text)


def send(channel: Channel, level: int, text: str) -> None:
    """Send a LOG message, whatever it costs. Raises ChannelError."""
    channel.send(ImsgType.LOG, bytes([level]) + text[:TEXT_MAX].encode("utf-8", "replace"))


def last_words(channel: Channel, err: Exception) -> None:
    """Tell on `channel` what this process dies of."""
    with suppress(ChannelError):  # nobody left to tell
        send(channel, ERROR, explain(err))
        channel.send_msg(ViodevMsg(MsgType.ERROR, data=1, data_valid=1))


def explain(err: Exception) -> str:
    """Return an error in one line; with its place in the code if it is not one of ours."""
    if isinstance(err, PyvmError):
        return str(err)
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return f"{type(err).__name__}: {err}"
    code = trace.tb_frame.f_code
    where = f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"
    return f"{type(err).__name__}: {err} in {where}"
