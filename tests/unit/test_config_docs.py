"""Committed files that are derived from the tables of vm.yaml.

PYVMD_UPDATE_GOLDEN=1 writes them anew; the diff is for review.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from config.keys import VM
from config.reference import markdown
from config.schema import json_schema
from config.tables import NOT_BUILT

ROOT = Path(__file__).resolve().parents[2]
UPDATE = os.environ.get("PYVMD_UPDATE_GOLDEN") == "1"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docs/vm-yaml.md", markdown()),
        ("config/examples/pyvmd.schema.json", json.dumps(json_schema(), indent=2) + "\n"),
    ],
)
def test_the_committed_file_is_what_the_tables_say(name: str, text: str) -> None:
    """The manual and the editors' schema change with the tables, and only with them."""
    if UPDATE:
        (ROOT / name).write_text(text)
    assert (ROOT / name).read_text() == text, "review with PYVMD_UPDATE_GOLDEN=1 and git diff"


def test_the_manual_is_ready_for_the_keys_to_come() -> None:
    """Once nothing is left to build, every key of every table has its row in the manual."""
    with patch.dict(NOT_BUILT, clear=True):
        text = markdown()
    assert "## Not built yet" not in text
    for table in (VM, *(key.below for key in VM.keys if key.below)):
        for key in table.keys:
            assert f"\n| `{key.name}`" in text
    assert "## Keys of `disks[]`" in text
    assert "| a list of at most 3: each one of disk, cdrom, net |" in text
    assert "Not beside `firmware`." in text


def test_examples_name_the_shipped_schema() -> None:
    """The first line of each example tells editors which schema to use."""
    examples = sorted((ROOT / "config/examples").glob("*.yaml"))
    assert examples
    for example in examples:
        first = example.read_text().split("\n")[0]
        assert first == "# yaml-language-server: $schema=pyvmd.schema.json"
