"""vm.conf(5) as OpenBSD's vmd reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from config.vmconf import Interface, Switch, Vm, VmConf
from config.vmconflex import KEYWORDS, scan_scaled
from config.vmconfparse import MAX_FILES, MAX_MISTAKES, Parser, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Read = Callable[..., VmConf]


@pytest.fixture
def conf(tmp_path: Path) -> Read:
    """Reads a text as vm.conf."""

    def parse(text: str, **macros: str) -> VmConf:
        (tmp_path / "vm.conf").write_text(text)
        return read(str(tmp_path / "vm.conf"), macros)

    return parse


def mistakes(conf: Read, text: str) -> list[str]:
    """Return the complaints about a text, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        conf(text)
    return [line.rpartition("/vm.conf:")[2] for line in str(caught.value).split("\n")]


def test_the_whole_grammar(conf: Read) -> None:
    """Every statement and option once, in the ways that they may be written."""
    found = conf("""\
# a comment \\
  that goes on
sets="/var/www/sets"
local inet6 prefix fd00::/64
local prefix 100.64.0.0/10
socket owner :staff
agentx context "vms" path "/var/agentx/master"
staggered start parallel 4 delay 30
switch "uplink" {
    interface bridge0
    locked lladdr
    group ext
    rdomain 2
    down
    disable
}
switch inner { interface veb1 }
vm "web" {
    memory 512M
    disk "/home/web.img" format raw
    disk /home/data.qcow2
    interface { switch "uplink", locked lladdr fe:e1:bb:d1:00:01
        rdomain 3
        down }
    local interface tap3 lladdr fe:e1:ba:d4:c6:1b, group foo up
    interface locked lladdr
    interfaces 4
    boot /bsd.rd
    boot device cdrom
    cdrom $sets/install.iso
    owner joe:staff
    sev
    disable
    allow instance { boot, disk owner :users, \\
    memory
    instance }
}
vm web instance web2 {
    allow instance cdrom
    memory 1073741824
    owner 1000
    enable
}""")
    web = Vm(
        name="web",
        line=18,
        enable=False,
        disks=(("/home/web.img", "raw"), ("/home/data.qcow2", "")),
        interfaces=(
            Interface(
                switch="uplink", locked=True, lladdr="fe:e1:bb:d1:00:01", rdomain=3, up=False
            ),
            Interface(tap="tap3", local=True, lladdr="fe:e1:ba:d4:c6:1b", group="foo"),
            Interface(locked=True),
        ),
        nr_interfaces=4,
        boot="/bsd.rd",
        device="cdrom",
        cdrom="/var/www/sets/install.iso",
        memory="512M",
        owner="joe:staff",
        sev=True,
        allow=("boot", "disk", "memory", "instance"),
        allow_owner=":users",
    )
    web2 = Vm(
        name="web2", line=38, parent="web", memory="1073741824", owner="1000", allow=("cdrom",)
    )
    uplink = Switch(
        "uplink",
        9,
        enable=False,
        interface="bridge0",
        group="ext",
        locked=True,
        rdomain=2,
        up=False,
    )
    assert found.vms == (web, web2)
    assert found.switches == (uplink, Switch("inner", 17, interface="veb1"))
    assert found.options == {
        "inet6": "fd00::/64",
        "prefix": "100.64.0.0/10",
        "socket": ":staff",
        "agentx": "",
        "stagger": (4, 30),
    }
    assert found.remarks == ()


def test_words(conf: Read) -> None:
    """Quotes, escapes, joined strings, and what ends a bare word."""
    text = r"""vm "a" "b" { cdrom 'it''s'
    boot "with \" and \
no break"
    owner 12 }"""
    (vm,) = conf(text).vms
    assert (vm.name, vm.cdrom, vm.owner) == ("ab", "its", "12")
    assert vm.boot == 'with " and no break'
    (vm,) = conf("vm x{disk a.b-c/d+e}").vms
    assert vm.disks == (("a.b-c/d+e", ""),)


def test_macros(conf: Read, tmp_path: Path) -> None:
    """Read as if written there, also several words and parts of one; those given outside win."""
    text = 'dir = "/home"\nopts = "memory 1G"\nnot_used = x\nvm x { disk $dir/x.img\n $opts\n}\n'
    found = conf(text)
    assert found.vms[0].disks == (("/home/x.img", ""),)
    assert found.vms[0].memory == "1G"
    assert found.remarks == (f"{tmp_path}/vm.conf:1: macro 'not_used' not used",)
    assert conf(text, dir="/srv", unknown="").vms[0].disks == (("/srv/x.img", ""),)
    assert mistakes(conf, "vm x { disk $none }\n") == ["1: macro 'none' not defined"]
    assert mistakes(conf, 'a = "$a"\nvm x { disk $a }\n') == ["2: a macro in a macro"]
    assert mistakes(conf, "vm x { disk $ }\n") == ["1: a $ without a name"]
    assert "more than 10000 macros used" in mistakes(conf, 'a=""\n' + "$a" * 10_001)[0]


def test_mistakes_in_included_files_are_told_once(conf: Read) -> None:
    """However deep they are: not again for each file around them."""
    said = mistakes(conf, 'include "vm.conf"\n' + "nonsense\n" * (MAX_MISTAKES + 1))
    assert len(said) == MAX_MISTAKES
    assert all(len(line) < 500 for line in said)


def test_the_number_of_files_is_bounded(conf: Read, tmp_path: Path) -> None:
    """Files that include each other many times end, too."""
    for name in range(4):
        (tmp_path / f"{name}.conf").write_text(f'include "{name + 1}.conf"\n' * 20)
    (tmp_path / "4.conf").write_text("")
    assert f"more than {MAX_FILES} files" in mistakes(conf, 'include "0.conf"\n')[0]


def test_include(conf: Read, tmp_path: Path) -> None:
    """Beside the file that includes it; macros go both ways; mistakes name their file."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.conf").write_text('include "b.conf"\nvm a { disk $where }\n')
    (tmp_path / "more" / "b.conf").write_text("where = /b\n")
    found = conf('include "more/a.conf"\nvm c { disk $where }\n')
    assert [vm.disks[0][0] for vm in found.vms] == ["/b", "/b"]
    (tmp_path / "more" / "b.conf").write_text("vm b { zork }\n")
    assert mistakes(conf, 'include "more/a.conf"\n') == [
        "1: syntax error: expected a keyword (got 'zork')".replace(
            "1:", f"{tmp_path}/more/b.conf:1:"
        )
        if False
        else f"{tmp_path}/more/b.conf:1: syntax error: expected a keyword (got 'zork')",
        f"{tmp_path}/more/a.conf:2: macro 'where' not defined",
    ]
    assert "cannot read it: No such file" in mistakes(conf, 'include "none"\n')[0]
    assert "more than 16 files in files" in mistakes(conf, 'include "vm.conf"\n')[0]


def test_mistakes_do_not_hide_each_other(conf: Read) -> None:
    """Each line is looked at, inside braces and out."""
    text = """\
zork
vm a { memory 1 memory 2 }
vm b {
    disk
    zork
    memory 1
    memory 2
    switch x
    disk a format vmdk
    boot device floppy
    interfaces -1
    allow instance { zork
    }
}
switch s { up }
switch s { interface bridge0 }
vm b { disk x }
staggered start delay 1
"open
"""
    assert mistakes(conf, text) == [
        "1: syntax error: expected '=' (got 'the end of the line')",
        "2: syntax error: expected the end of the line (got 'memory')",
        "4: syntax error: expected a disk (got 'the end of the line')",
        "5: syntax error: expected a keyword (got 'zork')",
        "7: memory twice",
        "8: 'switch' says nothing about a vm",
        "9: unrecognized disk format 'vmdk'",
        "10: syntax error: expected cdrom or disk or net (got 'floppy')",
        "11: -1 is no number for a number of interfaces",
        "12: syntax error: expected boot or memory or interface or disk or cdrom or instance or "
        "owner (got 'zork')",
        "15: switch 's' is missing interface",
        "16: switch 's' is there already",
        "17: vm 'b' is there already",
        "18: syntax error: expected parallel (got 'delay')",
        "20: a quote that is not closed",
    ]
    assert len(mistakes(conf, "zork\n" * 1000)) == MAX_MISTAKES


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("1.5g", 3 << 29),
        ("100", 100),
        ("1K", 1024),
        (".5k", 512),
        ("2TB", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """As scan_scaled(3) reads them."""
    assert scan_scaled(text) == size


@pytest.mark.parametrize("text", ["", "M", "1X", "1.M.", "-1", "1" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        scan_scaled(text)


@pytest.mark.parametrize("data", [b"\xff", b"vm\0", b"#" * ((1 << 20) + 1)])
def test_what_is_no_vm_conf(tmp_path: Path, data: bytes) -> None:
    """A binary file is told as one."""
    (tmp_path / "vm.conf").write_bytes(data)
    with pytest.raises(ConfigError, match=r"vm.conf:1: not "):
        read(str(tmp_path / "vm.conf"))


PIECES = st.lists(
    st.sampled_from(
        [*sorted(KEYWORDS), "{", "}", "\n", ",", "=", '"a b"', "x", "1", "$m", "m", "\\\n", "'"]
    )
)


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_any_text_is_read_or_refused(words: list[str]) -> None:
    """Nothing but ConfigError comes of it, and every complaint has its place."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(" ".join(words))
        file.flush()
        try:
            found = Parser({"m": "vm y { disk z }"}).file(file.name)
        except ConfigError as err:
            for line in str(err).split("\n"):
                place, _, text = line.partition(": ")
                assert place.rpartition(":")[0] == file.name
                assert text
        else:
            assert all(vm.name for vm in found.vms)
