"""SCSI host: virtio 1.2 §5.6."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.features import F_INDIRECT_DESC, F_RING_PACKED
from devices.scsireq import AN, CONFIG, DRIVE_LUN, EVENT, HEADER, RESPONSE, TMF
from devices.spec import SPECS
from tests.scsilab import UNWRITTEN, ScsiLab
from tools.viodriver import Segment
from tools.viodriver.registers import NEEDS_RESET

if TYPE_CHECKING:
    from pathlib import Path

CONTROLQ, EVENTQ, REQUESTQ = range(3)
DISC = bytes(range(256)) * 64  # 8 blocks
INQUIRY = b"\x12\0\0\0\x24\0"
READ_2 = b"\x28\0\0\0\0\1\0\0\2\0"  # blocks 1 and 2
WELL_KNOWN = b"\xc1\1" + bytes(6)


def test_5_6_4_layout(tmp_path: Path) -> None:
    """Every field at its place; three queues, and no feature bit of its own (§5.6.2 to §5.6.4)."""
    with ScsiLab(tmp_path) as lab:
        assert SPECS["vioscsi"].config_length == CONFIG.size == 36
        assert CONFIG.unpack(lab.device.config()) == (1, 126, 2048, 32, 16, 96, 32, 0, 1, 1)
        assert lab.offered() & 0xFFFFFF == 0
        assert lab.read_config(20, 4) == 96
        assert list(lab.device.queue_sizes) == [128] * 3


def test_5_6_4_1_sizes_are_the_drivers_until_a_reset(tmp_path: Path) -> None:
    """sense_size and cdb_size change the layout of requests; on reset they are 96 and 32."""
    with ScsiLab(tmp_path, DISC) as lab:
        for sense_size, cdb_size in ((0, 6), (18, 10), (17, 16), (252, 260), (4096, 32), (8, 12)):
            lab.start()
            lab.write_config(20, 4, sense_size)
            lab.write_config(24, 4, cdb_size)
            lab.sense_size, lab.cdb_size = sense_size, cdb_size
            assert (lab.read_config(20, 4), lab.read_config(24, 4)) == (sense_size, cdb_size)
            assert lab.ask(INQUIRY, 36).data[8:16] == b"PYVMD   "
            answer = lab.ask(b"\xff")
            assert len(answer.sense) == min(18, sense_size)
            lab.status = 0
            assert (lab.read_config(20, 4), lab.read_config(24, 4)) == (96, 32)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 4, 9), (20, 2, 5), (20, 4, 4097), (24, 4, 261), (24, 1, 6), (28, 2, 7), (32, 4, 0)],
)
def test_other_configuration_writes_change_nothing(
    tmp_path: Path, offset: int, size: int, value: int
) -> None:
    """Only whole sizes within bounds are taken; the log hears of the rest."""
    with ScsiLab(tmp_path) as lab:
        before = lab.device.config()
        lab.write_config(offset, size, value)
        assert lab.device.config() == before
        assert len(lab.said) == 1


@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC, F_RING_PACKED])
def test_5_6_6_1_residual_and_used_length(tmp_path: Path, features: int) -> None:
    """Residual is data size less transferred; the used length is response and data, no more."""
    with ScsiLab(tmp_path, DISC, packed=bool(features & F_RING_PACKED)) as lab:
        lab.start(features)
        answer = lab.ask(READ_2, 2 * 2048 + 100)
        assert (answer.response, answer.status, answer.residual) == (0, 0, 100)
        assert (answer.written, answer.data) == (108 + 4096, DISC[2048:6144])
        assert answer.rest == bytes((UNWRITTEN,)) * 100
        answer = lab.ask(INQUIRY, 36)
        assert (answer.residual, answer.written) == (0, 108 + 36)
        answer = lab.ask(bytes(6))
        assert answer[:5] == (0, 0, b"", 0, b"")
        assert answer.written == 108


def test_2_7_4_framing_means_nothing(tmp_path: Path) -> None:
    """Header, response and data may be cut anywhere."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        header = HEADER.pack(DRIVE_LUN, 1, 0, 0, 0) + READ_2.ljust(32, b"\0")
        for step in (1, 3, 19, 50, 51):
            readable = [header[at : at + step] for at in range(0, len(header), step)]
            for writable in (
                [108 + 4096],
                [1] * 20 + [88, 4096],
                [107, 2, 4095],
                [100, 8, 1, 4095],
            ):
                written, data = lab.ask_raw(readable, writable)
                assert written == 108 + 4096
                assert RESPONSE.unpack_from(data) == (0, 0, 0, 0, 0)
                assert data[108:] == DISC[2048:6144]


@pytest.mark.parametrize(("out", "room"), [(50, 108), (51, 107), (0, 108), (51, 0), (18, 300)])
def test_no_room_for_header_or_response_needs_a_reset(tmp_path: Path, out: int, room: int) -> None:
    """A chain in which they do not fit is broken; after a reset all is well."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        lab.offer([bytes(out)] if out else [], [room] if room else [], queue=REQUESTQ)
        lab.schedule(REQUESTQ)
        with pytest.raises(Exception, match="no room for header and response"):
            lab.serve()
        lab.start()
        assert lab.ask(INQUIRY, 36).status == 0


@pytest.mark.parametrize("target", [1, 2, 255])
def test_5_6_6_1_bad_target(tmp_path: Path, target: int) -> None:
    """BAD_TARGET for a target that does not exist; nothing is done or transferred."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        for lun in (bytes((1, target)) + bytes(6), bytes((0, 0)) + bytes(6), b"\2" + bytes(7)):
            answer = lab.ask(INQUIRY, 36, lun=lun)
            assert (answer.response, answer.residual, answer.data) == (3, 36, b"")


def test_5_6_6_1_addresses(tmp_path: Path) -> None:
    """LUN 0 in both formats, the well-known LUN, and LUNs that are not there."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        for lun in (DRIVE_LUN, b"\1\0\x40\0" + bytes(4)):
            assert lab.ask(INQUIRY, 36, lun=lun).data[0] == 0x05
        for lun in (WELL_KNOWN, b"\1\0\xc1\1" + bytes(4)):
            assert lab.ask(INQUIRY, 36, lun=lun).data[0] == 0x1E
            assert lab.ask(b"\xa0\0\0\0\0\0\0\0\0\x10\0\0", 16, lun=lun).data[3] == 8
            assert lab.ask(bytes(6), lun=lun).status == 0
            assert lab.ask(READ_2, 4096, lun=lun).key == (5, 0x20, 0)
        for lun in (b"\1\0\0\1" + bytes(4), b"\1\0\x40\1" + bytes(4), b"\1\0\0\0\0\0\0\1"):
            assert lab.ask(INQUIRY, 36, lun=lun).data[0] == 0x7F
            assert lab.ask(READ_2, 4096, lun=lun).key == (5, 0x25, 0)
            assert lab.ask(b"\3\0\0\0\x12\0", 18, lun=lun).data[2:13:10] == b"\5\x25"
            assert lab.ask(b"\xa0\0\0\0\0\0\0\0\0\x10\0\0", 16, lun=lun).data[3] == 8


def test_5_6_6_1_overrun(tmp_path: Path) -> None:
    """OVERRUN when the CDB asks for more than the buffer takes: allocation or transfer length."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        for cdb, room in ((INQUIRY, 35), (READ_2, 4095), (READ_2, 0), (b"\x25" + bytes(9), 7)):
            answer = lab.ask(cdb, room)
            assert (answer.response, answer.status, answer.data) == (1, 0, b"")
            assert answer.residual == room
        assert lab.ask(INQUIRY, out=bytes(36)).response == 1  # a buffer in the other direction


def test_5_6_6_1_both_directions_fail(tmp_path: Path) -> None:
    """Without INOUT a command with data in and data out gets FAILURE."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        answer = lab.ask(INQUIRY, 36, out=b"x")
        assert (answer.response, answer.residual, answer.data) == (9, 37, b"")


@pytest.mark.parametrize(
    ("subtype", "here", "elsewhere"),
    [
        *((subtype, 0, 12) for subtype in (0, 1, 3, 5, 6, 7)),
        (4, 0, 0),  # I_T NEXUS RESET: the LUN is ignored
        *((subtype, 11, 12) for subtype in (2, 8, 0xFFFFFFFF)),
    ],
)
def test_5_6_6_2_task_management(tmp_path: Path, subtype: int, here: int, elsewhere: int) -> None:
    """Nothing is left to abort: FUNCTION COMPLETE; REJECTED, INCORRECT_LUN, BAD_TARGET as due."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        assert lab.manage(subtype) == here
        assert lab.manage(subtype, b"\1\0\0\5" + bytes(4)) == elsewhere
        assert lab.manage(subtype, b"\1\1" + bytes(6)) == 3


@pytest.mark.parametrize(("subtype", "ascq"), [(4, 7), (5, 3)])
def test_a_reset_by_task_management(tmp_path: Path, subtype: int, ascq: int) -> None:
    """It ends the lock, and the next command is told which reset it was."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        assert lab.ask(b"\x1e\0\0\0\1\0").status == 0
        assert lab.device.drive.locked
        lab.manage(subtype)
        assert not lab.device.drive.locked
        assert lab.ask(bytes(6)).key == (6, 0x29, ascq)
        assert lab.ask(bytes(6)).status == 0


def test_5_6_6_2_asynchronous_notification(tmp_path: Path) -> None:
    """Media events there are; query changes nothing, another subscription replaces the last."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        assert lab.notify(1, 0xFFFFFFFF) == (16, 0)
        lab.offer([], [16], queue=EVENTQ)
        lab.device.setting("eject", [False, 0])
        lab.serve()
        assert lab.queues[EVENTQ].collect() == []
        assert lab.notify(2, 0x7E) == (16, 0)
        lab.insert(DISC)
        lab.serve()
        [used] = lab.queues[EVENTQ].collect()
        assert used.written == EVENT.size
        assert EVENT.unpack(lab.queues[EVENTQ].data(used.request)) == (2, DRIVE_LUN, 16)
        assert EVENTQ in lab.interrupts
        assert lab.notify(2, 0x6E) == (0, 0)
        lab.offer([], [16], queue=EVENTQ)
        lab.device.setting("eject", [False, 0])
        lab.serve()
        assert lab.queues[EVENTQ].collect() == []
        assert lab.notify(2, 16, b"\1\0\0\1" + bytes(4)) == (0, 12)
        assert lab.notify(1, 16, b"\1\1" + bytes(6)) == (0, 3)


def test_5_6_6_3_missed_events_are_told(tmp_path: Path) -> None:
    """No buffer: the event is lost, and the next buffer says so; a reset forgets it."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        lab.notify(2, 16)
        lab.device.setting("eject", [False, 0])
        lab.serve()
        lab.offer([], [16], queue=EVENTQ)
        lab.schedule(EVENTQ)
        lab.serve()
        [used] = lab.queues[EVENTQ].collect()
        assert EVENT.unpack(lab.queues[EVENTQ].data(used.request)) == (0x80000000, bytes(8), 0)
        lab.offer([], [4], queue=EVENTQ)  # too short to say what happened
        lab.offer([], [16], queue=EVENTQ)
        lab.insert(DISC)
        lab.serve()
        short, full = lab.queues[EVENTQ].collect()
        assert (short.written, lab.queues[EVENTQ].data(short.request)) == (4, bytes(4))
        assert EVENT.unpack(lab.queues[EVENTQ].data(full.request)) == (2, DRIVE_LUN, 16)
        lab.device.setting("eject", [False, 0])
        lab.serve()
        lab.start()
        lab.offer([], [16], queue=EVENTQ)
        lab.schedule(EVENTQ)
        lab.serve()
        assert lab.queues[EVENTQ].collect() == []


@pytest.mark.parametrize(
    ("data", "room", "answer"),
    [
        (b"\3\0\0\0", 1, b"\x09"),  # an unknown type
        (b"\xff" * 24, 5, b"\x09" + bytes((UNWRITTEN,)) * 4),
        (TMF.pack(0, 0, DRIVE_LUN, 0), 1, b"\0"),
        (TMF.pack(0, 0, DRIVE_LUN, 0) + b"more", 9, b"\0" + bytes((UNWRITTEN,)) * 8),
        (TMF.pack(0, 0, DRIVE_LUN, 0)[:23], 1, None),
        (TMF.pack(0, 0, DRIVE_LUN, 0), 0, None),
        (AN.pack(1, DRIVE_LUN, 0), 4, None),
        (AN.pack(1, DRIVE_LUN, 0)[:15], 5, None),
        (b"\0\0\0", 1, None),
    ],
)
def test_control_requests_of_every_length(
    tmp_path: Path, data: bytes, room: int, answer: bytes | None
) -> None:
    """An unknown one gets FAILURE; one that is cut short breaks the device until a reset."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        if answer is not None:
            assert lab.ask_raw([data], [room], queue=CONTROLQ)[1] == answer
            return
        lab.offer([data], [room] if room else [], queue=CONTROLQ)
        lab.schedule(CONTROLQ)
        with pytest.raises(Exception, match="SCSI control request"):
            lab.serve()
        lab.start()
        assert lab.manage(0) == 0


def test_a_budget_ends_a_turn(tmp_path: Path) -> None:
    """Twelve reads of 512 KiB take more than one turn; all are done, and there was one call."""
    with ScsiLab(tmp_path, DISC * 32) as lab:
        lab.start(arena_bytes=1 << 20)
        driver = lab.queues[REQUESTQ]
        header = driver.place(
            [HEADER.pack(DRIVE_LUN, 1, 0, 0, 0) + b"\x28" + bytes(6) + b"\1" + bytes(24)]
        )
        data = Segment(driver.arena.take(1 << 19), 1 << 19, writable=True)
        for _ in range(12):
            response = driver.place([], [108]).segments[0]
            driver.submit(driver.place_at([*header.segments, response, data], indirect=False))
        queue = lab.registers.transport.live[REQUESTQ]
        assert queue is not None
        turns = 1
        while lab.device.kick(REQUESTQ, queue):
            turns += 1
        assert turns == 2
        assert [used.written for used in driver.collect()] == [108 + (1 << 19)] * 12
        assert lab.memory.read(data.gpa, data.length) == DISC * 32


def test_state_goes_over_to_a_successor(tmp_path: Path) -> None:
    """What save() gives, load() takes: sizes, lock, attention, subscription."""
    with ScsiLab(tmp_path, DISC) as lab, ScsiLab(tmp_path) as next_lab:
        lab.start()
        lab.write_config(24, 4, 16)
        lab.ask(b"\x1e\0\0\0\1\0")
        lab.cdb_size = 16
        lab.ask(b"\x1e\0\0\0\1\0")
        lab.notify(2, 16)
        lab.manage(5)
        next_lab.device.load(lab.device.save())
        assert next_lab.device.save() == lab.device.save()
        assert next_lab.read_config(24, 4) == 16


def fire(lab: ScsiLab) -> None:
    """Let a while pass."""
    for timer in lab.timers:
        timer.fire()


def test_the_tray_is_told_at_most_so_often(tmp_path: Path) -> None:
    """A guest that plays with the tray has the VM process woken once, when all is written down."""
    with ScsiLab(tmp_path, DISC) as lab:
        lab.start()
        for _ in range(100):
            lab.ask(b"\x1b\0\0\0\2\0")
            lab.ask(b"\x1b\0\0\0\3\0")
        lab.ask(b"\x1e\0\0\0\1\0")
        assert lab.told == []
        fire(lab)
        assert lab.told == ["locked 1"]
        fire(lab)
        assert lab.told == ["locked 1"]
        lab.ask(b"\x1b\0\0\0\2\0")
        lab.ask(b"\x1e\0\0\0\0\0")
        fire(lab)
        lab.insert(DISC)
        lab.device.setting("eject", [False, 7])
        fire(lab)
        assert lab.told == ["locked 1", "closed 1", "open 0"]
        assert lab.status & NEEDS_RESET == 0
