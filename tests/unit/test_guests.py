"""The guests whose bytes are committed are what their sources say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_guests_match_their_sources() -> None:
    """Assembling every source again gives the committed bytes."""
    for tool in ("as", "ld", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (apt-get install binutils)")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/assemble", "--check"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
