"""Files of VMs by pyvmctl: start by name, up, load, reload, forget, validate; staggered start."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError, NoSuchVmError, PyvmError
from tests.unit.cli_start_lab import TWO, ends, fails, runs
from vmm import daemon, known, runroot, starting, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.model import VmConfig
    from tests.unit.cli_start_lab import Report, StartLab
    from vmm.rundir import RunDir


def running() -> list[str]:
    """Return the names of the VMs that run."""
    return [info.name for info in survey.survey() if info.alive]


def said(lab: StartLab) -> list[str]:
    """Return what was said, without process ids."""
    return [line.partition(", pid")[0] for line in lab.err.splitlines()]


@pytest.fixture
def two(lab: StartLab) -> StartLab:
    """A lab whose file holds VMs one and two, and off, which is not enabled."""
    lab.vm_is(runs)
    lab.yaml.write_text(TWO)
    return lab


# by name


def test_a_started_file_is_known_and_its_vms_start_by_name(two: StartLab) -> None:
    """From the first start on; what was edited meanwhile counts."""
    assert two("one") == 3
    assert (
        said(two)
        == ["pyvmctl: no VM 'one' in a file that was loaded (start it by its file: start FILE)"]
        or two.err
    )
    assert two.start("one") == 0
    assert known.files() == [str(two.yaml)]
    assert two("two", "off") == 0
    assert running() == ["off", "one", "two"]
    two.yaml.write_text(TWO + "  three: {boot: {kernel: k}}\n")
    assert two("three", "--json") == 0
    assert json.loads(two.out)["name"] == "three"


def test_the_file_named_last_says_what_a_name_means(two: StartLab) -> None:
    """Two files may have a VM of one name."""
    other = two.yaml.parent / "other.yaml"
    other.write_text("vms: {one: {boot: {kernel: k}, vcpus: 7}}\n")
    assert two.run("load", "-n", str(two.yaml)) == two.run("load", "-n", str(other)) == 0
    assert known.find("one")[0].vcpus == 7
    assert known.find("two")[1].path == str(two.yaml)


def test_a_broken_file_says_why_a_name_is_unknown(two: StartLab) -> None:
    """The VM may be in there; other files' VMs still start."""
    assert two.run("load", "-n", str(two.yaml)) == 0
    broken = two.yaml.parent / "broken.yaml"
    broken.write_text("vms: {x: {boot: {kernel: k}}}\n")
    assert two.run("load", "-n", str(broken)) == 0
    broken.write_text("vms: 1\n")
    assert two("x") == 2
    assert f"{broken}:1:6: vms: expected a mapping" in two.err
    assert two("one") == 0
    broken.unlink()
    assert two("x") == 2
    assert f"{broken}:1:1: cannot read it: No such file or directory (put it back;" in two.err


@pytest.mark.parametrize("trap", ["mode", "owner"])
def test_a_file_that_another_could_have_changed_is_refused(two: StartLab, trap: str) -> None:
    """A name is a standing order: who may change the file gives the orders."""
    assert two.run("load", "-n", str(two.yaml)) == 0
    if trap == "mode":
        two.yaml.chmod(0o664)
    elif os.geteuid():
        pytest.skip("only root can give a file away")
    else:
        os.chown(two.yaml, 12345, 12345)
    assert two("one") == 1
    assert "could have been changed by another user" in two.err
    assert running() == []
    assert two.start("one") == 0  # named is read


def test_what_has_taken_the_place_of_a_file_is_not_waited_for(two: StartLab) -> None:
    """A FIFO there would hold up whoever asks for any name, root included."""
    assert two.run("load", "-n", str(two.yaml)) == 0
    two.yaml.unlink()
    os.mkfifo(two.yaml)
    [found] = known.read()
    assert "is no file any more" in str(found.error)
    assert two("x") == 1
    assert f"{two.yaml} is no file any more" in two.err


def test_what_can_be_read_once_is_started_and_not_known(two: StartLab) -> None:
    """As in `pyvmctl start <(make-yaml)`: its name means nothing later."""
    reader, writer = os.pipe()
    os.write(writer, two.yaml.read_bytes())
    os.close(writer)
    try:
        assert two.run("load", "-n", f"/dev/fd/{reader}") == 0
    finally:
        os.close(reader)
    assert known.files() == []


def test_a_damaged_list_of_files_is_no_list(two: StartLab) -> None:
    """Whatever stands in it."""
    for text in ("", "[]", '{"files": 1}', '{"files": [1, "relative", null]}', "\xff"):
        (two.root / ".files").write_text(text)
        assert known.files() == []
    with pytest.raises(NoSuchVmError):
        known.find("one")


def test_the_list_of_files_has_an_end(two: StartLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in it may be named again even then."""
    monkeypatch.setattr(known, "MAX_FILES", 1)
    known.remember(str(two.yaml))
    known.remember(str(two.yaml))
    with pytest.raises(HostError, match="1 files are known already"):
        known.remember("/other.yaml")


# up and load


def test_up_starts_what_does_not_run(two: StartLab) -> None:
    """And only that; with names also what is not enabled."""
    assert two.run("up", "-f", str(two.yaml)) == 0
    assert running() == ["one", "two"]
    assert two.run("up", "--json") == 0
    assert json.loads(two.out) == []
    assert said(two) == ["vm one runs already", "vm two runs already"]
    assert two.run("up", "off") == 0
    assert said(two) == ["started vm 3 successfully: off"]
    assert two.run("up", "nobody") == 3
    assert f"no VM 'nobody' in {two.yaml}" in two.err


def test_load_of_several_files(two: StartLab) -> None:
    """All VMs start; a mistake in one file, or a name in two of them, and nothing is done."""
    other = two.yaml.parent / "other.yaml"
    other.write_text("vms: {one: {boot: {kernel: k}}, b: {vcpus: 0}}\n")
    assert two.run("load", str(two.yaml), str(other)) == 2
    assert f"{other}:1:36: vms.b: missing key 'boot'" in two.err
    other.write_text("vms: {one: {boot: {kernel: k}}}\n")
    assert two.run("load", str(two.yaml), str(other)) == 2
    assert said(two) == [f"{other}:1:1: VM 'one' is in {two.yaml}, too"]
    assert (running(), known.files()) == ([], [])
    other.write_text("vms: {b: {boot: {kernel: k}}}\n")
    assert two.run("load", str(two.yaml), str(other), "--json") == 0
    assert [vm["name"] for vm in json.loads(two.out)] == ["one", "two", "b"]


def test_one_that_fails_does_not_keep_the_others_from_starting(two: StartLab) -> None:
    """The exit status is its own."""

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        vm: Callable[[VmConfig, RunDir, Report], int] = runs
        if config.name == "one":
            vm = fails(HostError("no kernel today"))
        return vm(config, rundir, report)

    two.vm_is(run)
    assert two.run("load", str(two.yaml)) == 1
    first, second = said(two)
    assert (first, second[-18:]) == ("pyvmctl: no kernel today", " successfully: two")
    assert running() == ["two"]


def test_staggered_start_waits_between_groups(
    two: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before the first and not after the last; one per CPU unless said."""
    steps: list[object] = []
    monkeypatch.setattr(time, "sleep", steps.append)
    monkeypatch.setattr(starting, "_tell", lambda vm: steps.append(vm.name))
    vms = "vms:\n" + "".join(f"  v{n}: {{boot: {{kernel: k}}}}\n" for n in range(5))
    two.yaml.write_text(vms + "staggered-start: {parallel: 2, delay: 7s}\n")
    assert two.start() == 0
    assert [step for step in steps if isinstance(step, str) or step == 7.0] == [
        "v0",
        "v1",
        7.0,
        "v2",
        "v3",
        7.0,
        "v4",
    ]


def test_an_interrupt_ends_those_that_do_not_run_yet(
    two: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs by then stays; nothing is left of the others."""
    told = two.root / ".told"
    settle = daemon._await_report

    def settled(birth: daemon._Birth) -> daemon.Started | PyvmError:
        result = settle(birth)
        told.touch()
        return result

    monkeypatch.setattr(daemon, "_await_report", settled)

    def run(config: VmConfig, rundir: RunDir, report: Report) -> int:
        if config.name == "two":
            while not told.exists():  # the starter has not heard of "one" yet
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        return runs(config, rundir, report)

    two.vm_is(run)
    two.yaml.write_text(TWO + "staggered-start: {parallel: 3}\n")
    assert two.start("one", "two") == 130
    left = [name for name in os.listdir(two.root) if not name.startswith(".")]
    assert running() == left == ["one"]


# reload


def test_reload(two: StartLab) -> None:
    """Starts what is new, forgets what is gone and stopped, leaves alone what runs."""
    two.vm_is(ends(0))
    assert two.start() == 0
    for name in ("one", "two"):
        assert survey.wait_end(name, 10) is not None
    two.vm_is(runs)
    assert two.start("two") == 0
    pid = two.pid("two")
    two.yaml.write_text("vms: {three: {boot: {kernel: k}}, two: {boot: {kernel: k}, vcpus: 9}}\n")
    assert two.run("reload") == 0
    assert said(two) == [
        "forgot vm 1: one",
        "vm two runs already",
        "started vm 3 successfully: three",
    ]
    assert two.pid("two") == pid


def test_reload_with_a_mistake_changes_nothing(two: StartLab) -> None:
    """The known files stay known."""
    assert two.run("load", "-n", str(two.yaml)) == 0
    bad = two.yaml.parent / "bad.yaml"
    bad.write_text("vms: 1\n")
    assert two.run("reload", str(bad)) == 2
    assert known.files() == [str(two.yaml)]
    assert two.run("reload", str(two.yaml)) == 0
    assert running() == ["one", "two"]


def test_without_a_known_file_there_is_a_default_one(
    two: StartLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's is below his own configuration directory."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(two.yaml.parent))
    assert two.run("reload") == 2
    assert f"{two.yaml.parent}/pyvmd/vm.yaml:1:1: cannot read it" in two.err


# forget


def test_forget_removes_what_is_left_of_a_vm_that_has_ended(two: StartLab) -> None:
    """Never of one that runs; what is unknown is said, the others are done."""
    assert two.start("two") == 0
    two.vm_is(ends(0))
    assert two.start("one") == 0
    assert survey.wait_end("one", 10) is not None
    assert two.run("forget", "one", "nobody", "two") == 1  # the status of the last failure
    assert said(two)[0].startswith("pyvmctl: no VM 'nobody'")
    assert "cannot forget a vm that runs" in two.err
    assert "forgot vm 2: one" in said(two)
    assert sorted(name for name in os.listdir(two.root) if name[0] != ".") == ["two"]
    assert two.run("forget", "-a") == 0
    assert (running(), known.files()) == (["two"], [])
    assert runroot.vm_id("three") == 2  # the number is free
    assert two.run("forget") == two.run("forget", "-a", "x") == 2


# validate


def test_validate_says_all_mistakes_and_touches_nothing(two: StartLab) -> None:
    """One line per mistake in the editors' form; JSON has them all, too."""
    bad = two.yaml.parent / "bad.yaml"
    bad.write_text("boot: {kernel: k}\nvcpus: 99\nmemory: 1048576\n")
    assert two.run("validate", str(two.yaml)) == 0
    assert said(two) == [f"{two.yaml}: good: one, two, off"]
    assert two.run("validate", str(bad), str(two.yaml)) == 2
    assert said(two)[0].startswith(f"{bad}:2:8: vcpus: expected an integer")
    assert two.run("validate", "--json", str(bad), str(two.yaml)) == 2
    first, second = json.loads(two.out)
    assert (first["file"], first["vms"], len(first["errors"])) == (str(bad), [], 1)
    assert second == {
        "file": str(two.yaml),
        "vms": ["one", "two", "off"],
        "errors": [],
        "warnings": [],
    }
    assert (os.listdir(two.root), known.files()) == ([], [])
