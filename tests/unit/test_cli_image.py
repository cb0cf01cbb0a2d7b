"""pyvmctl image: actions as such, and `info`."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from config.model import DiskConfig
from devices import images
from devices.title import set_title
from tests.unit.image_lab import MIB, needs_qemu_img, qcow2, qemu_img, qemu_info, raw

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl


@contextmanager
def vm_with(path: Path, *, readonly: bool = False) -> Iterator[int]:
    """A device process of VM web has an image; its pid."""
    held, ready = os.pipe()
    done, finish = os.pipe()
    pid = os.fork()
    if pid == 0:
        disk = DiskConfig(path=str(path), format="qcow2", readonly=readonly)
        images.open_disk(disk, "vioblk0")
        set_title("web/vioblk0")
        os.write(ready, b"1")
        os.close(finish)
        os.read(done, 1)
        os._exit(0)
    try:
        os.read(held, 1)
        yield pid
    finally:
        for fd in (held, ready, done, finish):
            os.close(fd)
        os.waitpid(pid, 0)


# Actions


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "image: which action? (one of info, check, resize, convert, commit, rebase)"),
        (("show",), "image: no action 'show'"),
        (("c", "a"), "image: 'c' is ambiguous: check, convert, commit"),
        (("info",), "the following arguments are required: IMAGE"),
        (("info", "-f", "vmdk", "a"), "invalid choice: 'vmdk'"),
        (("info", "-f", "raw", "qcow2:a"), "is named qcow2, and the option says raw"),
        (("info", ""), "'': not a file name"),
        (("resize", "a", "5"), "a disk has one or more sectors of 512 bytes"),
        (("resize", "a", "+0"), "a disk has one or more sectors of 512 bytes"),
        (("resize", "a", "10GB"), "1000 or 1024"),
        (("resize", "a", "-5G"), "the following arguments are required: SIZE"),
    ],
)
def test_mistakes(pyvmctl: Pyvmctl, words: tuple[str, ...], complaint: str) -> None:
    """Status 2, one line, nothing on standard output."""
    assert pyvmctl("image", *words) == 2
    assert complaint in pyvmctl.err
    assert (pyvmctl.out, pyvmctl.err.count("\n")) == ("", 1)


def test_an_action_may_be_shortened(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """As verbs may."""
    raw(tmp_path / "a.raw")

    assert pyvmctl("ima", "i", str(tmp_path / "a.raw")) == 0


def test_help_of_an_action(pyvmctl: Pyvmctl) -> None:
    """`help image info` is `image info --help`; `image --help` lists the actions."""
    assert pyvmctl("help", "image", "info") == 0
    by_verb = pyvmctl.out
    assert pyvmctl("image", "info", "--help") == 0
    assert pyvmctl.out == by_verb
    assert "usage: pyvmctl image info" in by_verb
    assert pyvmctl("image", "--help") == 0
    assert "  rebase   put an overlay" in pyvmctl.out
    assert pyvmctl("help", "stop", "info") == 2
    assert "stop has no actions" in pyvmctl.err


# info


def test_info_of_a_raw_image(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """Size, and what of it has space."""
    raw(tmp_path / "a.img", 3 * MIB, b"x")

    assert pyvmctl("image", "info", str(tmp_path / "a.img")) == 0
    assert pyvmctl.out == (
        f"image:     {tmp_path}/a.img\n"
        "format:    raw\n"
        "size:      3M (3145728 bytes)\n"
        "allocated: 4K\n"
    )
    assert pyvmctl("image", "info", "--json", str(tmp_path / "a.img")) == 0
    assert json.loads(pyvmctl.out) == {
        "path": str(tmp_path / "a.img"),
        "format": "raw",
        "size": 3 * MIB,
        "allocated": 4096,
        "in_use": None,
        "bases": [],
        "broken": None,
    }


@needs_qemu_img
def test_info_of_a_chain(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """Every image below is told, and what QEMU tells is told alike."""
    raw(tmp_path / "c.img", 1 * MIB)
    for name, base, kind, size in (("b", "c.img", "raw", "2M"), ("a", "b.qcow2", "qcow2", "3M")):
        made = tmp_path / f"{name}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", kind, made, size)
    path = str(tmp_path / "a.qcow2")

    assert pyvmctl("image", "info", "--json", path) == 0
    facts = json.loads(pyvmctl.out)

    theirs = qemu_info(path)
    assert facts["size"] == theirs["virtual-size"] == 3 * MIB
    assert facts["allocated"] == theirs["actual-size"]
    assert facts["cluster_size"] == theirs["cluster-size"]
    assert facts["base"] == theirs["backing-filename"]
    assert facts["base_format"] == theirs["backing-filename-format"]
    assert facts["refcount_bits"] == theirs["format-specific"]["data"]["refcount-bits"]
    assert facts["corrupt"] is theirs["format-specific"]["data"]["corrupt"] is False
    assert [(base["path"], base["size"]) for base in facts["bases"]] == [
        (str(tmp_path / "b.qcow2"), 2 * MIB),
        (str(tmp_path / "c.img"), MIB),
    ]
    assert pyvmctl("image", "info", path) == 0
    assert f"base:      {tmp_path}/b.qcow2 (qcow2 version 3, 2M)\n" in pyvmctl.out
    assert f"base:      {tmp_path}/c.img (raw, 1M)\n" in pyvmctl.out


@pytest.mark.parametrize(
    ("base", "kind", "said"),
    [
        ("gone.img", "raw", "gone.img of {}/a.qcow2: cannot open: No such file"),
        ("a.qcow2", "qcow2", "goes round in circles"),
        ("b.img", "", "does not say which format"),
        ("nbd:x", "raw", "no local file"),
        (".", "raw", "is a directory"),
    ],
)
def test_info_of_a_broken_chain(
    pyvmctl: Pyvmctl, tmp_path: Path, base: str, kind: str, said: str
) -> None:
    """What is wrong below is told, and what is above it all the same."""
    qcow2(tmp_path / "a.qcow2", base=base, kind=kind)

    assert pyvmctl("image", "info", "--json", str(tmp_path / "a.qcow2")) == 0
    facts = json.loads(pyvmctl.out)
    assert said.format(tmp_path) in facts["broken"]
    assert (facts["base"], facts["bases"]) == (base, [])
    assert pyvmctl("image", "info", str(tmp_path / "a.qcow2")) == 0
    assert "broken:    " in pyvmctl.out


def test_info_of_a_chain_without_end(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """It stops where a VM would."""
    qcow2(tmp_path / "0.qcow2")
    for index in range(1, 20):
        qcow2(tmp_path / f"{index}.qcow2", base=f"{index - 1}.qcow2", kind="qcow2")

    assert pyvmctl("image", "info", "--json", str(tmp_path / "19.qcow2")) == 0
    facts = json.loads(pyvmctl.out)
    assert len(facts["bases"]) == 15
    assert "more than 15 bases below it" in facts["broken"]


def test_info_of_what_may_be_either(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """A header that a guest may have written is not believed unless the user does."""
    qcow2(tmp_path / "a.img", 2 * MIB)

    assert pyvmctl("image", "info", str(tmp_path / "a.img")) == 2
    assert f"say qcow2:{tmp_path}/a.img, else raw:{tmp_path}/a.img" in pyvmctl.err
    assert pyvmctl("image", "info", "--json", f"qcow2:{tmp_path}/a.img") == 0
    assert json.loads(pyvmctl.out)["size"] == 2 * MIB
    assert pyvmctl("image", "info", "--json", f"raw:{tmp_path}/a.img") == 0
    assert json.loads(pyvmctl.out)["size"] == (tmp_path / "a.img").stat().st_size


@pytest.mark.parametrize("readonly", [False, True])
def test_info_of_a_running_vms_image(pyvmctl: Pyvmctl, tmp_path: Path, readonly: bool) -> None:
    """It can be looked at, and who uses it how is said."""
    qcow2(tmp_path / "a.qcow2")

    with vm_with(tmp_path / "a.qcow2", readonly=readonly) as pid:
        assert pyvmctl("image", "info", str(tmp_path / "a.qcow2")) == 0

    how = "reads" if readonly else "writes"
    who = f"VM web has it open (vioblk0, process {pid}), and {how} it"
    assert f"in use:    {who}\n" in pyvmctl.out


def test_info_takes_no_lock(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """A VM that starts meanwhile is not in the way: nothing of ours is left locked."""
    raw(tmp_path / "a.raw")
    fd = os.open(tmp_path / "a.raw", os.O_RDWR)
    try:
        assert pyvmctl("image", "info", str(tmp_path / "a.raw")) == 0
        fcntl.fcntl(fd, fcntl.F_OFD_GETLK, bytes(32))
    finally:
        os.close(fd)
    assert images.open_disk(DiskConfig(path=str(tmp_path / "a.raw"), format="raw"), "x") > 0


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.qcow2", b"", "magic at byte 0 is missing"),
        ("a.qcow2", b"no image at all", "a qcow2 image begins with"),
        ("a.qcow2", b"QFI\xfb\0\0\0\3", "the file has 8 bytes"),
    ],
)
def test_info_of_what_is_no_image(
    pyvmctl: Pyvmctl, tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    """The file is named, with what is wrong in it."""
    (tmp_path / name).write_bytes(content)

    assert pyvmctl("image", "info", str(tmp_path / name)) == 2
    assert f"{tmp_path}/{name}: " in pyvmctl.err
    assert complaint in pyvmctl.err


def test_info_of_nothing(pyvmctl: Pyvmctl, tmp_path: Path) -> None:
    """No such file, a directory, a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    for name, complaint in (
        ("gone", "cannot open: No such file or directory"),
        (".", "is a directory"),
        ("fifo", "neither file nor block device"),
    ):
        assert pyvmctl("image", "info", str(tmp_path / name)) == 2
        assert complaint in pyvmctl.err


def test_info_of_names_that_need_care(
    pyvmctl: Pyvmctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that begins like an option, one that is not UTF-8, one that would steer a terminal."""
    monkeypatch.chdir(tmp_path)
    raw("-s")
    raw(os.fsdecode(b"\xff.raw"))
    raw("\x1b[2J.raw")

    assert pyvmctl("image", "info", "--", "-s") == 0
    assert "image:     -s\n" in pyvmctl.out
    assert pyvmctl("image", "info", os.fsdecode(b"\xff.raw")) == 0
    assert "\\udcff.raw" in pyvmctl.out
    assert pyvmctl("image", "info", "--json", os.fsdecode(b"\xff.raw")) == 0
    assert os.fsencode(json.loads(pyvmctl.out)["path"]) == b"\xff.raw"
    assert pyvmctl("image", "info", "\x1b[2J.raw") == 0
    assert "\x1b" not in pyvmctl.out
