"""pyvmctl start NAME with vmctl's flags: a VM without a file, and made from another one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from config import model
from config.model import BootConfig, DiskConfig, NicConfig, VmConfig
from tests.unit.cli_start_lab import runs
from vmm import survey

if TYPE_CHECKING:
    from tests.unit.cli_start_lab import Report, StartLab
    from vmm.rundir import RunDir

BASE: Final = """\
switches: {uplink: {bridge: br0}, inner: {}}
vms:
  base: {boot: {firmware: seabios}, memory: 256M, disks: [{path: b.raw, format: raw}],
         rng: {rate: 1M/s}, enable: no}
  strict: {boot: {kernel: k, cmdline: quiet}, allow: [disk], enable: no}
"""


class FlagLab:
    """Runs `pyvmctl start` in an empty directory and keeps the configuration it came to."""

    def __init__(self, lab: StartLab) -> None:
        self.lab, self.here = lab, str(lab.yaml.parent)
        self._note = lab.yaml.parent / "started"
        lab.vm_is(self._runs)

    def _runs(self, config: VmConfig, rundir: RunDir, report: Report) -> int:
        self._note.write_text(repr(config))
        return runs(config, rundir, report)

    def start(self, *words: str) -> VmConfig:
        """Start it; what it was started as."""
        assert self.lab("new", *words) == 0, self.lab.err
        return self.started()

    def started(self) -> VmConfig:
        """What a VM was started as, last."""
        vm = eval(self._note.read_text(), _MODEL)  # noqa: S307  our own repr()
        assert isinstance(vm, VmConfig)
        return vm

    def refused(self, *words: str) -> str:
        """Be refused as a usage error, with nothing started; why."""
        assert self.lab(*words) == 2
        assert all(info.name != words[0] for info in survey.survey())
        assert self.lab.err.startswith("pyvmctl: ")
        return self.lab.err.removeprefix("pyvmctl: ").rstrip("\n")


_MODEL: Final = {name: value for name, value in vars(model).items() if name.endswith("Config")}


@pytest.fixture
def flags(lab: StartLab, monkeypatch: pytest.MonkeyPatch) -> FlagLab:
    """A place to start VMs by flags."""
    monkeypatch.chdir(lab.yaml.parent)
    return FlagLab(lab)


@pytest.fixture
def based(flags: FlagLab) -> FlagLab:
    """With a known file that holds templates."""
    flags.lab.yaml.write_text(BASE)
    assert flags.lab.run("load", "-n", str(flags.lab.yaml)) == 0
    return flags


# described by flags alone


def test_every_flag_becomes_its_key(flags: FlagLab) -> None:
    """Paths start where the command runs; disks keep their order."""
    vm = flags.start(
        "-m", "1G", "-d", "qcow2:a b", "-d", "raw:x.qcow2", "-r", "i.iso", "-B", "cdrom"
    )
    assert vm == VmConfig(
        "new",
        BootConfig(firmware="seabios", order=("cdrom",)),
        memory=1 << 30,
        disks=(
            DiskConfig(f"{flags.here}/a b", "qcow2"),
            DiskConfig(f"{flags.here}/x.qcow2", "raw"),
        ),
        cdrom=f"{flags.here}/i.iso",
    )


def test_a_kernel_is_loaded_directly(flags: FlagLab) -> None:
    """Without firmware."""
    assert flags.start("-b", "../k") == VmConfig(
        "new", BootConfig(kernel=f"{os.path.dirname(flags.here)}/k")
    )


@pytest.mark.parametrize(
    ("word", "image"),
    [("a.qcow2", "qcow2"), ("a.QCOW2", "qcow2"), ("a.raw", "raw"), ("a.img", "raw")],
)
def test_an_ending_tells_the_format(flags: FlagLab, word: str, image: str) -> None:
    """As it does with other verbs."""
    assert flags.start("-d", word).disks == (DiskConfig(f"{flags.here}/{word}", image),)


def test_content_never_tells_the_format(flags: FlagLab) -> None:
    """Its guest may have written it."""
    with open(f"{flags.here}/disk", "wb") as file:
        file.write(b"QFI\xfb" + bytes(508))
    assert flags.refused("new", "-d", "disk") == (
        "-d disk: which format? (say raw:disk or qcow2:disk; it is never guessed)"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "1G"], "VM 'new' has nothing to boot (give it -b, -d or -r)"),
        (["-b", "k", "-m", "12X"], "-m 12X: expected a size from 1M to 128G in steps of 4K (got"),
        (["-b", "k", "-m", "512"], "-m 512: expected a size from 1M to 128G in steps of 4K (got "),
        (["-b", "k", "-b", "l"], "-b l: -b is given twice"),
        (["-b", "k", "-m", "1G", "-m", "1G"], "-m 1G: -m is given twice"),
        (["-b", "~/k"], "-b ~/k: expected a file name (got '~/k'; '~' is not expanded here"),
        (["-b", "k", "-B", "disk"], "-B disk: does not go with a kernel (firmware finds"),
        (["-r", "i", "-B", "floppy"], "-B floppy: expected one of disk, cdrom, net (got 'floppy')"),
        (["-b", "k", "-i", "17"], "-i 17: expected an integer from 0 to 16 (got '17')"),
        (["-b", ""], "-b: expected a file name (got '')"),
        (["other", "-b", "k"], "-b k: describes one VM (give one name beside it)"),
        (["-t", "nobody"], "-t nobody: no such VM in a known file"),
        (["-b", "k", "-n", "uplink"], "-n uplink: no such switch in a known file (no file"),
    ],
)  # fmt: skip
def test_mistakes_name_their_flag(flags: FlagLab, words: list[str], expected: str) -> None:
    """One sentence, exit status 2, nothing started."""
    assert flags.refused("new", *words).startswith(expected)


def test_all_mistakes_are_told_at_once(flags: FlagLab) -> None:
    """In the order of the command line; a bad name last."""
    told = flags.refused("2new", "-m", "1", "-r", "~", "-b", "k").splitlines()
    assert [line.split(":")[0] for line in told] == ["-m 1", "-r ~", "VM name 2new"]


def test_its_end_leaves_no_description(flags: FlagLab) -> None:
    """The name alone means nothing afterwards, and other flags may describe it then."""
    flags.start("-b", "k")
    assert flags.lab("new") == 3
    assert flags.lab.run("stop", "-f", "new") == 0
    assert flags.lab("new") == 3
    assert flags.start("-d", "a.raw").disks


def test_a_running_vm_is_not_started_again(flags: FlagLab) -> None:
    """Whatever the flags say."""
    flags.start("-b", "k")
    assert flags.lab("new", "-b", "other") == 1
    assert "VM new is already running" in flags.lab.err


# interfaces


def test_interfaces_are_in_the_order_of_the_command_line(based: FlagLab) -> None:
    """Then plain ones, until there are as many as -i says."""
    vm = based.start("-b", "k", "-L", "-n", "inner", "-i", "4", "-L")
    assert vm.interfaces == (
        NicConfig(local=True),
        NicConfig(switch="inner"),
        NicConfig(local=True),
        NicConfig(),
    )
    assert {switch.name: switch.bridge for switch in vm.switches} == {"uplink": "br0", "inner": ""}


def test_enough_interfaces_are_not_filled_up(based: FlagLab) -> None:
    """-i is the least there are."""
    assert len(based.start("-b", "k", "-i", "1", "-L", "-L").interfaces) == 2


def test_a_switch_must_be_known(based: FlagLab) -> None:
    """The ones there are are named."""
    assert based.refused("new", "-b", "k", "-n", "other") == (
        "-n other: no such switch in a known file (there are: uplink, inner)"
    )


def test_an_instance_may_have_other_interfaces(based: FlagLab) -> None:
    """On its template's switches, if it lets it; but not more of the same."""
    assert based.start("-t", "base", "-n", "uplink").interfaces == (NicConfig(switch="uplink"),)
    told = based.refused("-t", "strict", "-L", "other")
    assert told.startswith("-L: 'strict' does not let its instances change this")
    assert based.refused("other", "-t", "base", "-i", "2").startswith("-i 2: does not go with -t")


# a VM of a file


def test_the_vm_of_a_file_takes_another_kernel_for_one_run(based: FlagLab) -> None:
    """Command line stays; the next start is as the file says."""
    assert based.lab("strict", "-b", "next") == 0
    started = based.started()
    assert started.boot == BootConfig(kernel=f"{based.here}/next", cmdline="quiet")
    assert based.lab.run("stop", "-f", "strict") == 0
    assert based.lab(str(based.lab.yaml), "base", "-b", "next") == 0
    started = based.started()
    assert (started.boot, started.memory) == (BootConfig(kernel=f"{based.here}/next"), 256 << 20)


@pytest.mark.parametrize("flag", [["-m", "1G"], ["-d", "a.raw"], ["-t", "strict"], ["-L"]])
def test_the_vm_of_a_file_takes_no_other_flag(based: FlagLab, flag: list[str]) -> None:
    """By its name or with its file, with -b or without."""
    expected = f"{' '.join(flag)}: a file describes VM 'base' already (change it there; only -b"
    assert based.refused("base", *flag).startswith(expected)
    assert based.refused(str(based.lab.yaml), "base", "-b", "k", *flag).startswith(expected)


def test_flags_are_for_one_vm_of_a_file(based: FlagLab) -> None:
    """Not for all of them."""
    told = based.refused(str(based.lab.yaml), "base", "strict", "-b", "k")
    assert told == "-b k: is for one VM (name one of: base, strict)"


# templates


def test_an_instance_has_all_of_its_template_but_disks(based: FlagLab) -> None:
    """And what the flags say."""
    vm = based.start("-t", "base", "-d", "own.raw", "-B", "disk")
    assert (vm.name, vm.instance, vm.memory, vm.rng.rate, vm.enable) == (
        "new", "base", 256 << 20, 1 << 20, True,
    )  # fmt: skip
    assert vm.disks == (DiskConfig(f"{based.here}/own.raw", "raw"),)
    assert vm.boot == BootConfig(firmware="seabios", order=("disk",))


def test_an_instance_needs_no_flag_of_its_own(based: FlagLab) -> None:
    """Its kernel is the template's."""
    assert based.start("-t", "strict").boot == BootConfig(kernel=f"{based.here}/k", cmdline="quiet")


@pytest.mark.parametrize(
    "flag", [["-m", "1G"], ["-b", "other"], ["-r", "i.iso"]], ids=["memory", "boot", "cdrom"]
)
def test_a_template_says_what_may_change(based: FlagLab, flag: list[str]) -> None:
    """By its `allow`; what it has itself may be said again."""
    expected = f"{' '.join(flag)}: 'strict' does not let its instances change this"
    assert based.refused("new", "-t", "strict", *flag).startswith(expected)
    vm = based.start("-t", "strict", "-d", "own.raw", "-m", "512M")
    assert (vm.memory, len(vm.disks)) == (512 << 20, 1)


def test_a_template_that_boots_a_kernel_has_no_boot_device(based: FlagLab) -> None:
    """Firmware is what looks for one."""
    told = based.refused("new", "-t", "strict", "-B", "disk")
    assert told.startswith("-B disk: does not go with a kernel")
