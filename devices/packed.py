"""The packed layout of a virtqueue (virtio 1.2 §2.8): one ring that both sides write.

    descriptor ring   size × 16   addr, len, id, flags     available by the driver, used by us
    driver area       4           what calls the driver wants    the driver writes
    device area       4           what kicks we want             the device writes

There are no indices. Two bits of a descriptor's flags tell whose it is: the driver makes one
available with AVAIL = its wrap counter and USED = the opposite; the device makes one used with
both = its wrap counter. A wrap counter starts at 1 and flips when its side passes the ring's end,
so what the bits mean flips each lap, and nobody has to clean up (§2.8.1).

A chain of n descriptors lies in n consecutive places and is named by the buffer id in its last
one. Its used entry is one descriptor, id and length, and then the device skips the other n - 1
places (§2.8.6). Entries are used in the order of completion, so they overwrite descriptors of
chains that may still be in flight; nothing is read from the ring a second time.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from config.errors import GuestError
from devices.chain import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    MAX_CHAIN,
    Chain,
    Desc,
    build,
    indirect_table,
)
from devices.inflight import Inflight
from devices.ring import MAX_SIZE, RECOVERED, QueueState, VirtQueue, ring_area

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.guestmem import GuestMemory

DESC_F_AVAIL: Final = 1 << 7
DESC_F_USED: Final = 1 << 15
MARKS: Final = DESC_F_AVAIL | DESC_F_USED

WRAP: Final = 1 << 15  # the wrap counter in a cursor
PLACE: Final = WRAP - 1  # the place in the ring in a cursor

EVENT_ENABLE: Final = 0  # notify always
EVENT_DISABLE: Final = 1  # never
EVENT_DESC: Final = 2  # when a certain descriptor changes hands; needs EVENT_IDX

_read_body: Final = Struct("<QIH").unpack_from  # addr, len, id: all of a descriptor but flags
_read_desc: Final = DESC.unpack_from  # addr, len, id, flags


class PackedQueue(VirtQueue):
    """Device side of one packed virtqueue. Its heads are buffer ids: any 16 bits."""

    __slots__ = (
        "_counts",
        "_device_event",
        "_driver_event",
        "_free_slots",
        "_limit",
        "_nr_descs",
        "_ring",
        "_ring16",
        "_ring32",
        "_slots",
    )

    _FIRST = WRAP

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
        """See open_queue(); for `in_order` nothing is simpler here."""
        if not 0 < size <= MAX_SIZE:
            raise GuestError(f"queue size {size} is not 1 to {MAX_SIZE}")
        area = None if inflight is None else Inflight(inflight, size, packed=True)
        super().__init__(memory, size, features, area)
        self._limit = min(size, MAX_CHAIN)
        self._counts: dict[int, int] = {}  # head → places it takes in the ring
        self._nr_descs = 0  # the sum of these: what the driver may not use yet
        self._slots: dict[int, list[int]] = {}  # head → its places in the in-flight area
        self._free_slots = list(range(size))
        self._map(
            ring_area(memory, desc_gpa, 16 * size, 16, "descriptor ring"),
            ring_area(memory, avail_gpa, 4, 4, "driver event area"),
            ring_area(memory, used_gpa, 4, 4, "device event area"),
        )
        if area is not None:
            self._take_over(area)

    def _map(self, ring: memoryview, driver: memoryview, device: memoryview) -> None:
        self._ring = ring.toreadonly()
        self._ring16, self._ring32 = ring.cast("H"), ring.cast("I")
        self._driver_event = driver.toreadonly().cast("H")
        self._device_event = device.cast("H")

    # The hot path.

    def pop(self) -> Chain | None:
        """Take the next chain, if any. Raises GuestError, position unchanged, on a broken ring."""
        cursor = self._next_avail
        place = cursor & PLACE
        available = DESC_F_AVAIL if cursor & WRAP else DESC_F_USED
        flags = self._ring16[8 * place + 7]
        if flags & MARKS != available:
            return None
        # Flags first, the rest after: the driver writes them the other way round.
        addr, length, head = _read_body(self._ring, 16 * place)
        copies: list[Desc] = [(addr, length, flags)]
        while flags & DESC_F_NEXT:
            if len(copies) >= self._limit:
                raise GuestError(f"chain longer than {self._limit}")
            place += 1
            if place == self.size:
                place = 0
                available ^= MARKS
            addr, length, head, flags = _read_desc(self._ring, 16 * place)
            if flags & MARKS != available:
                raise GuestError(f"chain runs into descriptor {place}, which is not available")
            copies.append((addr, length, flags))
        count = len(copies)
        if self._nr_descs + count > self.size:
            raise GuestError(f"{self._nr_descs} + {count} descriptors in a ring of {self.size}")
        if head in self._in_flight:
            raise GuestError(f"buffer id {head} offered again while in flight")
        chain = self._fetch(head, copies)
        if self._area is not None:
            slots = self._free_slots[-count:]
            del self._free_slots[-count:]
            self._area.keep(slots, copies)
            self._area.take(slots[0], head)
            self._slots[head] = slots
        self._in_flight[head] = cursor
        self._counts[head] = count
        self._nr_descs += count
        self._next_avail = self._step(cursor, count)
        return chain

    def _fetch(self, head: int, copies: list[Desc]) -> Chain:
        """Build a chain from its ring descriptors, or from the table that the only one names."""
        addr, length, flags = copies[0]
        if flags & DESC_F_INDIRECT and self._indirect and len(copies) == 1:
            # Entries follow one another, and of their flags only WRITE means anything (§2.8.7).
            table = DESC.iter_unpack(indirect_table(self._memory, addr, length))
            copies = [(addr, length, flags & DESC_F_WRITE) for addr, length, _, flags in table]
        return build(self._memory, head, copies)

    def _step(self, cursor: int, count: int) -> int:
        """Return `cursor` moved on by `count` ≤ size places."""
        place = (cursor & PLACE) + count
        if place < self.size:
            return cursor + count
        return place - self.size | (cursor & WRAP ^ WRAP)

    def peek(self, limit: int, length: int) -> list[tuple[int, int]]:
        """See VirtQueue."""
        found: list[tuple[int, int]] = []
        cursor, size, ring, ring16 = self._next_avail, self.size, self._ring, self._ring16
        place = cursor & PLACE
        expected = DESC_F_INDIRECT | (DESC_F_AVAIL if cursor & WRAP else DESC_F_USED)
        if not self._indirect:
            return found
        for at in range(place, min(place + limit, place + size - self._nr_descs, size)):
            if ring16[8 * at + 7] != expected:
                break
            table_gpa, table_length, head = _read_body(ring, 16 * at)
            if table_length != length:
                break
            found.append((head, table_gpa))
        return found

    def take(self, tables: Sequence[tuple[int, int]], length: int) -> None:
        """See VirtQueue."""
        cursor = self._next_avail
        for head, table_gpa in tables:
            if self._area is not None:
                slots = [self._free_slots.pop()]
                self._area.keep(slots, [(table_gpa, length, DESC_F_INDIRECT)])
                self._area.take(slots[0], head)
                self._slots[head] = slots
            self._in_flight[head] = cursor
            self._counts[head] = 1
            self._nr_descs += 1
            self._next_avail = cursor = self._step(cursor, 1)

    def pass_back(self, done: Sequence[tuple[int, int]]) -> None:
        """See VirtQueue. Each takes one place in the ring."""
        if not done:
            return
        used = self._step(self._next_used, len(done))
        self._counts.update((head, 1) for head, _ in done)
        if self._area is None:
            self._write_used(done)
        else:
            entries = [
                (slot, written) for slot, (_, written) in zip(self._free_slots, done, strict=False)
            ]
            for (slot, _), (head, _) in zip(entries, done, strict=True):
                self._area.name(slot, head)
            self._area.begin(entries, used)
            self._write_used(done)
            self._area.settle(entries, used)
        self._counts.clear()
        self._next_used = self._next_avail = used
        self._uncalled += len(done)

    def push(self, head: int, written: int) -> None:
        """Give a chain back; `written` counts bytes stored in its writable part (§2.8.4)."""
        if self._in_order or self._area is not None:
            super().push(head, written)
            return
        del self._in_flight[head]
        count = self._counts.pop(head)
        cursor = self._next_used
        place = cursor & PLACE
        flags = MARKS if cursor & WRAP else 0
        self._ring32[4 * place + 2] = written
        self._ring16[8 * place + 6] = head
        # Flags last, in one store: they make the entry used.
        self._ring16[8 * place + 7] = flags | DESC_F_WRITE if written else flags
        self._next_used = self._step(cursor, count)
        self._nr_descs -= count
        self._uncalled += count

    def _publish(self, batch: Sequence[tuple[int, int]]) -> None:
        nr_descs = 0
        for head, _ in batch:
            del self._in_flight[head]
            nr_descs += self._counts[head]
        used = self._step(self._next_used, nr_descs)
        if self._area is None:
            self._write_used(batch)
        else:
            entries = [(self._slots[head][0], written) for head, written in batch]
            self._area.begin(entries, used)
            self._write_used(batch)
            self._area.settle(entries, used)
            for head, _ in batch:
                self._free_slots += self._slots.pop(head)
        for head, _ in batch:
            del self._counts[head]
        self._nr_descs -= nr_descs
        self._next_used = used
        self._uncalled += nr_descs

    def _write_used(self, batch: Sequence[tuple[int, int]]) -> None:
        cursor = self._next_used
        first_flags = -1
        for head, written in batch:
            place = cursor & PLACE
            flags = MARKS if cursor & WRAP else 0
            if written:
                flags |= DESC_F_WRITE
            self._ring32[4 * place + 2] = written
            self._ring16[8 * place + 6] = head
            if first_flags < 0:
                first_flags = flags
            else:
                self._ring16[8 * place + 7] = flags
            cursor = self._step(cursor, self._counts[head])
        # The driver waits at the first entry: its flags, stored last, show it the whole batch.
        self._ring16[8 * (self._next_used & PLACE) + 7] = first_flags

    def has_work(self) -> bool:
        """Tell whether pop would find a chain, or a broken ring."""
        cursor = self._next_avail
        available = DESC_F_AVAIL if cursor & WRAP else DESC_F_USED
        return self._ring16[8 * (cursor & PLACE) + 7] & MARKS == available

    # Notifications. Both areas: the word that says which descriptor, then the word that says how.

    def _want_kicks(self) -> None:
        if self._event_idx:
            self._device_event[0] = self._next_avail
            self._device_event[1] = EVENT_DESC
        else:
            self._device_event[1] = EVENT_ENABLE

    def disable_kicks(self) -> None:
        """Tell the driver that kicks are not needed while we poll. It may kick all the same."""
        self._device_event[1] = EVENT_DISABLE

    def _wants_call(self, pushed: int) -> bool:
        how = self._driver_event[1] & 3
        if how != EVENT_DESC or not self._event_idx:
            return how != EVENT_DISABLE
        # Count places from the start of the lap we are in; the one before lies below zero.
        event = self._driver_event[0]
        end, place = self._next_used & PLACE, event & PLACE
        if (event ^ self._next_used) & WRAP:
            place -= self.size
        return end - pushed <= place < end

    # Undoing, saving, recovering.

    def _before(self, cursor: int, head: int) -> int:
        # A whole lap back is the same place with the other wrap counter.
        count = self._counts.get(head, 0)
        return self._step(cursor, self.size - count) ^ WRAP

    def _release(self, head: int) -> int:
        del self._in_flight[head]
        self._nr_descs -= self._counts.pop(head)
        slots = self._slots.pop(head, [0])
        if self._area is not None:
            self._free_slots += slots
        return slots[0]

    def _check_state(self, state: QueueState) -> None:
        for cursor in state:
            if not (0 <= cursor <= 0xFFFF and cursor & PLACE < self.size):
                raise GuestError(f"cursor {cursor:#x} is not in a ring of {self.size}")

    def _abandon_ring(self) -> None:
        ring, driver, device = bytearray(16 * self.size), bytearray(4), bytearray(4)
        self._map(memoryview(ring), memoryview(driver), memoryview(device))

    def _adopt(self, area: Inflight, entry: int) -> int:
        head = area.head(entry)
        slots, copies = area.chain(entry)
        if head in self._in_flight or not set(slots) <= set(self._free_slots):
            raise GuestError("in-flight area: two chains share a buffer id or a descriptor")
        self._free_slots = [slot for slot in self._free_slots if slot not in slots]
        self._in_flight[head] = RECOVERED
        self._slots[head] = slots
        self._counts[head] = len(copies)
        self._nr_descs += len(copies)
        return head

    def _is_published(self, used: int) -> bool:
        # At the start of the batch the driver's descriptor is still there, or it is not.
        cursor = self._next_used
        available = DESC_F_AVAIL if cursor & WRAP else DESC_F_USED
        return self._ring16[8 * (cursor & PLACE) + 7] & MARKS != available

    def _after_adopted(self) -> int:
        return self._step(self._next_used, self._nr_descs)

    def _rebuild(self, area: Inflight, entry: int) -> Chain:
        _, copies = area.chain(entry)
        return self._fetch(area.head(entry), copies)
