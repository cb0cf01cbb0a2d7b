"""pyvmctl image convert, judged by QEMU."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.guestvm import TREE
from tests.loopdev import loop_device
from tests.unit.image_lab import (
    MIB,
    allocated,
    content,
    fill,
    interrupting,
    needs_qemu_img,
    nobody_left,
    pattern,
    qcow2,
    qemu_img,
    qemu_info,
    raw,
    signals_count,
    sound,
)
from tests.unit.test_cli_image import vm_with
from vmm import imagecopy, imagetool, imagework
from vmm.imagename import ImageName
from vmm.progress import Work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.cli_fakes import Pyvmctl

pytestmark = [needs_qemu_img, pytest.mark.usefixtures("here")]

AREAS = ((0, 65536, 1), (200_704, 4096, 2), (5 * MIB, 512, 3), (9 * MIB, MIB, 4))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Let signals reach the commands."""
    with signals_count():
        yield


# convert


@pytest.mark.parametrize("source", ["raw", "qcow2"])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_convert(pyvmctl: Pyvmctl, here: Path, source: str, target: str) -> None:
    """Same content in another format, zeroes and holes taking no space."""
    qemu_img("create", "-q", "-f", source, f"in.{source}", "10M")
    fill(f"in.{source}", *AREAS, (6 * MIB, 2 * MIB, 0), kind=source)

    assert pyvmctl("image", "convert", f"in.{source}", f"out.{target}") == 0

    assert (pyvmctl.out, pyvmctl.err) == ("", f"out.{target}: {target}, 10M\n")
    assert content(f"out.{target}", target) == pattern(10 * MIB, *AREAS)
    assert qemu_info(f"out.{target}")["format"] == target
    assert allocated(f"out.{target}") < 2 * MIB
    if target == "qcow2":
        sound(f"out.{target}")
    nobody_left(here, f"in.{source}", f"out.{target}")


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_convert_flattens_a_chain(pyvmctl: Pyvmctl, chain: bytes, target: str) -> None:
    """What all images of a chain show together is in one."""
    assert pyvmctl("image", "convert", "--json", "a.qcow2", f"out.{target}") == 0

    facts = {"path": f"out.{target}", "format": target, "size": 10 * MIB}
    assert json.loads(pyvmctl.out) == facts
    assert content(f"out.{target}", target) == chain
    assert "backing-filename" not in qemu_info(f"out.{target}")


def test_convert_reads_compressed_images(pyvmctl: Pyvmctl) -> None:
    """As they are distributed."""
    raw("in.raw", 10 * MIB)
    fill("in.raw", *AREAS, kind="raw")
    qemu_img("convert", "-c", "-O", "qcow2", "in.raw", "packed.qcow2")

    assert pyvmctl("image", "convert", "packed.qcow2", "out.raw") == 0

    assert content("out.raw", "raw") == pattern(10 * MIB, *AREAS)


@pytest.mark.parametrize("size", [1, 511, 513, MIB + 7])
def test_convert_of_an_odd_size(pyvmctl: Pyvmctl, size: int) -> None:
    """Raw stays as it is, qcow2 gets whole sectors."""
    data = bytes(range(1, 256)) * (size // 255 + 1)
    (raw("in.raw", size, data[:size]))

    assert pyvmctl("image", "convert", "in.raw", "out.raw") == 0
    assert pyvmctl("image", "convert", "in.raw", "out.qcow2") == 0

    with open("out.raw", "rb") as file:
        assert file.read() == data[:size]
    assert content("out.qcow2") == data[:size].ljust(-(-size // 512) * 512, b"\0")


def test_an_image_of_any_number_of_runs_takes_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small hostile one can have 10¹² of them: each is forgotten when it is copied."""
    raw("web.img", 4 * MIB, b"web")
    seen: list[str] = []

    def runs(_image: imagetool.Image) -> Iterator[imagecopy.Run]:
        for at in range(0, 4 * MIB, MIB):
            seen.append("looked at")
            yield imagecopy.Run(at, MIB, imagecopy.DATA)

    def start(_work: Work, total: int) -> None:
        seen[:] = [str(total)]

    monkeypatch.setattr(imagetool, "all_runs", runs)
    monkeypatch.setattr(Work, "start", start)
    monkeypatch.setattr(Work, "add", lambda _work, _length: seen.append("copied"))
    imagework.convert(ImageName("web.img", "raw"), imagework.Making(ImageName("web", "raw")))
    assert seen == [str(4 * MIB), *["looked at", "copied"] * 4]
    assert content("web", "raw") == content("web.img", "raw")


def test_convert_with_options(pyvmctl: Pyvmctl) -> None:
    """-f and -O say formats beside the names, -o shapes the new image."""
    raw("in", 4 * MIB)
    fill("in", (MIB, 5000, 9), kind="raw")

    words = ("-f", "raw", "-O", "qcow2", "-o", "cluster-size=4K", "-o", "version=2")
    assert pyvmctl("image", "convert", *words, "in", "out") == 0

    facts = qemu_info("out")
    assert (facts["format"], facts["cluster-size"]) == ("qcow2", 4096)
    assert facts["format-specific"]["data"]["compat"] == "0.10"
    assert content("out") == pattern(4 * MIB, (MIB, 5000, 9))


def test_convert_never_takes_a_target_away(pyvmctl: Pyvmctl, here: Path) -> None:
    """Not one that exists, not its own source, not one that a VM has."""
    qcow2("a.qcow2")
    raw("b.raw", MIB, b"precious")

    assert pyvmctl("image", "convert", "a.qcow2", "b.raw") == 1
    assert "b.raw: exists already" in pyvmctl.err
    assert pyvmctl("image", "convert", "--force", "a.qcow2", "a.qcow2") == 1
    assert "a.qcow2: in use: it is named twice" in pyvmctl.err
    with vm_with(here / "a.qcow2"):
        assert pyvmctl("image", "convert", "--force", "b.raw", "a.qcow2") == 1
        assert "in use: VM web" in pyvmctl.err
        assert pyvmctl("image", "convert", "a.qcow2", "c.raw") == 1
        assert "in use: VM web" in pyvmctl.err
    with open("b.raw", "rb") as file:
        assert file.read(8) == b"precious"
    assert pyvmctl("image", "convert", "--force", "a.qcow2", "b.raw") == 0
    assert content("b.raw", "raw") == bytes(MIB)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("target", ["new.qcow2", "old.qcow2"])
def test_an_interrupted_convert_leaves_nothing(
    pyvmctl: Pyvmctl, here: Path, monkeypatch: pytest.MonkeyPatch, number: int, target: str
) -> None:
    """^C in the middle: no file that was not there, and the one that was is as it was."""
    raw("in.raw", 10 * MIB)
    fill("in.raw", (0, 10 * MIB, 7), kind="raw")
    qcow2("old.qcow2")
    before = (here / "old.qcow2").read_bytes()
    monkeypatch.setattr(imagecopy, "write", interrupting(imagecopy.write, 5, number))

    assert pyvmctl("image", "convert", "--force", "in.raw", target) == 128 + number

    assert "Traceback" not in pyvmctl.err
    nobody_left(here, "in.raw", "old.qcow2")
    assert (here / "old.qcow2").read_bytes() == before


# Host trouble


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_full_disk(
    pyvmctl: Pyvmctl, here: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is said which image could not be written, and nothing is left of it."""
    raw("in.raw", 4 * MIB)
    fill("in.raw", (0, 4 * MIB, 7), kind="raw")
    real = os.pwritev

    def full(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        if offset >= 2 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, views, offset, flags)

    monkeypatch.setattr(os, "pwritev", full)
    assert pyvmctl("image", "convert", "in.raw", f"out.{kind}") == 1

    assert f"in.raw to out.{kind}: cannot write at byte" in pyvmctl.err
    assert "No space left on device" in pyvmctl.err
    nobody_left(here, "in.raw")


def test_an_unreadable_source(
    pyvmctl: Pyvmctl, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector names the place."""
    raw("in.raw", 4 * MIB, b"x" * MIB)
    real = os.preadv

    def bad(fd: int, views: Any, offset: int, *flags: int) -> int:
        if offset == 0 and len(views[0]) > 65536:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset, *flags)

    monkeypatch.setattr(os, "preadv", bad)
    assert pyvmctl("image", "convert", "in.raw", "out.qcow2") == 1

    assert "cannot read at byte 0: Input/output error" in pyvmctl.err
    nobody_left(here, "in.raw")


def test_long_work_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress reaches its end, no more and no less, whatever is copied."""
    seen: list[Work] = []

    class Watched(Work):
        def __init__(self, *words: Any, **how: Any) -> None:
            super().__init__(*words, **how)
            seen.append(self)

    monkeypatch.setattr(imagework, "Work", Watched)
    raw("in.raw", 4 * MIB + 100, b"x" * 5000)
    imagework.convert(
        ImageName("in.raw", "raw"),
        imagework.Making(ImageName("out.qcow2", "qcow2")),
    )

    imagework.check(ImageName("out.qcow2", "qcow2"), "all")

    assert "100%  4.0M of 4.0M" in seen[0].line()
    assert "check out.qcow2" in seen[1].line()
    assert "100%  4.0M of 4.0M" in seen[1].line()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_file_system_that_is_really_full(here: Path, kind: str) -> None:
    """The whole command on a tmpfs of 2 MiB: an error, and all space is free again."""
    raw("in.raw", 4 * MIB)
    fill("in.raw", (0, 4 * MIB, 7), kind="raw")
    (here / "small").mkdir()
    script = (
        "mount -t tmpfs -o size=2m none small && "
        f'"$0" -m vmm.cli image convert in.raw small/out.{kind}; status=$?; '
        "ls -A small; df --output=used small | tail -1; exit $status"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable],
        env={**os.environ, "PYTHONPATH": TREE},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1, done
    assert "No space left on device" in done.stderr
    assert done.stdout.split() == ["0"]


def test_convert_of_a_block_device(pyvmctl: Pyvmctl, here: Path) -> None:
    """A block device is a raw image; none is ever replaced by a file."""
    raw("in.raw", 2 * MIB)
    fill("in.raw", (MIB, 5000, 9), kind="raw")
    with loop_device(str(here / "in.raw")) as device:
        assert pyvmctl("image", "convert", f"raw:{device}", "out.qcow2") == 0
        assert content("out.qcow2") == pattern(2 * MIB, (MIB, 5000, 9))
        assert pyvmctl("image", "info", device) == 0
        assert "size:      2M" in pyvmctl.out
        assert pyvmctl("image", "convert", "--force", "out.qcow2", f"raw:{device}") == 2
        assert "is a block device, which no new file can replace" in pyvmctl.err
        assert pyvmctl("image", "resize", f"raw:{device}", "3M") == 2
        assert f"{device}: a block device has the size it has" in pyvmctl.err
        assert pyvmctl("image", "resize", "--shrink", f"raw:{device}", "1M") == 2
