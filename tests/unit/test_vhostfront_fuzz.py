"""The fuzz target of the vhost-user front end, for a moment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_vhostfront import make_up, one_input
from tests.fuzz.run import mutate
from tests.rng import seeded

pytestmark = pytest.mark.usefixtures("others_garbage_kept")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_survived(data: bytes) -> None:
    """Whatever comes: PeerError at most, and no descriptor is left."""
    one_input(data)


def test_answers_that_are_nearly_right_are_survived() -> None:
    """Enough of them must begin a conversation to be a test."""
    rng = seeded(7)
    good = sum(one_input(make_up(rng)) for _ in range(300))
    good += sum(one_input(mutate(make_up(rng), rng)) for _ in range(300))
    assert good > 300
