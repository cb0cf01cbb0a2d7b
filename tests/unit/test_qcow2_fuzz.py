"""The qcow2 fuzz target on inputs of hypothesis and of its own, for a moment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz_qcow2 import SEEDS, STEP, make_up, one_input
from tests.rng import seeded


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=4 * STEP))
def test_any_change_is_survived(data: bytes) -> None:
    """Whatever an image holds: an error, or a disk; never the guest's data over the tables."""
    one_input(data)


def test_changes_where_it_matters_are_survived() -> None:
    """Inputs that hit tables; enough must succeed to be a test."""
    rng = seeded(11)
    good = sum(one_input(make_up(rng)) for _ in range(120))
    assert good > 240


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_an_image_that_is_sound_can_do_everything(seed: int) -> None:
    """The images that inputs change, unchanged: all twelve steps, or all but growing."""
    fixed = SEEDS[seed][7] == 2 and any(SEEDS[seed][60:64])  # version 2 with snapshots
    assert one_input(bytes([seed])) == 12 - fixed
