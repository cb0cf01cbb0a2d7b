"""What the documents tell people to type is what pyvmctl takes, and their vm.yaml is valid."""

from __future__ import annotations

import re
import shlex
from typing import Final

import pytest

from config.load import load_text
from tests.unit.cli_fakes import TOP
from vmm import cli
from vmm.usage import choose, parser

PAGES: Final = (
    "README.md",
    "docs/tutorial.md",
    "docs/devices.md",
    "docs/pyvmctl.md",
    "docs/stopping.md",
)

# vmctl(8), reference of OpenBSD 7.x: every command.
VMCTL: Final = """
    console create load log pause receive reload reset send show start status stop unpause wait
"""


def page(name: str) -> str:
    """Return one document."""
    with open(f"{TOP}/{name}") as file:
        return file.read()


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return all command lines of pyvmctl in blocks and in running text."""
    found: list[str] = []
    for name in PAGES:
        text = page(name)
        lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
        lines += re.findall(r"`(pyvmctl [^` ]+ [^`]+)`", text)
        typed = (re.match(r"(?:\.venv/bin/)?(pyvmctl .*)", line) for line in lines)
        found += [match[1] for match in typed if match]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one(line: str) -> None:
    """Its verb is there, and takes these words; capitals and dots stand for something."""
    if "..." in line or "VERB" in line:
        pytest.skip("shortened in the text")
    words = shlex.split(line, comments=True)[1:]
    verb, rest = choose(cli.load(cli.resolve(words[0])), words[1:])
    if rest != ["--help"]:
        parser(verb).parse_words(rest)


def test_there_are_commands() -> None:
    """The search finds them."""
    found = commands()
    assert "pyvmctl start two -t web -d two.qcow2" in found
    assert len(found) > 25


@pytest.mark.parametrize("name", PAGES)
def test_their_files_are_valid(name: str) -> None:
    """All blocks of YAML."""
    for block in blocks(page(name), "yaml"):
        assert load_text(block, "/vm.yaml").vms


def test_every_vmctl_command_has_its_row() -> None:
    """And what stands beside it is a verb, or none."""
    section = page("docs/pyvmctl.md").partition("## Coming from vmctl")[2]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(\w+)`|none) \|", section, re.MULTILINE)
    assert [theirs for theirs, _ in rows] == VMCTL.split()
    for theirs, ours in rows:
        if ours:
            assert ours in cli.VERBS
            assert cli.resolve(theirs) == ours
        else:
            assert theirs not in cli.VERBS
