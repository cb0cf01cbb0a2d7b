"""vmm.draft: a file is there as a whole, or not at all."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from tests.descriptors import count_before
from tests.unit.image_lab import nobody_left
from vmm.draft import Draft

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(params=["nameless", "hidden"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on a file system with O_TMPFILE and on one without."""
    real: Callable[..., int] = os.open

    def no_tmpfile(path: str, flags: int, *rest: Any, **how: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **how)

    if request.param == "hidden":
        monkeypatch.setattr(os, "open", no_tmpfile)
    return str(request.param)


def test_it_has_no_name_until_it_is_complete(tmp_path: Path, kind: str) -> None:
    """Others see nothing, or a hidden file where the file system knows no other way."""
    with Draft(str(tmp_path / "a")) as draft:
        os.write(draft.fd, b"content")
        names = os.listdir(tmp_path)
        assert len(names) == (kind == "hidden")
        assert all(name.startswith(".pyvmd-") for name in names)
        draft.publish()
        nobody_left(tmp_path, "a")

    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    nobody_left(tmp_path, "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """No file, no descriptor."""
    before = count_before()

    with pytest.raises(error), Draft(str(tmp_path / "a")):
        raise error

    nobody_left(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_taken_name_stays(tmp_path: Path) -> None:
    """Whoever has the name keeps it, even if he came while we worked."""
    with Draft(str(tmp_path / "a")) as draft:
        (tmp_path / "a").write_text("his")
        with pytest.raises(HostError, match=r"/a: exists already") as error:
            draft.publish()

    assert (tmp_path / "a").read_text() == "his"
    assert "--force" in error.value.hint
    nobody_left(tmp_path, "a")


def test_replacing(tmp_path: Path) -> None:
    """With `replace` the old file gives way in one step, and its mode lives on if asked."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    with Draft(str(tmp_path / "a")) as draft:
        os.write(draft.fd, b"new")
        draft.resemble((tmp_path / "a").stat())
        assert (tmp_path / "a").read_text() == "old"
        draft.publish(replace=True)

    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    nobody_left(tmp_path, "a")


@pytest.mark.parametrize("replace", [False, True])
def test_content_is_on_the_medium_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """A power cut leaves the old file or the new one, never an empty one of that name."""
    done = []
    fsync, link, rename = os.fsync, os.link, os.rename

    def noted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*words: Any, **how: Any) -> None:
            done.append(name)
            function(*words, **how)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
    monkeypatch.setattr(os, "link", noted("name", link))
    monkeypatch.setattr(os, "rename", noted("name", rename))
    with Draft(str(tmp_path / "a")) as draft:
        draft.publish(replace=replace)

    assert (done[0], done[-1]) == ("fsync", "fsync")
    assert set(done[1:-1]) == {"name"}


def test_replacing_nothing(tmp_path: Path) -> None:
    """`replace` does not ask for something to replace."""
    with Draft(str(tmp_path / "a")) as draft:
        draft.publish(replace=True)

    nobody_left(tmp_path, "a")


def test_replacing_a_directory(tmp_path: Path) -> None:
    """A directory is no file to replace."""
    (tmp_path / "a").mkdir()
    with (
        Draft(str(tmp_path / "a")) as draft,
        pytest.raises(HostError, match=r"/a: cannot finish it: Is a directory"),
    ):
        draft.publish(replace=True)

    nobody_left(tmp_path, "a")


def test_a_place_that_is_none(tmp_path: Path) -> None:
    """The directory must be there."""
    with pytest.raises(HostError, match=r"/no/a: cannot make it: No such file or directory"):
        Draft(str(tmp_path / "no" / "a"))


def test_a_name_of_any_length_and_bytes(tmp_path: Path) -> None:
    """The longest name there can be, and one that is not UTF-8."""
    for name in ("x" * 255, os.fsdecode(b"\xff\xfe"), "-s"):
        with Draft(str(tmp_path / name)) as draft:
            draft.publish()
        assert name in os.listdir(tmp_path)


def test_no_directory_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is in the working directory."""
    monkeypatch.chdir(tmp_path)
    with Draft("a") as draft:
        draft.publish()

    nobody_left(tmp_path, "a")
