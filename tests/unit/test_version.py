"""The version is written down twice, since reading it from the package metadata is slow."""

from __future__ import annotations

import os
import tomllib

from vmm.version import VERSION


def test_both_places_say_the_same_version() -> None:
    """vmm/version.py and pyproject.toml agree."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(top, "pyproject.toml"), "rb") as file:
        assert tomllib.load(file)["project"]["version"] == VERSION
