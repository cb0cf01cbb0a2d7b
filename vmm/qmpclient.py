"""A small blocking QMP client, for pyvmctl. Every wait has an end."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError, NoSuchVmError
from devices.lines import printable
from vmm import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT: Final = 10.0  # seconds for an answer, unless the caller says otherwise
MESSAGE_LIMIT: Final = 4 * 1024 * 1024  # bytes; a VM process that a guest has taken over may lie
EVENTS_KEPT: Final = 1000  # while nobody asks for them


class CommandError(HostError):
    """The VM answered with an error; `error_class` is QMP's."""

    def __init__(self, what: str, error_class: str, vm: str) -> None:
        super().__init__(what, vm=vm)
        self.error_class = error_class


class GoneError(HostError):
    """The VM closed the connection: it has ended, or threw this client out."""


class QmpClient:
    """A negotiated connection to one control socket. A context manager."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        """Connect and negotiate. Raises NoSuchVmError if nobody listens, HostError."""
        self.name = os.path.basename(os.path.dirname(path))
        self.timeout = timeout  # seconds for each call(); may be changed
        self._buffer = bytearray()
        self._looked = 0  # bytes of _buffer known to hold no line end
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._serial = 0
        self._passed = -1  # descriptor to send with the next command
        self.gone = False  # the VM has hung up
        self._socket = self._connect(path)
        try:
            self.greeting = self._greeting()
            self.call("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def pass_fd(self, name: str, fd: int) -> None:
        """Hand the VM a copy of `fd`, for a command that calls it `name`. Raises as call()."""
        self._passed = fd
        self.call("getfd", fdname=name)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Run one command and return its result.

        Raises CommandError if the VM says no, GoneError if it ends meanwhile, HostError if it
        does not answer within `timeout` seconds.
        """
        deadline = time.monotonic() + self.timeout
        self._serial += 1
        request = {"execute": name, "arguments": arguments, "id": self._serial}
        self._send(json.dumps(request).encode() + b"\r\n")
        while True:
            try:
                message = self._message(deadline)
            except TimeoutError:
                raise self._stuck(f"no answer to {name} within {self.timeout:g} s") from None
            if "event" in message:
                self._events.append(message)
            elif message.get("id") != self._serial:
                continue  # the answer to a call that was given up
            elif "error" in message:
                raise self._refused(message["error"])
            else:
                return message.get("return")

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield events as they come, for `timeout` seconds in all; ends when the VM does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            while self._events:
                yield self._events.popleft()
            try:
                message = self._message(deadline)
            except (GoneError, TimeoutError):
                return
            if "event" in message:
                yield message

    def _connect(self, path: str) -> socket.socket:
        try:
            return sockets.connect(path, self.timeout)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as err:
            raise NoSuchVmError(f"VM {self.name} is not running") from err
        except PermissionError as err:
            hint = "its owner and root can"
            raise HostError("you may not control this VM", vm=self.name, hint=hint) from err
        except OSError as err:
            raise HostError(f"cannot connect to {path}: {err}") from err

    def _greeting(self) -> dict[str, Any]:
        try:
            greeting = self._message(time.monotonic() + self.timeout)
        except TimeoutError:
            what = f"the control socket is silent for {self.timeout:g} s"
            raise self._stuck(what) from None
        if "error" in greeting:
            raise self._refused(greeting["error"])
        if "QMP" not in greeting:
            raise self._nonsense()
        return greeting

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(self.timeout)
        fd, self._passed = self._passed, -1
        try:
            if fd >= 0:  # it travels with the first bytes
                data = data[socket.send_fds(self._socket, [data], [fd]) :]
            self._socket.sendall(data)
        except OSError as err:
            raise GoneError(f"the control connection broke: {err}", vm=self.name) from err

    def _message(self, deadline: float | None) -> dict[str, Any]:
        """Return the next message. Raises TimeoutError, GoneError, HostError."""
        while True:
            end = self._buffer.find(b"\n", self._looked)
            if end < 0:
                self._looked = len(self._buffer)
                self._receive(deadline)
                continue
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._looked = 0
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise self._nonsense() from None
            if not isinstance(message, dict):
                raise self._nonsense()
            return message

    def _receive(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        if len(self._buffer) > MESSAGE_LIMIT:
            raise self._nonsense()
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            self.gone = True
            raise GoneError("the VM closed the control connection", vm=self.name)
        self._buffer += data

    def _stuck(self, what: str) -> HostError:
        return HostError(
            what, vm=self.name, hint=f"'pyvmctl kill {self.name}' ends it all the same"
        )

    def _refused(self, error: Any) -> CommandError:
        told = error if isinstance(error, dict) else {}
        what = printable(str(told.get("desc", "refused without a reason")))
        return CommandError(what, str(told.get("class", "GenericError")), self.name)

    def _nonsense(self) -> HostError:
        return HostError("the control socket does not speak QMP", vm=self.name)
