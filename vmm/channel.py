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
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.loop import READ
from devices.spec import Block
from devices.viodev import ChannelError, ImsgType, MsgType, ViodevMsg
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.loop import Loop, Timer
    from devices.viodev import Channel, Imsg

SYNC_DEADLINE: Final = 5.0  # seconds a register access may take, behind the request at work, too
BUSY_DEADLINES: Final = 12  # of these in a row, while the device waits for the host: a minute
READ_ATTEMPTS: Final = 20  # processes that may die over a read, one after the other
ASYNC_DEADLINE: Final = 0.2  # seconds the loop waits for the rest of a message
CALL_DEADLINE: Final = 2.0  # seconds that the loop waits for the answer to a command
LATE_DEADLINE: Final = 60.0  # seconds until a device that owes an answer is given up
EVENT_MAX: Final = 32  # bytes of a word
LAST_MAX: Final = 8  # messages that are read of a process that has ended
WRITES_MAX: Final = 64  # register writes that may have to be made again
LEVELS: Final = (log.debug, log.info, log.warning, log.error)


class DeviceChannel:
    """Both channels of one device process."""

    def __init__(self, name: str, loop: Loop, failed: Callable[[str], None]) -> None:
        """Make a device's channel; `failed(why)` is called once, on the loop's thread."""
        self.name = name
        self._loop, self._failed = loop, failed
        self.messages = 0  # in either direction: what the VM process has to do for this device
        self.answered = 0  # register reads of the guest
        self._lock = threading.Condition()  # the sync channel: one access at a time
        self._thread = threading.get_ident()  # the loop's
        #: Where another process takes the place of one that has died: gets that done, at once, on
        #: the loop's thread. Accesses wait for it.
        self.revive: Callable[[], object] | None = None
        #: Tells how many register writes that process will know of.
        self.handled: Callable[[], int] = lambda: 0
        self._written = 0  # register writes so far, where they may have to be made again
        self._writes: deque[ViodevMsg] = deque()  # the latest of them
        self.generation = 0  # how many processes there have been
        self._sync: Channel | None = None
        self._async: Channel | None = None
        #: Called on the loop's thread when a device without irqfd interrupts.
        self.on_kick: Callable[[int], None] = lambda queue: None
        #: Called on the loop's thread when the device says that something has happened.
        self.on_event: Callable[[str], None] = lambda word: None
        #: Tells whether the device says that it waits for the host.
        self.is_busy: Callable[[], bool] = lambda: False
        self._owed: list[int] = []  # message types of the answers that are to come, in order
        self._answer: bytes | None = None  # to the last one
        self._given_up: Timer | None = None

    def open(self, sync: Channel, async_: Channel) -> None:
        """Start to serve a device process that has said READY on `sync`.

        Makes the register writes again that a predecessor has not done.
        """
        with self._lock:
            self._sync, self._async = sync, async_
            self.generation += 1
            self._owed.clear()
            self._loop.add(async_.fileno(), READ, self._incoming)
            if self.revive is not None:
                missing = min(max(self._written - self.handled(), 0), len(self._writes))
                try:
                    for message in list(self._writes)[len(self._writes) - missing :]:
                        sync.send_msg(message)
                    if self.generation > 1:
                        self._look(sync, Block.ISR_PEEK, 1)
                except ChannelError as err:
                    self._break(err)
            self._lock.notify_all()

    @property
    def alive(self) -> bool:
        """Whether there is somebody to talk to."""
        return self._sync is not None

    def read(self, reg: int, size: int) -> tuple[int, int]:
        """Read a device register: (value, interrupt state). All-ones from a dead device."""
        for _ in range(READ_ATTEMPTS):
            if not self._there(time.monotonic() + BUSY_DEADLINES * SYNC_DEADLINE):
                break
            with self._lock:
                if self._sync is not None:
                    self.messages += 2
                    try:
                        reply = self._look(self._sync, reg, size)
                    except ChannelError as err:
                        self._break(err)
                    else:
                        self.answered += 1
                        return reply.data & ((1 << 8 * size) - 1), reply.state
        return (1 << 8 * size) - 1, 0

    def _there(self, end: float) -> bool:
        """Whether there is somebody to talk to, or will be by `end`."""
        if self._sync is None and self.revive is not None and time.monotonic() < end:
            if threading.get_ident() == self._thread:
                self.revive()
                return self._sync is not None
            with self._lock:
                while self._sync is None and self.revive is not None:
                    if not self._lock.wait(end - time.monotonic()):
                        break
        return self._sync is not None

    def _look(self, sync: Channel, reg: int, size: int) -> ViodevMsg:
        """Read a register. Raises ChannelError."""
        sync.send_msg(ViodevMsg(MsgType.IO_READ, reg, size))
        reply = self._reply(sync)
        if reply.type != MsgType.IO_READ or not reply.data_valid:
            raise ChannelError(f"{self.name}: answered a read with type {reply.type}")
        self._writes.clear()  # it has done them before
        return reply

    def _reply(self, sync: Channel) -> ViodevMsg:
        """Wait for the answer to a read, longer while the device waits for the host itself."""
        for _ in range(BUSY_DEADLINES - 1):
            try:
                return sync.receive_msg()
            except ChannelError as err:
                if not (isinstance(err.__cause__, BlockingIOError) and self.is_busy()):
                    raise
                log.limited(f"{self.name} is slow", "a register waits for a slow disk", self.name)
        return sync.receive_msg()

    def write(self, reg: int, size: int, value: int) -> None:
        """Write a device register. Not answered; a later read sees its effect."""
        message = ViodevMsg(MsgType.IO_WRITE, reg, size, data=value, data_valid=1)
        if len(self._writes) >= WRITES_MAX:
            self.read(Block.ISR_PEEK, 1)
        with self._lock:
            if self.revive is not None:
                self._writes.append(message)
                self._written += 1
            if self._sync is not None:
                self.messages += 1
                try:
                    self._sync.send_msg(message)
                except ChannelError as err:
                    self._break(err)

    def call(self, kind: ImsgType, data: bytes = b"", fd: int | None = None) -> bytes:
        """Send a PAUSE, UNPAUSE or SETTING and wait for its answer's payload. Loop's thread.

        A copy of `fd` goes with it, to a device whose spec has room for descriptors.
        Raises ChannelError if the device is dead, or dies of this, or is too busy: one that waits
        for a slow disk does what it was told later, or is given up after LATE_DEADLINE.
        """
        if self._async is None:
            raise ChannelError(f"{self.name}: has died")
        self._answer = None
        try:
            self._owed.append(kind)
            self._async.send(kind, data, fd=fd)
            end = time.monotonic() + CALL_DEADLINE
            while self._async is not None and self._owed:
                left = end - time.monotonic()
                if left <= 0 or not self._waits(self._async, left):
                    break
                self._take(self._async.receive())
        except ChannelError as err:
            self._broken(err)
            raise
        if self._async is None:
            raise ChannelError(f"{self.name}: has died")
        if self._answer is None:
            self._wait_longer()
            hint = "it may wait for a slow disk, and do this later"
            raise ChannelError(f"{self.name}: is busy", hint=hint)
        return self._answer

    @staticmethod
    def _waits(channel: Channel, seconds: float) -> bool:
        """Whether a message is there, or comes within so many seconds."""
        poll = select.poll()  # a VM of many queues has descriptors that select(2) cannot have
        poll.register(channel.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _wait_longer(self) -> None:
        """Have the device given up if it goes on to owe answers."""
        if self._given_up is None:
            self._given_up = self._loop.timer(self._not_answered)
            self._given_up.arm(LATE_DEADLINE)

    def _not_answered(self) -> None:
        self._broken(ChannelError(f"{self.name}: does not answer"))

    def close(self) -> None:
        """Hang up for good; a device process ends when it sees that. Loop's thread."""
        self.revive = None
        self.hang_up()

    def hang_up(self) -> None:
        """Hang up; another process may come. Loop's thread."""
        with self._lock:
            self._lock.notify_all()
            sync, self._sync = self._sync, None
            async_, self._async = self._async, None
        self._forget_timer()
        if async_ is not None:
            self._hear_last_words(async_)
            self._loop.remove(async_.fileno())
            async_.close()
        if sync is not None:
            sync.close()

    def _hear_last_words(self, channel: Channel) -> None:
        """Log what a process may have said before it ended."""
        with suppress(ChannelError):
            for _ in range(LAST_MAX):
                if not self._waits(channel, 0):
                    break
                imsg = channel.receive()
                if imsg.fd is not None:
                    os.close(imsg.fd)
                if imsg.type == ImsgType.LOG:
                    self._log(imsg.data)

    def _forget_timer(self) -> None:
        if self._given_up is not None:
            self._given_up.close()
            self._given_up = None

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
        self._loop.call(partial(self._broken, err, self.generation))

    def _broken(self, err: ChannelError, generation: int = 0) -> None:
        """A process is lost: the one that is there, or that `generation` if it still is."""
        if self._async is not None and generation in (0, self.generation):
            self.hang_up()
            self._failed(err.what)

    def _incoming(self, _events: int) -> None:
        # Level-triggered: what does not fit this round's batch wakes the loop again.
        channel = self._async
        if channel is None or not self._waits(channel, 0):
            return  # call() has taken it, in an earlier callback of the same round
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
        elif imsg.type == ImsgType.EVENT:
            self.on_event(imsg.data[:EVENT_MAX].decode("ascii", "replace"))
        elif self._owed and imsg.type == self._owed[0]:
            del self._owed[0]
            if not self._owed:
                self._answer = imsg.data
                self._forget_timer()
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
        if level is log.debug:
            log.debug(text, self.name)
        elif level is log.info:  # not with the warnings: neither may use up the other's share
            log.limited(f"{self.name} tells", text, self.name, log.info)
        else:
            log.limited(f"{self.name} says", text, self.name)


def describe(status: int) -> str:
    """Return in words how a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"
