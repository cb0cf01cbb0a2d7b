"""The vhost-user fuzz target on inputs of hypothesis and of its own, for a moment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_vhostuser import make_up, mutate, one_input
from tests.rng import seeded

pytestmark = pytest.mark.usefixtures("others_garbage_kept")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_survived(data: bytes) -> None:
    """Whatever is sent: an answer, or the end of the connection; nothing is left."""
    one_input(data)


def test_inputs_that_look_like_front_ends_are_survived() -> None:
    """Inputs near to right ones go further; enough must be answered to be a test."""
    rng = seeded(7)
    answers = [one_input(make_up(rng)) for _ in range(80)]
    answers += [one_input(mutate(make_up(rng), rng)) for _ in range(80)]
    assert sum(answer > 10 for answer in answers) > 60
