"""docs/conformance.md names tests; they must exist."""

from __future__ import annotations

import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NAMED = re.compile(r"`((?:tests/\w+/)?)(test_\w+\.py)::(test_\w+)`")


def named_tests() -> list[tuple[str, str]]:
    """Return path and function of each test that the table names."""
    with open(f"{ROOT}/docs/conformance.md", encoding="utf-8") as table:
        found = NAMED.findall(table.read())
    return [(f"{where or 'tests/conformance/'}{file}", test) for where, file, test in found]


def test_every_test_of_the_table_exists() -> None:
    """A clause points at a test of that name in that file; renaming one breaks the table."""
    missing = []
    for path, test in named_tests():
        with open(f"{ROOT}/{path}", encoding="utf-8") as file:
            if f"\ndef {test}(" not in file.read():
                missing.append(f"{path}::{test}")
    assert missing == []


def test_every_row_names_a_test() -> None:
    """No requirement is listed without what shows it."""
    with open(f"{ROOT}/docs/conformance.md", encoding="utf-8") as table:
        rows = [line for line in table if re.match(r"\| \d", line)]
    assert len(rows) > 50
    assert [row for row in rows if not NAMED.search(row)] == []


def test_every_clause_test_of_the_rings_is_in_the_table() -> None:
    """A test named after a clause of §2.7 or §2.8 is found from its clause."""
    named = set(named_tests())
    forgotten = []
    for name in ("virtqueue_split", "virtqueue_packed", "chains_split", "chains_packed"):
        path = f"tests/conformance/test_{name}.py"
        with open(f"{ROOT}/{path}", encoding="utf-8") as file:
            tests = re.findall(r"^def (test_\w+)\(", file.read(), re.MULTILINE)
        forgotten += [f"{path}::{test}" for test in tests if (path, test) not in named]
    assert forgotten == []
