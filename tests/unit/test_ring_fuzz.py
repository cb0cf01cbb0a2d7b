"""The ring fuzz target on inputs of hypothesis and of its own, for a moment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_ring import make_up, mutate, one_input
from tests.rng import seeded


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_are_survived(data: bytes) -> None:
    """Whatever ring, area and operations: GuestError or a sound chain."""
    one_input(data)


def test_inputs_that_look_like_rings_are_survived() -> None:
    """Inputs near to working rings go further; enough of them must give chains to be a test."""
    rng = seeded(7)
    got = [one_input(make_up(rng)) for _ in range(500)]
    got += [one_input(mutate(make_up(rng), rng)) for _ in range(500)]
    assert sum(map(bool, got)) > 100
