"""Fuzz target of a CD-ROM drive: any CDB, any framing, any control request, discs that change.

    python -m tests.fuzz.fuzz_scsi --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_scsi --atheris [atheris options] [corpus directory]

The first needs nothing and makes its inputs up. tests/unit/test_scsi_fuzz.py runs the same target
from hypothesis.

An input is steps, each of them a byte that says what, a byte that says how, and

    0-9   a command: 16 bytes of CDB     11  the host ejects        13  an event buffer
    10    a control request: 24 bytes    12  the host puts in a disc    14  a write of sizes

The only exceptions the target may see are GuestError and, from the host's side, HostError. Every
answer is well formed, every used length is true, and nothing is written beyond it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from config.errors import GuestError, HostError
from devices.disc import BLOCK
from devices.features import F_VERSION_1
from devices.scsicd import COMMANDS
from devices.scsireq import DRIVE_LUN, HEADER, RESPONSE
from devices.vioscsi import CONTROLQ, EVENTQ, REQUESTQ, Vioscsi
from tests.fuzz.run import change, run
from tools.viodriver import make_memory, open_driver

if TYPE_CHECKING:
    from random import Random

NR_BLOCKS: Final = 8
LUNS: Final = (DRIVE_LUN, DRIVE_LUN, DRIVE_LUN, b"\xc1\1" + bytes(6), b"\1\0\0\1" + bytes(4))
ROOMS: Final = (0, 1, 4, 8, 18, 36, 96, 255, 2048, 4096, 4095, 2049, 8 * 2048, 300)
CUTS: Final = (100000, 1, 7, 51, 108, 512, 2048, 100000)
SIZES: Final = (0, 6, 10, 16, 18, 32, 96, 260, 4096)


class FoundError(Exception):
    """The target did what no input may make it do."""


class Host:
    """Hears what the device says, and nothing else."""

    def timer(self, _callback: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Bench:
    """One device, made once; every input starts with a reset and the first disc."""

    def __init__(self) -> None:
        self.memory = make_memory(4 << 20)
        self.host: Any = Host()
        self.content = os.urandom(BLOCK * NR_BLOCKS)
        self.device = Vioscsi(self.memory, self.host, None)

    def run(self, data: bytes) -> int:
        """Do the steps of one input; return how many commands ended GOOD."""
        self.device.reset()
        self.device.drive.attentions = ()
        self._insert(True)
        drivers = [open_driver(self.memory, 16, 0x1000 + (n << 20), F_VERSION_1) for n in range(3)]
        self.queues = [driver.open_device() for driver in drivers]
        self.drivers = drivers
        self.device.activate(F_VERSION_1, self.queues)
        at = nr_good = nr_steps = 0
        try:
            while len(data) - at >= 2 and nr_steps < 24:
                what, how = data[at] % 15, data[at + 1]
                length = 16 if what < 10 else 24 if what == 10 else 0
                nr_good += self._step(
                    what, how, data[at + 2 : at + 2 + length].ljust(length, b"\0")
                )
                at += 2 + length
                nr_steps += 1
        except GuestError:
            pass
        return nr_good

    def _step(self, what: int, how: int, data: bytes) -> int:
        if what < 10:
            return self._command(how, data)
        if what == 10:
            self._ask(CONTROLQ, data[: 24 - (how & 3) * 4], how >> 4, 0)
        elif what == 11:
            with contextlib.suppress(HostError):
                self.device.setting("eject" if how & 2 else "load", [bool(how & 1), 0])
        elif what == 12:
            with contextlib.suppress(HostError):
                self._insert(bool(how & 1))
        elif what == 13 and self.drivers[EVENTQ].outstanding < 8:
            self.drivers[EVENTQ].add([], [16 if how & 7 else 4])
        elif what == 14:
            value = SIZES[how % len(SIZES)].to_bytes(4, "little")
            self.device.write_config(24 if how & 128 else 20, value)
        self.device.kick(EVENTQ, self.queues[EVENTQ])
        for used in self.drivers[EVENTQ].collect():
            if used.written not in (4, 16):
                raise FoundError(f"an event of {used.written} bytes")
        return 0

    def _insert(self, force: bool) -> None:
        fd = os.memfd_create("disc")
        os.pwrite(fd, self.content, 0)
        try:
            self.device.take("insert", [force, 0], fd)
        except HostError:
            os.close(fd)
            raise

    def _command(self, how: int, cdb: bytes) -> int:
        sense_size, cdb_size = self.device._sizes[20], self.device._sizes[24]
        header = HEADER.pack(LUNS[how % len(LUNS)], 1, 0, 0, 0)
        header += cdb[:cdb_size].ljust(cdb_size, b"\0")
        response_size = RESPONSE.size + sense_size
        room = ROOMS[(how >> 4) + 8 * (cdb[0] == 0x28)] if how >> 4 < 6 else ROOMS[how >> 4 & 7]
        written, data = self._ask(REQUESTQ, header, response_size + room, CUTS[how & 7])
        sense_len, residual, qualifier, status, response = RESPONSE.unpack_from(data)
        done = written - response_size
        if (
            sense_len > sense_size
            or qualifier
            or not 0 <= done <= room
            or residual != room - done
            or status not in (0, 2)
            or response not in (0, 1, 3)
            or any(byte != 0xEE for byte in data[written:])
        ):
            raise FoundError(f"{written} of {len(data)} bytes: {data[:response_size].hex()}")
        read = cdb[0] == 0x28 and LUNS[how % len(LUNS)] == DRIVE_LUN and cdb_size >= 10
        if read and not status and not response and done:
            lba = int.from_bytes(cdb[2:6], "big") * BLOCK
            if data[response_size:written] != self.content[lba : lba + done]:
                raise FoundError("a read that is not the disc's bytes")
        return int(status == response == 0)

    def _ask(self, index: int, readable: bytes, room: int, step: int) -> tuple[int, bytes]:
        """Make one request in pieces of `step` bytes; return used length and buffers."""
        driver, queue = self.drivers[index], self.queues[index]
        step = max(step or 100000, -(-max(len(readable), room) // 6))
        cut = [readable[at : at + step] for at in range(0, len(readable), step)]
        request = driver.place(cut, [min(step, room - at) for at in range(0, room, step)])
        if not request.segments:
            return 0, b""
        request.owned = True
        for segment in request.segments:
            if segment.writable:
                self.memory.write(segment.gpa, b"\xee" * segment.length)
        driver.submit(request)
        while self.device.kick(index, queue):
            pass
        [used] = driver.collect()
        return used.written, driver.data(used.request)


_bench: Final = Bench()


def one_input(data: bytes) -> int:
    """Run one input; return how many commands were GOOD, a measure of how far it went."""
    return _bench.run(data)


def make_up(rng: Random) -> bytes:
    """Return an input of steps most of which are nearly right."""
    parts = []
    for _ in range(rng.randint(1, 16)):
        what, how = rng.choice((0, 0, 0, 0, 0, 0, 10, 11, 12, 13, 14)), rng.randrange(256)
        code = rng.choice((0x28, 0x28, *COMMANDS, rng.randrange(256)))
        if what == 0 and rng.random() < 0.7:  # room enough, and the drive's LUN
            how = rng.choice((0x41, 0x46, 0x47) if code == 0x28 else (0x70, 0x75, 0x76))
        parts.append(bytes((what, how)))
        if what == 0:
            field = (0, 0, 0, 1, 4, 8, 16, 0x80, rng.randrange(256))
            cdb = bytearray(rng.choice(field) if rng.random() < 0.1 else 0 for _ in range(16))
            cdb[0] = code
            if code == 0x28:
                cdb[2:10] = bytes((0, 0, 0, rng.randrange(9), 0, 0, rng.randrange(3), 0))
            parts.append(bytes(cdb))
        elif what == 10:
            kind, lun = rng.randrange(3), DRIVE_LUN
            middle = b"" if kind else rng.randrange(9).to_bytes(4, "little")
            parts.append((kind.to_bytes(4, "little") + middle + lun + b"\x10").ljust(24, b"\0"))
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(run("a CD-ROM drive", one_input, make_up, change, "commands succeeded"))
