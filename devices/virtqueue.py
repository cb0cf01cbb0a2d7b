"""Virtqueues: `open_queue`, and the split layout (virtio 1.2 §2.7). Start reading here.

    descriptor table   size × 16   addr, len, flags, next                 the driver writes
    avail ring         6 + 2·size  flags, idx, ring[size], used_event     the driver writes
    used ring          6 + 8·size  flags, idx, (id, len)[size], avail_event   the device writes

The driver writes a chain into the table, puts the number of its first descriptor, the head, into
`avail.ring[idx mod size]` and adds one to `avail.idx`. The device takes it (`pop`), works, puts
head and bytes written into `used.ring[idx mod size]` and adds one to `used.idx` (`push`). Only
the two indices make anything visible, and each has one writer. Both run freely modulo 2¹⁶.

Each side may ask the other not to ring it up. Without EVENT_IDX by a flag, `avail.flags` against
calls and `used.flags` against kicks. With it by naming an index: "when you write entry
`used_event`" and "... `avail_event`" (§2.7.7, §2.7.10).

What both layouts share is in `ring.py`, how descriptors become views in `chain.py`, the other
layout in `packed.py`, and what survives the death of this process in `inflight.py`.
"""

from __future__ import annotations

from array import array
from itertools import chain as flat
from struct import Struct
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.chain import DESC_F_INDIRECT, Chain, walk
from devices.features import F_IN_ORDER, F_NOTIFY_ON_EMPTY, F_RING_PACKED
from devices.inflight import Inflight
from devices.inflightrow import RowInflight
from devices.packed import PackedQueue
from devices.ring import MAX_SIZE, RECOVERED, QueueState, VirtQueue, ring_area

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import GuestMemory

__all__ = ["Chain", "QueueState", "SplitQueue", "VirtQueue", "open_queue"]

AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1
_MANY: Final = 4  # used entries that are written together sooner than one by one

_read_head: Final = Struct("<QIH").unpack_from  # addr, len, flags


def open_queue(
    memory: GuestMemory,
    size: int,
    desc_gpa: int,
    avail_gpa: int,
    used_gpa: int,
    *,
    features: int,
    inflight: memoryview | None = None,
    in_order: bool = False,
) -> VirtQueue:
    """Return the device side of a queue that the driver has just enabled.

    The three addresses are those of the descriptor, driver and device area. `inflight` is a view
    of `inflight_bytes()` of shared memory that outlives this process; if it still holds the
    queue of a killed one, the new queue carries on from there and `resubmit` gives its chains.
    A device that gives chains back `in_order` of taking, always, has less to note there.
    Raises GuestError unless size, alignment and addresses are right.
    """
    areas = desc_gpa, avail_gpa, used_gpa
    layout = PackedQueue if features & F_RING_PACKED else SplitQueue
    queue: VirtQueue = layout(
        memory, size, *areas, features=features, inflight=inflight, in_order=in_order
    )
    queue.areas = areas
    return queue


class SplitQueue(VirtQueue):
    """Device side of one split virtqueue."""

    __slots__ = (
        "_avail",
        "_avail_event",
        "_mask",
        "_notify_on_empty",
        "_table",
        "_used16",
        "_used32",
        "_used_event",
    )

    _FIRST = 0

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        *,
        features: int,
        inflight: memoryview | None = None,
        in_order: bool = False,
    ) -> None:
        """See open_queue()."""
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise GuestError(f"queue size {size} is not a power of two up to {MAX_SIZE}")
        area = None
        if inflight is not None:
            in_row = in_order or features & F_IN_ORDER
            area = RowInflight(inflight, size) if in_row else Inflight(inflight, size, packed=False)
        super().__init__(memory, size, features, area)
        self._mask = size - 1
        self._notify_on_empty = bool(features & F_NOTIFY_ON_EMPTY)
        self._used_event = 2 + size  # in 16-bit words from the start of the avail ring
        self._avail_event = 2 + 4 * size  # likewise, of the used ring
        self._map(
            ring_area(memory, desc_gpa, 16 * size, 16, "descriptor table"),
            ring_area(memory, avail_gpa, 6 + 2 * size, 2, "avail ring"),
            ring_area(memory, used_gpa, 6 + 8 * size, 4, "used ring"),
        )
        if area is not None:
            self._take_over(area)

    def _map(self, table: memoryview, avail: memoryview, used: memoryview) -> None:
        # What the driver writes, the device cannot (§2.7.5.1).
        self._table = table.toreadonly()
        self._avail = avail.toreadonly().cast("H")
        self._used16 = used.cast("H")
        self._used32 = used[:-2].cast("I")

    # The hot path.

    def pop(self) -> Chain | None:
        """Take the next chain, if any. Raises GuestError, position unchanged, on a broken ring."""
        cursor = self._next_avail
        pending = (self._avail[1] - cursor) & 0xFFFF
        if not pending:
            return None
        if pending > self.size:
            raise GuestError(f"avail index is {pending} ahead in a ring of {self.size}")
        head = self._avail[2 + (cursor & self._mask)]
        if head in self._in_flight:
            raise GuestError(f"head {head} offered again while in flight")
        chain = walk(self._memory, self._table, self.size, head, self._indirect)
        if self._area is not None:
            self._area.take(head, head)
        self._in_flight[head] = cursor
        self._next_avail = (cursor + 1) & 0xFFFF
        return chain

    def push(self, head: int, written: int) -> None:
        """Give a chain back; `written` counts bytes stored in its writable part (§2.7.8)."""
        if self._in_order:
            super().push(head, written)
            return
        del self._in_flight[head]
        cursor = self._next_used
        used = (cursor + 1) & 0xFFFF
        area = self._area
        if area is not None:
            area.begin(((head, written),), used)
        slot = 1 + 2 * (cursor & self._mask)
        self._used32[slot] = head
        self._used32[slot + 1] = written
        # Element first, index second, in one store: pack_into would show the driver a zero.
        self._used16[1] = self._next_used = used
        if area is not None:
            area.settle(((head, written),), used)
        self._uncalled += 1

    def peek(self, limit: int, length: int) -> list[tuple[int, int]]:
        """See VirtQueue."""
        found: list[tuple[int, int]] = []
        cursor, size, avail, table = self._next_avail, self.size, self._avail, self._table
        pending = (avail[1] - cursor) & 0xFFFF
        if pending > size or not self._indirect:
            return found
        slot = 2 + (cursor & self._mask)
        for head in avail[slot : min(slot + min(pending, limit), 2 + size)]:
            if head >= size:
                break
            table_gpa, table_length, flags = _read_head(table, 16 * head)
            if flags != DESC_F_INDIRECT or table_length != length:
                break
            found.append((head, table_gpa))
        return found

    def take(self, tables: Sequence[tuple[int, int]], length: int) -> None:
        """See VirtQueue."""
        if self._area is not None:
            self._area.take_all([head for head, _ in tables])
        cursor = self._next_avail
        for head, _ in tables:
            self._in_flight[head] = cursor
            self._next_avail = cursor = (cursor + 1) & 0xFFFF

    def pass_back(self, done: Sequence[tuple[int, int]]) -> None:
        """See VirtQueue."""
        self._next_avail = (self._next_avail + len(done)) & 0xFFFF
        self._show(done)

    def _publish(self, batch: Sequence[tuple[int, int]]) -> None:
        in_flight = self._in_flight
        for head, _ in batch:
            del in_flight[head]
        self._show(batch)

    def _show(self, batch: Sequence[tuple[int, int]]) -> None:
        """Let the driver see a batch; and whoever comes after us, whatever happens meanwhile."""
        used = (self._next_used + len(batch)) & 0xFFFF
        if self._area is None:
            self._write_used(batch)
        else:
            self._area.begin(batch, used)
            self._write_used(batch)
            self._area.settle(batch, used)
        self._next_used = used
        self._uncalled += len(batch)

    def _write_used(self, batch: Sequence[tuple[int, int]]) -> None:
        used32, mask, cursor, count = self._used32, self._mask, self._next_used, len(batch)
        slot = 1 + 2 * (cursor & mask)
        if count >= _MANY and slot + 2 * count <= len(used32):
            used32[slot : slot + 2 * count] = array("I", flat.from_iterable(batch))
        else:
            for number, entry in enumerate(batch, cursor):
                slot = 1 + 2 * (number & mask)
                used32[slot], used32[slot + 1] = entry
        # One index for all: the driver sees the whole batch or none of it.
        self._used16[1] = (cursor + count) & 0xFFFF

    def has_work(self) -> bool:
        """Tell whether pop would find a chain, or a broken ring."""
        return self._avail[1] != self._next_avail

    # Notifications.

    def _want_kicks(self) -> None:
        if self._event_idx:
            self._used16[self._avail_event] = self._next_avail
        else:
            self._used16[0] = 0

    def disable_kicks(self) -> None:
        """Tell the driver that kicks are not needed while we poll. It may kick all the same."""
        # With EVENT_IDX that is so already: avail_event names an entry that has been written.
        if not self._event_idx:
            self._used16[0] = USED_F_NO_NOTIFY

    def _wants_call(self, pushed: int) -> bool:
        if self._notify_on_empty and not self._in_flight and not self.has_work():
            return True
        if not self._event_idx:
            return not self._avail[0] & AVAIL_F_NO_INTERRUPT
        # Is entry number used_event among the `pushed` latest?
        return (self._next_used - 1 - self._avail[self._used_event]) & 0xFFFF < pushed

    # Undoing, saving, recovering.

    def _before(self, cursor: int, head: int) -> int:
        return (cursor - 1) & 0xFFFF

    def _release(self, head: int) -> int:
        self._in_flight.pop(head)
        return head

    def _check_state(self, state: QueueState) -> None:
        avail, used = state
        if not (0 <= avail <= 0xFFFF and 0 <= used <= 0xFFFF):
            raise GuestError(f"cursors {avail} and {used} do not have 16 bits")
        if (avail - used) & 0xFFFF > self.size:
            raise GuestError(
                f"avail cursor {avail} and used cursor {used} in a ring of {self.size}"
            )

    def _abandon_ring(self) -> None:
        table, avail = bytearray(16 * self.size), bytearray(6 + 2 * self.size)
        used = bytearray(6 + 8 * self.size)
        self._map(memoryview(table), memoryview(avail), memoryview(used))

    def _adopt(self, area: Inflight, entry: int) -> int:
        self._in_flight[entry] = RECOVERED
        return entry

    def _is_published(self, used: int) -> bool:
        index = self._used16[1]
        if index not in (used, self._next_used):
            raise GuestError(f"used index is {index}; we last wrote {self._next_used} or {used}")
        return index == used

    def _after_adopted(self) -> int:
        return (self._next_used + len(self._in_flight)) & 0xFFFF

    def _rebuild(self, area: Inflight, entry: int) -> Chain:
        return walk(self._memory, self._table, self.size, entry, self._indirect)
