"""vm.yaml that is right, and files that are not vm.yaml at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import yaml

from config import load
from config.errors import EXIT_USAGE, ConfigError
from config.load import MAX_FILE, MAX_NODES, load_bytes, load_file, load_text
from config.model import BootConfig, DebugConfig, VmConfig

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = os.path.join(os.path.dirname(load.__file__), "examples")
LOADERS = [yaml.SafeLoader, getattr(yaml, "CSafeLoader", None)]


@pytest.fixture(params=LOADERS, ids=["python", "libyaml"])
def _each_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with PyYAML's own parser and with libyaml's."""
    if request.param is None:
        pytest.skip("this PyYAML was built without libyaml")
    monkeypatch.setattr(load, "_LOADER", request.param)


def mistakes(text: str | bytes, name: str = "dir/vm.yaml") -> list[str]:
    """Return the lines of the ConfigError that a text must end in, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_bytes(text.encode() if isinstance(text, str) else text, name)
    assert caught.value.exit_status == EXIT_USAGE
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{name}:") for line in lines)
    return [line.removeprefix(f"{name}:") for line in lines]


@pytest.mark.usefixtures("_each_parser")
def test_every_key_reaches_the_model() -> None:
    """Each key's value arrives under its name, and relative paths start at the file's directory."""
    config = load_text(
        """\
name: web-1.example_x
vcpus: 4
memory: 2GiB
boot:
  kernel: bzImage
  initrd: /boot/initrd.img
  cmdline: >-
    console=ttyS0
    root=/dev/vda "a b"
debug: {console: yes, exit: "true"}
enable: no
owner: alice:staff
x-note: [anything, {at: all}]
""",
        "/etc/pyvmd/vm.yaml",
    )
    assert config.vms == (
        VmConfig(
            name="web-1.example_x",
            boot=BootConfig(
                kernel="/etc/pyvmd/bzImage",
                initrd="/boot/initrd.img",
                cmdline='console=ttyS0 root=/dev/vda "a b"',
            ),
            vcpus=4,
            memory=2 << 30,
            debug=DebugConfig(console=True, exit=True),
            enable=False,
            owner="alice:staff",
        ),
    )
    assert config.warnings == ()


def test_defaults() -> None:
    """A kernel is enough: the file gives the name, the model the rest."""
    (vm,) = load_text("boot: {kernel: /k}", "web.yaml").vms
    assert vm == VmConfig(name="web", boot=BootConfig(kernel="/k"), vcpus=1, memory=512 << 20)


@pytest.mark.parametrize("name", ["7up.yaml", "<stdin>", ".yaml", "a b.yaml"])
def test_a_file_name_that_is_no_vm_name_gives_none(name: str) -> None:
    """Only a file whose name without ending is a valid VM name can leave `name` out."""
    assert mistakes("boot: {kernel: /k}", name) == ["1:1: missing key 'name'"]


@pytest.mark.usefixtures("_each_parser")
def test_several_vms_keep_their_order_and_may_share_parts() -> None:
    """Below `vms` the key is the name, x- included; anchors repeat a part of the file."""
    config = load_text(
        "x-boot: &boot {kernel: /k}\n"
        "vms:\n"
        "  web: {boot: *boot, memory: 1G}\n"
        "  x-ray: {boot: *boot}\n"
        "  db: {boot: {kernel: /k}, cpus: 3}\n",
        "many.yaml",
    )
    assert [(vm.name, vm.boot.kernel, vm.vcpus) for vm in config.vms] == [
        ("web", "/k", 1),
        ("x-ray", "/k", 1),
        ("db", "/k", 3),
    ]


@pytest.mark.usefixtures("_each_parser")
def test_yaml_never_guesses_a_type() -> None:
    """Text is kept as written where YAML 1.1 sees a number, a truth value or a base-60 number."""
    for word in ("52:54:00:12:34:56", "0755", "no", "1.10", "22:22", "2026-01-01", "1_000"):
        (vm,) = load_text(f"boot: {{kernel: /k, cmdline: {word}}}", "web.yaml").vms
        assert vm.boot.cmdline == word
    (vm,) = load_text('vcpus: "08"\nowner: 0123\nboot: {kernel: no}', "/d/web.yaml").vms
    assert (vm.vcpus, vm.owner, vm.boot.kernel) == (8, "0123", "/d/no")


def test_a_bare_number_of_bytes_gives_a_warning() -> None:
    """Other programs take a bare memory size for MiB: it is read as bytes, and not silently."""
    config = load_text("boot: {kernel: /k}\nmemory: 268435456\n", "dir/web.yaml")
    assert config.vms[0].memory == 256 << 20
    assert config.warnings == (
        "dir/web.yaml:2:9: memory: a number without unit is bytes: write 256M",
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("k", "real/sub/k"),
        ("./k", "real/sub/k"),
        ("../k", "real/k"),
        ("../../k", "k"),
        ("a/../k", "real/sub/a/../k"),
        ("../a/../k", "real/a/../k"),
        ("..k", "real/sub/..k"),
        ("..", "real/sub/.."),
    ],
)
def test_relative_paths(tmp_path: Path, written: str, meant: str) -> None:
    """A leading ".." leaves the directory that really holds the file; a later one is kept.

    After a symbolic link ".." is not the directory before it, so that text alone cannot tell.
    """
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/sub")
    (tmp_path / "link" / "web.yaml").write_text(f"boot: {{kernel: {written}}}")
    (vm,) = load_file(str(tmp_path / "link" / "web.yaml")).vms
    assert vm.boot.kernel == os.path.join(os.path.realpath(tmp_path), meant)


@pytest.mark.parametrize("name", ["hello", "linux"])
def test_the_examples_load(name: str) -> None:
    """What is shipped as an example has no mistakes and no warnings."""
    config = load_file(os.path.join(EXAMPLES, f"{name}.yaml"))
    assert [vm.name for vm in config.vms] == [name]
    assert config.warnings == ()


def test_the_linux_example_finds_the_built_guest() -> None:
    """Its kernel is the one that tools/guest-image leaves in the repository's cache."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(load.__file__)))
    (vm,) = load_file(os.path.join(EXAMPLES, "linux.yaml")).vms
    assert vm.boot.kernel == os.path.join(root, ".cache/guest/vmlinuz")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and a directory are one clear line each."""
    for path, reason in (
        (str(tmp_path / "none.yaml"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        ("web\0.yaml", "embedded null byte"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_file(path)
        told = path if path.isprintable() else repr(path)
        assert str(caught.value) == f"{told}:1:1: cannot read it: {reason}"


def test_a_file_without_end_is_read_no_further_than_the_limit() -> None:
    """A device or a 10 MB file is refused by its size, before any of it is parsed."""
    with pytest.raises(ConfigError, match="/dev/zero:1:1: larger than 1048576 bytes"):
        load_file("/dev/zero")
    assert mistakes("a: &a [b]\nc: [" + "*a," * (10 << 20) + "]") == [
        "1:1: larger than 1048576 bytes: not a vm.yaml"
    ]


@pytest.mark.usefixtures("_each_parser")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", "1:1: the file is empty (a VM needs at least 'boot')"),
        (b"# only words\n", "1:1: the file is empty (a VM needs at least 'boot')"),
        (b"\xef\xbb\xbf", "1:1: the file is empty (a VM needs at least 'boot')"),
        (b"---\n", "the file is empty"),
        (b"\x7fELF\x02\x01\x01\0", "1:8: a NUL character: a binary file?"),
        (b"name: a\nb: \xff\xfe", "2:4: not UTF-8 text (byte 0xff): a binary file?"),
        ("näme: a\0".encode(), "1:8: a NUL character"),
        ("ab: c".encode("utf-16"), "1:1: not UTF-8 text"),
        (b"a: b\nc: \x07", "2:4: the character '\\x07' is not allowed"),
        (b"web", "1:1: expected a mapping with keys such as name, vcpus"),
        (b"- web", "1:1: expected a mapping with keys such as name, vcpus"),
        (b"a: b\n---\nc: d", "2:1: a second document: one file holds one"),
        (b"a: [b", "YAML syntax error while parsing a flow sequence"),
        (b"a: b: c", "1:5: YAML syntax error: mapping values are not allowed"),
        (b"a:\n\tb: c", "2:1: YAML syntax error while scanning for the next token"),
        (b"a:\n\tb: c", "(indent with spaces, not tabs)"),
        (b"a: 'b", "YAML syntax error while scanning a quoted scalar"),
        (b"%YAML 9.9\n---\n", "YAML syntax error: found incompatible YAML document"),
        (b'"\\U00110000": b', "YAML syntax error"),
        (b"a: *b", "1:4: the alias 'b' has no anchor before it"),
        (b"a: &b [*b]", "1:8: the alias 'b' has no anchor before it"),
        (b"[" * 500, "1:22: nested deeper than 20 levels"),
        (b"{a: " * 100_000, "nested deeper than 20 levels"),
        (b"- " * 100_000, "nested deeper than 20 levels"),
    ],
)
def test_a_text_that_is_no_vm_yaml_is_one_clear_line(text: bytes, line: str) -> None:
    """Each kind of wrong file ends in a single line with the place of the trouble."""
    (told,) = mistakes(text)
    assert line in told


@pytest.mark.usefixtures("_each_parser")
def test_aliases_cannot_blow_a_file_up() -> None:
    """A use of an alias counts as much as what it stands for, so a "billion laughs" ends early."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (told,) = mistakes("\n".join(rows))
    assert told.startswith("5:")
    assert f"more than {MAX_NODES} values, counting each use of an alias" in told


@pytest.mark.usefixtures("_each_parser")
def test_a_megabyte_of_values_is_not_built() -> None:
    """The number of values is limited on its own: small ones fit a file by the hundred thousand."""
    (told,) = mistakes("- a\n" * (MAX_FILE // 4))
    assert told == f"{MAX_NODES}:3: more than {MAX_NODES} values, counting each use of an alias"


@pytest.mark.usefixtures("_each_parser")
def test_load_text_takes_no_surrogates() -> None:
    """A str that no file can hold is a ConfigError, too."""
    with pytest.raises(ConfigError, match=r"vm\.yaml:1:2: not valid Unicode"):
        load_text("a\ud800", "vm.yaml")
    with pytest.raises(ConfigError, match=r"vm\.yaml:1:"):  # only libyaml refuses the escape itself
        load_text('name: "\\ud800"\nboot: {kernel: "\\ud800"}', "vm.yaml")
    with pytest.raises(ConfigError, match="larger than"):
        load_text("#" * (MAX_FILE + 1), "vm.yaml")
