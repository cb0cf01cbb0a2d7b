"""A device process behind a vhost-user socket: one connection, and then it ends.

What `devices/process.py` is for the private channel. The same device sits behind it, in the same
jail; what differs is who asks and how. Everything that came through the connection, descriptors
and mappings, goes with the process.

    socket    a message of the front end       kick n    the driver has filled queue n
    channel   the supervisor's settings        whatever the device itself watches, timers

**Ends.** When the front end hangs up or breaks the protocol, exit 0 with one line in the log; the
supervisor serves the next one. When the supervisor is gone, exit 0. Any other error is the last
LOG message, exit 1.
"""

from __future__ import annotations

import gc
import json
import socket
from typing import TYPE_CHECKING, Any

from config.errors import GuestError, PyvmError
from devices import jail, words
from devices.device import DEBUG, INFO, WARNING
from devices.guestmem import GuestMemory
from devices.loop import READ, Loop
from devices.process import GC_THRESHOLD, WAIT
from devices.vhostback import Conversation
from devices.vhostrings import Rings
from devices.vhostwire import PeerError, Wire
from devices.viodev import Channel, ChannelError, ImsgType, MsgType, ViodevMsg

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.device import Device, Timer
    from devices.process import Order

PEER = "front end"


def main(order: Order, fds: dict[str, int], create: Callable[..., Device], level: str) -> int:
    """Be the process, in a child that has no descriptors but `fds`; return exit status.

    `fds` are `channel`, to the supervisor, `socket`, and the device's own.
    """
    channel = Channel(socket.socket(fileno=fds.pop("channel")), "supervisor", WAIT)
    try:
        door = Door(order, fds, create, channel)
        report = jail.enter(order.kind, level, vhost=True)
        for lack in report.lacking:
            words.send(channel, WARNING, f"jail without {lack}")
        words.send(channel, DEBUG, report.summary())
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        channel.send_msg(ViodevMsg(MsgType.READY))
    except Exception as err:  # whatever it is, the supervisor is told
        words.last_words(channel, err)
        return 1
    return door.serve()


class Door:
    """Holds the parts, and is what a device sees of the process: device.Host."""

    def __init__(
        self, order: Order, fds: dict[str, int], create: Callable[..., Device], channel: Channel
    ) -> None:
        """Build device and conversation. Raises PyvmError, OSError."""
        self._channel, self._words = channel, words.Words(channel)
        self._loop = Loop()
        wire = Wire(socket.socket(fileno=fds.pop("socket")), PEER)
        memory = GuestMemory()
        self._device = device = create(order.settings, fds, memory, self)
        self._rings = Rings(device, memory, self._loop, self.log)
        self._talk = Conversation(wire, self._rings, self.log)
        self._loop.add(wire.fileno(), READ, self._talk.readable)
        self._loop.add(channel.fileno(), READ, self._request)

    def serve(self) -> int:
        """Serve until the front end leaves; return the exit status."""
        try:
            return self._serve()
        finally:
            self._device.close()
            self._talk.close()

    def _serve(self) -> int:
        while True:
            try:
                self._loop.run()
            except GuestError as err:
                self._rings.fail(err)
            except PeerError as err:
                gone = isinstance(err.__cause__, EOFError | ConnectionError)
                self.log(INFO if gone else WARNING, str(err))
                return 0
            except ChannelError as err:
                if isinstance(err.__cause__, EOFError | ConnectionError):
                    return 0
                words.last_words(self._channel, err)
                return 1
            except Exception as err:
                words.last_words(self._channel, err)
                return 1

    def _request(self, _events: int) -> None:
        """Serve a request of the supervisor."""
        imsg = self._channel.receive()
        if imsg.type != ImsgType.SETTING or imsg.fd is not None:
            raise ChannelError(f"supervisor: sent message type {imsg.type}")
        try:
            request = json.loads(imsg.data)
            answer: dict[str, Any] = {
                "value": self._device.setting(request["name"], request["value"])
            }
        except GuestError as err:
            self._rings.fail(err)
            answer = {"error": str(err)}
        except PyvmError as err:
            answer = {"error": str(err)[: words.TEXT_MAX]}
        self._channel.send(ImsgType.SETTING, json.dumps(answer).encode())

    # device.Host.

    def call(self, index: int) -> None:
        """See Host."""
        self._rings.bells.call(self._rings.rings[index])

    def schedule(self, index: int) -> None:
        """See Host."""
        self._rings.bells.schedule(index)

    def checkpoint(self) -> None:
        """See Host; what is to be remembered is the front end's business."""

    def config_changed(self) -> None:
        """See Host."""
        self._talk.config_changed()

    def tell(self, word: str) -> None:
        """See Host."""
        self.log(INFO, word)

    def watch(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """See Host."""
        self._loop.add(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """See Host."""
        self._loop.remove(fd)

    def timer(self, callback: Callable[[], None]) -> Timer:
        """See Host."""
        return self._loop.timer(callback)

    def log(self, level: int, text: str) -> None:
        """See Host."""
        self._words.say(level, text)
