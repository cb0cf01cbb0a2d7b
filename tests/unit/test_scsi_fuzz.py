"""The CD-ROM drive's fuzz target on inputs of hypothesis and of its own, for a moment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_scsi import make_up, one_input
from tests.fuzz.run import change
from tests.rng import seeded


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_survived(data: bytes) -> None:
    """Whatever is asked: a well-formed answer, a true used length, the disc's own bytes."""
    one_input(data)


def test_inputs_that_look_like_commands_are_survived() -> None:
    """Inputs near to right commands go further; enough must succeed to be a test."""
    rng = seeded(7)
    good = sum(one_input(make_up(rng)) for _ in range(200))
    good += sum(one_input(change(make_up(rng), rng)) for _ in range(200))
    assert good > 200
