"""One test for each kind of mistake in vm.yaml, and for telling them all at once, in place."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from config.keys import FILE, VM
from config.load import load_text
from config.nodes import MAX_ERRORS

BOOT = "boot: {kernel: /k}\n"
NAME = "a name of at most 63 letters, digits, '.', '-', '_' that starts with a letter"
MEMORY = "a size from 1M to 128G in steps of 4K"
KEYS = ", ".join(VM.names())
FILE_KEYS = ", ".join(FILE.names())


def mistakes(text: str) -> list[str]:
    """Return the complaints about `text`, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, "web.yaml")
    return [line.removeprefix("web.yaml:") for line in str(caught.value).split("\n")]


def test_nine_mistakes_in_one_pass() -> None:
    """All mistakes of a file are told at once, in its order, each at its line and column."""
    text = """\
name: 7up
memmory: 512M
vcpus: 99
memory: 512MB
boot:
  kernel: [bzImage]
  kernel: bzImage
debug: {console: maybe, exit: !!bool true}
balloon: []
"""
    assert mistakes(text) == [
        f"1:7: name: expected {NAME} (got '7up')",
        "2:1: memmory: unknown key (did you mean 'memory'?)",
        "3:8: vcpus: expected an integer from 1 to 32 (got '99')",
        f"4:9: memory: expected {MEMORY} (got '512MB'; "
        "'MB' may mean 1000 or 1024: write M or MiB for 1024)",
        "6:11: boot.kernel: expected a file name (got a list)",
        "7:3: boot.kernel: duplicate key (first on line 6)",
        "8:18: debug.console: expected true or false (got 'maybe')",
        "8:31: the tag 'tag:yaml.org,2002:bool': tags are not supported, leave it out",
        "9:1: balloon: not built yet in this version",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("memory: 1G", "1:1: missing key 'boot'"),
        ("boot: {}", "1:7: boot: missing key 'kernel'"),
        ("boot: {initrd: /i}", "1:7: boot: missing key 'kernel'"),
        ("boot:\nname: web", "1:6: boot: expected a mapping with keys such as kernel, initrd, cm"),
        ("boot: bzImage", "1:7: boot: expected a mapping with keys such as kernel, initrd, cmdli"),
        ("boot: [a]", "firmware, order (got a list)"),
        ("boot: {kernal: /k}", "1:8: boot.kernal: unknown key (did you mean 'kernel'?)"),
        (BOOT + "kernel: /k", "2:1: kernel: unknown key (it belongs below 'boot')"),
        (BOOT + "zzz: 1", f"2:1: zzz: unknown key (allowed: {KEYS})"),
        (BOOT + "disable: yes", "2:1: disable: unknown key (did you mean 'enable'?)"),
        (BOOT + "Memory: 1G", "2:1: Memory: unknown key (did you mean 'memory'?)"),
        (BOOT + '"": 1', "2:1: '': unknown key"),
        (BOOT + '"a\\nb\\e[31m": 1', "2:1: 'a\\nb\\x1b[31m': unknown key"),
        (BOOT + "boot: {kernel: /k}", "2:1: boot: duplicate key (first on line 1)"),
        (BOOT + '"boot": {kernel: /k}', "2:1: boot: duplicate key (first on line 1)"),
        (BOOT + "cpus: 1\nvcpus: 1", "3:1: vcpus: duplicate key: it means the same as 'vcpus'"),
        (BOOT + "? [a]\n: b", "2:3: a key must be a word (got a list)"),
        (BOOT + "? {a: b}\n: b", "2:3: a key must be a word (got a mapping)"),
        (BOOT + "<<: {a: b}", "2:1: <<: merge keys are not supported: repeat the keys"),
        (BOOT + "name: !mine web", "2:7: the tag '!mine': tags are not supported, leave it out"),
        (BOOT + "name: ! web", "2:7: the tag '!': tags are not supported, leave it out"),
        (BOOT + "name: 12", f"2:7: name: expected {NAME} (got '12')"),
        (BOOT + "name: -a", f"2:7: name: expected {NAME} (got '-a')"),
        (BOOT + "name: a/b", f"2:7: name: expected {NAME} (got 'a/b')"),
        (BOOT + "name: ä", f"2:7: name: expected {NAME} (got 'ä')"),
        (BOOT + "name:", f"2:6: name: expected {NAME} (got nothing)"),
        (BOOT + "name: null", f"2:7: name: expected {NAME} (got nothing)"),
        (BOOT + 'name: ""', f"2:7: name: expected {NAME} (got '')"),
        (BOOT + f"name: {'a' * 64}", "64 bytes, the limit is 63)"),
        (BOOT + "vcpus: 0", "2:8: vcpus: expected an integer from 1 to 32 (got '0')"),
        (BOOT + "cpus: 33", "2:7: cpus: expected an integer from 1 to 32 (got '33')"),
        (BOOT + "vcpus: -1", "2:8: vcpus: expected an integer from 1 to 32 (got '-1')"),
        (BOOT + "vcpus: 0x2", "2:8: vcpus: expected an integer from 1 to 32 (got '0x2')"),
        (BOOT + "vcpus: 1.0", "2:8: vcpus: expected an integer from 1 to 32 (got '1.0')"),
        (BOOT + "vcpus: ٣", "2:8: vcpus: expected an integer from 1 to 32 (got '٣')"),
        (BOOT + "vcpus: two", "2:8: vcpus: expected an integer from 1 to 32 (got 'two')"),
        (BOOT + f"vcpus: {'9' * 5000}", f"(got '{'9' * 37}...')"),
        (BOOT + "memory: 0", f"2:9: memory: expected {MEMORY} (got '0')"),
        (BOOT + "memory: 512", "(got '512'; that is bytes: did you mean 512M?)"),
        (BOOT + "memory: 1023K", f"2:9: memory: expected {MEMORY} (got '1023K')"),
        (BOOT + "memory: 129G", f"2:9: memory: expected {MEMORY} (got '129G')"),
        (BOOT + "memory: 1048577", "(got '1048577'; the nearest is 1M)"),
        (BOOT + "memory: 1026K", "(got '1026K'; the nearest is 1028K)"),
        (BOOT + "memory: 512.001M", "(got '512.001M'; not a whole number of bytes)"),
        (BOOT + "memory: lots", "(got 'lots'; not a size such as 512M or 2G)"),
        (BOOT + "memory: {size: 1G}", f"2:9: memory: expected {MEMORY} (got a mapping)"),
        (BOOT + "enable: 1", "2:9: enable: expected true or false (got '1')"),
        (BOOT + "enable: y", "2:9: enable: expected true or false (got 'y')"),
        (BOOT + "owner: a b", "2:8: owner: expected an owner such as alice, alice:staff, :staff"),
        (BOOT + 'owner: ":"', "(got ':')"),
        (BOOT + 'owner: "alice:"', "(got 'alice:')"),
        (BOOT + "owner: a:b:c", "(got 'a:b:c')"),
        ("boot: {kernel: ''}", "1:16: boot.kernel: expected a file name (got '')"),
        ("boot: {kernel: ~/k}", "(got '~/k'; '~' is not expanded here: write the directory, or ./"),
        ('boot: {kernel: "a\\nb"}', "(got 'a\\nb'; control characters are not allowed)"),
        ('boot: {kernel: "a\\0b"}', "(got 'a\\x00b'; control characters are not allowed)"),
        ('boot: {kernel: "a\\x9bb"}', "(got 'a\\x9bb'; control characters are not allowed)"),
        (f"boot: {{kernel: /{'k' * 4095}}}", "4096 bytes, the limit is 4095)"),
        ('boot: {kernel: /k, cmdline: "a\\tb"}', "control characters are not allowed)"),
        (f"boot: {{kernel: /k, cmdline: {'ä' * 2049}}}", "4098 bytes, the limit is 4096)"),
        ("debug: on\n" + BOOT, "1:8: debug: expected a mapping with keys such as console, exit"),
        ("vms:", "1:5: vms: expected a mapping of names to VMs (got nothing)"),
        ("vms: {}", "1:6: vms: expected a mapping of names to VMs (got an empty one)"),
        ("vms: [a]", "1:6: vms: expected a mapping of names to VMs (got a list)"),
        ("vms: {web: }", f"vms.web: expected a mapping with keys such as {KEYS} (got nothing)"),
        ("vms: {1: {boot: {kernel: k}}}", f"1:7: vms.1: expected {NAME} (got '1')"),
        ("vms: {a: {boot: {kernel: k}, vcpus: 0}}", "1:37: vms.a.vcpus: expected an integer"),
        (
            "vms:\n  a: {boot: {kernel: k}}\n  a: {boot: {kernel: k}}",
            "3:3: vms.a: duplicate key (first on line 2)",
        ),
        (
            "vms:\n  a: {boot: {kernel: k}, name: b}",
            "2:26: vms.a.name: the name stands before the colon already",
        ),
        (
            "vcpus: 1\nvms: {a: {boot: {kernel: k}}}",
            "1:1: vcpus: unknown key (it belongs below 'vms')",
        ),
        ("zzz: 1\nvms: {a: {boot: {kernel: k}}}", f"1:1: zzz: unknown key (allowed: {FILE_KEYS})"),
    ],
)
def test_each_kind_of_mistake(text: str, line: str) -> None:
    """One mistake is one line: where it is, what is allowed, what came, and what may be meant."""
    (told,) = mistakes(text)
    assert line in told


def test_an_optional_command_line_may_be_empty() -> None:
    """An empty text is a value where it makes sense, if it is written as one."""
    (vm,) = load_text('boot: {kernel: /k, cmdline: ""}', "web.yaml").vms
    assert vm.boot.cmdline == ""


def test_an_aliased_mistake_points_to_where_it_is_written() -> None:
    """A bad value behind an alias is told with its own position and the path of its use."""
    told = mistakes("x-cpu: &cpu 99\nboot: {kernel: /k}\nvcpus: *cpu\n")
    assert told == ["1:8: vcpus: expected an integer from 1 to 32 (got '99')"]


def test_mistakes_of_several_vms_come_together() -> None:
    """One VM's mistakes do not hide those of the next."""
    assert mistakes("vms:\n  a: {vcpus: 1}\n  b: {boot: {kernel: k}, vcpus: no}\n") == [
        "2:6: vms.a: missing key 'boot'",
        "3:33: vms.b.vcpus: expected an integer from 1 to 32 (got 'no')",
    ]


def test_the_number_of_complaints_is_limited() -> None:
    """A file of nothing but mistakes costs bounded time and tells a bounded story."""
    told = mistakes("".join(f"memorz{i}: 1\n" for i in range(5000)))
    assert len(told) == MAX_ERRORS + 1
    assert told[-1] == f"{MAX_ERRORS}:1: that makes {MAX_ERRORS} mistakes: any others are not shown"


def test_the_file_name_cannot_forge_a_line() -> None:
    """A file name with a line break or an escape sequence is quoted in messages."""
    with pytest.raises(ConfigError) as caught:
        load_text("", "a\nb\x1b[31m")
    assert str(caught.value).startswith("'a\\nb\\x1b[31m':1:1: ")
