"""How fuzz targets are run: for a while, or by atheris."""

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


def change(data: bytes, rng: Random) -> bytes:
    """Return `data` with a few bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def run(
    what: str,
    one_input: Callable[[bytes], int],
    make_up: Callable[[Random], bytes],
    mutate: Callable[[bytes, Random], bytes],
    unit: str,
    *,
    keep_from: int | None = None,
) -> int:
    """Fuzz for a while; print the input that found something, in hex, and end with its error.

    `one_input` returns how far an input went, in `unit`s. Half of the inputs are mutated; with
    `keep_from` most are, and made from such as went at least so far.
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
    nr_inputs = reached = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        if keep_from is None:
            data = make_up(rng)
            if rng.random() < 0.5:
                data = mutate(data, rng)
        else:
            data = make_up(rng) if rng.random() < 0.3 else mutate(rng.choice(kept), rng)
        try:
            far = one_input(data)
        except Exception:
            print(f"input {nr_inputs}: {data.hex()}", file=sys.stderr)
            raise
        nr_inputs += 1
        reached += far
        if keep_from is not None and far >= keep_from:
            kept = [*kept[-200:], data]
    print(f"{nr_inputs} inputs, {reached} {unit}, nothing found")
    return 0
