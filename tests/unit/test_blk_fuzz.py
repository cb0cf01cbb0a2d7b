"""The block request fuzz target on inputs of hypothesis and of its own, for a moment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_blk import make_up, one_input
from tests.fuzz.run import change
from tests.rng import seeded


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_survived(data: bytes) -> None:
    """Whatever is asked: a status, a true used length, and no other sector changed."""
    one_input(data)


def test_inputs_that_look_like_requests_are_survived() -> None:
    """Inputs near to right requests go further; enough must succeed to be a test."""
    rng = seeded(7)
    good = sum(one_input(make_up(rng)) for _ in range(300))
    good += sum(one_input(change(make_up(rng), rng)) for _ in range(300))
    assert good > 300
