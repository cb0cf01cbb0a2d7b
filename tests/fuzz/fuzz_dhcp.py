"""Fuzz target of the DHCP responder: any UDP payload in a good frame of the guest.

    python -m tests.fuzz.fuzz_dhcp --seconds 60 [--seed 1]
    python -m tests.fuzz.fuzz_dhcp --atheris [atheris options] [corpus directory]

An input is a byte that picks settings and where the frame goes, and then the payload. Nothing may
be raised, and each answer must be one that a client can read: `tests.netlab` checks its lengths,
checksums and options without any of the code under test.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from devices.netlocal import MAX_FRAME, Local
from tests import netlab
from tests.fuzz.run import FoundError, mutate, run

if TYPE_CHECKING:
    from random import Random

SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"hostname": "web", "domain": "example.org", "lease": 600, "mtu": 1400},
    {"search": ["s" * 60, "t" * 63, "u" * 60], "dns": ["9.9.9.9"] * 8, "boot_file": "auto_install"},
    {"length": 32, "router": "10.0.0.1", "hostname": "h" * 63, "domain": "d" * 63},
)
_LOCALS: Final = tuple(Local({**netlab.SETTINGS, **more}) for more in SETTINGS)


def one_input(data: bytes) -> int:
    """Run one input; return 1 if it got an answer."""
    if not data:
        return 0
    local = _LOCALS[data[0] & 3]
    unicast: dict[str, Any] = {"dst": "100.64.1.2", "dst_mac": netlab.HOST} if data[0] & 4 else {}
    ports = (67, 67) if data[0] & 8 else (68, 67)
    payload = data[1:1400]
    frame = netlab.udp(payload, ports=ports, **unicast)
    answers = local.answer(frame)
    if not answers:
        return 0
    (answer,) = answers
    if len(answer) > MAX_FRAME or not local.wants(frame[:64]):
        raise FoundError(f"{len(answer)} bytes, wanted {local.wants(frame[:64])}")
    seen = netlab.see(answer)
    check(payload, seen.payload)
    return 1


def check(request: bytes, payload: bytes) -> None:
    """Check that an answer answers. Raises FoundError, AssertionError, IndexError."""
    if payload[0] != 2 or payload[4:8] != request[4:8] or payload[24:44] != request[24:44]:
        raise FoundError(payload.hex())
    if payload[16:20] not in (bytes(4), netlab.ip("100.64.1.3")):
        raise FoundError(f"gives {payload[16:20].hex()} away")
    options = netlab.read_options(payload[240:])
    overload = options.get(52, b"\0")[0]
    for bit, area in ((1, payload[108:236]), (2, payload[44:108])):
        if overload & bit:
            netlab.read_options(area)
    kind = options.get(53)
    if kind == b"\5" and payload[16:20] == bytes(4) and 51 in options:
        raise FoundError("a lease of nothing")
    if kind in (b"\2", b"\5", b"\6") and options.get(54) != netlab.ip("100.64.1.2"):
        raise FoundError("an answer from nobody")


def make_up(rng: Random) -> bytes:
    """Return an input that a client might have sent, with luck."""
    options = [(53, bytes((rng.choice((1, 3, 3, 3, 4, 7, 8, 9)),)))]
    for _ in range(rng.randrange(6)):
        code = rng.choice((12, 50, 50, 52, 54, 55, 57, 60, 61, 80, 82, rng.randrange(1, 255)))
        value = {
            50: netlab.ip(rng.choice(("100.64.1.3", "10.0.0.1"))),
            52: bytes((rng.randrange(4),)),
            54: netlab.ip(rng.choice(("100.64.1.2", "10.0.0.1"))),
            57: rng.choice((b"\x02\x40", b"\x05\xdc", b"\xff\xff", b"\0\0")),
        }.get(code, rng.randbytes(rng.choice((0, 1, 4, 20, 255))))
        options.append((code, value))
    payload = netlab.bootp(
        *options,
        ciaddr=rng.choice(("0.0.0.0", "100.64.1.3", "10.0.0.1")),
        giaddr=rng.choice(("0.0.0.0", "0.0.0.0", "100.64.1.3")),
        flags=rng.choice((0, 0x8000, 0xFFFF)),
        hops=rng.choice((0, 0, 1)),
        sname=rng.choice((b"", b"\x32\x04\x64\x40\x01\x03\xff", rng.randbytes(64))),
        file=rng.choice((b"", b"", b"\x32\x04\x64\x40\x01\x03\xff", rng.randbytes(128))),
        cookie=rng.choice((netlab.COOKIE,) * 9 + (bytes(4),)),
        pad=rng.choice((0, 300, 548)),
    )
    return rng.randbytes(1) + payload


if __name__ == "__main__":
    sys.exit(run("the DHCP responder", one_input, make_up, mutate, "of them answered", keep_from=1))
