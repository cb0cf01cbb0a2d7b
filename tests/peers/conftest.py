"""One boot of the guest serves all tests of this directory: it takes longer than all the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.peers.debian import booted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.peers.debian import Guest


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """Return Debian at its prompt. Each test finds every device at work, and leaves it so."""
    with booted() as made:
        yield made
