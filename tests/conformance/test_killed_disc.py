"""A CD-ROM drive whose process is killed at any instant: its guest never notices.

What a guest does is done twice: by a drive that lives, and by one that dies all the time. Answers,
events, and what the VM process knows are the same, in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
from functools import partial
from struct import pack
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.errors import HostError, PyvmError
from devices.disc import BLOCK
from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.scsi import UNIT_ATTENTION
from devices.scsireq import AN, AN_ANSWER, DRIVE_LUN, EVENT
from devices.spec import JOURNAL_HALF
from devices.vioscsi import CONTROLQ, EVENTQ
from tests.disclab import DiscLab
from tests.pluglab import PlugLab, wait_until
from tests.rng import seeded
from tools.viodriver.device import VirtioDevice
from tools.viodriver.registers import READY as READY_STATUS
from tools.viodriver.scsi import Scsi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from random import Random

RING: Final = F_INDIRECT_DESC | F_EVENT_IDX
RINGS: Final = [F_INDIRECT_DESC, RING, RING | F_RING_PACKED, RING | F_IN_ORDER]
DISC: Final = bytes(range(256)) * (BLOCK // 256) * 3
OTHER: Final = bytes(reversed(range(256))) * (BLOCK // 256) * 5

READY: Final = bytes(6)
SENSE: Final = b"\3\0\0\0\x12\0"
OPEN, CLOSE = b"\x1b\0\0\0\2\0", b"\x1b\0\0\0\3\0"
LOCK, UNLOCK = b"\x1e\0\0\0\1\0", b"\x1e\0\0\0\0\0"
POLL: Final = b"\x4a\1\0\0\x10\0\0\0\x08\0"
CAPACITY: Final = b"\x25" + bytes(9)
READ: Final = b"\x28\0\0\0\0\1\0\0\2\0"
SUBSCRIBE: Final = 2
CLOSED: Final = {"tray_open": False, "locked": False}
KILLED: Final = 25  # processes in a test

COMMANDS: Final = [
    (READY, 0),
    (SENSE, 18),
    (OPEN, 0),
    (CLOSE, 0),
    (LOCK, 0),
    (UNLOCK, 0),
    (POLL, 8),
    (CAPACITY, 8),
    (READ, 2 * BLOCK),
    (b"\xff" * 10, 0),
]


def act(lab: DiscLab, action: str, content: bytes = b"", *, force: bool = False) -> Any:
    """Have the VM process do something; return what it says of the drive, or why not."""
    fd = lab.burn(content, f"{len(content)}.iso") if content else -1
    try:
        facts = lab.vm.act(action, force=force, fd=fd, path=str(len(content)))
        assert len(lab.vm.fds) == bool(facts["medium"])
        assert images() == 2 * len(lab.vm.fds) + (fd >= 0)
        return dict(facts)
    except HostError as err:
        return err.what
    finally:
        if fd >= 0:
            os.close(fd)


def images() -> int:
    """How many descriptors of discs this process has."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(".iso" in os.readlink(link) for link in links if os.path.lexists(link))


def step(lab: DiscLab, rng: Random) -> Any:
    """Do one thing, of those that guest and VM process may do."""
    match rng.randrange(20):
        case 0:
            return lab.manage(rng.choice((4, 5)))
        case 1:
            return lab.notify(SUBSCRIBE, rng.choice((0, 16, 16)))
        case 2 | 3:
            if lab.queues[EVENTQ].outstanding < 4:
                lab.queues[EVENTQ].add([], [rng.choice((EVENT.size, EVENT.size, 4))])
                lab.schedule(EVENTQ)
                lab.serve()
            return None
        case 4:
            return act(lab, "eject", force=rng.random() < 0.3)
        case 5:
            return act(lab, "load")
        case 6 | 7:
            return act(lab, "insert", rng.choice((DISC, OTHER)), force=rng.random() < 0.3)
        case 8:
            lab.write_config(rng.choice((20, 24)), 4, rng.choice((32, 96)))
            lab.sense_size, lab.cdb_size = lab.read_config(20, 4), lab.read_config(24, 4)
            return lab.sense_size, lab.cdb_size
        case 9:
            lab.pass_time()
            return dict(lab.vm.facts)
    return lab.ask(*rng.choice(COMMANDS))


def run(
    directory: Path, ring: int, content: bytes | None, seed: int, dying: Random | None
) -> tuple[list[Any], int]:
    """Do a sequence of such steps; return all that anybody heard, and how many lives it took."""
    rng = seeded(seed)
    lab = DiscLab(directory, content, packed=bool(ring & F_RING_PACKED), dying=dying)
    try:
        lab.start(ring, size=8)
        heard: list[Any] = [(step(lab, rng), lab.events()) for _ in range(40)]
        lab.pass_time()
        lab.pass_time()
        heard.append(dict(lab.vm.facts))
    finally:
        lab.close()
    assert images() == 0
    return heard, lab.lives


@pytest.mark.parametrize("ring", RINGS)
def test_any_sequence_with_deaths_at_any_line(ring: int, tmp_path: Path) -> None:
    """Commands, resets, events, discs, and sizes, while processes die, also over beginning."""
    lives = 0
    for seed in range(20):
        content = DISC if seed % 4 else None
        expected, one = run(tmp_path, ring, content, seed, None)
        assert one == 1
        heard, count = run(tmp_path, ring, content, seed, seeded(seed))
        assert heard == expected, seed
        lives += count
    assert lives > 20 * 10


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    """Between a death and the VM process's next try, a guest may have done anything."""
    lab = DiscLab(tmp_path, DISC, dying=None)
    lab.start(RING)
    lab.ask(READY)
    tries: list[str] = []

    def twice(name: str, value: Any, fd: int) -> Any:
        """Lose the first answer."""
        lab._send(name, value, fd)
        lab.checkpoint()
        lab.die()
        tries.append(name)
        lab.ask(SENSE, 18)
        assert lab.ask(CLOSE).status == lab.ask(LOCK).status == 0
        return lab._send(name, value, fd)

    lab.vm.send = twice
    locked = {"tray_open": False, "locked": True}
    assert act(lab, "eject") == {"medium": None, **locked}
    assert act(lab, "insert", OTHER, force=True) == {"medium": str(len(OTHER)), **locked}
    lab.ask(READY)
    assert lab.ask(READ, 2 * BLOCK).data == OTHER[BLOCK : 3 * BLOCK]
    assert tries == ["eject", "insert"]

    def refused(name: str, value: Any, fd: int) -> Any:
        """Lose the first answer, which was a refusal."""
        with pytest.raises(HostError):
            lab._send(name, value, fd)
        lab.die()
        while lab.ask(POLL, 8).data[4]:
            pass
        assert lab.ask(UNLOCK).status == 0
        return lab._send(name, value, fd)

    lab.vm.send = refused
    assert "has locked the tray" in act(lab, "eject")
    assert lab.ask(POLL, 8).data[4:6] == b"\0\2"  # no event since, and there is a disc
    lab.close()


# The same with processes, jailed, and the VM process's own way to replace them.


class PlugDisc(PlugLab):
    """A drive in a process, and a guest's driver."""

    def __init__(self, path: Path, ring: int, *, killed: bool = False) -> None:
        """Start it with the disc at `path`; `killed`: before anybody has looked at it."""
        super().__init__("vioscsi", 3, packed=bool(ring & F_RING_PACKED), cdrom=str(path))
        if killed:
            self.wait_life(0, self.kill())
        drive = self.devices.drive
        assert drive is not None
        self.drive = drive
        self.devices.on_event = lambda _, word: drive.said(word)
        self.guest = VirtioDevice(self)
        self.guest.start(ring, size=32)
        self.scsi, self.events = Scsi(self.guest), self.guest.acquire(EVENTQ)
        for _ in range(8):
            self.offer_event()

    def offer_event(self) -> None:
        """Give the device one more buffer for an event."""
        buffer = self.events.take(EVENT.size)
        self.events.start(buffer, 1)
        self.events.add([(buffer, EVENT.size)], writable=True)
        self.events.flush()

    def await_events(self, count: int) -> list[bytes]:
        """Wait for so many, and return all there are."""
        found = []
        done = self.events.wait(count) if count else []
        for buffer, written in done + self.events.poll():
            found.append(self.memory.read(buffer, written))
            self.events.give(buffer, EVENT.size)
            self.offer_event()
        return found

    def act(self, action: str, path: Path | None = None, *, force: bool = False) -> Any:
        """Have the VM process do something; return what it says of the drive, or why not."""
        fd = os.open(path, os.O_RDONLY) if path else -1
        try:
            move = partial(self.drive.act, action, force=force, fd=fd, path=str(path))
            facts = self.on_loop(move)
            assert len(self.drive.fds) == bool(facts["medium"])
            return dict(facts)
        except PyvmError as err:
            return err.what.split(" (")[0]
        finally:
            if fd >= 0:
                os.close(fd)

    def read_disc(self) -> bytes:
        """Read all of the disc, whatever attention there is."""
        while not (found := self.scsi.command(CAPACITY, 8)).good:
            if found.key[0] != UNIT_ATTENTION:
                return b""
        count = int.from_bytes(found.data[:4], "big") + 1
        cdb = b"\x28\0" + bytes(5) + count.to_bytes(2, "big") + b"\0"
        return self.scsi.command(cdb, count * BLOCK).data

    @contextlib.contextmanager
    def killing(self) -> Iterator[None]:
        """Kill its processes, at random moments, some young, some not."""
        stop, rng = threading.Event(), seeded(8)

        def kill() -> None:
            number = 0
            while not stop.wait(0.07 if number % 8 == 7 else rng.uniform(0, 0.02)):
                number += 1
                with contextlib.suppress(OSError):
                    if self.device.process is not None:
                        self.device.process.kill()

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("ring", [RING, RING | F_RING_PACKED])
def test_any_sequence_with_processes_killed(ring: int, tmp_path: Path) -> None:
    """Answers and events are those of a drive that lives."""
    rng = seeded(7)
    model = DiscLab(tmp_path, DISC, dying=None)
    model.start(RING)
    for _ in range(64):
        model.offer([], [EVENT.size], queue=EVENTQ)
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], ring) as lab, lab.killing():
        for number in itertools.count():
            if len(lab.replaced) >= KILLED:
                break
            assert not lab.lost
            what = rng.randrange(12)
            if what == 0:
                assert lab.scsi.manage(5) == model.manage(5)
            elif what == 1 and number % 2:
                content = rng.choice((DISC, OTHER))
                told = lab.act("insert", paths[content])
                expected = act(model, "insert", content)
                if isinstance(expected, dict):
                    expected["medium"] = str(paths[content])
                assert told == expected
            elif what == 1:
                subscribe(lab.guest)
                assert model.notify(SUBSCRIBE, 16) == (16, 0)
            else:
                cdb, room = rng.choice(COMMANDS)
                found, wanted = lab.scsi.command(cdb, room), model.ask(cdb, room)
                assert (found.response, found.status, found.sense, found.data) == (
                    (wanted.response, wanted.status, wanted.sense, wanted.data)
                ), (number, cdb.hex())
            events = model.events()
            for _ in events:
                model.offer([], [EVENT.size], queue=EVENTQ)
            assert lab.await_events(len(events)) == events, number
        assert lab.status == READY_STATUS
    model.close()


def burn(directory: Path) -> dict[bytes, Path]:
    """Return images of both discs."""
    paths = {content: directory / f"{len(content)}.img" for content in (DISC, OTHER)}
    for content, path in paths.items():
        path.write_bytes(content)
    return paths


def subscribe(guest: VirtioDevice) -> None:
    """Have media events sent."""
    queue = guest._acquired[CONTROLQ]
    request, answer = queue.take(AN.pack(SUBSCRIBE, DRIVE_LUN, 16)), queue.take(5)
    queue.start(None, 2)
    queue.add([(request, AN.size)])
    queue.add([(answer, 5)], writable=True)
    queue.wait()
    assert guest.transport.memory.read(answer, 5) == AN_ANSWER.pack(16, 0)
    queue.give(request, AN.size)
    queue.give(answer, 5)


def test_discs_change_while_processes_are_killed(tmp_path: Path) -> None:
    """What is read, what is told, and which descriptors are kept agree after each change."""
    paths, rng = burn(tmp_path), seeded(9)
    with PlugDisc(paths[DISC], RING) as lab:
        before, content = len(os.listdir("/proc/self/fd")), DISC
        with lab.killing():
            while len(lab.replaced) < KILLED:
                assert not lab.lost
                if rng.random() < 0.5:
                    content = rng.choice((DISC, OTHER))
                    facts = lab.act("insert", paths[content])
                    assert facts == {"medium": str(paths[content]), **CLOSED}
                elif rng.random() < 0.5:
                    content = b""
                    facts = lab.act("eject")
                    assert facts == {"medium": None, "tray_open": True, "locked": False}
                assert lab.read_disc() == content
                assert lab.facts()["medium"] == (str(paths[content]) if content else None)
        assert lab.status == READY_STATUS
        assert lab.act("insert", paths[DISC])["medium"] == str(paths[DISC])
        assert lab.read_disc() == DISC
        assert len(os.listdir("/proc/self/fd")) == before
        process = f"/proc/{lab.facts()['pid']}/fd"
        links = [os.readlink(f"{process}/{fd}") for fd in os.listdir(process)]
        assert [link for link in links if link.endswith(".img")] == [str(paths[DISC])]


def test_however_often_one_that_works_is_killed(tmp_path: Path) -> None:
    """Processes that have done something are not given up, and count on."""
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        for _ in range(30):
            lab.wait_life(0, lab.kill())
            assert lab.read_disc() == DISC
        counted = lab.page.read()
        assert counted["requests"] >= 61  # one of them told of the power-on
        assert counted["read_bytes"] >= 30 * len(DISC)


def test_killed_before_there_is_a_driver(tmp_path: Path) -> None:
    """The disc that the VM began with is in the drive."""
    with PlugDisc(burn(tmp_path)[DISC], RING, killed=True) as lab:
        assert lab.scsi.command(READY).key == (UNIT_ATTENTION, 0x29, 0)
        assert lab.read_disc() == DISC
        assert lab.facts()["medium"] is not None


def test_a_lock_outlives_processes(tmp_path: Path) -> None:
    """Only force takes the disc of a guest that has locked it, and was killed for."""
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        lab.scsi.command(READY)
        assert lab.scsi.command(LOCK).good
        lab.wait_life(0, lab.kill())
        wait_until(lambda: bool(lab.facts()["locked"]))
        for action in ("eject", "insert"):
            told = lab.act(action, paths[OTHER] if action == "insert" else None)
            assert told == "the guest has locked the tray; it has been asked to eject"
            lab.kill()
        assert lab.read_disc() == DISC
        assert lab.act("insert", paths[OTHER], force=True)["medium"] == str(paths[OTHER])
        lab.kill()
        assert lab.read_disc() == OTHER


def test_a_disc_is_as_large_as_when_it_went_in(tmp_path: Path) -> None:
    """An image that is cut off is an unreadable place for the next process, too."""
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        assert lab.read_disc() == DISC
        os.truncate(paths[DISC], 0)
        lab.wait_life(0, lab.kill())
        assert lab.scsi.command(CAPACITY, 8).data == pack(">II", 2, BLOCK)
        assert lab.scsi.command(READ, 2 * BLOCK).key == (3, 0x11, 0)
        assert lab.facts()["medium"] == str(paths[DISC])


def test_a_late_insert_is_told(tmp_path: Path) -> None:
    """A drive that was busy has the disc in later, and status says so; or it was killed first."""
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        lab.scsi.command(READY)
        os.kill(lab.facts()["pid"], signal.SIGSTOP)
        assert "is busy" in lab.act("insert", paths[OTHER])
        assert lab.facts()["medium"] == str(paths[DISC])
        os.kill(lab.facts()["pid"], signal.SIGCONT)
        wait_until(lambda: lab.facts()["medium"] == str(paths[OTHER]))
        assert lab.read_disc() == OTHER
        assert len(lab.drive.fds) == 1

        os.kill(lab.facts()["pid"], signal.SIGSTOP)
        assert "is busy" in lab.act("insert", paths[DISC])
        lab.wait_life(0, lab.kill())
        assert lab.read_disc() == OTHER
        assert lab.facts()["medium"] == str(paths[OTHER])
        assert lab.act("load")["medium"] == str(paths[OTHER])
        assert len(lab.drive.fds) == 1


NONSENSE: Final[list[tuple[str, Any]]] = [
    ("sizes", [1 << 80, 0]),
    ("pending", []),
    ("once", [[2, 0, 1 << 40]]),
    ("once", [["x"]]),
    ("drive", {"tray_open": 0, "locked": 0, "attentions": [[900, 0, 0]], "events": []}),
    ("drive", {"tray_open": 0, "locked": 0, "attentions": [{}, 7], "events": []}),
    ("drive", {"tray_open": 0, "locked": 0, "attentions": [[1] * 9], "events": [1 << 70]}),
    ("changer", {"disc": 1, "size": 1 << 90, "acted": 0, "refusal": ""}),
]


@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_a_journal_that_makes_no_sense(number: int, tmp_path: Path) -> None:
    """The drive is lost, with last words; the VM process and other devices have nothing of it."""
    key, value = NONSENSE[number]
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        lab.scsi.command(READY)
        forge(lab, {key: value})
        lab.device.process.kill()  # type: ignore[union-attr]
        wait_until(lambda: bool(lab.lost))
        assert "20 processes in a row died" in lab.lost
        assert lab.status == 0xFF
        assert "has died" in lab.act("insert", paths[OTHER])
        states = {row["name"]: row["state"] for row in lab.on_loop(lab.devices.facts)}
        assert states == {"viornd": "running", "vioscsi": "lost"}


def test_a_journal_that_makes_sense_but_is_not_so(tmp_path: Path) -> None:
    """Another disc's number is no disc, and the rest is the guest's trouble alone."""
    paths = burn(tmp_path)
    with PlugDisc(paths[DISC], RING) as lab:
        lab.scsi.command(READY)
        changer = {"disc": 77, "size": 1, "acted": 1 << 60, "refusal": "no"}
        forge(lab, {"once": [[0, 5, 9], [1, 2, 3], [2, 99, 1], [-3, 0, 0]], "changer": changer})
        lab.wait_life(0, lab.kill())
        assert lab.read_disc() == b""
        wait_until(lambda: lab.facts()["medium"] is None)
        assert lab.act("insert", paths[OTHER])["medium"] == str(paths[OTHER])
        assert lab.read_disc() == OTHER
        assert not lab.lost


def forge(lab: PlugDisc, changes: dict[str, Any]) -> None:
    """Write into the journal, as a process that was taken over can."""
    assert lab.device.lasting is not None
    journal = lab.device.lasting.fds["journal"]
    at = max((0, JOURNAL_HALF), key=lambda half: os.pread(journal, 8, half)[::-1])
    size = int.from_bytes(os.pread(journal, 8, at + 8), "little")
    state = json.loads(os.pread(journal, size, at + 24))
    state["device"] |= changes
    text = json.dumps(state).encode()
    os.pwrite(journal, len(text).to_bytes(8, "little"), at + 8)
    os.pwrite(journal, text, at + 24)
