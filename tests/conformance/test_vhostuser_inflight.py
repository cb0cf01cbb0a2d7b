"""Back ends that are killed: the next one goes on, and the driver sees each request done once."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from devices.blkreq import HEADER, S_OK, T_IN, T_OUT
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from devices.vhostarea import make_inflight, map_area, split_inflight, stride
from devices.vhostask import RefusedError
from devices.vhostfront import FrontEnd, InflightArea
from devices.vhostlog import PAGE, DirtyLog, open_logged
from devices.vhostwire import F_LOG_ALL
from tests.conformance.process_lab import Lab, script
from tests.conformance.ring_lab import RAM
from tests.rng import seeded
from tests.stores import Killed
from tests.vhostlab import DEADLINE, Program, Session
from tools.viodriver import NoRoomError

if TYPE_CHECKING:
    from pathlib import Path

    from devices.virtqueue import VirtQueue

SIZE = 1 << 20
LAYOUTS = [F_INDIRECT_DESC, F_RING_PACKED | F_EVENT_IDX]


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_whose_device_process_is_killed_over_and_over(
    layout: int, cache: str, tmp_path: Path
) -> None:
    """SIGKILL under load, eight times: no request is lost or done twice, all data is right."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    expected = bytearray(SIZE)
    rng = seeded(5)
    with (
        Program("vioblk", str(path), "--format", "raw", "--cache", cache) as program,
        Session(program.connect()) as session,
    ):
        session.begin(layout, inflight=True)
        queue = session.queues[0]
        asked: dict[int, tuple[int, bytes]] = {}
        done: set[int] = set()

        def offer() -> None:
            """Write to places that nothing in flight is about."""
            busy = {place for token, (place, _) in asked.items() if token not in done}
            for place in rng.sample(range(SIZE // 4096), 40):
                if place in busy:
                    continue
                data = os.urandom(4096)
                try:
                    token = queue.add([HEADER.pack(T_OUT, 0, 8 * place), data], [1])
                except NoRoomError:
                    return
                asked[token] = place, data
                busy.add(place)

        def collect() -> None:
            for used in queue.collect():
                place, data = asked[used.token]
                assert used.token not in done
                assert (used.written, queue.data(used.request)) == (1, bytes((S_OK,)))
                done.add(used.token)
                expected[4096 * place : 4096 * (place + 1)] = data

        for life in range(8):
            goal = len(done) + rng.randrange(1, 200)
            while len(done) < goal:
                offer()
                session.kick(0)
                if not queue.enable_calls():
                    assert session.wait_call(0, DEADLINE)
                collect()
            offer()
            session.kick(0)
            program.kill_device()
            program.wait_said("was killed by signal 9", life + 1)
            session.reconnect(program.connect())
        while queue.outstanding:
            if not queue.enable_calls():
                assert session.wait_call(0, DEADLINE)
            collect()
        assert done == asked.keys()
        for place in rng.sample(range(SIZE // 4096), 64):
            _, data = session.ask(0, HEADER.pack(T_IN, 0, 8 * place), room=(4096, 1))
            assert data == bytes(expected[4096 * place : 4096 * (place + 1)]) + bytes((S_OK,))
        assert session.front.stop_queue(0) == session.front.stop_queue(0)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_that_was_stopped_leaves_nothing_to_take_over(layout: int) -> None:
    """The base counts then, not what the area says."""
    with Program("viornd") as program, Session(program.connect()) as session:
        session.begin(layout, inflight=True)
        for turn in range(3):
            for _ in range(5):
                assert session.ask(0, room=(16,))[0] == 16
            base = session.front.stop_queue(0)
            program.kill_device()
            program.wait_said("was killed by signal 9", turn + 1)
            session.front.close()
            session.front = FrontEnd(program.connect(), DEADLINE)
            session.front.negotiate()
            session.resume([base])
        assert session.ask(0, room=(16,))[0] == 16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_area_that_somebody_has_written_to(layout: int) -> None:
    """Whatever is in it: an error of that ring, or a ring that works; never a crash."""
    rng = seeded(11)
    with Program("viornd") as program:
        for _ in range(40):
            with Session(program.connect(), 1 << 20) as session:
                session.front.negotiate()
                session.make_queues(layout | 1 << 32, 1, 8)
                fd, size = make_inflight(1, 8)
                area = map_area(fd, 0, size, "area")
                words = [1, 8, int(bool(layout & F_RING_PACKED)), rng.randrange(1 << 16)]
                for at, word in enumerate(words):
                    area[2 * at : 2 * at + 2] = word.to_bytes(2, "little")
                for _ in range(rng.randrange(200)):
                    area[rng.randrange(8, 400)] = rng.randrange(256)
                session.inflight = InflightArea(fd, size, 0, 1, 8)
                with suppress(RefusedError):
                    session.resume()
                session.queues[0].add([], [16])
                session.kick(0)
                session.front.status()
        assert "killed by signal" not in program.said()
        assert "Error" not in program.said()


def test_areas_are_sealed_and_large_enough() -> None:
    """Nobody can cut one short under us, and any queue of that size fits."""
    fd, size = make_inflight(3, 128)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    areas = split_inflight(map_area(fd, 0, size, "area"), 3, 128)
    assert [len(area) for area in areas] == [stride(128)] * 3
    os.close(fd)


class LoggedLab(Lab):
    """A lab whose device processes log what they write."""

    def start(self, kill_at: int | None = None) -> VirtQueue:
        self.watch.log.clear()
        self.watch.kill_at = kill_at
        driver = self.driver
        log = DirtyLog(memoryview(bytearray(RAM // PAGE // 8)))
        log.cover(self.memory.spans)
        return open_logged(
            self.memory,
            self.size,
            driver.desc_gpa,
            driver.avail_gpa,
            driver.used_gpa,
            features=driver.features,
            inflight=self.watch.view("area", self.area),
            in_order=False,
            log=log,
            log_gpa=driver.used_gpa,
        )


@pytest.mark.parametrize("features", [F_LOG_ALL, F_LOG_ALL | F_RING_PACKED])
def test_logged_queues_can_be_killed_at_every_store(features: int) -> None:
    """What holds for the others holds for them: see test_inflight.py."""
    kill_at = 0
    while True:
        lab = LoggedLab(features & ~F_LOG_ALL)
        lab.offer(1, 1, 2, 1, 1)
        try:
            script(lab.start(kill_at))
        except Killed:
            lab.collect()
            lab.finish(lab.start())
            lab.close()
            kill_at += 1
        else:
            lab.close()
            break
    assert kill_at > 60
