"""A vhost-user back end for tests: keeps what it is told, answers by rote, and lies when asked to.

It serves one connection at a time, in a thread, and never touches a ring by itself.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from struct import pack, unpack_from

from devices import passing, vhostwire
from devices.vhostwire import (
    F_PROTOCOL_FEATURES,
    FRONT,
    NEED_REPLY,
    P_REPLY_ACK,
    REPLY,
    U64,
    Front,
    Message,
    PeerError,
    Wire,
)

PATIENCE = 30.0  # seconds; nothing should ever need them

Answer = Callable[[Message], Message | None]


class VhostPeer:
    """One back end; attributes may be changed while it runs."""

    def __init__(self) -> None:
        self.features = 1 << 32 | F_PROTOCOL_FEATURES
        self.protocol = vhostwire.P_MQ | P_REPLY_ACK
        self.queues = 2
        self.config = bytes(range(64))
        self.bases: dict[int, int] = {}
        #: What to answer instead, by request; None is silence.
        self.answers: dict[int, Answer] = {}
        #: All that was heard, without descriptors; of those, how many.
        self.heard: list[tuple[Front, bytes, int]] = []
        #: The latest descriptors, by request and queue (0 where there is none).
        self.fds: dict[tuple[int, int], int] = {}
        self.back: Wire | None = None
        self.wire: Wire | None = None
        self.agreed = 0
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []

    def serve(self, sock: socket.socket) -> None:
        """Serve a connection, until it ends."""
        wire = Wire(sock, "front end")
        self.wire, self.agreed = wire, 0

        def run() -> None:
            try:
                while True:
                    message = wire.wait(PATIENCE)
                    self._take(wire, message)
            except PeerError:
                pass
            finally:
                wire.close()
                with self._news:
                    if self.wire is wire:
                        self.wire = None
                    self._news.notify_all()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def requests(self) -> list[Front]:
        """Return what was asked so far, in order."""
        return [request for request, _, _ in self.heard]

    def payload(self, request: Front) -> bytes:
        """Return the latest payload of a request."""
        return next(data for what, data, _ in reversed(self.heard) if what == request)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until something is so, which is looked at after every message."""
        with self._news:
            assert self._news.wait_for(done, PATIENCE), self.requests()

    def hang_up(self) -> None:
        """End the connection, as a killed process does."""
        wire = self.wire
        if wire is not None:
            # Not close(): the thread polls it, and may be closing it right now.
            with suppress(OSError), socket.socket(fileno=os.dup(wire.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)
            self.wait_for(lambda: self.wire is not wire)

    def close(self) -> None:
        """End, and close all that was kept."""
        self.hang_up()
        for thread in self._threads:
            thread.join(PATIENCE)
        passing.close(self.fds.values())
        self.fds.clear()
        if self.back is not None:
            self.back.close()

    def _take(self, wire: Wire, message: Message) -> None:
        request = Front(message.request)
        queue = 0
        if request in {Front.SET_VRING_KICK, Front.SET_VRING_CALL, Front.SET_VRING_ERR}:
            queue = U64.unpack(message.payload)[0] & vhostwire.VRING_INDEX
        if request == Front.SET_BACKEND_REQ_FD:
            if self.back is not None:
                self.back.close()
            self.back = Wire(socket.socket(fileno=message.fds[0]), "front end")
        else:
            for position, fd in enumerate(message.fds):
                old = self.fds.get((request, queue + position))
                if old is not None:
                    passing.close([old])
                self.fds[request, queue + position] = fd
        self.heard.append((request, message.payload, len(message.fds)))
        try:
            answer = self.answers.get(request, self._answer)(message)
            if answer is not None:
                wire.send(answer)
        finally:
            with self._news:
                self._news.notify_all()

    def _answer(self, message: Message) -> Message | None:
        """Answer as a back end without faults does."""
        request, payload = message.request, message.payload

        def number(value: int) -> Message:
            return Message(request, REPLY, U64.pack(value))

        match request:
            case Front.GET_FEATURES:
                return number(self.features)
            case Front.GET_PROTOCOL_FEATURES:
                return number(self.protocol)
            case Front.SET_PROTOCOL_FEATURES:
                (self.agreed,) = U64.unpack(payload)
                return None
            case Front.GET_QUEUE_NUM:
                return number(self.queues)
            case Front.GET_MAX_MEM_SLOTS:
                return number(32)
            case Front.GET_STATUS:
                return number(0)
            case Front.GET_CONFIG:
                offset, size, flags = unpack_from("<III", payload)
                part = self.config[offset : offset + size]
                if len(part) < size:
                    return Message(request, REPLY)
                return Message(request, REPLY, pack("<III", offset, size, flags) + part)
            case Front.GET_VRING_BASE:
                (queue,) = unpack_from("<I", payload)
                return Message(request, REPLY, pack("<II", queue, self.bases.get(queue, 0)))
            case Front.SET_VRING_BASE:
                queue, base = unpack_from("<II", payload)
                self.bases[queue] = base
            case Front.SET_CONFIG:
                offset, size, _ = unpack_from("<III", payload)
                self.config = self.config[:offset] + payload[12:] + self.config[offset + size :]
        if FRONT[request].replies:
            return number(0)
        needs = message.flags & NEED_REPLY and self.agreed & P_REPLY_ACK
        return number(0) if needs else None
