"""vmm.imagename: which format a name on the command line says."""

from __future__ import annotations

import pytest

from vmm.imagename import QCOW2_MAGIC, ImageName, parse, settle
from vmm.usage import UsageError


@pytest.mark.parametrize(
    ("word", "option", "path", "kind"),
    [
        ("qcow2:a.img", "", "a.img", "qcow2"),
        ("raw:a.qcow2", "", "a.qcow2", "raw"),
        ("raw:a", "raw", "a", "raw"),
        ("qcow2:-s", "", "-s", "qcow2"),
        ("/x/a.qcow2", "", "/x/a.qcow2", "qcow2"),
        ("a.QCOW2", "", "a.QCOW2", "qcow2"),
        ("a.raw", "", "a.raw", "raw"),
        ("a.qcow2", "raw", "a.qcow2", "raw"),
        ("a.img", "qcow2", "a.img", "qcow2"),
        ("a.img", "", "a.img", ""),
        ("a", "", "a", ""),
        (".qcow2", "", ".qcow2", ""),
        ("./raw:a", "", "./raw:a", ""),
        ("vmdk:a", "", "vmdk:a", ""),
        ("raw:qcow2:a", "", "qcow2:a", "raw"),
        ("b\udcff.raw", "", "b\udcff.raw", "raw"),
    ],
)
def test_a_name_is_taken_apart(word: str, option: str, path: str, kind: str) -> None:
    """Prefix, else option, else ending; else it says nothing."""
    assert parse(word, option) == ImageName(path, kind)


@pytest.mark.parametrize(
    ("word", "option", "complaint"),
    [
        ("qcow2:a", "raw", "is named qcow2, and the option says raw"),
        ("", "", "not a file name"),
        ("raw:", "", "not a file name"),
        ("a\0b", "", "not a file name"),
    ],
)
def test_a_name_that_cannot_be(word: str, option: str, complaint: str) -> None:
    """Contradictions and nothing at all are usage errors."""
    with pytest.raises(UsageError, match=complaint):
        parse(word, option)


def test_content_may_make_an_image_raw() -> None:
    """Without a word on its format, an image that has no qcow2 header is raw."""
    assert settle(ImageName("a.img", ""), b"\0\0\0\0") == "raw"
    assert settle(ImageName("a.img", ""), b"") == "raw"


def test_content_never_makes_an_image_qcow2() -> None:
    """A header could be a guest's work: then the user decides, and both spellings are shown."""
    with pytest.raises(UsageError, match="so can a raw one") as error:
        settle(ImageName("a.img", ""), QCOW2_MAGIC)

    assert error.value.hint == "if you trust it, say qcow2:a.img, else raw:a.img"


def test_a_word_counts_more_than_content() -> None:
    """What the user says holds."""
    assert settle(ImageName("a", "raw"), QCOW2_MAGIC) == "raw"
    assert settle(ImageName("a", "qcow2"), b"\0\0\0\0") == "qcow2"
