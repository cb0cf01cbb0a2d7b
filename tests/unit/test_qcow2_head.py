"""devices.qcow2head: headers of qcow2 images, those of qemu-img and those that break the rules."""

from __future__ import annotations

import os
import shutil
import subprocess
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from devices import qcow2head
from devices.qcow2head import EXTENSION_FEATURE_NAMES, Header, build, parse

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_offset=0x30000,
    l1_entries=2,
    refcount_offset=0x10000,
    refcount_clusters=1,
)
UNKNOWN = (0x1234_5678, b"somebody else's")


def image(header: Header = PLAIN) -> bytearray:
    """The first cluster of an image."""
    return bytearray(build(header).ljust(header.cluster_size, b"\0"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": 2, "header_length": 72},
        {"cluster_bits": 9, "size": 512},
        {"cluster_bits": 21, "l1_offset": 6 << 20, "refcount_offset": 2 << 20},
        {"refcount_bits": 1},
        {"refcount_bits": 64},
        {"backing_file": "base.img", "backing_format": "raw"},
        {"backing_file": "nobody/knows", "version": 2, "header_length": 72},
        {"backing_file": "a" * 1023},
        {"backing_file": "\udcff.img", "backing_format": "qcow2"},
        {"additional": bytes(8), "header_length": 112, "extensions": (UNKNOWN, (7, b""))},
        {"incompatible": 3, "compatible": 1, "autoclear": 0xFF00},
        {"snapshots": 2, "snapshots_offset": 0x50000},
    ],
    ids=str,
)
def test_what_is_built_is_what_is_parsed(changes: dict[str, Any]) -> None:
    """Every field, extension and name survives the way there and back."""
    header = PLAIN._replace(**changes)
    assert parse(bytes(image(header))) == header


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_headers_of_qemu_img(tmp_path: Path, version: int, cluster_size: int) -> None:
    """What qemu-img writes is understood, backing file and format included."""
    (tmp_path / "base.img").write_bytes(bytes(1 << 20))
    compat = {2: "0.10", 3: "1.1"}[version]
    options = f"cluster_size={cluster_size},compat={compat}"
    backing = ["-b", "base.img", "-F", "raw"] if cluster_size > 512 else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, "a.qcow2", "1M"]
    subprocess.run(command, cwd=tmp_path, check=True)
    fd = os.open(tmp_path / "a.qcow2", os.O_RDONLY)
    header = qcow2head.read(fd)
    os.close(fd)

    assert (header.version, header.cluster_size, header.size) == (version, cluster_size, 1 << 20)
    assert header.refcount_bits == 16
    assert not header.incompatible
    wanted = ("base.img", "raw") if backing else ("", "")
    assert (header.backing_file, header.backing_format) == wanted
    assert parse(bytes(image(header))) == header


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (0, b"QFI\xfa", "magic at byte 0 is 514649fa"),
        (4, pack(">I", 1), "version at byte 4 is 1: 2 or 3"),
        (4, pack(">I", 4), "version at byte 4 is 4"),
        (20, pack(">I", 8), "cluster_bits at byte 20 is 8: 9 to 21"),
        (20, pack(">I", 22), "cluster_bits at byte 20 is 22"),
        (24, pack(">Q", 1 << 63), "size at byte 24 is 9223372036854775808"),
        (24, pack(">Q", (1 << 30) + 1), "l1_size at byte 36 is 2: .* needs 3 entries"),
        (32, pack(">I", 1), "crypt_method at byte 32 is 1: AES encryption is not built"),
        (32, pack(">I", 2), "crypt_method at byte 32 is 2: LUKS encryption is not built"),
        (32, pack(">I", 3), "crypt_method at byte 32 is 3: unknown encryption"),
        (36, pack(">I", 1), "l1_size at byte 36 is 1: .* needs 2 entries"),
        (36, pack(">I", (4 << 20) + 1), "l1_size at byte 36 is 4194305: at most 4194304"),
        (40, pack(">Q", 0x30200), "l1_table_offset at byte 40 is 0x30200"),
        (40, pack(">Q", 0), "l1_table_offset at byte 40 is 0x0"),
        (40, pack(">Q", 1 << 56), "l1_table_offset at byte 40 is 0x100000000000000"),
        (48, pack(">Q", 0x10001), "refcount_table_offset at byte 48 is 0x10001"),
        (48, pack(">Q", 0), "refcount_table_offset at byte 48 is 0x0"),
        (56, pack(">I", 0), "refcount_table_clusters at byte 56 is 0: 1 to 128"),
        (56, pack(">I", 129), "refcount_table_clusters at byte 56 is 129"),
        (60, pack(">I", 65537), "nb_snapshots at byte 60 is 65537"),
        (60, pack(">IQ", 1, 0x200), "snapshots_offset at byte 64 is 0x200"),
        (72, pack(">Q", 4), "incompatible_features at byte 72 is 0x4: an external data file"),
        (72, pack(">Q", 16), "is 0x10: extended L2 entries is not built .*extended_l2=off"),
        (72, pack(">Q", 1 << 40), r"is 0x10000000000: an unknown feature, bit 40 is not built"),
        (96, pack(">I", 7), "refcount_order at byte 96 is 7: 0 to 6"),
        (100, pack(">I", 96), "header_length at byte 100 is 96: a multiple of 8 from 104"),
        (100, pack(">I", 108), "header_length at byte 100 is 108"),
        (100, pack(">I", 65544), "header_length at byte 100 is 65544"),
        (8, pack(">QI", 0x200, 1024), "backing_file_size at byte 16 is 1024: at most 1023"),
        (8, pack(">QI", 0xFFFF, 2), "backing_file_offset at byte 8 is 0xffff: .* outside"),
        (8, pack(">QI", 8, 2), "backing_file_offset at byte 8 is 0x8"),
        (8, pack(">QI", 1 << 63, 2), "backing_file_offset at byte 8 is 0x8000000000000000"),
        (8, pack(">QI", 0x200, 2), "backing file name at byte 512 is .* zero byte"),
        (104, pack(">II", 9, 0xFFFF_FFFF), "extension 0x00000009 length at byte 108"),
        (104, pack(">II", 0xE2792ACA, 2) + b"\n!", "backing format at byte 112 is .* ASCII"),
    ],
)
def test_each_complaint_names_field_place_and_value(at: int, value: bytes, complaint: str) -> None:
    """One field broken at a time."""
    data = image()
    data[at : at + len(value)] = value
    with pytest.raises(ConfigError, match=complaint):
        parse(bytes(data))


def test_zstd_is_refused_by_name() -> None:
    """The method is in a field of its own."""
    data = image(PLAIN._replace(additional=b"\1" + bytes(7), header_length=112))
    data[79] = 8
    with pytest.raises(ConfigError, match=r"is 0x8: zstd compression is not built .*=zlib"):
        parse(bytes(data))


def test_an_unknown_feature_is_called_by_the_name_the_image_has_for_it() -> None:
    """The feature name table is somebody else's text: one line of printable letters comes out."""
    names = b"\1\x28other".ljust(48, b"\0") + b"\0\x28warp\ndrive".ljust(48, b"\0")
    data = image(PLAIN._replace(extensions=((EXTENSION_FEATURE_NAMES, names),)))
    data[72:80] = pack(">Q", 1 << 40)
    with pytest.raises(ConfigError, match=r"bit 40 \('warp\\ndrive'\) is not built"):
        parse(bytes(data))


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103])
def test_a_file_that_ends_within_its_header(length: int) -> None:
    """Cut anywhere, it is refused; behind byte 104 only tables are missing."""
    with pytest.raises(ConfigError, match=r"qcow2 header: "):
        parse(bytes(image()[:length]))
    assert parse(bytes(image()[:104])) == PLAIN


def test_a_name_that_does_not_fit_the_cluster_is_refused() -> None:
    """512 bytes hold header and extensions, and a short name."""
    small = PLAIN._replace(cluster_bits=9, size=512)
    assert parse(bytes(image(small._replace(backing_file="a" * 400)))).backing_file == "a" * 400
    with pytest.raises(ConfigError, match=r"513 bytes, 401 of them .* do not fit"):
        build(small._replace(backing_file="a" * 401))
    with pytest.raises(ConfigError, match="do not fit"):
        build(PLAIN._replace(backing_file="a" * 1024))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=12), st.data())
def test_any_bytes_are_understood_or_refused(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Nothing but ConfigError comes out, and what is understood can be built again."""
    head = image(PLAIN._replace(backing_file="base", extensions=(UNKNOWN,)))
    for at, value in changes:
        head[at] = value
    length = data.draw(st.sampled_from((65536, 65536, 512, 200, 104)))
    try:
        header = parse(bytes(head[:length]))
    except ConfigError:
        return
    assert header.size <= header.l1_entries << (2 * header.cluster_bits - 3)
