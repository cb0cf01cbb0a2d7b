"""A viovhost device process between a driver and a back end, both of them the test.

    with PeerLab() as lab:
        [queue] = lab.host.start()             # the driver's side
        queue.add([b"x"], [4])
        lab.host.kick(0)
        chain = lab.pop(0)                     # the back end's side
        lab.back[0].push(chain.head, 4)
        lab.call(0)

The protocol is VhostPeer's, in a thread; its rings are opened here, where the test runs.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING, Any, Final, Self

from devices import vhostwire
from devices.guestmem import GuestMemory
from devices.spec import VHOST, VhostKind
from devices.vhostmem import Regions
from devices.vhostwire import (
    MEM_REGION,
    MEM_TABLE,
    P_INFLIGHT_SHMFD,
    REPLY,
    VRING_ADDR,
    VRING_STATE,
    Front,
    Message,
)
from devices.viodev import ImsgType
from devices.virtqueue import Chain, QueueState, VirtQueue, open_queue
from tests.vhostpeer import VhostPeer
from tools.viodriver.private import DEADLINE, DeviceHost
from vmm.peers import files, place

if TYPE_CHECKING:
    from types import TracebackType

KIND: Final = VhostKind(40, 0xFF0000, 16, 0, 1, 64)


class PeerLab:
    """One device process, and who serves it."""

    def __init__(
        self,
        peer: VhostPeer | None = None,
        *,
        queues: int = 1,
        books: bool = False,
        kind: VhostKind = KIND,
        jail: str = "off",
        irqfd: bool = True,
        own: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Connect; `books` has the back end keep an in-flight area. Raises HostError."""
        self.peer = peer or VhostPeer()
        self.peer.protocol |= vhostwire.P_CONFIG | vhostwire.P_BACKEND_REQ
        if books:
            self.peer.protocol |= P_INFLIGHT_SHMFD
            self.peer.answers[Front.GET_INFLIGHT_FD] = self._make_area
        self.areas: list[int] = []
        made = place("dev", "/peer", kind, queues, exact=True, **(own or {}))
        self.settings = made.settings | settings
        ours, theirs = socket.socketpair()
        self.kept = files(self.settings["queues"])
        self.peer.serve(theirs)
        try:
            self.host = DeviceHost(
                VHOST,
                self.settings,
                fds={"peer": ours.fileno(), **self.kept},
                queues=made.queues,
                irqfd=irqfd,
                jail=jail,
            )
        except BaseException:
            self.peer.close()
            raise
        finally:
            ours.close()
        #: The back end's side of each queue, after open().
        self.back: list[VirtQueue] = []
        self._memories: list[GuestMemory] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.host.close()
        self.peer.close()
        for fd in (*self.areas, *self.kept.values()):
            os.close(fd)

    def open(self, features: int = 0) -> list[VirtQueue]:
        """Open the rings as the back end was last told of them, and return them."""
        table = self.peer.payload(Front.SET_MEM_TABLE)
        regions = Regions()
        for number in range(MEM_TABLE.unpack_from(table)[0]):
            at = MEM_TABLE.size + number * MEM_REGION.size
            fd = self.peer.fds[Front.SET_MEM_TABLE, number]
            regions = regions.with_region(table[at : at + MEM_REGION.size], fd)
        memory = GuestMemory()
        memory.replace(regions.spans)
        self._memories.append(memory)
        self.back = []
        for index in range(self.settings["queues"]):
            _, _, desc, used, avail, _ = VRING_ADDR.unpack(self.told(Front.SET_VRING_ADDR, index))
            _, size = VRING_STATE.unpack(self.told(Front.SET_VRING_NUM, index))
            _, base = VRING_STATE.unpack(self.told(Front.SET_VRING_BASE, index))
            where = [regions.gpa(hva) for hva in (desc, avail, used)]
            queue = open_queue(memory, size, *where, features=features)
            queue.load(QueueState(base, base))
            self.back.append(queue)
        return self.back

    def told(self, request: Front, index: int) -> bytes:
        """Return the latest payload of a request about queue `index`."""
        for what, payload, _ in reversed(self.peer.heard):
            if what == request and payload[0] == index:
                return payload
        raise LookupError(f"{request.name} of queue {index}")

    def kicked(self, index: int, timeout: float = DEADLINE) -> bool:
        """Wait for a kick that reaches the back end, and take it."""
        fd = self.peer.fds[Front.SET_VRING_KICK, index]
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1e3):
            return False
        os.eventfd_read(fd)
        return True

    def call(self, index: int) -> None:
        """Call, as the back end."""
        os.eventfd_write(self.peer.fds[Front.SET_VRING_CALL, index], 1)

    def pop(self, index: int) -> Chain:
        """Return the next chain that reaches the back end."""
        while (chain := self.back[index].pop()) is None:
            self.back[index].enable_kicks()
            chain = self.back[index].pop()
            if chain is not None:
                return chain
            assert self.kicked(index), self.host.said
        return chain

    def wait_told(self, word: str) -> None:
        """Wait for a word to the VM process, and forget it."""
        while word not in self.host.told:
            assert self.host.listen(DEADLINE), (word, self.host.told, self.host.said)
        self.host.told.remove(word)

    def connect(self, word: str = "peer-up") -> None:
        """Give the device another connection to the back end, and wait for what it says to it."""
        ours, theirs = socket.socketpair()
        self.peer.serve(theirs)
        ours.setblocking(False)
        with ours:
            answer = self.host.ask(
                ImsgType.SETTING, {"name": "peer", "value": None}, fd=ours.fileno()
            )
        assert answer == {"value": True}
        self.wait_told(word)

    def _make_area(self, message: Message) -> Message:
        _, _, queues, size = vhostwire.INFLIGHT.unpack(message.payload)
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, 0x1000)
        self.areas.append(fd)
        payload = vhostwire.INFLIGHT.pack(0x1000, 0, queues, size)
        return Message(message.request, REPLY, payload, (fd,))
