"""virtio block device (virtio 1.2 §5.2) on a `raw.Disk`.

Queues 0 to N-1: requests, any of them on any queue. Configuration space: `blkconfig`.

Features: SIZE_MAX SEG_MAX BLK_SIZE TOPOLOGY FLUSH, MQ with several queues, and RO or else
CONFIG_WCE DISCARD WRITE_ZEROES.

    ring ── blkquick ───────────────────────────────────────► window: a map of the page cache
      ├─ blkfly ─────────────────────────────────────────┐
      └─ chains ── blkreq.parse ──► requests ── blkring ─┴► io_uring, where it overlaps them
                                        └─ blkserve.Server ──► raw.Disk: Raw, Qcow2

An image opened with O_DIRECT overlaps requests. Through the page cache they are done one after
another: such a read costs less than handing it to somebody else. Nearly all requests take one of
the first two ways: through the page cache without a system call, past it with one for many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError, HostError
from devices import blkconfig
from devices.blkpop import pop_usual
from devices.blkquick import SHAPES, serve_quick
from devices.blkreq import (
    BLK_F_BLK_SIZE,
    BLK_F_CONFIG_WCE,
    BLK_F_DISCARD,
    BLK_F_FLUSH,
    BLK_F_MQ,
    BLK_F_RO,
    BLK_F_SEG_MAX,
    BLK_F_SIZE_MAX,
    BLK_F_TOPOLOGY,
    BLK_F_WRITE_ZEROES,
    parse,
)
from devices.blkring import OverlappingServer
from devices.blkserve import BATCH, Server
from devices.device import ERROR, INFO, Device
from devices.features import F_VERSION_1
from devices.patience import Patience
from devices.qcow2 import open_chain
from devices.raw import SECTOR
from devices.spec import BUSY, SPECS
from devices.uring import Ring
from devices.virtqueue import SplitQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from config.errors import GuestError
    from devices.blkreq import Request
    from devices.blkserve import Done
    from devices.chain import Chain
    from devices.device import Host
    from devices.guestmem import GuestMemory
    from devices.raw import Disk
    from devices.virtqueue import VirtQueue

QUEUE_SIZE: Final = SPECS["vioblk"].queues[0]
QUICK_BATCH: Final = 16  # served together out of the window: the driver goes on meanwhile
BUDGET: Final = 4 << 20  # bytes per wake-up, about 1 ms from the page cache
REQUEST_COST: Final = 4096  # bytes: what a request counts for beside its own


def create(
    settings: Mapping[str, Any], fds: dict[str, int], memory: GuestMemory, host: Host
) -> Vioblk:
    """Make the device on the descriptor `image`. Settings: those of config.model.DiskConfig.

    An image that stands on others has these as `base0`, `base1`, …, and their formats in
    `settings["bases"]`, the one right below it first. With cache: none there is a `ring`, of which
    the setting of that name tells more, or why there is none.
    """
    formats = (settings["format"], *settings.get("bases", ()))
    names = ("image", *(f"base{index}" for index in range(len(formats) - 1)))
    try:
        disk = open_chain(
            [fds.pop(name) for name in names], formats, again=bool(settings.get("resumes"))
        )
    except OSError as err:
        raise HostError(f"cannot read the image: {err.strerror}") from err
    if disk.size < settings["block_size"]:
        raise ConfigError(f"the image has {disk.size} bytes: less than one block")
    ring: Ring | None = None
    if "ring" in fds:
        try:
            ring = Ring(fds.pop("ring"), bytes.fromhex(settings["ring"]))
        except OSError as err:
            raise HostError(f"cannot map the ring: {err.strerror}") from err
    elif why := settings.get("ring"):
        host.log(INFO, f"{why}: requests do not overlap")
    return Vioblk(memory, host, disk, settings, ring)


class Vioblk(Device):
    """Takes requests off its queues, has them served, and gives them back."""

    forgetful = BLK_F_CONFIG_WCE

    def __init__(
        self,
        memory: GuestMemory,
        host: Host,
        disk: Disk,
        settings: Mapping[str, Any],
        ring: Ring | None = None,
    ) -> None:
        """See `create`; with `ring` requests overlap."""
        super().__init__(memory, host)
        self._disk, self._settings = disk, settings
        self._server = self._make_server(ring)
        self.in_order = self._server.in_order
        self.queue_sizes = (QUEUE_SIZE,) * settings["queues"]
        self.features = BLK_F_SIZE_MAX | BLK_F_SEG_MAX | BLK_F_BLK_SIZE | BLK_F_TOPOLOGY
        self.features |= BLK_F_FLUSH | BLK_F_MQ * (settings["queues"] > 1)
        if disk.readonly:
            self.features |= BLK_F_RO
        else:
            self.features |= BLK_F_CONFIG_WCE | BLK_F_DISCARD | BLK_F_WRITE_ZEROES
        self._set_limit()
        self._queues: Sequence[VirtQueue | None] = ()
        self._recovered: dict[int, list[Chain]] = {}
        self._waiting: set[int] = set()  # queues that found the server full
        self._patience = Patience()

    def begin(self) -> None:
        """Count on where a predecessor has stopped."""
        server = self._server
        server.nr_reads, server.bytes_read, server.nr_writes, server.bytes_written = self.totals[:4]
        server.nr_others = self.totals[4]

    def _make_server(self, ring: Ring | None) -> Server:
        serial = self._settings["serial"]
        if ring is None:
            return Server(self._disk, self.host, serial)
        report, go_on = self._give_back, self._go_on
        return OverlappingServer(
            self._disk, self.host, serial, ring=ring, give_back=report, go_on=go_on
        )

    # Configuration space.

    def config(self) -> bytes:
        """See blkconfig."""
        nr_queues = len(self.queue_sizes) if self.features & BLK_F_MQ else 0
        return blkconfig.pack(self._server, self._settings, nr_queues)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the cache mode; a legacy driver may set it at any time (§5.2.5.3)."""
        if offset == blkconfig.WRITEBACK_AT and data in (b"\0", b"\1") and not self._disk.readonly:
            self._server.writeback = data == b"\1"

    # Life of a driver.

    def activate(self, features: int, queues: Sequence[VirtQueue | None]) -> None:
        """Settle the cache mode, and find what a killed predecessor left unfinished."""
        if not features & BLK_F_CONFIG_WCE:
            self._server.writeback = bool(features & BLK_F_FLUSH)
        elif features & F_VERSION_1 and not features & BLK_F_FLUSH:
            self._server.writeback = False  # a legacy driver's own choice stays (§5.2.5.3)
        self._queues = queues
        for index, queue in enumerate(queues):
            if queue is not None:
                self.start_queue(index, queue)

    def start_queue(self, index: int, queue: VirtQueue) -> None:
        """Find what a killed predecessor left unfinished in a queue."""
        self._recovered[index] = queue.resubmit()

    def stop_queue(self, index: int, queue: VirtQueue) -> None:
        """Finish what is in flight, and what a predecessor left."""
        while self._recovered.get(index):
            self._server.drain()  # so that there is room
            requests, broken = self._take(index, queue, BATCH)
            self._serve(index, queue, requests)
            if broken is not None:
                raise broken
        self._server.drain()

    def kick(self, index: int, queue: VirtQueue) -> bool:
        """Serve what is there, as far as the budget goes."""
        left = BUDGET
        if not self._server.in_order and not self._recovered.get(index) and not queue.has_work():
            return queue.enable_kicks()  # results came first, and _go_on has seen to it
        self._patience.woken()
        queue.disable_kicks()
        while left > 0:
            if (quick := self._serve_quick(index, queue)) > 0:
                left -= quick
                continue
            limit = min(self._server.room, self._server.batch)
            if not limit:  # when there is room, _give_back() has us called again
                self._waiting.add(index)
                return False
            requests, broken = self._take(index, queue, limit)
            if requests:
                left -= self._serve(index, queue, requests)
            if broken is not None:
                raise broken
            if not requests and not self._look_on(queue) and not queue.enable_kicks():
                return False
        return True

    def _look_on(self, queue: VirtQueue) -> bool:
        """Look for more work a little longer, unless results are to be looked for meanwhile."""
        return self._server.in_order and self._patience.look(queue)

    def _serve_quick(self, index: int, queue: VirtQueue) -> int:
        """Serve, or start, what is of the usual shape; return what it counts for."""
        window, server = self._disk.window, self._server
        if not self._is_plain(index, queue):
            return 0
        if isinstance(server, OverlappingServer):
            cost = self._start_quick(server, index, queue)
            server.land_soon()
            return cost
        if window is None:
            return 0
        writable = server.writeback and not self._disk.readonly
        self.totals[BUSY] = 1  # a page may have to be read
        done, bytes_read, nr_writes, bytes_written = serve_quick(
            queue, QUICK_BATCH, window, server.limit, writable=writable
        )
        self.totals[BUSY] = 0
        if not done:
            return 0
        server.nr_reads += len(done) - nr_writes
        server.bytes_read += bytes_read
        server.nr_writes += nr_writes
        server.bytes_written += bytes_written
        queue.pass_back(done)
        self._account(index, queue)
        return bytes_read + bytes_written + REQUEST_COST * len(done)

    def _take(
        self, index: int, queue: VirtQueue, limit: int
    ) -> tuple[list[Request], GuestError | None]:
        """Take up to `limit` requests, and what is wrong with the one after them, if anything."""
        recovered = self._recovered.get(index)
        if recovered:
            chains = recovered[:limit]
            del recovered[:limit]
            return parse(chains)
        requests = pop_usual(queue, limit) if type(queue) is SplitQueue else []
        if requests:
            return requests, None
        return parse(queue.pop_batch(limit))

    def _serve(self, index: int, queue: VirtQueue, requests: list[Request]) -> int:
        """Serve requests and give back what is done; return what they count for."""
        done: Done = []
        self.totals[BUSY] = 1  # a slow disk keeps registers waiting
        asked = self._server.serve(index, requests, done)
        self.totals[BUSY] = 0
        queue.push_batch(done)
        self._account(index, queue)
        return asked + REQUEST_COST * len(requests)

    def _account(self, index: int, queue: VirtQueue) -> None:
        """Requests were given back: tell the counters and, if it wants, the driver."""
        self._count()
        if queue.should_call():
            self.host.call(index)

    def _count(self) -> None:
        server = self._server
        totals = self.totals
        totals[0], totals[1] = server.nr_reads, server.bytes_read
        totals[2], totals[3] = server.nr_writes, server.bytes_written
        totals[4] = server.nr_others

    def _give_back(self, index: int, done: Done) -> None:
        """Take what the server has finished since; queues that waited for room may go on."""
        queue = self._queues[index]
        if queue is not None:  # it is None when the driver broke a rule meanwhile
            queue.push_batch(done)
            if queue.should_call():
                self.host.call(index)
        for waiting in self._waiting:
            self.host.schedule(waiting)
        self._waiting.clear()

    def _go_on(self, index: int) -> None:
        """Start what the driver has added meanwhile, ahead of its kick."""
        server, queue = self._server, self._queues[index]
        if queue is None or not isinstance(server, OverlappingServer):
            return
        if queue.has_work() and self._is_plain(index, queue):
            while self._start_quick(server, index, queue):
                if not queue.enable_kicks():
                    return
            self.host.schedule(index)

    def _start_quick(self, server: OverlappingServer, index: int, queue: VirtQueue) -> int:
        """Start what is of the usual shape; return what it counts for."""
        self.totals[BUSY] = 1
        nr_started, asked = server.start_quick(index, queue, server.batch)
        self.totals[BUSY] = 0
        self._count()
        return asked + REQUEST_COST * nr_started

    def _is_plain(self, index: int, queue: VirtQueue) -> bool:
        """Whether requests may go the quick way: no log is kept, no predecessor left any."""
        return type(queue) in SHAPES and not self._recovered.get(index)

    def _rest(self, rest: Callable[[], None]) -> None:
        """Have the server come to rest, for which a slow disk keeps registers waiting."""
        self.totals[BUSY] = 1
        rest()
        self.totals[BUSY] = 0

    def reset_queue(self, index: int) -> None:
        """Be done with all queues: they share what is in flight, and it does not take long."""
        self._rest(self._server.drain)
        self._recovered.pop(index, None)

    def reset(self) -> None:
        """Wait for what is in flight and forget it; back to writeback, as after power-on."""
        self._rest(self._server.abandon)
        self._server.writeback = True
        self._recovered.clear()
        self._waiting.clear()

    def pause(self) -> None:
        """Finish what is in flight.

        A process that takes the place of another has nothing, and no need to wait for what that
        one had if the VM itself is not paused.
        """
        if self._queues or self._settings.get("paused"):
            self._rest(self._server.drain)

    # Life of the process.

    def close(self) -> None:
        """Finish what is in flight, and leave the image in good order."""
        self._server.abandon()
        try:
            self._disk.finish()
        except OSError as err:
            self.host.log(ERROR, f"cannot close the image properly: {err.strerror}")

    def setting(self, name: str, value: Any) -> Any:
        """Change `resize`: bytes to grow to, or 0 to take the size that the image has now.

        The result is the new size. Raises ConfigError, HostError.
        """
        if name != "resize":
            return super().setting(name, value)
        if type(value) is not int or not 0 <= value < 1 << 63 or value % SECTOR:
            raise ConfigError(f"resize: {value!r} is not a number of bytes, in whole sectors")
        self._server.drain()
        try:
            self._disk.resize(value)
        except OSError as err:
            raise HostError(f"cannot resize the image: {err.strerror}") from err
        if self._set_limit():
            self.host.config_changed()
        return self._server.limit

    def _set_limit(self) -> bool:
        """Let requests reach all whole blocks of the disk; return whether that is a change."""
        before, block = self._server.limit, self._settings["block_size"]
        self._server.limit = self._disk.size // block * block
        return self._server.limit != before

    def save(self) -> dict[str, Any]:
        """Return the cache mode."""
        return {"writeback": self._server.writeback}

    def remember(self) -> dict[str, Any]:
        """Return the size that the driver knows, and what the image does not tell, too."""
        return {**self.save(), "limit": self._server.limit, "disk": self._disk.remember()}

    def load(self, state: dict[str, Any]) -> None:
        """Take that over; what is no longer in the image cannot be had. Raises HostError."""
        server = self._server
        writeback, limit = state["writeback"], state.get("limit", server.limit)
        if type(writeback) is not bool or type(limit) is not int or limit < 0:
            raise HostError("the state of a disk makes no sense")
        server.writeback, server.limit = writeback, min(limit, server.limit)
        if "disk" in state:
            self._disk.load(state["disk"])
