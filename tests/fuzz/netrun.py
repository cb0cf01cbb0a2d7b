"""How the fuzz targets of network protocols are run: for a while, or by atheris."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from tests.rng import seeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random


class FoundError(Exception):
    """The target did what no input may make it do."""


def mutate(data: bytes, rng: Random) -> bytes:
    """Return `data` with a few bytes changed, now and then cut or with a piece twice."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if changed:
            at = rng.randrange(len(changed))
            changed[at] = rng.choice((0, 1, 2, 0x43, 0x44, 0x80, 0xFF, rng.randrange(256)))
    if changed and rng.random() < 0.2:
        at = rng.randrange(len(changed))
        changed[at:at] = changed[at : at + rng.randrange(40)]
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def run(what: str, one_input: Callable[[bytes], int], make_up: Callable[[Random], bytes]) -> int:
    """Fuzz for a while; print the input that found something, in hex, and end with its error.

    `one_input` returns how far an input went; those that went anywhere are mutated further.
    """
    if "--atheris" in sys.argv:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

        sys.argv.remove("--atheris")
        atheris.instrument_all()
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
        return 0
    parser = argparse.ArgumentParser(description=f"fuzz {what}")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = seeded(options.seed)
    kept = [make_up(rng)]
    nr_inputs = nr_far = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        data = make_up(rng) if rng.random() < 0.3 else mutate(rng.choice(kept), rng)
        try:
            far = one_input(data)
        except Exception:
            print(f"input {nr_inputs}: {data.hex()}", file=sys.stderr)
            raise
        nr_inputs += 1
        if far:
            nr_far += 1
            kept = [*kept[-200:], data]
    print(f"{nr_inputs} inputs, {nr_far} of them answered, nothing found")
    return 0
