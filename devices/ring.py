"""What split and packed virtqueues have in common: the device's view of a queue.

A virtqueue is memory that driver and device both see. The driver makes chains *available*, the
device *pops* them, works on them in any order, and *pushes* them back as *used*. Who may write
which word differs between the two layouts (`virtqueue.py`, `packed.py`); what a device does with
a queue does not, and is this class. Its words are those of QEMU's VirtQueue.

**Cursors.** A queue remembers two places: where the next available chain will be, and where the
next used entry goes. Each is 16 bits. Split: an index that runs freely modulo 2¹⁶. Packed: the
position in the ring, with the wrap counter as bit 15.

**Fences.** Twice a queue stores a word and then looks at one of the driver's: "used", then "does
it want a call"; "kicks wanted", then "is there new work". On x86-64 that load may overtake the
store. Then both sides miss each other's news and the queue sleeps for ever, within seconds of
traffic at depth 1. So `fence` goes between.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import GuestError
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC
from devices.guestmem import fence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.chain import Chain
    from devices.guestmem import GuestMemory
    from devices.inflight import Inflight

MAX_SIZE: Final = 1 << 15  # entries (§2.7, §2.8)
RECOVERED: Final = -1  # in place of the cursor of a chain that a predecessor popped
_CALL_DUE: Final = 1 << 16  # more than any ring: should_call says yes once


class QueueState(NamedTuple):
    """The two cursors, as saved, restored, and carried by vhost-user's vring base."""

    avail: int
    used: int


class VirtQueue:
    """Device side of one enabled virtqueue. Knows no transport and no device.

    For one thread. It lives from enable to reset: size, addresses and features cannot change in
    between. Every rule the driver breaks is a GuestError, and the queue is where it was before.
    """

    __slots__ = (
        "_area",
        "_event_idx",
        "_filled",
        "_in_flight",
        "_in_order",
        "_indirect",
        "_memory",
        "_next_avail",
        "_next_used",
        "_recovered",
        "_uncalled",
        "adopted",
        "areas",
        "features",
        "live",
        "size",
    )

    _FIRST: int  # both cursors of a queue just enabled

    def __init__(
        self, memory: GuestMemory, size: int, features: int, area: Inflight | None
    ) -> None:
        self.size, self.features = size, features
        self.live = True  # until reset()
        self.adopted = False  # whether it goes on where a killed predecessor was
        #: GPAs of descriptor, driver and device area, for who lets another process serve it.
        self.areas = (0, 0, 0)
        self._memory, self._area = memory, area
        self._indirect = bool(features & F_INDIRECT_DESC)
        self._event_idx = bool(features & F_EVENT_IDX)
        self._in_order = bool(features & F_IN_ORDER)
        self._next_avail = self._next_used = self._FIRST
        # Head of each popped chain → cursor where it was popped. Dicts keep order: oldest first.
        self._in_flight: dict[int, int] = {}
        self._filled: dict[int, int] = {}  # head → used length, staged by fill()
        self._recovered: list[int] = []  # entries of the in-flight area, for resubmit()
        self._uncalled = 0  # used entries the driver has not been offered a call for

    # Taking chains.

    def pop(self) -> Chain | None:
        """Take the next chain, if any. Raises GuestError, position unchanged, on a broken ring."""
        raise NotImplementedError

    def pop_batch(self, limit: int) -> list[Chain]:
        """Take up to `limit` chains: a device's budget for one wake-up.

        A broken ring raises GuestError only when nothing was popped before it; else the next
        call does, since the position stays there.
        """
        chains: list[Chain] = []
        try:
            while len(chains) < limit and (chain := self.pop()) is not None:
                chains.append(chain)
        except GuestError:
            if not chains:
                raise
        return chains

    def has_work(self) -> bool:
        """Tell whether pop would find a chain, or a broken ring."""
        raise NotImplementedError

    def peek(self, limit: int, length: int) -> list[tuple[int, int]]:
        """Return head and table of the next chains that are an indirect table of `length` bytes.

        Up to `limit`, perhaps fewer: [] says nothing about the queue. They stay available, a head
        may be there twice or be in flight already, and a table is the caller's to read, once.
        """
        raise NotImplementedError

    def take(self, tables: Sequence[tuple[int, int]], length: int) -> None:
        """Pop the first of the chains of `peek`; no head may be in flight."""
        raise NotImplementedError

    def pass_back(self, done: Sequence[tuple[int, int]]) -> None:
        """Give back the first of the chains of `peek`, pairs of head and written.

        Nothing else may be in flight. Until now a successor of this process would have found them
        in the ring and begun again.
        """
        raise NotImplementedError

    @property
    def nr_in_flight(self) -> int:
        """Count the chains popped and not given back."""
        return len(self._in_flight)

    # Giving chains back.

    def push(self, head: int, written: int) -> None:
        """Give a chain back; `written` counts bytes stored in its writable part (§2.7.8).

        With IN_ORDER the driver sees it once all older chains are back too. Raises KeyError if
        the chain is not in flight: that is a bug of the device, not of the guest.
        """
        if self._in_order:
            self.fill(head, written)
            self.flush()
        else:
            self._publish(((head, written),))

    def push_batch(self, done: Sequence[tuple[int, int]]) -> None:
        """Give chains back, pairs of head and written, so that the driver sees all or none."""
        if self._in_order:
            for head, written in done:
                self.fill(head, written)
            self.flush()
        elif done:
            self._publish(done)

    def fill(self, head: int, written: int) -> None:
        """Stage a chain to be given back by the next `flush`. Raises KeyError like `push`."""
        if head not in self._in_flight or head in self._filled:
            raise KeyError(f"chain {head} is not in flight")
        self._filled[head] = written

    def flush(self) -> None:
        """Give back all staged chains at once. With IN_ORDER, those with no older one missing."""
        if self._in_order:
            batch: list[tuple[int, int]] = []
            for head in self._in_flight:
                if head not in self._filled:
                    break
                batch.append((head, self._filled.pop(head)))
        else:
            batch = list(self._filled.items())
            self._filled.clear()
        if batch:
            self._publish(batch)

    def drop_all(self) -> int:
        """Give back every available chain unread, none written; return how many there were.

        At most a ring full, however fast the driver adds. Raises GuestError on a broken ring.
        """
        chains = self.pop_batch(self.size)
        self.push_batch([(chain.head, 0) for chain in chains])
        return len(chains)

    # Taking back a pop.

    def detach(self, head: int) -> None:
        """Forget a popped chain without giving it back, for a device about to need a reset.

        Until then its descriptors stay the device's; a successor process would be told of it.
        """
        del self._in_flight[head]
        self._filled.pop(head, None)

    def unpop(self, head: int) -> None:
        """Undo the latest pop. Raises KeyError if that was another chain or is back already."""
        if next(reversed(self._in_flight), None) != head or not self.rewind(1):
            raise KeyError(f"chain {head} was not the last one popped")

    def rewind(self, count: int) -> bool:
        """Undo the latest `count` pops. Return False, nothing changed, if one is back already."""
        heads = list(islice(reversed(self._in_flight), count))
        cursor = self._next_avail
        for head in heads:
            cursor = self._before(cursor, head)
            if self._in_flight[head] != cursor:
                return False
        if len(heads) < count:
            return False
        for head in heads:
            entry = self._release(head)
            if self._area is not None:
                self._area.drop(entry)
            self._filled.pop(head, None)
        self._next_avail = cursor
        return True

    # Notifications.

    def should_call(self) -> bool:
        """Tell whether the driver wants a call for what was pushed since the last time we asked.

        Ask once after each batch, and call if it says so: it is not asked twice.
        """
        if not self._uncalled or not self.live:
            return False
        fence()  # our used entries, then the driver's wish: it may be enabling calls right now
        pushed, self._uncalled = self._uncalled, 0
        return pushed >= _CALL_DUE or self._wants_call(pushed)

    def enable_kicks(self) -> bool:
        """Ask for a kick with the next chain. Return True if one came before we had asked.

        Then no kick may come for it: go on popping. Call it after enable and restore, too.
        """
        self._want_kicks()
        fence()  # our wish, then the driver's news
        return self.has_work()

    def disable_kicks(self) -> None:
        """Tell the driver that kicks are not needed while we poll. It may kick all the same."""
        raise NotImplementedError

    # Beginning and end.

    def resubmit(self) -> list[Chain]:
        """Return the chains a killed predecessor had popped, oldest first; once.

        They are in flight: work on them as if just popped. Raises GuestError as `pop` does.
        """
        entries, self._recovered = self._recovered, []
        return [self._rebuild(self._area, entry) for entry in entries] if self._area else []

    def save(self) -> QueueState:
        """Return the cursors. Chains in flight are not part of them: push or rewind those first."""
        return QueueState(self._next_avail, self._next_used)

    def load(self, state: QueueState) -> None:
        """Continue at saved cursors. Raises GuestError if they do not fit the ring.

        Whether the driver knows of everything used before is unknown, so a call is due; and
        chains may be waiting without a kick.
        """
        if self._in_flight:
            raise RuntimeError("load() with chains in flight")
        self._check_state(state)
        self._next_avail, self._next_used = state
        self._uncalled = _CALL_DUE
        if self._area is not None:
            self._area.format(state.used)

    def reset(self) -> None:
        """Let go of the ring for good: device reset, or reset of this queue (§2.6.1).

        From here on the queue touches private memory only, so a late push harms nobody. The
        driver may now free the buffers: views of chains in flight must not be used any more.
        """
        self.live = False
        self._next_avail = self._next_used = self._FIRST
        self._recovered.clear()
        self._abandon_ring()
        if self._area is not None:
            self._area.void()
            self._area = None

    def _take_over(self, area: Inflight) -> None:
        """Begin where a predecessor was killed, if one was: finish its batch, take its chains.

        Raises GuestError if ring and area do not fit each other.
        """
        if not area.holds_queue():
            area.format(self._next_used)
            return
        self.adopted = True
        self._check_state(QueueState(area.used, area.used))
        self._next_used = area.used
        batch, used = area.unsettled()
        if batch:
            heads = [(self._adopt(area, entry), written) for entry, written in batch]
            if self._after_adopted() != used:
                raise GuestError("in-flight area: batch and cursor do not agree")
            if not self._is_published(used):
                self._write_used(heads)
            area.settle(batch, used)
            for head, _ in heads:
                self._release(head)
        elif used != area.used and self._is_published(used):
            area.settle(batch, used)
        self._next_used = area.used
        self._recovered = area.taken()
        for entry in self._recovered:
            self._adopt(area, entry)
        self._next_avail = self._after_adopted()
        self._uncalled = _CALL_DUE

    # What a layout provides, besides pop, has_work, disable_kicks and _FIRST.

    def _before(self, cursor: int, head: int) -> int:
        """Return where the chain `head` began if it ended at `cursor`."""
        raise NotImplementedError

    def _publish(self, batch: Sequence[tuple[int, int]]) -> None:
        """Make chains used, visible together, and forget them: pairs of head and written."""
        raise NotImplementedError

    def _write_used(self, batch: Sequence[tuple[int, int]]) -> None:
        """Write the used entries of a batch at the used cursor, then let the driver see them."""
        raise NotImplementedError

    def _release(self, head: int) -> int:
        """Forget a chain; return its entry in the in-flight area, if there is one."""
        raise NotImplementedError

    def _want_kicks(self) -> None:
        raise NotImplementedError

    def _wants_call(self, pushed: int) -> bool:
        """Tell whether the driver asked for a call within the latest `pushed` used entries."""
        raise NotImplementedError

    def _check_state(self, state: QueueState) -> None:
        """Raise GuestError unless both cursors fit the ring."""
        raise NotImplementedError

    def _abandon_ring(self) -> None:
        """Put private memory, nothing available in it, in place of the ring."""
        raise NotImplementedError

    # And for taking over from a predecessor; entries are those of the in-flight area.

    def _adopt(self, area: Inflight, entry: int) -> int:
        """Put an entry's chain into our tables; return its head."""
        raise NotImplementedError

    def _after_adopted(self) -> int:
        """Return the cursor that lies as far behind the used cursor as adopted chains need."""
        raise NotImplementedError

    def _is_published(self, used: int) -> bool:
        """Tell whether the driver sees a used cursor of `used`, one batch further than ours."""
        raise NotImplementedError

    def _rebuild(self, area: Inflight, entry: int) -> Chain:
        """Make an entry's chain again, with all checks of pop."""
        raise NotImplementedError


def ring_area(memory: GuestMemory, gpa: int, length: int, align: int, name: str) -> memoryview:
    """Return one part of a ring. Raises GuestError unless aligned, in RAM and in one piece."""
    if gpa % align:
        raise GuestError(f"{name} at {gpa:#x} is not aligned to {align} bytes")
    try:
        return memory.view(gpa, length)
    except GuestError as err:
        raise GuestError(f"{name}: {err}") from err
