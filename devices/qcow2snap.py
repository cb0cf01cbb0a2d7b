"""Internal snapshots of a qcow2 image: read, so that what belongs to them is left alone.

A snapshot is an L1 table of its own. Clusters that it shares with the disk have refcounts above 1
and are copied before they are written, so snapshots need no care but this.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from devices.qcow2file import OFFSET_MASK, open_problem
from devices.qcow2head import MOST_L1_BYTES

if TYPE_CHECKING:
    from devices.qcow2file import ImageFile

MOST_TABLES: Final = 16 << 20  # bytes of all snapshots' L1 tables: it bounds what opening costs
_ENTRY: Final = Struct(">QIHHIIQII")


class Snapshot(NamedTuple):
    """An entry of the snapshot table."""

    l1_offset: int
    l1_entries: int
    name: str


def snapshots(file: ImageFile) -> tuple[list[Snapshot], int]:
    """Return the snapshots, and how many bytes their table has. Raises ConfigError, OSError."""
    header, found = file.header, []
    at, left = header.snapshots_offset, MOST_TABLES
    for index in range(header.snapshots):
        where = f"snapshot {index} at {at:#x}"
        if at + _ENTRY.size > file.end:
            raise open_problem(f"{where}: the file ends at {file.end:#x}")
        fixed = file.get(at, _ENTRY.size)
        l1_offset, l1_entries, id_bytes, name_bytes, _, _, _, _, extra = _ENTRY.unpack(fixed)
        length = _ENTRY.size + extra + id_bytes + name_bytes
        if extra > 1024 or at + length > file.end:
            raise open_problem(f"{where}: {length} bytes, {extra} of them extra, are too many")
        data = file.get(at + _ENTRY.size, length - _ENTRY.size)
        bad = 8 * l1_entries > MOST_L1_BYTES or l1_offset + 8 * l1_entries > file.end
        if bad or (l1_entries and not file.holds(l1_offset)):
            raise open_problem(f"{where}: an L1 table of {l1_entries} entries at {l1_offset:#x}")
        left -= 8 * l1_entries
        if left < 0:
            raise open_problem(f"{where}: the snapshots' L1 tables have more than {MOST_TABLES}")
        name = data[extra + id_bytes :].decode("utf-8", "replace")
        found.append(Snapshot(l1_offset, l1_entries, name))
        at += length + -length % 8
    return found, at - header.snapshots_offset


def guard_snapshots(file: ImageFile) -> None:
    """Let nothing be written where snapshots have their tables. Raises ConfigError, OSError."""
    found, length = snapshots(file)
    l1s = [(snapshot.l1_offset, 8 * snapshot.l1_entries) for snapshot in found]
    file.guard.cover("a snapshot's table", (file.header.snapshots_offset, length), *l1s)
    offsets: set[int] = set()
    for snapshot in found:
        entries = file.words(snapshot.l1_offset, snapshot.l1_entries)
        offsets.update(entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK)
    file.guard.fill("a snapshot's L2 table", offsets)
