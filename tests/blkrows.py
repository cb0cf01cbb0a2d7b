"""A block device that gets the usual request, and every way in which one can be a little odd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError
from devices.blkreq import BLK_F_FLUSH, HEADER, T_IN
from devices.chain import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.blklab import BlkLab
from tools.viodriver import PackedDriver, SplitDriver

if TYPE_CHECKING:
    from pathlib import Path

    from devices.virtqueue import VirtQueue

N, W, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
SIZE: Final = 1 << 20
CONTENT: Final = b"".join(
    bytes((sector & 0xFF, sector >> 8)) * 256 for sector in range(SIZE // 512)
)
# Guest addresses that no ring and no arena of the lab uses.
HEADERS, TABLES, DATA = 0x800000, 0x810000, 0x820000
RAM: Final = 16 << 20

#: One word changed, of the descriptors d0 to d2 or of the one that names their table.
CHANGES: Final[list[dict[str, int]]] = [
    {},
    *({"d0_addr": gpa} for gpa in (RAM, RAM - 8, RAM - 16, RAM - 15, (1 << 64) - 16)),
    *({"d0_length": length} for length in (0, 15, 17, 0xFFFF_FFFF)),
    *({"d0_flags": flags} for flags in (0, W, N | W, INDIRECT, N | INDIRECT, N | 8, 0xFFFF)),
    *({"d0_next": index} for index in (0, 2, 3, 0xFFFF)),
    *({"d1_addr": gpa} for gpa in (RAM, RAM - 511, RAM - 512, (1 << 64) - 1)),
    *({"d1_length": length} for length in (0, 1, 1024, RAM, 0xFFFF_FFFF)),
    *({"d1_flags": flags} for flags in (0, N, W, N | W, N | INDIRECT, N | 16)),
    *({"d1_next": index} for index in (0, 1, 3, 0xFFFF)),
    *({"d2_addr": gpa} for gpa in (RAM, RAM - 1, (1 << 64) - 1)),
    *({"d2_length": length} for length in (0, 2, 0xFFFF_FFFF)),
    *({"d2_flags": flags} for flags in (0, N, N | W, W | INDIRECT, W | 32)),
    *({"d2_next": index} for index in (1, 3, 0xFFFF)),
    *({"length": length} for length in (0, 16, 32, 47, 49, 64)),
    *({"table": table} for table in (RAM - 48, RAM - 47, RAM, (1 << 64) - 48)),
]


class RowsLab(BlkLab):
    """A disk with CONTENT and one queue, whose driver makes what it likes."""

    def __init__(
        self, directory: Path, *, packed: bool = False, content: bytes = CONTENT, **more: Any
    ) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(directory, len(content), content=content, packed=packed, **more)
        features = F_INDIRECT_DESC | F_EVENT_IDX | BLK_F_FLUSH | F_RING_PACKED * packed
        [self.driver] = self.start(features)

    def offer_rows(
        self, kind: int, sector: int, *, table: int = TABLES, length: int = 48, **changes: int
    ) -> None:
        """Offer an indirect table of the usual three, with one word of one of them changed.

        In a packed ring `next` is the id, and there is no NEXT.
        """
        packed = isinstance(self.driver, PackedDriver)
        self.memory.write(HEADERS, HEADER.pack(kind, 0, sector))
        self.memory.write(DATA, b"\x55" * 1024)
        n = 0 if packed else N
        flags = n | W if kind == T_IN else n
        rows = [[HEADERS, 16, n, 1], [DATA, 512, flags, 2], [DATA + 4096, 1, W, 0]]
        for name, value in changes.items():
            rows[int(name[1])][["addr", "length", "flags", "next"].index(name[3:])] = value
        if packed:
            rows = [[addr, length_, next_, flags] for addr, length_, flags, next_ in rows]
        content = b"".join(DESC.pack(*row) for row in rows)
        self.memory.write(min(table, RAM - len(content)), content)
        self.offer_table(table, length)

    def offer_table(self, table: int, length: int = 48, head: int = 0) -> None:
        """Offer an indirect table, whatever is there."""
        if isinstance(self.driver, PackedDriver):
            self.driver.offer_chains([(head, [(table, length, INDIRECT)])])
        else:
            self.driver.desc(head, table, length, INDIRECT)
            self.driver.offer(head)

    @property
    def queue(self) -> VirtQueue:
        """The device's side."""
        queue = self.registers.transport.live[0]
        assert queue is not None
        return queue

    def serve_all(self) -> None:
        """Kick, and see all of it done. Raises GuestError."""
        self.schedule(0)
        self.serve()

    def outcome(self) -> tuple[Any, ...]:
        """Serve, and return everything that it has changed."""
        error = ""
        try:
            self.serve_all()
        except GuestError as err:
            error = str(err)
        return (
            error,
            list(self.driver.used())
            if isinstance(self.driver, SplitDriver)
            else self.driver.ring_bytes(),
            self.status,
            self.memory.read(HEADERS, 0x40000),
            self.image.read_bytes(),
            list(self.device.totals[:5]),
        )
