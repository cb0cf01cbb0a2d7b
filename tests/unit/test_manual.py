"""Manual pages and completions: what is printed is what the verbs and keys are."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.cli_fakes import TOP
from vmm import cli, completion, manual
from vmm.surface import surfaces

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGES: Final = {"pyvmctl.1": lambda: manual.commands(surfaces()), "vm.yaml.5": manual.file_format}


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_in_docs_are_what_the_code_says(
    page: str, request: pytest.FixtureRequest
) -> None:
    """With PYVMD_UPDATE_GOLDEN=1 they are written anew."""
    path, text = f"{TOP}/docs/man/{page}", PAGES[page]()
    if os.environ.get("PYVMD_UPDATE_GOLDEN"):
        with open(path, "w") as file:
            file.write(text)
    with open(path) as file:
        assert file.read() == text


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_good_mdoc(page: str) -> None:
    """By mandoc's own word; only that the other page is not installed may trouble it."""
    if not shutil.which("mandoc"):
        pytest.skip("no mandoc here: tools/setup installs it")
    done = subprocess.run(
        ["mandoc", "-T", "lint", f"{TOP}/docs/man/{page}"],
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert told == []
    shown = subprocess.run(
        ["mandoc", "-T", "utf8", f"{TOP}/docs/man/{page}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert len(shown.splitlines()) > 100


def test_every_verb_option_and_key_is_in_the_manual() -> None:
    """Nothing is left out."""
    text = manual.commands(surfaces())
    for surface in surfaces():
        assert f".It Cm {surface.name}" in text
        for option in surface.options:
            if "--help" not in option.words:
                assert f"Fl {option.words[-1][1:]}" in text
    assert {surface.name for surface in surfaces()} == set(cli.VERBS)


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Completes a command line in a shell; pyvmctl is one that knows two VMs."""
    fake = tmp_path / "pyvmctl"
    fake.write_text("#!/bin/sh\n[ \"$*\" = 'status -q' ] && printf 'web\\ndb\\n'\n")
    fake.chmod(0o755)
    (tmp_path / "disk.img").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(shell: str, *words: str) -> set[str]:
        if not shutil.which(shell):
            pytest.skip(f"no {shell} here: tools/setup installs it")
        script = tmp_path / f"completion.{shell}"
        script.write_text(completion.script(shell, surfaces()))
        if shell == "bash":
            line = " ".join(f"'{word}'" for word in words)
            ask = (
                f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _pyvmctl; "
                'printf "%s\\n" "${COMPREPLY[@]}"'
            )
        else:
            ask = f"source {script}; complete -C '{' '.join(words)}'"
        done = subprocess.run(
            [shell, "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert done.stderr == ""
        return {line.partition("\t")[0] for line in done.stdout.splitlines()} - {""}

    return run


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion(shell: str, complete: Callable[..., set[str]]) -> None:
    """Verbs and aliases, names of VMs, options, files, and the words of an option."""
    assert {"start", "status", "stop", "pause", "ls"} <= complete(shell, "pyvmctl", "")
    assert complete(shell, "pyvmctl", "star") == {"start"}
    assert complete(shell, "pyvmctl", "stop", "w") == {"web"}
    assert {"web", "db"} <= complete(shell, "pyvmctl", "ls", "")
    assert "--json" in complete(shell, "pyvmctl", "status", "--")
    assert "-f" in complete(shell, "pyvmctl", "stop", "-")
    assert "disk.img" in complete(shell, "pyvmctl", "validate", "di")
    assert complete(shell, "pyvmctl", "status", "--color", "al") == {"always"}
    assert complete(shell, "pyvmctl", "completion", "z") == {"zsh"}
    assert complete(shell, "pyvmctl", "help", "unp") == {"unpause"}


def test_zsh_reads_its_script(tmp_path: Path) -> None:
    """And defines the function; what it offers is for zsh's own system to show."""
    if not shutil.which("zsh"):
        pytest.skip("no zsh here: tools/setup installs it")
    script = tmp_path / "_pyvmctl"
    script.write_text(completion.script("zsh", surfaces()))
    ask = f"autoload -U compinit; compinit -D; source {script}; whence -w _pyvmctl"
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("_pyvmctl: function\n", "")
