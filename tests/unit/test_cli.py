"""pyvmctl as a command line: verbs and their abbreviations, help, errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.errors import ConfigError, HostError, NoSuchVmError, PyvmError
from vmm import cli, usage, verb_host
from vmm.usage import UsageError
from vmm.version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

ACTIONS: Final = [action.name for verb in cli.VERBS for action in cli.load(verb).actions.values()]


def pyvmctl(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command and return what it said."""
    command = [sys.executable, "-m", "vmm.cli", *words]
    return subprocess.run(command, cwd=TOP, text=True, timeout=60, check=False, **how)


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("start", "start"),
        ("stat", "status"),
        ("sto", "stop"),
        ("cons", "console"),
        ("cr", "create"),
        ("un", "unpause"),
        ("sh", "status"),
        ("lis", "status"),
        ("c", None),  # console, create
        ("l", None),  # log, ls, list
        ("st", None),
        ("p", None),  # pause, ps
    ],
)
def test_verbs_may_be_shortened(word: str, verb: str | None) -> None:
    """As in vmctl, any prefix does that fits one verb only; aliases count."""
    if verb:
        assert cli.resolve(word) == verb
    else:
        with pytest.raises(UsageError, match="ambiguous"):
            cli.resolve(word)


@pytest.mark.parametrize("alias", ["show", "ls", "ps", "list"])
def test_status_has_the_names_others_use(alias: str) -> None:
    """What other tools call their list shows our status."""
    assert cli.resolve(alias) == "status"


def test_every_alias_leads_to_a_verb() -> None:
    """Verbs and aliases are distinct names, and each verb's module declares it."""
    assert not cli.VERBS.keys() & cli.ALIASES.keys()
    assert set(cli.ALIASES.values()) <= cli.VERBS.keys()
    for name in cli.VERBS:
        assert cli.load(name).name == name


@pytest.mark.parametrize("verb", [*cli.VERBS, "", *ACTIONS])
def test_help_is_what_was_reviewed(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Help changes only on purpose: PYVMD_UPDATE_GOLDEN=1 writes it, and the diff is reviewed."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    path = os.path.join(GOLDEN, f"help-{verb.replace(' ', '-') or 'pyvmctl'}.txt")
    if os.environ.get("PYVMD_UPDATE_GOLDEN"):
        os.makedirs(GOLDEN, exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
    with open(path) as file:
        assert text == file.read()
    assert "example:\n  pyvmctl " in text
    assert max(map(len, text.splitlines())) <= 80 or not verb


def test_help_verb_is_the_same_as_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`help start`, `help sta`-like prefixes and `start --help` say the same."""
    assert cli.main(["start", "--help"]) == 0
    by_option = capsys.readouterr().out
    assert cli.main(["help", "star"]) == 0
    assert capsys.readouterr().out == by_option


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ([], "which verb?"),
        (["frobnicate"], "no verb 'frobnicate'"),
        (["st"], "ambiguous: start, stats, status, stop"),
        (["--json", "status"], "options come after the verb"),
        (["status", "--js"], "unrecognized arguments: --js"),  # long options do not abbreviate
        (["wait"], "the following arguments are required: NAME"),
        (["start"], "the following arguments are required: FILE"),
        (["wait", "web", "--timeout", "soon"], "expected a time such as 30"),
        (["log", "-n", "-1", "web"], "-n"),
        (["start", "-c", "-F", "vm.yaml"], "not allowed with argument"),
        (["stop"], "name the VMs to stop"),
        (["stop", "-a", "web"], "name the VMs to stop"),
        (["help", "frobnicate"], "no verb"),
    ],
)
def test_a_wrong_command_line_is_status_2(
    line: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user typed wrongly is said in one line on stderr, after the program's name."""
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyvmctl: ")
    assert err.count("\n") == 1
    assert complaint in err


def test_options_and_names_mix() -> None:
    """Options may stand before, between and after names, as people type them."""
    options = usage.parser(cli.load("stop")).parse_words(["a", "-f", "b", "-w"])

    assert (options.names, options.force, options.wait) == (["a", "b"], True, True)


def test_what_follows_two_dashes_is_no_option() -> None:
    """`--` ends the options, whatever stands before it, so that any name can be given."""
    options = usage.parser(cli.load("stop")).parse_words(["-w", "a", "--", "-f", "-1"])

    assert (options.names, options.force, options.wait) == (["a", "-f", "-1"], False, True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("30", 30), ("1.5", 1.5), ("90s", 90), ("5m", 300), ("2h", 7200), (".5", 0.5), ("0", 0)],
)
def test_times(text: str, value: float) -> None:
    """Times are seconds, or have a unit."""
    assert usage.seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", "m", "-1", "1e9", "nan", "inf", "5 m", "1d", "١", "1.2.3", "."]
)
def test_what_is_no_time(text: str) -> None:
    """Anything else is refused, in particular what float() would take."""
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        usage.seconds(text)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (HostError("no memory", vm="web", hint="stop b"), 1, "pyvmctl: web: no memory (stop b)"),
        (ConfigError("f:1:2: a: bad\nf:3:4: b: no"), 2, "f:1:2: a: bad\nf:3:4: b: no"),
        (UsageError("what?"), 2, "pyvmctl: what?"),
        (NoSuchVmError("no VM 'x'"), 3, "pyvmctl: no VM 'x'"),
        (PyvmError("said \x1b[2J"), 1, r"pyvmctl: said \x1b[2J"),
    ],
)  # fmt: skip
def test_errors_have_their_exit_status(
    error: PyvmError,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The class of an error decides the status; complaints about a file are printed as they are."""

    def fail(_options: object) -> int:
        raise error

    verbs = {"version": verb_host.VERBS["version"]._replace(run=fail)}
    monkeypatch.setattr(verb_host, "VERBS", verbs)

    assert cli.main(["version"]) == status
    assert capsys.readouterr() == ("", text + "\n")


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """^C ends quietly, with the status that shells give it."""

    def interrupt(_options: object) -> int:
        raise KeyboardInterrupt

    verbs = {"version": verb_host.VERBS["version"]._replace(run=interrupt)}
    monkeypatch.setattr(verb_host, "VERBS", verbs)

    assert cli.main(["version"]) == 130


def test_version_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """Version of pyvmd, Python and the kernel; --version is the same."""
    assert cli.main(["--version"]) == 0
    python = sys.version.split()[0]
    assert capsys.readouterr().out == (
        f"pyvmctl {VERSION} (Python {python}, Linux {os.uname().release})\n"
    )


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`pyvmctl schema | head -1` says nothing on stderr and ends as by SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    done = pyvmctl("schema", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_under_the_output_is_an_error() -> None:
    """Output that could not be written is said, with status 1, and no traceback follows."""
    with open("/dev/full", "w") as full:
        done = pyvmctl("version", stdout=full, stderr=subprocess.PIPE)

    assert done.returncode == 1
    assert done.stderr == "pyvmctl: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_filled(closed: str, tmp_path: Path) -> None:
    """Started with some of 0 to 2 closed, no file or socket of ours lands on those numbers."""
    out = tmp_path / "out"
    script = (
        "import os, sys\n"
        "from vmm import cli\n"
        "status = cli.main(['version'])\n"
        "cli.main(['no-such-verb'])\n"
        f"fd = os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT)\n"
        "os.write(fd, f'{status} {fd}'.encode())\n"
    )
    shell = f'exec {sys.executable} -c "$0" {closed}'
    subprocess.run(["sh", "-c", shell, script], cwd=TOP, timeout=60, check=True)

    status, fd = map(int, out.read_text().split())
    assert status == 0
    assert fd > 2
