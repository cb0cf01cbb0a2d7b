"""Entropy, a CD-ROM drive and a network interface behind a vhost-user socket, both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices import nethdr as hdr
from devices.disc import BLOCK
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from devices.scsireq import DRIVE_LUN, HEADER, RESPONSE
from tests.taplab import TapLab
from tests.vhostlab import DEADLINE, Program, Session
from tests.vionetlab import OWN, PEER

if TYPE_CHECKING:
    from pathlib import Path

LAYOUTS = [F_INDIRECT_DESC | F_EVENT_IDX, F_RING_PACKED]
DISC = b"".join(bytes((block,)) * BLOCK for block in range(64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropy(layout: int) -> None:
    """Whole buffers of it, never twice the same; a rate is kept by a timer in the jail."""
    with Program("viornd", "--rate", "1M") as program, Session(program.connect()) as session:
        session.begin(layout)
        answers = {session.ask(0, room=(4096,)) for _ in range(300)}
        assert len(answers) == 300
        assert {written for written, _ in answers} == {4096}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_drive(layout: int, tmp_path: Path) -> None:
    """The disc can be read, and stays in the drive for the next front end, tray and all."""
    path = tmp_path / "disc.iso"
    path.write_bytes(DISC)

    def command(session: Session, cdb: bytes, room: int = 0) -> tuple[int, int, bytes]:
        header = HEADER.pack(DRIVE_LUN, 1, 0, 0, 0) + cdb.ljust(32, b"\0")
        written, data = session.ask(2, header, room=(108, *((room,) if room else ())))
        _, _, _, status, response = RESPONSE.unpack_from(data)
        return response, status, data[108:written]

    with Program("vioscsi", "--cdrom", str(path)) as program:
        for _ in range(2):
            with Session(program.connect()) as session:
                session.begin(layout, 3)
                assert command(session, bytes(6))[1] == 2  # unit attention: power on
                read = b"\x28\0" + (5).to_bytes(4, "big") + b"\0" + (3).to_bytes(2, "big")
                assert command(session, read, 3 * BLOCK) == (0, 0, DISC[5 * BLOCK : 8 * BLOCK])
                assert command(session, b"\x1b\0\0\0\2") == (0, 0, b"")  # eject
                assert command(session, read, 3 * BLOCK)[1] == 2
        program.wait_said("open")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interface(layout: int) -> None:
    """Frames both ways, with the control queue in the monitor's hands as with QEMU."""
    frames = [OWN + PEER + b"\x08\x00" + bytes((n,)) * 100 for n in range(20)]
    with TapLab() as tap:
        fd = tap.fds[0]
        with (
            Program("vionet", "--tap-fd", str(fd), fds=[fd]) as program,
            Session(program.connect()) as session,
        ):
            rx, tx = session.begin(layout | hdr.NET_F_MRG_RXBUF, 2)
            rx.enable_calls()
            for _ in range(32):
                rx.add([], [2048])
            session.kick(0)
            for frame in frames:
                written, _ = session.ask(1, bytes(12) + PEER + OWN + frame[12:])
                assert not written
            assert [sent.data[12:] for sent in tap.receive(20)] == [frame[12:] for frame in frames]
            for frame in frames:
                tap.send(frame)
            received: list[bytes] = []
            while len(received) < 20:
                if not rx.enable_calls():
                    assert session.wait_call(0, DEADLINE)
                received += [rx.data(used.request, used.written)[12:] for used in rx.collect()]
            assert received == frames
            # What was not used goes back: the ring can be stopped, and gone on with.
            base = session.front.stop_queue(0)
            session.start(0, base)
            tap.send(frames[0])
            while not (found := rx.collect()):
                if not rx.enable_calls():
                    assert session.wait_call(0, DEADLINE)
            assert rx.data(found[0].request, found[0].written)[12:] == frames[0]
        assert tx.outstanding == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_used_as_their_rings_are_enabled(layout: int) -> None:
    """A monitor that has the control queue says by SET_VRING_ENABLE how many pairs there are."""
    with TapLab(queues=2) as tap:
        arguments = [word for fd in tap.fds for word in ("--tap-fd", str(fd))]
        with (
            Program("vionet", *arguments, "--queues", "2", fds=tap.fds) as program,
            Session(program.connect()) as session,
        ):
            session.front.negotiate()
            assert session.front.queue_count() == 2
            session.make_queues(session.features | layout | hdr.NET_F_MQ | 1 << 32, 4, 128)
            session.resume()
            for index in (2, 3):
                session.front.enable_queue(index, on=False)
            frame = bytes(12) + PEER + OWN + b"\x08\x00" + bytes(50)
            session.ask(3, frame)  # processed, and thrown away
            session.ask(1, frame)
            assert len(tap.receive(1)) == 1
            session.front.enable_queue(2)
            session.front.enable_queue(3)
            session.ask(3, frame)
            assert len(tap.receive(1)) == 1
