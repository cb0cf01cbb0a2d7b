"""The VM process's end of one device process: register accesses out, interrupts in.

vCPU threads talk on the sync channel, one at a time; the loop's thread listens on the async one.
The device may be compromised, so whatever is wrong with either channel (garbage, silence, EOF)
ends in one place, `failed`, once. From then on reads give all-ones and writes are dropped: the
guest sees a device that has gone, the VM lives on.
"""

from __future__ import annotations

import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.loop import READ
from devices.viodev import ChannelError, ImsgType, MsgType, ViodevMsg
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.loop import Loop
    from devices.viodev import Channel, Imsg

SYNC_DEADLINE: Final = 5.0  # seconds a register access may take; a slow disk does not delay one
ASYNC_DEADLINE: Final = 0.2  # seconds the loop waits for the rest of a message
CALL_DEADLINE: Final = 2.0  # seconds for the answer to a command
LEVELS: Final = (log.debug, log.info, log.warning, log.error)


class DeviceChannel:
    """Both channels of one device process."""

    def __init__(self, name: str, loop: Loop, failed: Callable[[str], None]) -> None:
        """Make a device's channel; `failed(why)` is called once, on the loop's thread."""
        self.name = name
        self._loop, self._failed = loop, failed
        self.messages = 0  # in either direction: what the VM process has to do for this device
        self._lock = threading.Lock()  # the sync channel: one access at a time
        self._sync: Channel | None = None
        self._async: Channel | None = None
        #: Called on the loop's thread when a device without irqfd interrupts.
        self.on_kick: Callable[[int], None] = lambda queue: None
        self._awaited = -1  # message type of the answer that call() waits for
        self._answer: bytes | None = None

    def open(self, sync: Channel, async_: Channel) -> None:
        """Start to serve a device process that has said READY on `sync`."""
        self._sync, self._async = sync, async_
        self._loop.add(async_.fileno(), READ, self._incoming)

    @property
    def alive(self) -> bool:
        """Whether there is somebody to talk to."""
        return self._sync is not None

    def read(self, reg: int, size: int) -> tuple[int, int]:
        """Read a device register: (value, interrupt state). All-ones from a dead device."""
        with self._lock:
            if self._sync is not None:
                self.messages += 2
                try:
                    self._sync.send_msg(ViodevMsg(MsgType.IO_READ, reg, size))
                    reply = self._sync.receive_msg()
                    if reply.type != MsgType.IO_READ or not reply.data_valid:
                        raise ChannelError(f"{self.name}: answered a read with type {reply.type}")
                    return reply.data & ((1 << 8 * size) - 1), reply.state
                except ChannelError as err:
                    self._break(err)
        return (1 << 8 * size) - 1, 0

    def write(self, reg: int, size: int, value: int) -> None:
        """Write a device register. Not answered; a later read sees its effect."""
        with self._lock:
            if self._sync is not None:
                self.messages += 1
                try:
                    self._sync.send_msg(
                        ViodevMsg(MsgType.IO_WRITE, reg, size, data=value, data_valid=1)
                    )
                except ChannelError as err:
                    self._break(err)

    def call(self, kind: ImsgType, data: bytes = b"") -> bytes:
        """Send a PAUSE, UNPAUSE or SETTING and wait for its answer's payload. Loop's thread.

        Raises ChannelError if the device is dead, or dies of this.
        """
        if self._async is None:
            raise ChannelError(f"{self.name}: has died")
        self._awaited, self._answer = kind, None
        try:
            self._async.send(kind, data)
            end = time.monotonic() + CALL_DEADLINE
            while self._async is not None and self._answer is None:
                left = end - time.monotonic()
                if left <= 0 or not select.select([self._async.fileno()], [], [], left)[0]:
                    raise ChannelError(f"{self.name}: does not answer")
                self._take(self._async.receive())
        except ChannelError as err:
            self._broken(err)
            raise
        finally:
            self._awaited = -1
        if self._answer is None:
            raise ChannelError(f"{self.name}: has died")
        return self._answer

    def close(self) -> None:
        """Hang up; a device process ends when it sees that. Loop's thread."""
        with self._lock:
            sync, self._sync = self._sync, None
            async_, self._async = self._async, None
        if async_ is not None:
            self._loop.remove(async_.fileno())
            async_.close()
        if sync is not None:
            sync.close()

    def shut_down(self) -> None:
        """Ask the device process to leave; close() afterwards. Loop's thread."""
        with self._lock:
            if self._sync is not None:
                try:
                    self._sync.send_msg(ViodevMsg(MsgType.SHUTDOWN))
                except ChannelError as err:
                    log.debug(str(err), self.name)

    def _break(self, err: ChannelError) -> None:
        """Under the lock: this device is lost; nobody shall wait for it a second time."""
        if self._sync is not None:
            self._sync.close()
            self._sync = None
        self._loop.call(partial(self._broken, err))

    def _broken(self, err: ChannelError) -> None:
        if self._async is not None:
            self.close()
            self._failed(err.what)

    def _incoming(self, _events: int) -> None:
        # Level-triggered: what does not fit this round's batch wakes the loop again.
        channel = self._async
        if channel is None:
            return
        try:
            self._take(channel.receive())
        except ChannelError as err:
            self._broken(err)

    def _take(self, imsg: Imsg) -> None:
        """Act on one message of a process that may say anything."""
        self.messages += 1
        if imsg.fd is not None:
            os.close(imsg.fd)
            raise ChannelError(f"{self.name}: sent a descriptor nobody asked for")
        if imsg.type == ImsgType.LOG:
            self._log(imsg.data)
        elif imsg.type == self._awaited:
            self._answer = imsg.data
        elif self._async is not None:
            self._obey(self._async.decode(imsg))

    def _obey(self, message: ViodevMsg) -> None:
        if message.type == MsgType.KICK:
            self.on_kick(message.data)
        elif message.type == MsgType.ERROR:
            raise ChannelError(f"{self.name}: gave up with error {message.data}")
        else:
            raise ChannelError(f"{self.name}: sent a viodev_msg of type {message.type} unasked")

    def _log(self, data: bytes) -> None:
        level = LEVELS[min(data[0], len(LEVELS) - 1)] if data else log.debug
        text = data[1:].decode("utf-8", "replace")
        if level is log.warning or level is log.error:
            log.limited(f"{self.name} says", text, self.name)
        else:
            level(text, self.name)


def describe(status: int) -> str:
    """Return in words how a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"
