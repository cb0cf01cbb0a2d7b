"""Descriptor chains: what a driver's descriptors become before a device sees them.

A descriptor is 16 bytes in guest memory that say "these bytes, in this direction, and there is
more" (virtio 1.2 §2.7.5, §2.8.13). The guest may rewrite it while we look. So each is read once,
into private integers, and only those are checked and used: what was checked is what is used.

After that a chain is data a device can trust: every view lies in RAM, readable ones come before
writable ones and cannot be written to, none is empty, and the number of steps was bounded. The
*contents* of the views stay the guest's, and may change at any time: a device copies headers
before it looks at them.

`walk` follows the links of a split table and makes views as it goes, since it is the hottest
loop there is. `build` makes views of descriptors copied before. A test holds them together.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from config.errors import GuestError

if TYPE_CHECKING:
    from devices.guestmem import GuestMemory

# struct virtq_desc: le64 addr, le32 len, le16 flags, le16 next (§2.7.5).
DESC: Final = Struct("<QIHH")
DESC_F_NEXT: Final = 1  # the chain goes on
DESC_F_WRITE: Final = 2  # for the device to write; without it, for the device to read
DESC_F_INDIRECT: Final = 4  # addr and len are those of a table of descriptors

# Descriptors in one chain, counting those of its indirect table. A driver may not exceed the
# queue size (§2.7.5.3.1), but real ones do with indirect tables, so the limit is the kernel's:
# it is IOV_MAX, and a chain always fits one preadv.
MAX_CHAIN: Final = 1024
MAX_BYTES: Final = 0xFFFF_FFFF  # used.len has 32 bits, and §2.7.5.2 forbids longer chains

# A private copy of one descriptor: addr, len, flags.
Desc = tuple[int, int, int]

_BAD_INDIRECT: Final = "indirect descriptor that is nested, chained or not negotiated"
_unpack: Final = DESC.unpack_from
_WRITE_OR_INDIRECT: Final = DESC_F_WRITE | DESC_F_INDIRECT


class Chain:
    """One request of the driver: guest bytes to read, then guest bytes to write.

    `head` names the chain when it is given back: the index of its first descriptor (split) or
    its buffer id (packed). The lists are the device's own; it may cut them up as it likes. The
    readable views are read-only, so that no mistake of a device can write there (§2.7.5.1).
    """

    __slots__ = ("head", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        readable_bytes: int,
        writable_bytes: int,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_bytes = readable_bytes
        self.writable_bytes = writable_bytes

    def __repr__(self) -> str:
        return f"Chain({self.head}, {self.readable_bytes} in, {self.writable_bytes} out)"


def indirect_table(memory: GuestMemory, table_gpa: int, length: int) -> memoryview | bytes:
    """Return an indirect table. Raises GuestError on a bad length or address.

    It is guest memory like the main table, unless it crosses a seam: then it is a copy.
    """
    if length == 0 or length % DESC.size or length > DESC.size * MAX_CHAIN:
        raise GuestError(f"indirect table of {length} bytes: not 1 to {MAX_CHAIN} descriptors")
    start, end, _, rom = memory.hot
    if start <= table_gpa and table_gpa + length <= end:
        return rom[table_gpa - start : table_gpa + length - start]
    return memory.read(table_gpa, length)


def walk(
    memory: GuestMemory, table: memoryview | bytes, entries: int, head: int, indirect: bool
) -> Chain:
    """Return the chain that starts at `head` of a split table; `indirect` says if negotiated.

    Direct descriptors may come before an indirect one, whose WRITE flag means nothing
    (§2.7.5.3.2). Those without bytes are legal and leave no view. Raises GuestError on an index
    outside the table, a chain that does not end in time, which is how a loop shows, a buffer
    outside RAM, a readable one after a writable one, a table where none may be, and a chain of
    4 GiB or more (§2.7.4.2, §2.7.5.2, §2.7.5.3.1).
    """
    start, end, ram, rom = memory.hot
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    views, source = readable, rom
    readable_bytes = writable_bytes = seams = 0
    index = head
    limit = entries if entries < MAX_CHAIN else MAX_CHAIN  # min() would cost 4 % of the chain
    while True:  # once for the main table, and once more for an indirect one
        for done in range(limit):
            if index >= entries:
                raise GuestError(f"descriptor {index} in a table of {entries}")
            addr, length, flags, index = _unpack(table, 16 * index)
            kind = flags & _WRITE_OR_INDIRECT
            if kind == DESC_F_WRITE:
                views, source = writable, ram
                writable_bytes += length
            elif kind:
                if flags & DESC_F_NEXT or not indirect:
                    raise GuestError(_BAD_INDIRECT)
                table = indirect_table(memory, addr, length)
                index, entries, indirect = 0, length // 16, False
                limit = entries if entries < MAX_CHAIN - done else MAX_CHAIN - done
                break
            elif views is writable:
                raise GuestError("readable descriptor after a writable one")
            else:
                readable_bytes += length
            stop = addr + length
            if start <= addr and stop <= end:
                if length:
                    views.append(source[addr - start : stop - start])
            elif length:  # another region, or more than one, or not RAM at all
                pieces = memory.views(addr, length)
                views += pieces if kind else [piece.toreadonly() for piece in pieces]
                seams += len(pieces) - 1
                start, end, ram, rom = memory.hot
                source = ram if kind else rom
            if not flags & DESC_F_NEXT:
                if readable_bytes + writable_bytes > MAX_BYTES:
                    raise GuestError(f"chain of {readable_bytes + writable_bytes} bytes")
                if seams and len(readable) + len(writable) > MAX_CHAIN:
                    raise GuestError(f"chain of more than {MAX_CHAIN} pieces")
                return Chain(head, readable, writable, readable_bytes, writable_bytes)
        else:
            raise GuestError(f"chain longer than {limit}")


def build(memory: GuestMemory, head: int, copies: list[Desc]) -> Chain:
    """Return the chain of descriptors copied before; nothing here reads guest memory.

    The rules are those of `walk`, and so are the errors; no descriptor may be indirect.
    """
    start, end, ram, rom = memory.hot
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    views, source = readable, rom
    readable_bytes = writable_bytes = seams = 0
    for addr, length, flags in copies:
        kind = flags & _WRITE_OR_INDIRECT
        if kind == DESC_F_WRITE:
            views, source = writable, ram
            writable_bytes += length
        elif kind:
            raise GuestError(_BAD_INDIRECT)
        elif views is writable:
            raise GuestError("readable descriptor after a writable one")
        else:
            readable_bytes += length
        stop = addr + length
        if start <= addr and stop <= end:
            if length:
                views.append(source[addr - start : stop - start])
        elif length:
            pieces = memory.views(addr, length)
            views += pieces if kind else [piece.toreadonly() for piece in pieces]
            seams += len(pieces) - 1
            start, end, ram, rom = memory.hot
            source = ram if kind else rom
    if readable_bytes + writable_bytes > MAX_BYTES:
        raise GuestError(f"chain of {readable_bytes + writable_bytes} bytes")
    if seams and len(readable) + len(writable) > MAX_CHAIN:
        raise GuestError(f"chain of more than {MAX_CHAIN} pieces")
    return Chain(head, readable, writable, readable_bytes, writable_bytes)
