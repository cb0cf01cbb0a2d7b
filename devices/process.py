"""A device process: one device, its registers, and the loop that wakes them.

Between fork and jail everything is opened and mapped (`Process`); after READY this file only
waits for one of

    sync      a register access from a vCPU        kick n    the driver has filled queue n
    async     pause, settings, from the VM's loop  resample  the guest ended a level interrupt
    whatever the device itself watches             timers

An idle device has no timer armed and does not wake.

**Turns.** A kick is an eventfd, level-triggered: a device that used up its budget has it written
again and goes to the end of the line, so neither another queue nor a register access waits for
more than one budget.

**No kick is lost.** One that comes too early finds the queue not live and is dropped, but every
queue is looked into once when it becomes live. Later ones are between driver and queue
(`VirtQueue.enable_kicks`).

**Errors.** GuestError from anywhere sets NEEDS_RESET. Either channel's end is the end of the VM:
exit 0. Everything else ends the process with its reason as the last LOG message.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import socket
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import GuestError, PyvmError
from devices import jail, words
from devices.device import DEBUG, WARNING
from devices.eventfds import signal_if_room
from devices.guestmem import GuestMemory, Region
from devices.loop import READ, Loop
from devices.spec import COUNTERS_SIZE, INFLIGHT_STRIDE, SPECS
from devices.transport import ISR_QUEUE
from devices.viodev import CONFIG_CHANGE, Channel, ChannelError, ImsgType, MsgType, ViodevMsg
from devices.virtio import Registers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.device import Device, Timer
    from devices.transport import Transport
    from devices.viodev import Imsg

WAIT: Final = 0.0  # no deadline: a VM process that is stopped by a debugger is not gone
GC_THRESHOLD: Final = 50_000  # objects: a net for mistakes


class Order(NamedTuple):
    """What this process is to be; from the VM process, which is trusted until the jail."""

    kind: str  # a row of spec.SPECS
    name: str  # "vioblk0"
    settings: Mapping[str, Any]
    regions: tuple[Region, ...]


def main(order: Order, fds: dict[str, int], create: Callable[..., Device], level: str) -> int:
    """Be the device process, in a child that has no descriptors but `fds`; return exit status.

    `level` is vm.yaml's word for how strict the jail has to be.
    """
    sync = Channel(socket.socket(fileno=fds.pop("sync")), "VM process", WAIT)
    async_ = Channel(socket.socket(fileno=fds.pop("async")), "VM process", WAIT)
    try:
        process = _kind_of(fds)(order, fds, create, async_, sync)
        if SPECS[order.kind].descriptors:
            async_.expect_fds()
        report = confine(order.kind, level)
        process.begin()
        for lack in report.lacking:
            words.send(sync, WARNING, f"jail without {lack}")
        words.send(sync, DEBUG, report.summary())
        # What was made until now lives as long as the process: never walk or unshare it. And no
        # request leaves a cycle (a test holds that), but a deep queue has more objects alive than
        # the usual threshold: it would have one collection per 130 requests, for nothing.
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        sync.send_msg(ViodevMsg(MsgType.READY))
        async_.send_msg(ViodevMsg(MsgType.READY))
    except Exception as err:  # whatever it is, the VM process is told
        words.last_words(sync, err)
        return 1
    return process.serve()


def confine(kind: str, level: str) -> jail.Report:
    """Enter the jail of this kind of device. Raises HostError."""
    return jail.enter(kind, level)


def _kind_of(fds: Mapping[str, int]) -> type[Process]:
    if "journal" not in fds:
        return Process
    from devices.lasting import LastingProcess  # spec.LASTING

    return LastingProcess


class Process:
    """Holds the parts, and is what they see of the process: device.Host and transport.Door."""

    #: The state machine, from `begin` on.
    transport: Transport

    def __init__(
        self,
        order: Order,
        fds: dict[str, int],
        create: Callable[..., Device],
        async_: Channel,
        sync: Channel,
    ) -> None:
        """Map guest memory and build the device. Raises PyvmError, OSError."""
        self._sync, self._async = sync, async_
        self._words = words.Words(async_)
        self._loop, self._running, self._paused = Loop(), True, False
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}  # silent while paused
        self._late: dict[Callable[[], None], None] = {}  # timers that fired while paused
        self._kicks: list[int] = []
        self._given: set[int] = set()  # queues whose kicks somebody else listens to
        self._signal: Callable[[int, int], None] = os.eventfd_write
        self._memory = memory = GuestMemory(
            fds["memory"], [Region(*region) for region in order.regions]
        )
        if not SPECS[order.kind].hands_over:
            os.close(fds.pop("memory"))
        self._device = device = create(order.settings, fds, memory, self)
        count = len(device.queue_sizes)
        if "counters" in fds:
            device.totals = _counters(fds.pop("counters"))
        self._packed = bool(order.settings.get("packed"))
        self._areas = _inflight_areas(fds.pop("inflight", -1), count)
        self._calls = {index: fds.pop(f"call{index}", -1) for index in range(count)}
        self._calls[CONFIG_CHANGE] = fds.pop("callc", -1)
        self._made_calls = self._calls
        for index in range(count):
            fd = fds.pop(f"kick{index}", -1)
            self._kicks.append(fd if fd >= 0 else os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        resample_fd = fds.pop("resample", -1)
        if resample_fd >= 0:
            self._resample_fd = resample_fd
            self._loop.add(resample_fd, READ, self._resampled)
        self._loop.add(sync.fileno(), READ, self._access)
        self._loop.add(async_.fileno(), READ, self._request)

    def begin(self) -> None:
        """Make the registers of what the device is, and listen to its queues. Raises PyvmError."""
        device = self._device
        device.begin()
        count = len(device.queue_sizes)
        areas = self._areas[:count]
        self._registers = Registers(device, self._memory, self, packed=self._packed, inflight=areas)
        self.transport = self._registers.transport
        for index in range(count):
            if index not in self._given:
                self.watch(self._kicks[index], self._kicker(index))

    def serve(self) -> int:
        """Serve until told to leave; return the exit status."""
        try:
            return self._serve()
        finally:
            self._device.close()

    def _serve(self) -> int:
        resumed = False
        while self._running:
            try:
                if not resumed:
                    resumed = True
                    self._resume()
                self._loop.run()
            except GuestError as err:
                self.transport.fail(err)
            except ChannelError as err:
                if isinstance(err.__cause__, (EOFError, ConnectionError)):
                    return 0
                words.last_words(self._async, err)
                return 1
            except Exception as err:
                words.last_words(self._async, err)
                return 1
        return 0

    def _resume(self) -> None:
        """Become what a predecessor was, where there is a way to know."""

    # Queues.

    def _kicker(self, index: int) -> Callable[[int], None]:
        """Return what serves queue `index`: the hot path from wake-up to device."""
        fd, live, kick = self._kicks[index], self.transport.live, self._device.kick
        clear, again = os.eventfd_read, os.eventfd_write

        def kicked(_events: int) -> None:
            clear(fd)
            queue = live[index]
            if queue is None:
                self.transport.early_kick(index)
            elif kick(index, queue):
                again(fd, 1)

        return kicked

    def give(self, index: int) -> tuple[int, int]:
        """Have another process serve a queue: return the eventfds of its kicks and its calls.

        Called by `Device.begin`. -1 in place of calls: they have to come by way of `call`.
        """
        self.leave(index)
        self._signal = signal_if_room
        return self._kicks[index], self._calls[index]

    def leave(self, index: int) -> None:
        """Leave the kicks of a queue to another process of ours; called by `Device.begin`."""
        self._given.add(index)

    def divert(self, fd: int) -> None:
        """Have calls of queues go to this eventfd, whoever listens there; -1: to the driver."""
        made = self._made_calls
        self._calls = made if fd < 0 else {**dict.fromkeys(made, fd), CONFIG_CHANGE: -1}

    def schedule(self, index: int) -> None:
        """Have queue `index` served soon, as if it had been kicked."""
        self._signal(self._kicks[index], 1)

    def call(self, index: int) -> None:
        """Interrupt the driver for a queue."""
        self.transport.isr |= ISR_QUEUE
        self.interrupt(index)

    def interrupt(self, source: int) -> None:
        """Interrupt for a queue or CONFIG_CHANGE; the ISR bit is set already."""
        fd = self._calls[source]
        if fd >= 0:
            self._signal(fd, 1)
        else:
            self._async.send_msg(ViodevMsg(MsgType.KICK, state=1, data=source, data_valid=1))

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        self.transport.config_changed()

    def checkpoint(self) -> None:
        """Write down what is so now, for whoever takes the place of this process: nobody does."""

    def tell(self, word: str) -> None:
        """Tell the VM process that something has happened."""
        self._async.send(ImsgType.EVENT, word.encode())

    def _resampled(self, _events: int) -> None:
        """The guest ended a level interrupt: raise the next one if ISR still holds something."""
        os.eventfd_read(self._resample_fd)
        isr = self.transport.isr
        if isr:
            self.interrupt(0 if isr & ISR_QUEUE else CONFIG_CHANGE)

    # Messages.

    def _access(self, _events: int) -> None:
        """Serve one register access."""
        self._answer_one()

    def _answer_one(self) -> ViodevMsg:
        message = self._sync.receive_msg()
        self._answer(message)
        return message

    def _answer(self, message: ViodevMsg) -> None:
        if message.type == MsgType.IO_READ:
            value, state = self._registers.read(message.reg, message.io_sz)
            self._sync.send_msg(message._replace(state=state, data=value, data_valid=1))
        elif message.type == MsgType.IO_WRITE:
            self._registers.write(message.reg, message.io_sz, message.data)
        elif message.type == MsgType.SHUTDOWN:
            self._running = False
            self._loop.stop()
        else:
            raise ChannelError(f"VM process: sent message type {message.type} on sync")

    def _request(self, _events: int) -> None:
        """Serve one request of the VM's loop."""
        imsg = self._async.receive()
        if imsg.fd is not None and imsg.type != ImsgType.SETTING:
            os.close(imsg.fd)
            raise ChannelError("VM process: sent a descriptor nobody asked for")
        if imsg.type == ImsgType.PAUSE:
            self._pause()
            self._async.send(ImsgType.PAUSE)
        elif imsg.type == ImsgType.UNPAUSE:
            self._unpause()
            self._async.send(ImsgType.UNPAUSE)
        elif imsg.type == ImsgType.SETTING:
            self._async.send(ImsgType.SETTING, json.dumps(self._set(imsg)).encode())
        else:
            raise ChannelError(f"VM process: sent message type {imsg.type} on async")

    def _set(self, imsg: Imsg) -> dict[str, Any]:
        """Answer {"name", "value"} with the value that holds now, or with {"error"}.

        An error may repeat what was asked, which can be longer than an answer.
        """
        fd = imsg.fd  # ours until the device has taken it
        try:
            request = json.loads(imsg.data)
            name, value = request["name"], request["value"]
            if fd is None:
                return {"value": self._device.setting(name, value)}
            result = self._device.take(name, value, fd)
            fd = None
            return {"value": result}
        except GuestError as err:
            self.transport.fail(err)
            return {"error": str(err)[: words.TEXT_MAX]}
        except (PyvmError, ValueError, KeyError, TypeError, RecursionError) as err:
            return {"error": str(err)[: words.TEXT_MAX]}
        finally:
            if fd is not None:
                os.close(fd)

    # Pausing. Only what could lead to guest memory stops; registers go on answering.

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            for fd in self._watched:
                self._loop.remove(fd)
            self._device.pause()

    def _unpause(self) -> None:
        if self._paused:
            self._go_on(self._device.unpause)

    def _go_on(self, begin: Callable[[], None]) -> None:
        """End the pause; `begin` is the device's part of it."""
        self._paused = False
        for fd, (events, callback) in self._watched.items():
            self._loop.add(fd, events, callback)
        begin()
        for index in range(len(self._kicks)):
            self.schedule(index)
        while self._late:
            self._late.popitem()[0]()

    def watch(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Call `callback(events)` while `fd` is ready; not while paused."""
        self._watched[fd] = events, callback
        if not self._paused:
            self._loop.add(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; harmless if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._loop.remove(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return an unarmed timer; what fires while paused is made up for afterwards."""

        def fired() -> None:
            if self._paused:
                self._late[callback] = None
            else:
                callback()

        return self._loop.timer(fired)

    def log(self, level: int, text: str) -> None:
        """Say something in the VM's log; see Words."""
        self._words.say(level, text)


def _counters(fd: int) -> memoryview:
    """Map the page of counters. Raises OSError, ValueError."""
    page = memoryview(mmap.mmap(fd, COUNTERS_SIZE)).cast("Q")
    os.close(fd)
    return page


def _inflight_areas(fd: int, count: int) -> list[memoryview | None]:
    """Map the in-flight areas of `count` queues, if there are any. Raises OSError, ValueError."""
    if fd < 0:
        return [None] * count
    whole = memoryview(mmap.mmap(fd, INFLIGHT_STRIDE * count))
    os.close(fd)
    return [whole[INFLIGHT_STRIDE * i : INFLIGHT_STRIDE * (i + 1)] for i in range(count)]
