"""pyvmctl stats, top and metrics: what VMs use."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import pexpect
import pytest

from tests.unit.cli_fakes import TOP
from vmm import metrics, sample
from vmm.sample import DeviceSample, Sample
from vmm.survey import VmInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl

DEVICE: Final = {
    "name": "vionet0",
    "lives": 3,
    "pid": os.getpid(),
    "counters": {"rx": {"bytes": 1000, "frames": 10, "drops": {"short": 1}}, "link": True},
}
INFO: Final = {
    "memory": 512 << 20,
    "resets": 3,
    "exits": {"io": 5, "hlt": 7},
    "spawner": os.getppid(),
    "devices": [DEVICE],
}


def moment(at: float, **changes: Any) -> Sample:
    """Return a sample of a VM with one device."""
    device = DeviceSample("vionet0", True, at, 4096, {"rx_bytes": int(at * 1000)})
    exits, devices = {"io": int(at * 10)}, {"vionet0": device}
    memory = (1 << 30, 1 << 20, 8 << 20, 4 << 20)
    one = Sample("web", "running", at, at / 2, *memory, 0, exits, devices)
    return one._replace(**changes)


def test_rates_are_differences_per_second() -> None:
    """Of CPU time in percent, of exits and of what devices have counted."""
    facts = sample.per_second(moment(10), moment(12))
    assert (facts["cpu_percent"], facts["exits_per_second"]) == (50.0, 10.0)
    (device,) = facts["devices"]
    assert (device["cpu_percent"], device["per_second"]) == (100.0, {"rx_bytes": 1000.0})


def test_without_a_moment_before_there_is_no_rate() -> None:
    """Nothing is divided by nothing; a counter that went back is no rate below 0."""
    for before in (None, moment(12)):
        facts = sample.per_second(before, moment(12))
        assert (facts["cpu_percent"], facts["exits_per_second"]) == (None, None)
        assert facts["devices"][0]["per_second"] == {}
    later = moment(
        14, exits={}, devices={"vionet0": DeviceSample("vionet0", True, 0, 0, {"rx_bytes": 5})}
    )
    facts = sample.per_second(moment(12), later)
    assert facts["exits_per_second"] == 0
    assert facts["devices"][0]["per_second"] == {"rx_bytes": 0}


def test_stats_of_a_vm(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A row for the VM, one for each device; in JSON all that is known."""
    fake_vm(info=INFO)
    assert pyvmctl("stats", "-d", "0.05") == 0
    lines = [line.split() for line in pyvmctl.out.splitlines()]
    assert lines[0] == ["CPU%", "MEM", "RSS", "EXITS/s", "IN/s", "OUT/s", "STATE", "NAME"]
    assert (lines[1][1], lines[1][3:]) == ("88.0M", ["0", "-", "-", "running", "web"])
    assert (lines[2][0], lines[2][-1]) == ("-", "spawner")
    assert (lines[3][1], lines[3][3:]) == ("-", ["-", "0B", "-", "vionet0"])
    assert pyvmctl("stats", "-d", "0.05", "--json", "web") == 0
    facts = json.loads(pyvmctl.out)
    assert (facts["exits"], facts["resets"]) == ({"io": 5, "hlt": 7}, 3)
    (device,) = facts["devices"]
    assert device["counters"] == {"rx_bytes": 1000, "rx_frames": 10}
    assert min(device["resident"], facts["resident"], facts["spawner_resident"]) > 1 << 20
    assert device["per_second"] == {"rx_bytes": 0, "rx_frames": 0}


def test_stats_without_vms(pyvmctl: Pyvmctl) -> None:
    """Nothing runs: an empty table at once, no error; a name that is unknown is one."""
    assert pyvmctl("stats") == 0
    assert len(pyvmctl.out.splitlines()) == 1
    assert pyvmctl("stats", "--json") == 0
    assert json.loads(pyvmctl.out) == []
    for verb in ("stats", "top", "metrics"):
        assert pyvmctl(verb, "nobody") == 3


@pytest.mark.parametrize(
    "lie",
    [
        {"devices": 1, "exits": [], "memory": "much", "resets": -1, "status": 5},
        {"devices": [1, {}, {"name": "\x1b[2J"}, {"name": "x" * 100}, {"name": ["a"]}]},
        {
            "devices": [
                {"name": "d", "pid": "1", "counters": {"a": {"b": 1 << 70}, "c": True, '"': 1}}
            ]
        },
        {"devices": [{"name": "d", "counters": {"a b": 1, "a-b": 2, "a": {"b": 3}}}]},
        {"exits": {"\n": 1, "x": "y", 'a"b': 2, "neg": -1}},
        {"devices": [{"name": f"d{n}"} for n in range(3000)]},
    ],
)
def test_a_vm_process_that_lies(
    lie: dict[str, Any], pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """What it says is shown only where it is what it should be."""
    fake_vm(info=lie)
    assert pyvmctl("stats", "-d", "0", "--json", "web") == 0
    facts = json.loads(pyvmctl.out)
    assert all(isinstance(number, int) and number >= 0 for number in facts["exits"].values())
    assert len(facts["devices"]) <= sample.MAX_ROWS
    assert "\x1b" not in pyvmctl.out
    assert pyvmctl("metrics") == 0
    check_format(pyvmctl.out)


def check_format(text: str) -> None:
    """Check what a reader of the format relies on."""
    families: list[str] = []
    series: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            families.append(line.split()[2])
        elif line.startswith("# TYPE "):
            assert line.split()[2] == families[-1]
            assert line.split()[3] in ("gauge", "counter")
        else:
            found = re.fullmatch(r'(\w+)\{(\w+="[^"\\\n]*",?)+\} [0-9.e+-]+', line)
            assert found, line
            assert found[1] == families[-1]
            series.append(line.rpartition(" ")[0])
    assert len(families) == len(set(families))
    assert len(series) == len(set(series))
    assert text.endswith("\n")


def test_metrics(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """Every family is declared once, each VM and device has its rows."""
    fake_vm(info=INFO)
    assert pyvmctl("metrics") == 0
    check_format(pyvmctl.out)
    lines = pyvmctl.out.splitlines()
    assert 'pyvmd_vm_state{vm="web",state="running"} 1' in lines
    assert 'pyvmd_vm_state{vm="web",state="crashed"} 0' in lines
    assert f'pyvmd_vm_memory_bytes{{vm="web"}} {512 << 20}' in lines
    assert 'pyvmd_vm_exits_total{vm="web",reason="hlt"} 7' in lines
    assert 'pyvmd_device_up{vm="web",device="vionet0"} 1' in lines
    assert 'pyvmd_device_processes_total{vm="web",device="vionet0"} 3' in lines
    assert 'pyvmd_device_events_total{vm="web",device="vionet0",event="rx_bytes"} 1000' in lines


@pytest.mark.parametrize(
    ("info", "state"),
    [
        ({"status": "paused"}, "paused"),
        ({"ladder": {"goal": "stop"}}, "stopping"),
        ({"ladder": {"goal": "reboot"}}, "running"),
        ({"status": "x"}, "unknown"),
    ],
)
def test_the_state_is_the_one_that_status_shows(
    info: dict[str, Any], state: str, pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]
) -> None:
    """In all that show one; in the metrics exactly one word of all is 1."""
    fake_vm(info={**INFO, **info})
    assert pyvmctl("status", "--json", "web") == 0
    assert json.loads(pyvmctl.out)["state"] == state
    assert pyvmctl("stats", "-d", "0", "--json", "web") == 0
    assert json.loads(pyvmctl.out)["state"] == state
    assert pyvmctl("metrics") == 0
    check_format(pyvmctl.out)
    ones = re.findall(r'pyvmd_vm_state\{vm="web",state="(\w+)"\} 1', pyvmctl.out)
    assert ones == [state]


def test_a_vm_that_does_not_answer_is_shown_all_the_same(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As unknown, with what the kernel knows of its process."""
    monkeypatch.setattr(sample, "ANSWER_SECONDS", 0.2)
    vm = fake_vm(info=INFO)
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        assert pyvmctl("stats", "-d", "0", "web") == 0
        row = pyvmctl.out.splitlines()[1].split()
        assert (row[1], row[-2:]) == ("-", ["unknown", "web"])
        assert pyvmctl("metrics", "web") == 0
        assert 'pyvmd_vm_state{vm="web",state="unknown"} 1' in pyvmctl.out
        assert "memory" not in pyvmctl.out
    finally:
        os.kill(vm.pid, signal.SIGCONT)


def test_json_of_top_and_metrics(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """A line per look; families with their rows."""
    fake_vm(info=INFO)
    assert pyvmctl("top", "--json", "-n", "2", "-d", "0.01") == 0
    looks = [json.loads(line) for line in pyvmctl.out.splitlines()]
    assert [[vm["name"] for vm in look] for look in looks] == [["web"], ["web"]]
    assert looks[0][0]["cpu_percent"] is None
    assert isinstance(looks[1][0]["cpu_percent"], float)
    assert pyvmctl("metrics", "--json") == 0
    families = {family.pop("name"): family for family in json.loads(pyvmctl.out)}
    assert families["pyvmd_vm_resets_total"] == {
        "type": "counter",
        "help": "Resets of the guest.",
        "metrics": [{"labels": {"vm": "web"}, "value": 3}],
    }


def test_metrics_of_a_vm_that_is_stopped() -> None:
    """Its state is told, and nothing that nobody could know."""
    info = VmInfo("web", 1, "crashed", 0, {}, "/nowhere")
    lines = metrics.text([info], {}).splitlines()
    assert 'pyvmd_vm_state{vm="web",state="crashed"} 1' in lines
    assert not [line for line in lines if "memory" in line]


def test_top_in_a_pipe(pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm]) -> None:
    """One table after the other, without a word of a terminal's language."""
    fake_vm(info=INFO)
    assert pyvmctl("top", "-n", "2", "-d", "0.01") == 0
    assert pyvmctl.out.count("NAME\n") == 2
    assert "\x1b" not in pyvmctl.out


def test_top_on_a_terminal(tmp_path: Path, fake_vm: Callable[..., FakeVm]) -> None:
    """The other screen, as many lines as fit, q leaves, and all is as it was."""
    many = [{"name": f"d{n}", "pid": 0} for n in range(50)]
    fake_vm(info={**INFO, "devices": many})
    words = ["-m", "vmm.cli", "top", "-d", "60"]
    client = pexpect.spawn(
        sys.executable, words, cwd=TOP, timeout=30, dimensions=(10, 80), encoding="utf-8"
    )
    client.expect_exact("\x1b[?1049h")
    client.expect_exact("(q leaves)")
    client.expect_exact("d4")
    client.send("q")
    client.expect_exact("\x1b[?1049l")
    assert "d9" not in client.before
    client.expect(pexpect.EOF)
    client.close()
    assert client.exitstatus == 0
