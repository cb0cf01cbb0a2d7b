"""Every verb by its real command line: exit status, what it prints where, and the form of its JSON.

What a verb does has tests elsewhere. Here is a row for each, so that none is without, and a form
for each --json, so that no field that programs read goes missing unseen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from tests.unit.cli_fakes import TOP
from vmm import cli
from vmm.usage import parser

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm
    from vmm.usage import Verb

# The form of JSON: a type, a tuple of types, [items], {key: form}, or {...: form} for any keys.
ANY: Final = object
MAYBE_TEXT: Final = (str, NoneType)
MAYBE_INT: Final = (int, NoneType)

STATUS: Final = {
    **dict.fromkeys(("name", "state", "owner", "path"), str),
    **dict.fromkeys(("pid", "vcpus", "memory", "memory_resident"), MAYBE_INT),
    **dict.fromkeys(("control", "console"), MAYBE_TEXT),
    **dict.fromkeys(("exit", "live"), (dict, NoneType)),
    "id": int,
}
STATS: Final = {
    **dict.fromkeys(("name", "state"), str),
    **dict.fromkeys(("cpu_percent", "cpu_seconds", "exits_per_second"), float),
    **dict.fromkeys(("memory", "memory_resident", "resident", "spawner_resident"), int),
    "resets": int,
    "exits": dict,
    "devices": list,
}
FIRST_STATS: Final = {**STATS, "cpu_percent": NoneType, "exits_per_second": NoneType}
VALIDATED: Final = [{"file": str, "vms": [str], "errors": [str], "warnings": [str]}]
ENDED: Final = {"id": int, "name": str, "state": str, "exit": dict}
CHECKED: Final = {
    **dict.fromkeys(("corruptions", "leaks", "allocated", "compressed", "total", "mended"), int),
    "path": str,
    "texts": [str],
    "image_end": MAYBE_INT,
    "dirty": bool,
}
IMAGE: Final = {
    **dict.fromkeys(("path", "format"), str),
    **dict.fromkeys(("size", "allocated", "version", "cluster_size", "refcount_bits"), int),
    **dict.fromkeys(("base", "base_format", "broken"), MAYBE_TEXT),
    "in_use": ANY,
    "dirty": bool,
    "corrupt": bool,
    "snapshots": int,
    "bases": list,
}
CREATED: Final = {
    "path": str,
    "format": str,
    "size": int,
    **dict.fromkeys(("base", "base_format"), MAYBE_TEXT),
}
DOCTOR: Final = {
    "can_start": bool,
    "stock_kernels": (bool, NoneType),
    "checks": {...: {"state": str, "text": str, "remedy": str, "value": ANY}},
}


class Row(NamedTuple):
    """One command line, below a VM `web` that runs, and what it comes to."""

    words: str
    status: int = 0
    out: str = ""  # a regular expression for all of it
    err: str = ""
    form: Any = None  # of what is printed on standard output, as JSON


ROWS: Final = (
    Row("start missing.yaml", 2, err=r"missing.yaml:1:1: cannot read it: No such file.*\n"),
    Row("start broken.yaml", 2, err=r"kernel .*/none: cannot open: No such file .*\n"),
    Row("start --json broken.yaml", 2, err=r"kernel .*/none: cannot open: No such file .*\n"),
    Row("up -f off.yaml"),
    Row("up -f off.yaml --json", form=[]),
    Row("load -n off.yaml"),
    Row("load off.yaml --json", form=[]),
    Row("reload off.yaml"),
    Row("reload off.yaml --json", form=[]),
    Row("forget web", 1, err=r"pyvmctl: web: cannot forget a vm that runs \(.*\)\n"),
    Row("validate off.yaml", err="off.yaml: good: off\n"),
    Row("validate --json off.yaml missing.yaml", 2, form=VALIDATED),
    Row("status", out=r" +ID +PID .*\n +1 +[0-9]+ .* running web\n"),
    Row("status --json web", form=STATUS),
    Row("status --json", form=[STATUS]),
    Row("inspect web", form={**STATUS, "config": dict}),
    Row("inspect --json web", form={**STATUS, "config": dict}),
    Row("inspect --format yaml web", out=r"# from VM web\n\nname: web\nvcpus: 2\n"),
    Row("stats -d 0.01", out=r" +CPU% .*\n.* running web\n"),
    Row("stats -d 0.01 --json web", form=STATS),
    Row("top -n 1", out=r"(?s).* running web\n"),
    Row("top -n 1 --json", form=[FIRST_STATS]),
    Row("metrics --json", form=[{"name": str, "type": str, "help": str, "metrics": list}]),
    Row("metrics", out=r'(?s)# HELP .*pyvmd_vm_state\{vm="web",state="running"\} 1\n.*'),
    Row("console --no-wait web"),
    Row("log -n 1 web", out=r"[0-9T:.-]+Z info web: asked: pause\n"),
    Row("events --timeout 0.01 web"),
    Row("events --timeout 0.01 --json web"),
    Row("stop web", err="stopping vm web: requested to shutdown vm 1\n"),
    Row("kill web", err="forced to terminate vm 1\n"),
    Row("wait --timeout 0.01 web", 1, err=r"pyvmctl: web: still runs after 0.01 s \(.*\)\n"),
    Row("reboot web", err="rebooting vm web: requested to reboot vm 1\n"),
    Row("reset web", err="reset vm 1 successfully\n"),
    Row("pause web", err="paused vm 1 successfully\n"),
    Row("unpause web", err="unpaused vm 1 successfully\n"),
    Row("import vm.conf", out=r"# from vm.conf\n\nvms:\n(?s:.*)", err=r"(?s).*"),
    Row("disk resize web 0 1G", err="web/vioblk0: 1G\n"),
    Row("disk resize --json web 0 1G", form=dict),
    Row("cdrom eject web", err="web/vioscsi: no disc, tray open\n"),
    Row("cdrom eject --json web", form=dict),
    Row("cdrom insert web nothing.iso", 2, err=r"vioscsi: disc nothing.iso: cannot open.*\n"),
    Row("cdrom insert --json web off.yaml", form=dict),
    Row("create -s 1M new.qcow2", err=r"(?s).*"),
    Row("create -s 1M --json new.qcow2", form=CREATED),
    Row("image info disk.qcow2", out=r"(?s).*qcow2.*"),
    Row("image info --json disk.qcow2", form=IMAGE),
    Row("image check disk.qcow2", out=r"(?s).*", err=r"(?s).*"),
    Row("image check --json disk.qcow2", form=CHECKED),
    Row("image resize disk.qcow2 2M", err="disk.qcow2: 2M\n"),
    Row("image resize --json disk.qcow2 2M", form=dict),
    Row("image convert disk.qcow2 new.raw", err="new.raw: raw, 1M\n"),
    Row("image convert --json disk.qcow2 new.raw", form=dict),
    Row("image commit disk.qcow2", 2, err=r"disk.qcow2: stands on no base\n"),
    Row("image commit --json over.qcow2", form=dict),
    Row("image rebase disk.qcow2", 2, err=r"pyvmctl: on which base\? .*\n"),
    Row("image rebase --json -u -b disk.qcow2 over.qcow2", form=dict),
    Row("net", out=r" +TAP .*\n(?s:.*)"),
    Row("net --json", form={"taps": list, "bridges": list, "tables": list, "leases": list}),
    Row("nic status web", out=r"(?s).*"),
    Row("nic status --json web", form={"vm": str, "device": str}),
    Row("nic link web 0 down", err="web/vionet0: link down\n"),
    Row("nic rate --rx-rate 1M/s web 0", err="web/vionet0: .*\n"),
    Row("nic rate web 0", 2, err=r"pyvmctl: nic rate: which limit\? .*\n"),
    Row("pcap nobody", 3, err=r"pyvmctl: no VM 'nobody' .*\n"),
    Row("doctor", 0, out=r"(?s).*kvm.*"),
    Row("doctor --json", form=DOCTOR),
    Row("schema", form=dict),
    Row("completion bash", out=r"(?s)# bash completion.*"),
    Row("manual vm.yaml.5", out=r'(?s)\.\\".*\.Dt VM\.YAML 5\n.*'),
    Row("version", out=r"pyvmctl [0-9.]+ \(Python [0-9.]+, Linux .*\)\n"),
    Row("version --json", form=dict.fromkeys(("version", "python", "kernel", "machine"), str)),
    Row("help", out=r"(?s)usage: pyvmctl .*"),
)  # fmt: skip


def mismatch(value: Any, form: Any, where: str = "$") -> str:
    """Return where JSON is not of a form, "" if it is."""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where}: no list"
        pairs = [(f"{where}[{n}]", item, form[0]) for n, item in enumerate(value) if form]
        if value and not form:
            return f"{where}: not empty"
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where}: no object"
        if ... not in form and set(value) != set(form):
            return f"{where}: keys {sorted(set(value) ^ set(form))}"
        pairs = [(f"{where}.{key}", value[key], form.get(key, form.get(...))) for key in value]
    else:
        allowed = form if isinstance(form, tuple) else (form,)
        ok = form is ANY or type(value) in allowed
        return "" if ok else f"{where}: {value!r} is not {form}"
    return next(filter(None, (mismatch(item, part, at) for at, item, part in pairs)), "")


@pytest.fixture
def place(tmp_path: Path, run_root: Path, fake_vm: Callable[..., FakeVm]) -> Path:
    """A directory with a few files, and the VM."""
    (tmp_path / "off.yaml").write_text("name: off\nenable: no\nboot: {kernel: none}\n")
    (tmp_path / "broken.yaml").write_text("name: broken\nboot: {kernel: none}\n")
    (tmp_path / "vm.conf").write_text('vm "old" {\n\tboot "/k"\n\tmemory 512M\n}\n')
    fake_vm("web", echo=True, settings={"resize": 1 << 30})
    return tmp_path


def run(place: Path, words: str) -> subprocess.CompletedProcess[str]:
    """Run one command line where the files are."""
    return subprocess.run(
        [sys.executable, "-m", "vmm.cli", *words.split()],
        cwd=place,
        env={**os.environ, "PYTHONPATH": TOP, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.words)
def test_a_command_line(row: Row, place: Path) -> None:
    """Status, data on standard output, what is said on standard error, and nothing else."""
    if "image " in row.words:
        assert run(place, "create -s 1M disk.qcow2").returncode == 0
    if "over.qcow2" in row.words:
        assert run(place, "create -b disk.qcow2 over.qcow2").returncode == 0
    if row.words.startswith("log "):
        assert run(place, "pause web").returncode == 0
    done = run(place, row.words)
    assert done.returncode == row.status, done.stderr
    assert "Traceback" not in done.stderr
    if row.form is None:
        assert re.fullmatch(row.out, done.stdout), done.stdout
        assert re.fullmatch(row.err, done.stderr), done.stderr
    else:
        assert mismatch(json.loads(done.stdout), row.form) == ""


def test_no_verb_is_without_a_row() -> None:
    """Nor an action of one, nor a --json without a form."""
    lacking = []
    for name in cli.VERBS:
        verb = cli.load(name)
        for words, part in {
            name: verb,
            **{f"{name} {action}": made for action, made in verb.actions.items()},
        }.items():
            if part is verb and verb.actions:
                continue
            rows = [row for row in ROWS if f"{row.words} ".startswith(f"{words} ")]
            if not rows:
                lacking.append(words)
            elif _has_json(part) and not any(row.form is not None for row in rows):
                lacking.append(f"{words} --json")
    assert set(lacking) == WITHOUT_FORM


# What these print with --json needs a VM that starts, ends or tells something, or is a line for
# each of many things: below, in test_cli_start.py, test_cli_events.py and test_cli_wait.py.
WITHOUT_FORM: Final = {"start --json", "wait --json", "events --json", "log --json"}


def _has_json(verb: Verb) -> bool:
    return any("--json" in action.option_strings for action in parser(verb)._actions)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"a": 1}, {}),
        ({}, {"a": int}),
        ({"a": True}, {"a": int}),
        ([1, "x"], [int]),
        ([1], []),
        (None, (int, str)),
        ({"x": {"y": 1}}, {...: {"y": str}}),
        ([], {}),
    ],
)
def test_a_wrong_form_is_seen(value: Any, form: Any) -> None:
    """By the measure itself."""
    assert mismatch(value, form)


# how it ended


@pytest.mark.parametrize("verb", ["stop --timeout 20", "wait --timeout 20 --json"])
def test_whoever_waits_is_told_how_it_ended(
    verb: str, run_root: Path, fake_vm: Callable[..., FakeVm], tmp_path: Path
) -> None:
    """In vmctl's words, then in the VM's own; a program gets all of it."""
    fake_vm("web", obeys=0, exit={"how": "stop", "detail": "guest power-off (ACPI), as asked"})
    if verb.startswith("wait"):
        assert run(tmp_path, "stop web").returncode == 0
    done = run(tmp_path, f"{verb} web")
    assert done.returncode == 0
    assert done.stderr.endswith("terminated vm 1\nweb: guest power-off (ACPI), as asked\n")
    if "--json" in verb:
        found = json.loads(done.stdout)
        assert mismatch(found, ENDED) == ""
        assert (found["state"], found["exit"]["how"]) == ("stopped", "stop")
