"""A disk behind a vhost-user socket: the program, its jail, and requests in both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.blkreq import BLK_F_FLUSH, HEADER, S_IOERR, S_OK, T_FLUSH, T_GET_ID, T_IN, T_OUT
from devices.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from tests.vhostlab import Program, Session

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)
LAYOUTS = [F_INDIRECT_DESC, F_RING_PACKED | F_EVENT_IDX]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    return path


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_request(image: Path, layout: int, cache: str) -> None:
    """Reads, writes, flush, id and what cannot be: all in the jail, twice in a row."""
    options = ("--format", "raw", "--serial", "serial-7", "--cache", cache)
    with Program("vioblk", str(image), *options) as program:
        for _ in range(2):
            with Session(program.connect()) as session:
                session.begin(layout | BLK_F_FLUSH)

                def ask(kind: int, sector: int, *data: bytes, room: int = 0) -> tuple[int, bytes]:
                    parts = (HEADER.pack(kind, 0, sector), *data)
                    rooms = (room, 1) if room else (1,)
                    written, answer = session.ask(0, *parts, room=rooms)
                    assert written == (len(answer) if answer[-1] == S_OK else 0)
                    return answer[-1], answer[:-1]

                assert ask(T_IN, 8, room=4096) == (S_OK, PATTERN[4096:8192])
                assert ask(T_OUT, 8, b"w" * 4096) == (S_OK, b"")
                assert ask(T_IN, 8, room=4096) == (S_OK, b"w" * 4096)
                assert ask(T_OUT, 8, PATTERN[4096:8192]) == (S_OK, b"")
                assert ask(T_FLUSH, 0) == (S_OK, b"")
                assert ask(T_GET_ID, 0, room=20) == (S_OK, b"serial-7".ljust(20, b"\0"))
                assert ask(T_IN, SIZE // 512, room=512)[0] == S_IOERR
                capacity = session.front.get_config(8)
                assert int.from_bytes(capacity, "little") == SIZE // 512
    assert image.read_bytes() == PATTERN
    assert program.process.returncode == 0
