"""The example of tools/viodriver/README.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.vhostlab import TOP, Program

if TYPE_CHECKING:
    from pathlib import Path


def test_the_load_generator(tmp_path: Path) -> None:
    """It reads, and says how often."""
    with open(f"{TOP}/tools/viodriver/README.md", encoding="utf-8") as file:
        [code] = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    assert code.count("\n") < 40
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    words = ["--blk-file", str(tmp_path / "disk.img"), "--format", "raw"]
    with Program("vioblk", *words) as program:
        program.connect().close()  # it listens
        done = subprocess.run(
            [sys.executable, "-c", code, program.path],
            cwd=TOP,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert int(done.stdout.split()[0]) > 0
