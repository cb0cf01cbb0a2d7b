"""The systemd units in tools/systemd, by systemd's own check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from config.errors import EXIT_FAILED, EXIT_USAGE
from tests.unit.cli_fakes import TOP
from vmm import cli
from vmm.ending import EXIT_TIMEOUT
from vmm.usage import parser

if TYPE_CHECKING:
    from pathlib import Path

UNITS = sorted(os.listdir(f"{TOP}/tools/systemd"))


def unit(name: str) -> str:
    """Return a unit's text."""
    with open(f"{TOP}/tools/systemd/{name}") as file:
        return file.read()


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_it(name: str, tmp_path: Path) -> None:
    """With a program that is there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here: tools/setup installs it")
    program = tmp_path / "pyvmctl"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / name.replace("@.", "@web.")
    copy.write_text(unit(name).replace("/usr/local/bin/pyvmctl", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if copy.name in line or "pyvmd" in line]
    assert (done.returncode, told) == (0, [])


@pytest.mark.parametrize("name", UNITS)
def test_its_command_lines_are_ours(name: str) -> None:
    """Verbs and options exist."""
    commands = re.findall(r"^Exec\w+=-?/usr/local/bin/pyvmctl (.*)$", unit(name), re.M)
    assert len(commands) >= 2
    for command in commands:
        verb, *words = command.replace("%i", "web").split()
        parser(cli.load(verb)).parse_intermixed_args(words)


def test_what_a_new_start_does_not_mend_is_not_started_again() -> None:
    """A wrong file; and a VM that somebody stopped, though its guest did not obey."""
    text = unit("pyvmd@.service")
    assert "Restart=on-failure\n" in text
    kept = re.search(r"^RestartPreventExitStatus=(.*)$", text, re.M)
    assert kept is not None
    assert set(map(int, kept[1].split())) == {EXIT_USAGE, EXIT_TIMEOUT}
    assert EXIT_FAILED not in {EXIT_USAGE, EXIT_TIMEOUT}
