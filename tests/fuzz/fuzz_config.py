"""Fuzz target of vm.yaml: any bytes end in a Config or in a ConfigError of the promised form.

    python -m tests.fuzz.fuzz_config [atheris options] [corpus directory]

needs the package atheris. tests/unit/test_config_fuzz.py runs the same target from hypothesis.
"""

from __future__ import annotations

import re
import sys

from config.errors import ConfigError
from config.load import load_bytes

FILE = "dir/fuzz.yaml"
LINE = re.compile(r"dir/fuzz\.yaml:[1-9][0-9]*:[1-9][0-9]*: \S.*")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
EXIT_SKIPPED = 77


def one_input(data: bytes) -> None:
    """Load `data`; raise if anything but a sound Config or a well-formed ConfigError comes out."""
    try:
        config = load_bytes(data, FILE)
    except ConfigError as err:
        for line in str(err).split("\n"):
            if not (LINE.fullmatch(line) and line.isprintable() and len(line) < 1000):
                raise RuntimeError(f"malformed message {line!r}") from err
        return
    names = [vm.name for vm in config.vms]
    if not names or len(set(names)) != len(names):
        raise RuntimeError(f"names {names}")
    for vm in config.vms:
        sound = (
            NAME.fullmatch(vm.name)
            and 1 <= vm.vcpus <= 32
            and 1 << 20 <= vm.memory <= 128 << 30
            and vm.memory % 4096 == 0
            and vm.boot.kernel.startswith("/")
        )
        if not sound:
            raise RuntimeError(f"unsound {vm}")


def main() -> int:
    """Run atheris for ever, or say that it is missing."""
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        print("SKIPPED: atheris is not installed; nothing was fuzzed", file=sys.stderr)
        return EXIT_SKIPPED
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
