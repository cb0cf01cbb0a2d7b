"""Reproducible chance for tests."""

from __future__ import annotations

from random import Random


def seeded(seed: int) -> Random:
    """Return a generator that gives the same numbers in every run."""
    return Random(seed)  # noqa: S311  # tests want the same dice each time
