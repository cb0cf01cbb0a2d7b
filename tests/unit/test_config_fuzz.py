"""No text, however odd, gets anything out of the reader but a Config or a ConfigError."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import load
from config.keys import VM
from config.tables import NOT_BUILT, Table
from tests.fuzz.fuzz_config import one_input

if TYPE_CHECKING:
    from collections.abc import Iterator

LOADERS = [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)]
GOOD = b"""\
name: web
vcpus: 2
memory: 512M
boot: &b {kernel: k, initrd: "i", cmdline: 'a=b'}
debug: {console: on, exit: no}
owner: alice:staff
x-a: [*b, {? [c] : d}]
"""


def _names(table: Table) -> set[str]:
    names = {"vms", "x-a", "<<", "null"}
    for key in table.keys:
        names |= {key.name, *key.aliases}
        names |= _names(key.below) if key.below else set()
    return names


WORDS = ["", "~", "k", "512M", "1M/s", "on", "2", "4096", "raw", "seabios", "disk", "-1", "1.5"]
WORDS += ["fe:e1:bb:d1:0:1", "2222:22/tcp", "fd:5", "lan", "user", "100.64.0.0/10", "auto"]
YAMLISH = ["&a x", "*a", "!!int 3", "|\n  x\n  y", ">-\n z", "'", '"\\0"', '"\\ud800"', "a:b", "é"]
SCALARS = st.sampled_from(WORDS + YAMLISH)
FLOW = st.recursive(
    SCALARS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(sorted(_names(VM))) | inner, inner), max_size=5).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.lists(st.tuples(st.sampled_from(sorted(_names(VM))), FLOW), max_size=8).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs)
)


@pytest.fixture(params=LOADERS, ids=["python", "libyaml"], scope="module", autouse=True)
def _each_parser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test here with both parsers."""
    with patch.object(load, "_LOADER", request.param):
        yield


@settings(deadline=None)
@given(st.binary())
def test_arbitrary_bytes(data: bytes) -> None:
    """Bytes of any kind end in one of the two."""
    one_input(data)


@settings(deadline=None)
@given(st.text(st.characters()))
def test_arbitrary_text(text: str) -> None:
    """So does text of any kind, lone surrogates included."""
    one_input(text.encode("utf-8", "surrogatepass"))


@settings(deadline=None, max_examples=50)
@given(FILES)
def test_files_of_real_keys_with_odd_values(text: str) -> None:
    """So do real keys with values that are nearly right, wrongly nested, or broken YAML."""
    one_input(text.encode())


@settings(deadline=None, max_examples=50)
@given(FILES)
def test_files_of_keys_that_are_not_built_yet(text: str) -> None:
    """The tables of later devices keep the promise, too."""
    with patch.dict(NOT_BUILT, clear=True):
        one_input(text.encode())


@settings(deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.binary(max_size=6))
def test_a_good_file_with_a_piece_changed(start: int, length: int, piece: bytes) -> None:
    """So does a good file of which a part was overwritten, cut out or inserted."""
    one_input(GOOD[:start] + piece + GOOD[start + length :])


def test_the_target_sees_a_good_file() -> None:
    """The target is not fooled: the file that is mutated above is a good one."""
    assert [vm.name for vm in load.load_bytes(GOOD, "dir/fuzz.yaml").vms] == ["web"]
