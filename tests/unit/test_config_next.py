"""Keys of devices that come later: refused today, decoded rightly once NOT_BUILT lets them in."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from config.errors import ConfigError
from config.keys import VM
from config.load import load_text
from config.model import BootConfig, DiskConfig, RngConfig, VhostConfig, VmmciConfig
from config.tables import NOT_BUILT, Table

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOT = "boot: {kernel: /k}\n"


@pytest.fixture
def _all_built() -> Iterator[None]:
    """Pretend that nothing is left to build."""
    with patch.dict(NOT_BUILT, clear=True):
        yield


def mistakes(text: str) -> list[str]:
    """Return the complaints about `text`, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, "web.yaml")
    return [line.removeprefix("web.yaml:") for line in str(caught.value).split("\n")]


@pytest.mark.parametrize("name", list(NOT_BUILT))
def test_what_is_not_built_says_so(name: str) -> None:
    """Such a key is refused by that reason alone, whatever its value."""
    table, key = name.split(".")
    if table == "boot":
        text, told = f"boot: {{kernel: /k, {key}: x}}\n", f"1:20: boot.{key}"
    else:
        text, told = f"{BOOT}{key}: [x]\n", f"2:1: {key}"
    assert mistakes(text) == [f"{told}: not built yet in this version"]


def test_what_is_not_built_is_refused_below_vms() -> None:
    """A file of several VMs gives the same answer."""
    assert mistakes("vms:\n  web:\n    boot: {kernel: /k}\n    balloon: {}\n") == [
        "4:5: vms.web.balloon: not built yet in this version",
    ]


def test_every_unbuilt_key_of_a_table_is_known_to_it() -> None:
    """An entry of NOT_BUILT whose key has a declaration spells it rightly.

    The others have no declaration yet; taking one of those out makes it an unknown key.
    """
    without = {"interfaces", "balloon"}
    boot = next(key.kind for key in VM.keys if key.name == "boot")
    assert isinstance(boot, Table)
    declared = {f"vm.{key.name}" for key in VM.keys} | {f"boot.{key.name}" for key in boot.keys}
    unbuilt = {name for name in NOT_BUILT if not name.startswith("file.")}
    assert unbuilt - declared == {f"vm.{name}" for name in without} & unbuilt


@pytest.mark.usefixtures("_all_built")
def test_disks() -> None:
    """Every key of a disk arrives; a bare MAC-like serial stays text, a bare block size is fine."""
    config = load_text(
        BOOT
        + """\
disks:
  - {path: root.img, format: raw}
  - path: /var/data.qcow2
    format: qcow2
    readonly: yes
    cache: none
    serial: 52:54:00:12:34:56
    queues: 4
    block-size: 4096
    physical-block-size: 16K
    min-io-size: 12K
    opt-io-size: 1M
""",
        "/etc/web.yaml",
    )
    assert config.warnings == ()
    assert config.vms[0].disks == (
        DiskConfig(path="/etc/root.img", format="raw"),
        DiskConfig(
            path="/var/data.qcow2",
            format="qcow2",
            readonly=True,
            cache="none",
            serial="52:54:00:12:34:56",
            queues=4,
            block_size=4096,
            physical_block_size=16 << 10,
            min_io_size=12 << 10,
            opt_io_size=1 << 20,
        ),
    )


@pytest.mark.usefixtures("_all_built")
@pytest.mark.parametrize(
    ("disk", "line"),
    [
        ("{format: raw}", "2:9: disks[0]: missing key 'path'"),
        ("{path: a}", "2:10: disks[0].path: needs the key 'format' beside it"),
        (
            "{path: a, format: qcow3}",
            "2:27: disks[0].format: expected one of raw, qcow2 (got 'qcow3'; did you mean 'qc",
        ),
        ("{path: a, format: raw, cache: 1}", "expected one of writeback, none (got '1')"),
        ("{path: a, format: raw, readonly: 1}", "expected true or false (got '1')"),
        ("{path: a, format: raw, queues: 0}", "expected an integer from 1 to 32 (got '0')"),
        (f"{{path: a, format: raw, serial: {'s' * 21}}}", "21 bytes, the limit is 20)"),
        (
            "{path: a, format: raw, block-size: 1536}",
            "2:44: disks[0].block-size: expected a power of two from 512 to 4K (got '1536')",
        ),
        ("{path: a, format: raw, block-size: 8K}", "from 512 to 4K (got '8K')"),
        (
            "{path: a, format: raw, block-size: 4K, physical-block-size: 512}",
            "2:48: disks[0].physical-block-size: is smaller than block-size (4096)",
        ),
        (
            "{path: a, format: raw, block-size: 4K, min-io-size: 512}",
            "2:48: disks[0].min-io-size: is no multiple of block-size (4096)",
        ),
        (
            "{path: a, format: raw, min-io-size: 8K, opt-io-size: 4K}",
            "2:49: disks[0].opt-io-size: is smaller than min-io-size (8192)",
        ),
        ("a.img", "2:9: disks[0]: expected a mapping with keys such as path, format"),
    ],
)
def test_mistakes_in_a_disk(disk: str, line: str) -> None:
    """Each is told with the index of the disk."""
    (told,) = mistakes(f"{BOOT}disks: [{disk}]")
    assert line in told


@pytest.mark.usefixtures("_all_built")
def test_lists_have_limits() -> None:
    """A list that is none, or too long, or repeats a choice is refused at the place."""
    assert mistakes(BOOT + "disks: a.img") == ["2:8: disks: expected a list (got 'a.img')"]
    disks = ", ".join(["{path: a, format: raw}"] * 17)
    assert mistakes(f"{BOOT}disks: [{disks}]") == ["2:393: disks: more than 16 items"]
    assert mistakes("boot: {firmware: seabios, order: [disk, cd, disk]}") == [
        "1:41: boot.order[1]: expected one of disk, cdrom, net (got 'cd')",
        "1:45: boot.order[2]: 'disk' is in the list already",
    ]


@pytest.mark.usefixtures("_all_built")
def test_rng_jail_and_transports() -> None:
    """The small keys arrive, and their absence is what the model says."""
    (vm,) = load_text(
        BOOT + "rng: {rate: 1.5M/s}\njail: off\ntransitional: on\npacked: true\n", "web.yaml"
    ).vms
    assert vm.rng == RngConfig(rate=3 << 19)
    assert (vm.jail, vm.transitional, vm.packed) == ("off", True, True)
    (vm,) = load_text(BOOT + "rng: {}\n", "web.yaml").vms
    assert (vm.rng, vm.jail, vm.disks) == (RngConfig(), "", ())


def test_vmmci_is_there_unless_told_otherwise() -> None:
    """Left out, or `true`, it has vmd's times; `false` keeps the times; a mapping sets them."""
    for text, wanted in {
        "": VmmciConfig(enabled=True, ack_timeout=3, shutdown_timeout=120),
        "vmmci: true": VmmciConfig(),
        "vmmci: {}": VmmciConfig(),
        "vmmci: off": VmmciConfig(enabled=False),
        "vmmci: {ack-timeout: 500ms}": None,
        "vmmci: {ack-timeout: 0.5s, shutdown-timeout: 5m}": VmmciConfig(True, 0.5, 300),
        "vmmci: {ack-timeout: 7}": VmmciConfig(ack_timeout=7),
    }.items():
        if wanted is None:
            (told,) = mistakes(BOOT + text)
            assert told == (
                "2:22: vmmci.ack-timeout: expected a time from 0.1s to 1h (got '500ms')"
            )
        else:
            assert load_text(BOOT + text, "web.yaml").vms[0].vmmci == wanted


@pytest.mark.usefixtures("_all_built")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vmmci: maybe", "2:8: vmmci: expected true or false (got 'maybe')"),
        ("vmmci:", "vmmci: expected a mapping with keys such as ack-timeout, shutdown-timeout"),
        ("vmmci: {enabled: true}", "2:9: vmmci.enabled: unknown key"),
        ("vmmci: {ack-timeout: 0s}", "expected a time from 0.1s to 1h (got '0s')"),
        ("vmmci: {shutdown-timeout: 25h}", "expected a time from 0.1s to 24h (got '25h')"),
        ("vmmci: {shutdown-timeout: 1.2.3}", "(got '1.2.3')"),
        ("rng: {rate: 1M}", "2:13: rng.rate: expected a rate such as 1M/s (got '1M')"),
        ("rng: {rate: 0/s}", "(got '0/s'; leave the key out for no limit)"),
        ("jail: of", "2:7: jail: expected one of required, best-effort, off (got 'of'; did you "),
        ("packed: maybe", "2:9: packed: expected true or false (got 'maybe')"),
        ("path: a.img", "2:1: path: unknown key (it belongs below 'disks')"),
    ],
)
def test_mistakes_in_the_small_keys(text: str, line: str) -> None:
    """Each is told as those of the keys that are built."""
    (told,) = mistakes(BOOT + text)
    assert line in told


def test_firmware() -> None:
    """`seabios` is a word, anything else a file; it excludes a kernel and needs nothing else."""
    (vm,) = load_text("boot: {firmware: seabios, order: [cdrom, disk]}", "/d/web.yaml").vms
    assert vm.boot == BootConfig(firmware="seabios", order=("cdrom", "disk"))
    (vm,) = load_text("boot: {firmware: bios.bin}", "/d/web.yaml").vms
    assert vm.boot == BootConfig(firmware="/d/bios.bin")
    assert mistakes("boot: {kernel: k, firmware: seabios}") == [
        "1:8: boot.kernel: not allowed beside 'firmware'"
    ]
    assert mistakes("boot: {firmware: seabios, initrd: i}") == [
        "1:27: boot.initrd: needs the key 'kernel' beside it"
    ]
    assert mistakes("boot: {kernel: k, order: [disk]}") == [
        "1:19: boot.order: needs the key 'firmware' beside it"
    ]
    assert mistakes("boot: {}") == ["1:7: boot: missing key 'kernel' or 'firmware'"]


def test_devices_that_others_serve() -> None:
    """Disks, interfaces and entropy name a socket; further devices are a type or a number."""
    (vm,) = load_text(
        BOOT
        + "disks: [{vhost-user: run/disk, queues: 2}]\n"
        + "interfaces: [{vhost-user: /net, lladdr: fe:e1:bb:d1:00:01, mtu: 1400}]\n"
        + "rng: {vhost-user: /rng}\n"
        + "vhost-user:\n"
        + "- {type: fs, socket: /fs, tag: home}\n"
        + "- {id: 40, socket: /any, queues: 3, config-size: 16, queue-size: 512}\n",
        "/etc/web.yaml",
    ).vms
    assert vm.disks == (DiskConfig(vhost_user="/etc/run/disk", queues=2),)
    assert vm.interfaces[0].vhost_user == "/net"
    assert vm.rng == RngConfig(vhost_user="/rng")
    assert vm.vhost_user == (
        VhostConfig("/fs", type="fs", tag="home"),
        VhostConfig("/any", id=40, queues=3, config_size=16, queue_size=512),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("disks: [{}]", "2:9: disks[0]: missing key 'path' or 'vhost-user'"),
        (
            "disks: [{vhost-user: /s, path: a, format: raw}]",
            "2:26: disks[0].path: not allowed beside 'vhost-user'",
        ),
        (
            "disks: [{vhost-user: /s, readonly: true}]",
            "2:26: disks[0].readonly: needs the key 'path' beside it",
        ),
        (
            "interfaces: [{vhost-user: /s, local: true}]",
            "2:31: interfaces[0].local: has no meaning beside 'vhost-user'",
        ),
        (
            "interfaces: [{vhost-user: /s, rx-pps: 2}]",
            "2:31: interfaces[0].rx-pps: has no meaning beside 'vhost-user'",
        ),
        ("rng: {vhost-user: /s, rate: 1M/s}", "2:7: rng.vhost-user: not allowed beside 'rate'"),
        ("vhost-user: [{socket: /s}]", "2:14: vhost-user[0]: missing key 'type' or 'id'"),
        ("vhost-user: [{type: rng}]", "2:14: vhost-user[0]: missing key 'socket'"),
        (
            "vhost-user: [{type: fs, socket: /s}]",
            "2:15: vhost-user[0].type: a file system needs the key 'tag' beside it",
        ),
        (
            "vhost-user: [{type: rng, socket: /s, tag: x}]",
            "2:38: vhost-user[0].tag: is for 'type: fs'",
        ),
        (
            "vhost-user: [{type: rng, socket: /s, queues: 2}]",
            "2:38: vhost-user[0].queues: must be 1 with 'type: rng'",
        ),
        (
            "vhost-user: [{type: rng, id: 4, socket: /s, queues: 1}]",
            "2:26: vhost-user[0].id: not allowed beside 'type', which has its own",
        ),
        (
            "vhost-user: [{id: 40, socket: /s}]",
            "2:15: vhost-user[0].id: needs the key 'queues' beside it",
        ),
        (
            "vhost-user: [{id: 26, socket: /s, queues: 1}]",
            "2:15: vhost-user[0].id: has a place of its own: 'type: fs'",
        ),
        (
            "vhost-user: [{id: 2, socket: /s, queues: 1}]",
            "2:19: vhost-user[0].id: expected an integer from 3 to 63 (got '2')",
        ),
        (
            "vhost-user: [{type: scsi, socket: /s, config-size: 4}]",
            "2:39: vhost-user[0].config-size: needs the key 'id' beside it",
        ),
        (
            "vhost-user: [{type: scsi, socket: /s, queue-size: 100}]",
            "vhost-user[0].queue-size: expected a power of two from 2 to 1K (got '100')",
        ),
    ],
)
def test_mistakes_about_devices_that_others_serve(text: str, told: str) -> None:
    """One line each."""
    (line,) = mistakes(BOOT + text)
    assert told in line
