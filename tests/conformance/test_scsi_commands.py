"""A CD-ROM drive's commands: SPC-4 and MMC-5, by the bytes they ask for."""

from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.scsicd import COMMANDS
from tests.descriptors import count_before
from tests.scsilab import Answer, ScsiLab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = 300
DISC = b"".join(block.to_bytes(2, "big") * 1024 for block in range(BLOCKS))
DVD_BLOCKS = 400_000

NO_DISC = (2, 0x3A, 1)
TRAY_OPEN = (2, 0x3A, 2)
INVALID_OPCODE = (5, 0x20, 0)
OUT_OF_RANGE = (5, 0x21, 0)
INVALID_FIELD = (5, 0x24, 0)
CHANGED = (6, 0x28, 0)
POWER_ON = (6, 0x29, 0)

EJECT, LOAD = b"\x1b\0\0\0\2\0", b"\x1b\0\0\0\3\0"
LOCK, UNLOCK = b"\x1e\0\0\0\1\0", b"\x1e\0\0\0\0\0"
READY = bytes(6)
EVENTS = b"\x4a\1\0\0\x10\0\0\0\x08\0"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[ScsiLab]:
    """A drive with a disc, its driver ready."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        yield lab


def dvd(lab: ScsiLab) -> None:
    """Put in a disc that is too large for a CD, with a last block that is cut off."""
    fd = lab.burn(b"", "dvd.iso")
    os.truncate(lab.image.with_name("dvd.iso"), DVD_BLOCKS * 2048 - 100)
    lab.device.take("insert", [False, 0], fd)
    lab.ask(READY)


FIXED = [
    # INQUIRY: type 5, removable, SPC-3, format 2, 31 more bytes, CMDQUE
    (b"\x12\0\0\0\xff\0", b"\5\x80\5\2\x1f\0\0\2PYVMD   CD-ROM          1   "),
    (b"\x12\1\0\0\xff\0", b"\5\0\0\3\0\x80\x83"),
    (b"\x12\1\x80\0\xff\0", b"\5\x80\0\x010"),
    (b"\x12\1\x83\0\xff\0", b"\5\x83\0\x1d\2\1\0\x19PYVMD   CD-ROM          0"),
    # REQUEST SENSE, fixed and descriptor: nothing to tell
    (b"\3\0\0\0\xff\0", b"\x70\0\0\0\0\0\0\x0a" + bytes(10)),
    (b"\3\1\0\0\xff\0", b"\x72" + bytes(7)),
    # READ CAPACITY
    (b"\x25" + bytes(9), b"\0\0\x01\x2b\0\0\x08\0"),
    (b"\x9e\x10" + bytes(11) + b"\xff\0\0", b"\0\0\0\0\0\0\x01\x2b\0\0\x08\0" + bytes(20)),
    # READ TOC: by block, by time, from the lead-out on, sessions
    (b"\x43\0\0\0\0\0\0\0\xff\0", b"\0\x12\1\1\0\x14\1\0\0\0\0\0\0\x14\xaa\0\0\0\x01\x2c"),
    (b"\x43\2\0\0\0\0\1\0\xff\0", b"\0\x12\1\1\0\x14\1\0\0\0\2\0\0\x14\xaa\0\0\0\6\0"),
    (b"\x43\0\0\0\0\0\xaa\0\xff\0", b"\0\x0a\1\1\0\x14\xaa\0\0\0\x01\x2c"),
    (b"\x43\0\1\0\0\0\0\0\xff\0", b"\0\x0a\1\1\0\x14\1\0\0\0\0\0"),
    (b"\x43\2\0\0\0\0\0\0\xff\x40", b"\0\x0a\1\1\0\x14\1\0\0\0\2\0"),
    # MODE SENSE: error recovery, and what cannot be changed of it
    (b"\x1a\0\1\0\xff\0", b"\x0f\0\0\0\1\x0a\0\5" + bytes(8)),
    (b"\x1a\0\x41\0\xff\0", b"\x0f\0\0\0\1\x0a" + bytes(10)),
    (b"\x5a\0\1\0\0\0\0\0\xff\0", b"\0\x12" + bytes(6) + b"\1\x0a\0\5" + bytes(8)),
    # GET EVENT STATUS NOTIFICATION: a disc is there, nothing has happened; no such class
    (EVENTS, b"\0\6\4\x10\0\2\0\0"),
    (b"\x4a\1\0\0\x6e\0\0\0\xff\0", b"\0\2\x80\x10"),
    # GET CONFIGURATION of one feature: CD read is current, DVD read is not
    (b"\x46\2\0\x1e\0\0\0\0\xff\0", b"\0\0\0\x0c\0\0\0\x08\0\x1e\1\4\0\0\0\0"),
    (b"\x46\2\0\x1f\0\0\0\0\xff\0", b"\0\0\0\x08\0\0\0\x08\0\x1f\0\0"),
    (b"\x46\2\0\x55\0\0\0\0\xff\0", b"\0\0\0\4\0\0\0\x08"),
    # READ DISC INFORMATION: complete, one session of one track
    (
        b"\x51\0\0\0\0\0\0\0\xff\0",
        b"\0\x20\x0e\1\1\1\1\x20" + bytes(8) + b"\xff" * 8 + bytes(10),
    ),
    # MECHANISM STATUS
    (b"\xbd\0\0\0\0\0\0\0\0\xff\0\0", bytes(8)),
    # REPORT LUNS: LUN 0, the well-known one, both
    (b"\xa0\0\0\0\0\0\0\0\0\xff\0\0", b"\0\0\0\x08" + bytes(12)),
    (b"\xa0\0\1\0\0\0\0\0\0\xff\0\0", b"\0\0\0\x08\0\0\0\0\xc1\1" + bytes(6)),
    (b"\xa0\0\2\0\0\0\0\0\0\xff\0\0", b"\0\0\0\x10" + bytes(12) + b"\xc1\1" + bytes(6)),
    (b"\x35" + bytes(9), b""),
    (READY, b""),
]


@pytest.mark.parametrize(("cdb", "expected"), FIXED, ids=lambda part: part.hex()[:24])
def test_what_a_command_returns(lab: ScsiLab, cdb: bytes, expected: bytes) -> None:
    """Byte for byte, and never more than the allocation length, of whatever size it is."""
    answer = lab.ask(cdb, 255)
    assert (answer.response, answer.status, answer.sense) == (0, 0, b"")
    assert answer.data == expected
    assert answer.residual == 255 - len(expected)
    at, size = COMMANDS[cdb[0]].allocation
    if not size:
        return
    for allocation in (0, 1, 3, 4, 5, 7, len(expected) - 1, len(expected)):
        if cdb[0] == 0xA0 and allocation < 16:
            continue
        cut = cdb[:at] + allocation.to_bytes(size, "big") + cdb[at + size :]
        answer = lab.ask(cut, 255)
        assert (answer.status, answer.data) == (0, expected[:allocation])


def test_capabilities(lab: ScsiLab) -> None:
    """Page 2Ah: a tray that locks and ejects, and whether it is locked; 3Fh: both pages."""
    page = lab.ask(b"\x5a\0\x2a\0\0\0\0\0\xff\0", 255).data
    assert (len(page), page[:2], page[8:10]) == (40, b"\0\x26", b"\x2a\x1e")
    assert page[14] == 0x29
    lab.ask(LOCK)
    assert lab.ask(b"\x5a\0\x2a\0\0\0\0\0\xff\0", 255).data[14] == 0x2B
    both = lab.ask(b"\x1a\0\x3f\0\xff\0", 255).data
    assert (len(both), both[0], both[4], both[16]) == (4 + 12 + 32, 47, 1, 0x2A)
    assert lab.ask(b"\x1a\0\x3f\xff\xff\0", 255).data == both


def test_all_features(lab: ScsiLab) -> None:
    """GET CONFIGURATION: all, those from one on, those that are current; the length adds up."""
    seen = {}
    for request, start in ((0, 0), (1, 0), (0, 0x10)):
        data = lab.ask(b"\x46" + bytes((request, 0, start, 0, 0, 0, 1, 0, 0)), 256).data
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        codes, at = [], 8
        while at < len(data):
            codes.append(int.from_bytes(data[at : at + 2], "big"))
            at += 4 + data[at + 3]
        assert at == len(data)
        seen[request, start] = codes
    assert seen[0, 0] == [0, 1, 2, 3, 0x10, 0x1E, 0x1F]
    assert seen[1, 0] == [0, 1, 2, 3, 0x10, 0x1E]
    assert seen[0, 0x10] == [0x10, 0x1E, 0x1F]


def test_a_dvd(lab: ScsiLab) -> None:
    """A disc too large for a CD has the profile of a DVD, and its structures."""
    assert lab.ask(b"\xad\0\0\0\0\0\0\0\x10\0\0\0", 4096).key == (5, 0x30, 2)
    dvd(lab)
    assert lab.ask(b"\x46\2\0\0\0\0\0\0\x08\0", 8).data[6:] == b"\0\x10"
    data = lab.ask(b"\xad\0\0\0\0\0\0\0\x10\0\0\0", 4096).data
    assert (len(data), data[:5]) == (2052, b"\x08\x02\0\0\1")
    last = 0x30000 + DVD_BLOCKS - 1
    assert data[8:16] == b"\0\3\0\0" + last.to_bytes(4, "big")
    assert lab.ask(b"\xad\0\0\0\0\0\0\1\x10\0\0\0", 4096).data == b"\0\6" + bytes(6)
    assert lab.ask(b"\xad\0\0\0\0\0\0\xff\x10\0\0\0", 4096).data[:5] == b"\0\x0e\0\0\0"
    assert lab.ask(b"\xad\0\0\0\0\0\0\2\x10\0\0\0", 4096).key == INVALID_FIELD
    assert lab.ask(b"\xad\1\0\0\0\0\0\0\x10\0\0\0", 4096).key == INVALID_FIELD
    lead_out = lab.ask(b"\x43\2\0\0\0\0\xaa\0\xff\0", 255).data
    assert lead_out[8:] == bytes((0, 88, 55, 25))  # 400 000 frames and two seconds


@pytest.mark.parametrize(
    "cdb",
    [
        b"\x12\1\xb0\0\xff\0",  # no such page
        b"\x12\0\x80\0\xff\0",  # a page, but no EVPD
        b"\x12\2\0\0\xff\0",  # command support data, long gone
        b"\x43\0\0\0\0\0\2\0\xff\0",  # no track 2
        b"\x43\0\2\0\0\0\0\0\xff\0",  # full TOC
        b"\x1a\0\x0e\0\xff\0",  # no audio page
        b"\x1a\0\1\1\xff\0",  # no subpages
        b"\x46\3\0\0\0\0\0\0\xff\0",
        b"\x4a\0\0\0\x10\0\0\0\xff\0",  # asynchronous
        b"\x51\1\0\0\0\0\0\0\xff\0",
        b"\xa0\0\0\0\0\0\0\0\0\x0f\0\0",  # less than one LUN
        b"\xa0\0\3\0\0\0\0\0\0\xff\0\0",
        b"\x9e\x11" + bytes(11) + b"\xff\0\0",
        b"\x1e\0\0\0\2\0",  # persistent
        b"\x28\x20\0\0\0\0\0\0\1\0",  # protection information
        b"\0\0\0\0\0\4",  # NACA
    ],
    ids=lambda cdb: cdb.hex(),
)
def test_fields_that_may_not_be(lab: ScsiLab, cdb: bytes) -> None:
    """INVALID FIELD IN CDB, and the sense data points at a byte of it."""
    answer = lab.ask(cdb, 2048)
    assert (answer.response, answer.status, answer.key) == (0, 2, INVALID_FIELD)
    assert (len(answer.sense), answer.sense[0], answer.sense[7], answer.data) == (18, 0x70, 10, b"")
    assert answer.sense[15] == 0xC0
    assert int.from_bytes(answer.sense[16:18], "big") < len(cdb)


def test_saved_parameters(lab: ScsiLab) -> None:
    """There are none."""
    assert lab.ask(b"\x1a\0\xc1\0\xff\0", 255).key == (5, 0x39, 0)


def test_cve_2015_5158_unknown_opcodes(lab: ScsiLab) -> None:
    """Whatever has no row: INVALID COMMAND OPERATION CODE, whatever its length would be."""
    for code in set(range(256)) - set(COMMANDS):
        assert lab.ask(bytes((code,)) * 32, 64).key == INVALID_OPCODE


def test_cdbs_of_every_length(lab: ScsiLab) -> None:
    """A CDB shorter than its command is refused, a longer one is cut; none at all is no command."""
    for size in (*range(34), 64, 260):
        lab.write_config(24, 4, size)
        lab.cdb_size = size
        for code, length in ((0x00, 6), (0x25, 10), (0xBD, 12), (0x9E, 16)):
            cdb = bytes((code, 0x10 * (code == 0x9E))) + bytes(258)
            answer = lab.ask(cdb, 64)
            if not size:
                assert answer.key == INVALID_OPCODE
            elif size < length:
                assert answer.key == INVALID_FIELD
            else:
                assert answer.status == 0


def reads(lba: int, count: int) -> list[bytes]:
    """Every READ command that can ask for this."""
    found = [
        b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big") + b"\0",
        b"\xa8\0" + lba.to_bytes(4, "big") + count.to_bytes(4, "big") + b"\0\0",
        b"\x88\0" + lba.to_bytes(8, "big") + count.to_bytes(4, "big") + b"\0\0",
    ]
    if lba < 1 << 21 and 0 < count <= 256:
        found.append(b"\x08" + lba.to_bytes(3, "big") + bytes((count & 0xFF,)) + b"\0")
    return found


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_reads_are_the_file(lab: ScsiLab, data: st.DataObject) -> None:
    """Any blocks, by any READ, into buffers in any pieces: what is in the image, and no more."""
    lba = data.draw(st.integers(0, BLOCKS))
    count = data.draw(st.integers(0, min(BLOCKS - lba, 64)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(count * 2048 - 1, 1)), max_size=6)))
    edges = [0, *(cut for cut in cuts if cut < count * 2048), count * 2048]
    pieces = [end - start for start, end in itertools.pairwise(edges)] if count else []
    for cdb in reads(lba, count):
        answer = lab.ask(cdb, count * 2048, pieces=pieces)
        assert (answer.response, answer.status, answer.residual) == (0, 0, 0)
        assert answer.data == DISC[lba * 2048 : (lba + count) * 2048]


@pytest.mark.parametrize(
    ("lba", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (0, BLOCKS + 1), (BLOCKS + 1, 0), (1 << 31, 1)]
)
def test_reads_beyond_the_end(lab: ScsiLab, lba: int, count: int) -> None:
    """LBA OUT OF RANGE, even where part of it is there; nothing is transferred."""
    for cdb in reads(lba, count):
        answer = lab.ask(cdb, 2048)
        assert (answer.key, answer.data) == (OUT_OF_RANGE, b"")
    assert lab.ask(b"\x88\0" + b"\xff" * 8 + b"\0\0\0\1\0\0", 2048).key == OUT_OF_RANGE


def test_a_short_read_of_no_blocks_is_one_of_256(lab: ScsiLab) -> None:
    """READ(6) has no other way to say it; the other READs mean none."""
    assert lab.ask(b"\x08\0\0\1\0\0", 256 * 2048).data == DISC[2048 : 257 * 2048]
    assert lab.ask(reads(1, 0)[0], 2048).data == b""


def test_a_read_may_be_too_long(lab: ScsiLab) -> None:
    """More than 64 MiB in one command is refused before anything is read."""
    dvd(lab)
    assert lab.ask(b"\xa8\0" + bytes(4) + b"\0\0\x80\1\0\0", 2048).key == INVALID_FIELD
    assert lab.ask(b"\xa8\0" + bytes(4) + b"\0\0\x80\0\0\0", 2048).response == 1  # no room


def test_the_last_block_may_be_cut_off(tmp_path: Path) -> None:
    """It counts, and ends in zeroes, whatever was in the buffer."""
    with ScsiLab(tmp_path, b"x" * 2049) as lab:
        lab.start()
        assert lab.ask(b"\x25" + bytes(9), 8).data[:4] == b"\0\0\0\1"
        assert lab.ask(reads(0, 2)[0], 4096).data == b"x" * 2049 + bytes(2047)
        assert lab.ask(reads(1, 1)[0], pieces=[1, 5, 2042]).data == b"x" + bytes(2047)
        assert lab.said == []


def test_an_unreadable_place(lab: ScsiLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from the host: MEDIUM ERROR at that block, what came before is there, the log is told."""
    real = os.preadv

    def bad(fd: int, views: list[memoryview], offset: int) -> int:
        if offset >= 5 * 2048:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        short = [views[0][: 5 * 2048 - offset]]
        return real(fd, short, offset)

    monkeypatch.setattr(os, "preadv", bad)
    for _ in range(30):
        answer = lab.ask(reads(3, 4)[0], 8192)
        assert (answer.status, answer.key) == (2, (3, 0x11, 0))
        assert (answer.sense[0], answer.sense[3:7]) == (0xF0, b"\0\0\0\5")
        assert (answer.data, answer.residual) == (DISC[3 * 2048 : 5 * 2048], 4096)
    assert 1 <= len(lab.said) <= 11
    assert "Input/output error" in lab.said[0]


def test_power_on_is_told_once(tmp_path: Path) -> None:
    """UNIT ATTENTION for the first command that takes one; others are done meanwhile."""
    with ScsiLab(tmp_path, DISC, attention=True) as lab:
        lab.start()
        assert lab.ask(b"\x12\0\0\0\x24\0", 36).status == 0
        assert lab.ask(b"\xa0\0\0\0\0\0\0\0\0\x10\0\0", 16).status == 0
        assert lab.ask(b"\x46\2\0\0\0\0\0\0\x08\0", 8).status == 0
        assert lab.ask(EVENTS, 8).status == 0
        assert lab.ask(b"\xff").key == POWER_ON
        assert lab.ask(READY).status == 0
        lab.start()
        assert lab.ask(b"\3\0\0\0\x12\0", 18).data[2:14:5] == b"\6\x0a\x29"
        assert lab.ask(READY).status == 0


def events(lab: ScsiLab) -> list[tuple[int, int]]:
    """Media events until there are none, each with the status of the tray."""
    found = []
    while (data := lab.ask(EVENTS, 8).data)[4]:
        found.append((data[4], data[5]))
    return [*found, (0, data[5])]


def test_the_guest_moves_the_tray(lab: ScsiLab) -> None:
    """Eject: NOT READY, tray open; load: UNIT ATTENTION, the disc is there again."""
    assert lab.ask(EJECT).status == 0
    assert events(lab) == [(3, 1), (0, 1)]
    for cdb in (READY, reads(0, 1)[0], b"\x25" + bytes(9), b"\x43\0\0\0\0\0\0\0\xff\0"):
        assert lab.ask(cdb, 2048).key == TRAY_OPEN
    assert lab.ask(b"\3\0\0\0\x12\0", 18).data[12:14] == b"\x3a\2"
    assert lab.ask(b"\xbd\0\0\0\0\0\0\0\0\x08\0\0", 8).data[1] == 0x10
    assert lab.ask(EJECT).status == 0
    assert lab.ask(LOAD).status == 0
    assert events(lab) == [(2, 2), (0, 2)]
    assert lab.ask(READY).key == CHANGED
    assert lab.ask(reads(0, 1)[0], 2048).data == DISC[:2048]
    assert lab.ask(b"\x1b\0\0\0\x32\0").status == 0  # a power condition, with LOEJ by mistake
    assert lab.ask(b"\x1b\0\0\0\0\0").status == 0
    assert lab.ask(READY).status == 0


def test_prevent_and_allow(lab: ScsiLab) -> None:
    """MEDIUM REMOVAL PREVENTED for the guest; for the host a refusal, and the guest is asked."""
    assert lab.ask(LOCK).status == 0
    assert lab.ask(EJECT).key == (5, 0x53, 2)
    with pytest.raises(Exception, match="locked the tray"):
        lab.device.setting("eject", [False, 0])
    with pytest.raises(Exception, match="locked the tray"):
        lab.insert(b"y" * 2048)
    assert events(lab) == [(1, 2), (0, 2)]
    assert lab.ask(UNLOCK).status == 0
    assert lab.device.setting("eject", [False, 0])["tray_open"]
    lab.device.setting("load", [False, 0])
    assert lab.ask(READY).key == NO_DISC
    lab.ask(LOCK)
    assert lab.insert(b"y" * 2048, force=True)["blocks"] == 1
    assert lab.ask(READY).key == CHANGED


def test_another_disc(lab: ScsiLab) -> None:
    """The host changes the disc: removal and new media, one attention, other bytes."""
    before = count_before()
    lab.insert(b"z" * 4096)
    assert events(lab) == [(3, 2), (2, 2), (0, 2)]
    answer: Answer = lab.ask(reads(0, 2)[0], 4096)
    assert answer.key == CHANGED
    assert lab.ask(reads(0, 2)[0], 4096).data == b"z" * 4096
    assert lab.ask(reads(2, 1)[0], 2048).key == OUT_OF_RANGE
    assert len(os.listdir("/proc/self/fd")) == before


def test_events_are_kept_while_nobody_asks(lab: ScsiLab) -> None:
    """The last few; and an allocation length without room for one takes none away."""
    for _ in range(50):
        lab.ask(EJECT)
        lab.ask(LOAD)
    assert lab.ask(EVENTS[:8] + b"\4\0", 8).data == b"\0\6\4\x10"
    assert [event for event, _ in events(lab)] == [3, 2, 3, 2, 0]
    for _ in range(5):
        lab.device.setting("eject", [False, 0])
        lab.insert(b"w" * 2048)
    assert lab.ask(READY).key == CHANGED
    assert lab.ask(READY).status == 0


def test_an_empty_drive(tmp_path: Path) -> None:
    """Everything that needs no disc works; the rest says MEDIUM NOT PRESENT."""
    with ScsiLab(tmp_path) as lab:
        lab.start()
        for code, row in COMMANDS.items():
            cdb = bytes((code, 1 if code == 0x4A else 0)) + bytes(14)
            answer = lab.ask(cdb, 2048)
            if row.medium:
                assert answer.key == NO_DISC, hex(code)
            else:
                assert answer.status == 0 or answer.key == INVALID_FIELD, hex(code)
        assert lab.ask(b"\x46\1\0\0\0\0\0\0\x08\0", 8).data[6:] == b"\0\0"
        assert lab.ask(EVENTS, 8).data[5] == 0
        with pytest.raises(Exception, match="setting"):
            lab.device.setting("burn", 1)
