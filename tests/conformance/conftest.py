"""Fixtures for tests of device processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import tests.examples  # noqa: F401  for what it sets
from tests.pairlab import PairLab
from tests.taplab import TapLab
from tools.viodriver.private import DeviceHost, shared_spawner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.launch import Spawner


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """One spawner for all; its devices are jailed as far as this host can."""
    with shared_spawner("best-effort") as spawner:
        yield spawner


@pytest.fixture
def host(spawner: Spawner) -> Iterator[DeviceHost]:
    """An entropy device."""
    with DeviceHost("viornd", spawner=spawner) as host:
        yield host


@pytest.fixture
def launch_pairs() -> Iterator[Callable[..., PairLab]]:
    """Return a function that launches a device of so many pairs on a new tap."""
    made: list[tuple[TapLab, PairLab]] = []

    def launch_(pairs: int = 2, **options: Any) -> PairLab:
        tap = TapLab(pairs)
        made.append((tap, PairLab(tap, **options)))
        return made[-1][1]

    yield launch_
    for tap, lab in made:
        lab.__exit__(None, None, None)
        tap.__exit__(None, None, None)
