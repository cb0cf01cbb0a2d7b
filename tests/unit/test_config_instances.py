"""Files of several VMs: what they have in common, templates, and how they are started."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from config.instances import PERMISSION
from config.keys import CHANGES, VM
from config.load import load_text
from config.model import BootConfig, DiskConfig, StaggerConfig, VmConfig

WEB = "  web: {boot: {kernel: /k}, vcpus: 2, memory: 1G, disks: [{path: /w, format: raw}]%s}\n"


def vms(text: str) -> dict[str, VmConfig]:
    """Return the VMs of a file by name."""
    return {vm.name: vm for vm in load_text(text, "/etc/vms.yaml").vms}


def mistakes(text: str) -> list[str]:
    """Return the complaints about `text`, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, "vms.yaml")
    return [line.removeprefix("vms.yaml:") for line in str(caught.value).split("\n")]


def test_defaults_hold_where_a_vm_has_nothing_of_its_own() -> None:
    """They may stand after the VMs; even required keys may come from them."""
    found = vms("vms:\n  a: {}\n  b: {memory: 2G}\ndefaults: {boot: {kernel: k}, memory: 1G}\n")
    assert [found[name].memory for name in "ab"] == [1 << 30, 2 << 30]
    assert found["a"].boot == found["b"].boot == BootConfig(kernel="/etc/k")


def test_mistakes_in_defaults_are_told_once() -> None:
    """Where they stand, however many VMs have them; the VMs' own are told beside them."""
    text = (
        "defaults: {vcpus: no, name: x, zzz: 1, cpus: 1, boot: {kernel: k}}\n"
        "vms: {a: {}, b: {zzz: 1}}\n"
    )
    assert mistakes(text) == [
        "1:19: defaults.vcpus: expected an integer from 1 to 32 (got 'no')",
        "1:23: defaults.name: cannot be the same for all",
        f"1:32: defaults.zzz: unknown key (allowed: {', '.join(VM.names())})",
        "1:40: defaults.cpus: duplicate key: it means the same as 'vcpus'",
        f"2:18: vms.b.zzz: unknown key (allowed: {', '.join(VM.names())})",
    ]
    assert "1:11: defaults: expected a mapping" in mistakes("defaults: 1\nvms: {a: {}}\n")[0]


def test_an_instance_has_its_templates_keys_but_not_its_disks() -> None:
    """Wherever the template stands, and through several steps."""
    more = "  two: {instance: one, memory: 2G}\n  one: {instance: web, enable: yes}\n"
    found = vms("vms:\n" + more + WEB % ", enable: no, owner: alice")
    assert found["one"] == found["web"]._replace(name="one", instance="web", enable=True, disks=())
    assert found["two"] == found["one"]._replace(name="two", instance="one", memory=2 << 30)
    assert found["web"].disks == (DiskConfig(path="/w", format="raw"),)


def test_a_template_goes_before_the_defaults() -> None:
    """Its own keys are nearer to the instance than the file's."""
    found = vms("defaults: {memory: 4G, vcpus: 4}\nvms:\n" + WEB % "" + "  x: {instance: web}\n")
    assert (found["x"].memory, found["x"].vcpus) == (1 << 30, 2)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("memory: 2G", "memory"),
        ("cpus: 4", "memory"),
        ("boot: {kernel: /other}", "boot"),
        ("disks: [{path: /x, format: raw}]", "disk"),
        ("allow: [memory]", "instance"),
    ],
)
def test_an_instance_changes_what_its_template_allows(change: str, word: str) -> None:
    """And nothing else; saying what the template says is no change."""
    for others in ([], [other for other in CHANGES if other != word]):
        text = (
            "vms:\n"
            + WEB % f", allow: [{', '.join(others)}]"
            + f"  x: {{instance: web, {change}}}\n"
        )
        key = change.partition(":")[0]
        (told,) = mistakes(text)
        allows = ", ".join(others) or "nothing"
        assert told == (
            f"3:22: vms.x.{key}: 'web' does not let its instances change this (it allows: {allows})"
        )
    assert vms("vms:\n" + WEB % f", allow: [{word}]" + f"  x: {{instance: web, {change}}}\n")
    assert vms("vms:\n" + WEB % ", allow: []" + "  x: {instance: web, memory: 1G, jail: off}\n")


def test_every_permission_is_a_word_of_allow_for_a_key_there_is() -> None:
    """A typing error in the table would forbid nothing, or everything."""
    assert set(PERMISSION.values()) == set(CHANGES)
    built = {key.name for key in VM.keys} | {"interfaces", "cdrom"}
    assert set(PERMISSION) <= built


def test_templates_that_cannot_be() -> None:
    """Unknown, oneself, in a circle, not a word, and none in a file of one VM."""
    boot = "boot: {kernel: /k}"
    assert mistakes(f"vms: {{a: {{{boot}, instance: b}}}}") == [
        "1:41: vms.a.instance: no VM 'b' in this file"
    ]
    assert mistakes(f"vms: {{a: {{{boot}, instance: a}}}}") == [
        "1:41: vms.a.instance: the VM would be made from itself"
    ]
    circle = f"vms:\n  a: {{{boot}, instance: b}}\n  b: {{{boot}, instance: a}}\n"
    assert mistakes(circle) == ["3:37: vms.b.instance: the VM would be made from itself"]
    (told,) = mistakes(f"vms: {{a: {{{boot}, instance: [b]}}}}")
    assert "vms.a.instance: expected a name" in told
    assert mistakes(f"{boot}\ninstance: a\n") == [
        "2:1: instance: there is no other VM in this file: put both below 'vms'"
    ]


def test_a_long_row_of_templates() -> None:
    """Is refused, instead of taking as much stack as the file's author likes."""
    rows = "".join(f"  v{n}: {{instance: v{n + 1}}}\n" for n in range(2000))
    (told,) = mistakes(f"vms:\n{rows}  v2000: {{boot: {{kernel: /k}}}}\n")[:1]
    assert "vms.v16.instance: more than 16 templates in a row" in told


def test_a_broken_template_is_told_once() -> None:
    """Its instance has what it can have; the template's mistake is not repeated for it."""
    text = "vms:\n  a: {boot: {kernel: /k}, vcpus: 0}\n  b: {instance: a, boot: {kernel: /k}}\n"
    assert mistakes(text) == ["2:34: vms.a.vcpus: expected an integer from 1 to 32 (got '0')"]


def test_staggered_start() -> None:
    """vm.conf(5)'s defaults: 30 seconds; times with a unit or without."""
    vm = "vms: {a: {boot: {kernel: /k}}}\n"
    assert load_text(vm, "v.yaml").staggered_start is None
    for text, expected in (
        ("{}", StaggerConfig(0, 30.0)),
        ("{parallel: 4, delay: 1.5}", StaggerConfig(4, 1.5)),
        ("{delay: 2m}", StaggerConfig(0, 120.0)),
        ("{delay: 0}", StaggerConfig(0, 0.0)),
    ):
        assert load_text(f"{vm}staggered-start: {text}", "v.yaml").staggered_start == expected
    for text in ("2h", "-1", "1.", "s", "1e3", "soon", "1 s"):
        (told,) = mistakes(f"{vm}staggered-start: {{delay: {text}}}")
        assert "staggered-start.delay: expected a time from 0s to 1h" in told
    assert mistakes("boot: {kernel: /k}\nstaggered-start: {}\n") == [
        "2:1: staggered-start: belongs to a file of several VMs: give it beside 'vms'"
    ]
